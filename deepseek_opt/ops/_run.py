"""调用本地算子：库不可用、设备不对、内存不够时给出中文说明，DEBUG 日志记下每次调用。"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek_opt import _native, log
from deepseek_opt.device_memory import is_out_of_memory, out_of_memory, shapes_of
from deepseek_opt.errors import InputError, UnsupportedError, mixed_devices

_READY = _native.load()
if _READY:
    # 导入即登记 fake、autograd、autocast。
    from deepseek_opt import op_rules  # noqa: F401  # pylint: disable=unused-import

_OPS = torch.ops.deepseek_opt


def run(name: str, *args):
    """执行 ``torch.ops.deepseek_opt.<name>``。

    抛出 UnsupportedError：库不可用，或张量的设备没有核；InputError：张量不在同一设备上；
    DeviceMemoryError：设备的内存不够。
    """
    if not _READY:
        raise UnsupportedError(f"本地算子库不可用：{_native.load_error()}")
    op = getattr(_OPS, name).default
    try:
        if log.debugging():
            return log.timed(name, _native.isa(), op, args)
        return op(*args)
    except NotImplementedError as error:
        raise _no_kernel(name, op, args) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        first = next(a for a in args if isinstance(a, Tensor))
        what = f"算子 {name}，张量的形状 {shapes_of(args)}"
        raise out_of_memory(what, first.device, error) from error


def is_tracing_grad(*tensors: Tensor | None) -> bool:
    """是否需要为这些张量记录梯度。"""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def missing(x: Tensor, *names: str) -> str | None:
    """x 的设备上不能执行 names 这些算子的原因（开着求导时连同反向）；能则为 None。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> ops.missing(torch.ones(2, device="meta"), "moe_route")
        '设备 meta 上还没有 moe_route、moe_route_backward 的核'
    """
    if x.is_cpu:
        return None
    return _native.missing(x.device.type, names, torch.is_grad_enabled())


def _no_kernel(name: str, op: Any, args: tuple) -> Exception:
    found = [(i, a.device) for i, a in enumerate(args) if isinstance(a, Tensor)]
    devices = sorted({str(device) for _, device in found})
    if len(devices) == 1:
        return UnsupportedError(f"{name}：这些张量在 {devices[0]} 上，没有对应的核。")
    names = [argument.name for argument in op._schema.arguments]
    return InputError(mixed_devices(name, [(names[i], device) for i, device in found]))
