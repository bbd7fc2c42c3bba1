"""主模型一侧：各行长度不同的缓存，预填充与一步几个词元的前向。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek_opt.cache_rows import crop_rows, empty_rows, move_rows, select_rows, settle_rows
from deepseek_opt.mtp.adapter import MTPAdapter


class Target:
    """主模型与它的缓存。

    各行在缓存里的词元数有两份：``offsets`` 在设备上，一步之内只看它；``lengths`` 是主机的整数，读回结果之后
    才知道（:meth:`settle`）。
    """

    def __init__(self, adapter: MTPAdapter, rows: int, device: torch.device):
        self.adapter = adapter
        self.cache = adapter.make_model_cache()
        self.offsets = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths = [0] * rows

    def run(self, tokens: Tensor) -> Tensor:
        """tokens [R, T] 接在各行之后，返回隐藏状态 [R, T, H]；之后要 :meth:`keep`、:meth:`settle`。"""
        positions = positions_after(self.offsets, tokens.shape[1])
        return self.adapter.run_model(tokens, positions, self.cache)

    def keep(self, counts: Tensor) -> None:
        """刚写入的里，各行只留下前 counts [R] 个；只在设备上。"""
        self.offsets += counts
        move_rows(self.cache, self.offsets)

    def settle(self, counts: Sequence[int]) -> None:
        """:meth:`keep` 的 counts 读回来了。"""
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        settle_rows(self.cache, self.lengths)

    def room(self) -> int:
        """最长的行还放得下几个词元（缓存的上限、学得的位置的个数）。"""
        limits = [getattr(layer, "max_length", None) for layer in getattr(self.cache, "layers", ())]
        limits = [n for n in (*limits, self.adapter.max_positions) if n is not None]
        return min(limits, default=1 << 62) - max(self.lengths)

    def cache_of_one(self, length: int) -> Any:
        """只有一行时，截到前 length 个词元的缓存，可以接着用。"""
        crop_rows(self.cache, [length])
        return self.cache

    def select(self, kept: Sequence[int]) -> None:
        """只留下 kept 各行。"""
        select_rows(self.cache, kept)
        self.offsets = self.offsets[torch.tensor(kept, device=self.offsets.device)]
        self.lengths = [self.lengths[i] for i in kept]

    def empty(self) -> None:
        """各行都退回 0 个词元，缓冲区留着。"""
        empty_rows(self.cache)
        self.offsets.zero_()
        self.lengths = [0] * len(self.lengths)


def positions_after(offsets: Tensor, steps: int) -> Tensor:
    """[R, steps]：各行接在 offsets [R] 之后的位置。"""
    if steps == 1:
        return offsets[:, None]
    return offsets[:, None] + torch.arange(steps, device=offsets.device)


def last_of(x: Tensor, counts: Tensor) -> Tensor:
    """x [R, T, H] 各行的第 counts - 1 个（没有的取第 0 个）：[R, H]。"""
    if x.shape[1] == 1:
        return x[:, 0]
    index = (counts - 1).clamp_min(0)
    return x[torch.arange(x.shape[0], device=x.device), index]
