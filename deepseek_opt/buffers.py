"""算子的大块内存（梯度、暂存）在进程内回收使用；见 csrc/binding_buffers.cpp。"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_opt import _native

_LARGE = 4 << 20


def release_buffers() -> int:
    """把回收池里空闲的内存立即还给系统，返回字节数。

    4 MiB 以上的梯度与算子暂存释放之后留给下一次用，合计不超过在用的历史最大值的 1.25 倍；系统内存紧张时可以直接取走，
    所以通常不必调用。训练结束、要让别的进程看到内存时调用。正在使用的张量不受影响。

    抛出 UnsupportedError：本地库不可用。

    示例
    ----
    >>> import deepseek_opt as dso
    >>> freed = dso.release_buffers()
    >>> dso.release_buffers()
    0
    """
    return _native.release_buffers()


def large_empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """没有初始化的张量；CPU 上 4 MiB 以上的建议系统用 2 MiB 的页（量化的权重这样放，解码快约一成）。"""
    out = torch.empty(tuple(shape), dtype=dtype, device=device)
    if out.is_cpu and out.nbytes >= _LARGE:
        _native.advise_huge_pages(out)
    return out
