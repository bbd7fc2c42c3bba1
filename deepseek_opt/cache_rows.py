"""整个缓存逐行截断、取行：本库的与 transformers 的缓存同一个写法，只检查一次。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek_opt.row_lengths import NEVER, Mark, RowLengths, measured, to_device, write_offsets


def crop_rows(cache: Any, lengths: Sequence[int], on_device: Tensor | None = None) -> None:
    """各行截断到 lengths；还没有写入过的层不动。on_device 是缓存所在设备上的同一份，有了就不必从主机送。"""
    written = _written(cache)
    if not written and getattr(cache, "crop_rows", None) is not None:
        cache.crop_rows(lengths)
    elif on_device is not None and written:
        written[0].check_rows(lengths)
        move_rows(cache, on_device)
        settle_rows(cache, lengths)
    else:
        crop_layers(written, lengths)


def move_rows(cache: Any, on_device: Tensor) -> None:
    """只在设备上截断：各行的长度改成 on_device [B]，不读它的内容；之后用 :func:`settle_rows` 让主机知道。

    别人写的缓存（没有本库的层）不动，由 :func:`settle_rows` 截断。
    """
    written = _written(cache)
    if written:
        write_offsets(written, on_device)


def settle_rows(cache: Any, lengths: Sequence[int]) -> None:
    """:func:`move_rows`（或重放 CUDA graph）之后，主机上的长度改成 lengths。"""
    written = _written(cache)
    if not written:
        if getattr(cache, "crop_rows", None) is not None:
            cache.crop_rows(lengths)
        return
    longest, short = measured(list(lengths))
    for layer in written:
        layer.settle(longest, short)


def _written(cache: Any) -> list[RowLengths]:
    return [layer for layer in _own_layers(cache) if layer.buffers()]


def crop_layers(layers: Sequence[RowLengths], lengths: Sequence[int] | Tensor) -> None:
    """各层的长度总是相同，所以只检查第一层；相邻的层在同一设备上的只送一次。"""
    if not layers:
        return
    wanted = layers[0].check_rows(lengths)
    longest, short = measured(wanted)
    device, copy = None, None
    for layer in layers:
        where = layer.offsets.device
        if where != device:
            device, copy = where, to_device(wanted, where)
        layer.set_rows(longest, short, copy)


def empty_rows(cache: Any) -> None:
    """各行都退回 0 个词元；缓冲区留着，地址不变。"""
    for layer in _own_layers(cache):
        layer.empty()


def select_rows(cache: Any, kept: Sequence[int]) -> None:
    """只留下 kept 各行。"""
    index = torch.tensor(kept)
    own = getattr(cache, "select", None)
    if own is not None:
        own(index)
        return
    for layer in cache.layers:
        if isinstance(layer, RowLengths):
            layer.select(index)


class CachePoint:
    """一次前向之前的缓存；前向中途失败时 :meth:`restore` 退回到这里。

    本库的层，与 transformers 的 DynamicLayer（拼接的，多出的截去）；别的（滑动窗口的、StaticCache……）不动。
    """

    def __init__(self, cache: Any):
        self.cache = cache
        self._marks = [_mark(layer) for layer in getattr(cache, "layers", ())]

    def restore(self) -> None:
        """各行去掉这以来写入的；这以来才分配的释放。不抛出：调用者正要抛出的才是原因。"""
        for index, layer in enumerate(getattr(self.cache, "layers", ())):
            _unwind(layer, self._marks[index] if index < len(self._marks) else NEVER)

    @property
    def nbytes(self) -> int:
        """此刻占用的字节数。"""
        return sum(layer.nbytes for layer in _own_layers(self.cache))


def _mark(layer: Any) -> Mark | None:
    """layer 的长度；不管的层为 None。"""
    if isinstance(layer, RowLengths):
        return layer.mark()
    if not _concatenated(layer):
        return None
    length = layer.get_seq_length()
    return length, None, length > 0


def _unwind(layer: Any, mark: Mark | None) -> None:
    if mark is None:
        return
    if isinstance(layer, RowLengths):
        layer.unwind(mark)
    elif _concatenated(layer):
        length, _, held = mark
        extra = layer.get_seq_length() - length
        if extra > 0 and not held:
            layer.keys = layer.values = None
            layer.is_initialized = False
        elif extra > 0:
            layer.crop(-extra)


def _concatenated(layer: Any) -> bool:
    """transformers 的 DynamicLayer 自己，不含它的子类；不为此导入 transformers。"""
    kind = type(layer)
    return kind.__name__ == "DynamicLayer" and kind.__module__ == "transformers.cache_utils"


def _own_layers(cache: Any) -> list[RowLengths]:
    return [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, RowLengths)]
