"""算子的大块内存（梯度、暂存）在进程内回收使用；见 csrc/binding_buffers.cpp。"""

from __future__ import annotations

from deepseek_opt import _native


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
