"""调用本地算子：库不可用、设备不对、内存不够时给出中文说明，DEBUG 日志记下每次调用。"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_opt import _native
from deepseek_opt.errors import UnsupportedError
from deepseek_opt.op_calls import call

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
    return call(name, getattr(_OPS, name).default, args)


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
