"""设备的内存不够时：认出来，一句中文写明在做什么、要多少、还剩多少。"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from deepseek_opt.errors import DeviceMemoryError, MemoryBudgetError

# 各处报“放不下”的话：CUDA 的分配器与驱动、CPU 的分配器、cuBLAS 建句柄、大小超出 int64。
_MARKS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Storage size calculation overflowed",
)
# 绑定里调用 torch 失败、而 torch 没有给出原因（2.13 以前；见 csrc/binding_torch.h）：只知道是哪个调用。
_UNKNOWN = re.compile(r"torch 的 (?:aten::)?(\w+) 失败：原因不明")
# 其中要分配的；参数在调用之前都检查过，所以在 CPU 上失败就是放不下。
_ALLOCATING = frozenset(
    {"empty", "new_empty", "new_zeros", "contiguous", "to", "reshape", "sum", "subtract", "linear"}
)

_ooms: dict[int, int] = {}  # 各 GPU 的分配器失败过几次，上一次看时的
_releases: list[Callable[[torch.device], None]] = []


def out_of_memory(
    what: str, device: torch.device, error: BaseException, required: int | None = None
) -> DeviceMemoryError:
    """由 torch 的内存不足得到本库的异常；required 是这次要的字节数。已经是本库的原样返回。"""
    from deepseek_opt.config import format_bytes

    if isinstance(error, DeviceMemoryError):
        return error
    _new_ooms(device)  # 这一次的已经知道了
    free = _free_bytes(device)
    parts = [what]
    if required is not None:
        parts.append(f"要 {format_bytes(required)}")
    if free is not None:
        parts.append(f"设备上还空着 {format_bytes(free)}")
    detail = str(error).split("\n", maxsplit=1)[0] or type(error).__name__
    message = f"设备 {device} 的内存不够：{'，'.join(parts)}（{detail}）"
    for release in _releases:
        release(device)
    return DeviceMemoryError(message, required_bytes=required, free_bytes=free)


def on_shortage(release: Callable[[torch.device], None]) -> None:
    """设备的内存不够时先调用 release(设备)：放掉为以后留着的，再试一次就多一些。"""
    _releases.append(release)


def is_out_of_memory(error: BaseException, device: torch.device) -> bool:
    """是不是 device 上的分配失败：torch 自己的异常，或绑定里的（经过稳定 ABI，异常的类型没有了）。"""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return not isinstance(error, MemoryBudgetError)
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    if any(mark in text for mark in _MARKS):
        return True
    unknown = _UNKNOWN.search(text)
    if unknown is None:
        return False
    if device.type == "cuda":
        return _new_ooms(device) and not _broken(device)
    return unknown[1] in _ALLOCATING


def shortage(what: str, device: torch.device, error: BaseException) -> DeviceMemoryError | None:
    """一次前向、一次生成里的 error：内存不够而还没有说明的，得到要抛出的；已经说明的、别的错误为 None。

    内存不够时先放掉 error 经过的（已经结束的）各帧里的张量：激活占着的内存还回去，接住它的人才有得用。
    """
    if not is_out_of_memory(error, device):
        return None
    traceback.clear_frames(error.__traceback__)
    return None if isinstance(error, DeviceMemoryError) else out_of_memory(what, device, error)


def shapes_of(args: Iterable[Any]) -> str:
    """各张量的形状。"""
    return "、".join(str(list(a.shape)) for a in args if isinstance(a, Tensor))


def capturing(device: torch.device) -> bool:
    """device 的当前流是不是正在录 CUDA graph；出错之后也要问，所以不抛出。"""
    if not _usable(device):
        return False
    try:
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()
    except RuntimeError:  # 设备已经出错
        return False


def _usable(device: torch.device) -> bool:
    """device 是真的、已经用上的 GPU。"""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_initialized()


def _new_ooms(device: torch.device) -> bool:
    """device 的分配器从上次看以来有没有失败过；只在出错之后看，平时没有开销。"""
    if not _usable(device):
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    count = torch.cuda.memory_stats(index).get("num_ooms", 0)
    before, _ooms[index] = _ooms.get(index, 0), count
    return count > before


def _broken(device: torch.device) -> bool:
    """device 已经出错（越界访问等）：之后的调用都失败，分配也是，那不是放不下。"""
    if capturing(device):
        return False  # 录制时不能等设备
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _free_bytes(device: torch.device) -> int | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    try:
        return torch.cuda.mem_get_info(device)[0]
    except RuntimeError:  # 问不出来：说明本来的错误更要紧
        return None
