"""设备的内存不够时：一句中文，写明在做什么、要多少、还剩多少。"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from deepseek_opt.errors import DeviceMemoryError

_MARKS = ("out of memory", "can't allocate memory", '"aten::new_empty"', '"aten::new_zeros"')


def out_of_memory(
    what: str, device: torch.device, error: BaseException, required: int | None = None
) -> DeviceMemoryError:
    """由 torch 的内存不足得到本库的异常；required 是这次要的字节数。已经是本库的原样返回。"""
    from deepseek_opt.config import format_bytes

    if isinstance(error, DeviceMemoryError):
        return error
    free = _free_bytes(device)
    parts = [what]
    if required is not None:
        parts.append(f"要 {format_bytes(required)}")
    if free is not None:
        parts.append(f"设备上还空着 {format_bytes(free)}")
    detail = str(error).split("\n", maxsplit=1)[0]
    message = f"设备 {device} 的内存不够：{'，'.join(parts)}（{detail}）"
    return DeviceMemoryError(message, required_bytes=required, free_bytes=free)


def is_out_of_memory(error: RuntimeError) -> bool:
    """是不是分配失败：torch 自己的异常，或绑定里的分配（经过稳定 ABI，只剩下哪个调用失败）。"""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(mark in text for mark in _MARKS)


def shapes_of(args: Iterable[Any]) -> str:
    """各张量的形状。"""
    return "、".join(str(list(a.shape)) for a in args if isinstance(a, Tensor))


def _free_bytes(device: torch.device) -> int | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info(device)[0]
