"""普通注意力（每头的 K、V）缓存的一层：各行长度可以不同，原地增长。只依赖 PyTorch。

与潜变量的 :class:`~deepseek_opt.cache_layer.LatentLayer` 对应，用在没有 MLA 核的层：多头、分组查询、滑动窗口。
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_opt.errors import InputError
from deepseek_opt.row_lengths import Parts, RowLengths


class KVLayer(RowLengths):
    """缓冲区 [B, C, H, D]（一个词元的 K 连在一起），第 b 行前 ``lengths[b]`` 个槽位有效。

    参数
    ----
    max_length : 每行词元数上限；None 为不限。name : 出现在报错里。
    """

    def __init__(self, *, max_length: int | None = None, name: str = ""):
        super().__init__(name)
        self.max_length = max_length
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def buffers(self) -> list[Tensor]:
        return [] if self._keys is None else [self._keys, self._values]

    def replace(self, buffers: Sequence[Tensor] | None) -> None:
        if buffers is None:
            self._keys = self._values = None
        else:
            self._keys, self._values = buffers

    def views(self) -> tuple[Tensor, Tensor]:
        """K [B, H, S, D] 与 V：前 length 个槽位的视图，不复制；行尾之后的槽位是有限的数，由掩码遮住。"""
        found = (self._keys[:, : self.length], self._values[:, : self.length])
        return tuple(t.transpose(1, 2) for t in found)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """各行在自己的末尾写入 K [B, H, T, D]、V；返回 :meth:`views`。

        抛出 InputError：形状、类型或设备与缓存不符，或放不下；缓存不变。
        """
        self._check(keys, values)
        steps = keys.shape[2]
        if self._keys is None or self.length + steps > self.capacity:
            self.reserve(self.length + steps, keys, values)
        for buffer, fresh in ((self._keys, keys), (self._values, values)):
            self._write(buffer, fresh.detach().transpose(1, 2))
        self._offsets += steps
        self.advance(steps)
        return self.views()

    def reserve(self, length: int, keys: Tensor, values: Tensor) -> None:
        """保证容量至少 length；keys、values 给出形状、类型与设备，内容不读。"""
        if self.max_length is not None and length > self.max_length:
            raise self.full(length, self.max_length)
        tails = [(tuple(t.shape[1::2]), t.dtype) for t in (keys, values)]
        parts = Parts(keys.shape[0], keys.device, tails)
        self.grow(length, self.max_length, parts, torch.zeros)

    # ---- 内部 ----

    def _write(self, buffer: Tensor, fresh: Tensor) -> None:
        """fresh [B, T, H, D] 写到各行的末尾。"""
        rows, steps = fresh.shape[:2]
        if not self.ragged:
            buffer[:, self.length : self.length + steps] = fresh
            return
        where = buffer.device
        begins = self.offsets + torch.arange(rows, device=where) * buffer.shape[1]
        places = (begins[:, None] + torch.arange(steps, device=where)).flatten()
        buffer.view(-1, *buffer.shape[2:]).index_copy_(0, places, fresh.flatten(0, 1))

    def _check(self, keys: Tensor, values: Tensor) -> None:
        if keys.dim() != 4 or values.dim() != 4 or keys.shape[::2] != values.shape[::2]:
            raise InputError(
                f"{self.name}keys、values 应为 [B, H, T, D]，得到 "
                f"{list(keys.shape)} 与 {list(values.shape)}"
            )
        for name, mine, fresh in (("keys", self._keys, keys), ("values", self._values, values)):
            if mine is None:
                continue
            wanted = [mine.shape[0], mine.shape[2], fresh.shape[2], mine.shape[3]]
            if list(fresh.shape) != wanted:
                raise InputError.expected(f"{self.name}{name}", f"形状 {wanted} 的张量", fresh)
            if (fresh.dtype, fresh.device) != (mine.dtype, mine.device):
                kind = f"与缓存同为 {mine.dtype}、在 {mine.device} 的张量"
                raise InputError.expected(f"{self.name}{name}", kind, fresh)
