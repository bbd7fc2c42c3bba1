"""调用本地算子：库不可用、设备不对时给出中文说明，DEBUG 日志记下每次调用。"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_opt import _native, log
from deepseek_opt.errors import UnsupportedError

_READY = _native.load()
if _READY:
    # 导入即登记 fake、autograd、autocast。
    from deepseek_opt import op_rules  # noqa: F401  # pylint: disable=unused-import

_OPS = torch.ops.deepseek_opt


def run(name: str, *args):
    """执行 ``torch.ops.deepseek_opt.<name>``；抛出 UnsupportedError：库不可用，或张量的设备没有核。"""
    if not _READY:
        raise UnsupportedError(f"本地算子库不可用：{_native.load_error()}")
    op = getattr(_OPS, name).default
    try:
        if log.debugging():
            return log.timed(name, _native.isa(), op, args)
        return op(*args)
    except NotImplementedError as error:
        devices = sorted({str(a.device) for a in args if isinstance(a, Tensor)})
        where = "、".join(devices)
        raise UnsupportedError(
            f"{name}：这些张量在 {where} 上，没有对应的核（全部张量应在同一设备上）。"
        ) from error
