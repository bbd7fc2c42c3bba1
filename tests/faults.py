"""在一次调用里种下失败：第几次分配内存不足，缓存是否与之前相同。"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deepseek_opt import ops
from deepseek_opt.errors import DeviceMemoryError
from tests.op_cases import bits
from tests.test_mla_layer_decode import fresh

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Allocations:
    """块内的分配；count 是有过几次。"""

    def __init__(self) -> None:
        self.count = 0


@contextmanager
def failing_allocation(nth: int, key: str = "CPU") -> Iterator[Allocations]:
    """块内第 nth 次 ``new_empty``（绑定里的分配多半经过它）内存不足；key 是 CPU（主机模拟也是）或 CUDA。"""
    seen = Allocations()

    def counted(self, size, dtype=None, layout=None, device=None, pin_memory=None):
        del layout, pin_memory
        seen.count += 1
        if seen.count == nth:
            raise torch.OutOfMemoryError(MESSAGE)
        return torch.empty(size, dtype=dtype or self.dtype, device=device or self.device)

    library = torch.library.Library("aten", "IMPL")
    library.impl(torch.ops.aten.new_empty.default, counted, key)
    try:
        yield seen
    finally:
        library._destroy()


def state(cache):
    """各层的长度与缓冲区。"""
    return [(layer.row_lengths(), [b.clone() for b in layer.buffers()]) for layer in cache.layers]


def unchanged(cache, before) -> None:
    """主机上的长度、设备上的位置、有效的槽位都与 before 相同；没有分配过的仍没有。"""
    for layer, (rows, buffers) in zip(cache.layers, before, strict=True):
        assert layer.row_lengths() == rows
        assert (layer.offsets.tolist() if layer.buffers() else []) == rows
        for now, old in zip(layer.buffers(), buffers, strict=True):
            assert now.shape == old.shape
            for b, n in enumerate(rows):
                assert torch.equal(now[b, :n], old[b, :n])


def layer_unchanged(args, before) -> None:
    """mla_layer_decode 失败之后：offsets、各行已有的槽位与 before 相同。"""
    assert torch.equal(args[20], before[20])
    for row, length in enumerate(before[20].tolist()):
        for now, old in zip(args[17:20], before[17:20], strict=True):
            assert now is None or torch.equal(bits(now)[row, :length], bits(old)[row, :length])


def layer_failures(args) -> int:
    """mla_layer_decode 的第一次、第二次……分配依次失败，什么都不改变；返回失败过几次，最后一次成功。"""
    mine, other, nth, failed = fresh(args), fresh(args), 0, True
    wanted = ops.mla_layer_decode(*other)
    while failed:
        nth += 1
        with failing_allocation(nth) as seen:
            try:
                got = ops.mla_layer_decode(*mine)
            except DeviceMemoryError:
                layer_unchanged(mine, args)
            failed = seen.count == nth
    assert torch.equal(got, wanted)
    for ours, theirs in zip(mine[17:21], other[17:21], strict=True):
        assert ours is None or torch.equal(bits(ours), bits(theirs))
    return nth - 1
