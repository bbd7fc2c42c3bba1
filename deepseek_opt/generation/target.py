"""主模型一侧：各行长度不同的缓存，预填充与一步几个词元的前向。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek_opt.cache_rows import crop_rows, select_rows
from deepseek_opt.mtp.adapter import MTPAdapter


class Target:
    """主模型与它的缓存。``lengths`` 是各行在缓存里的词元数。"""

    def __init__(self, adapter: MTPAdapter, rows: int):
        self.adapter = adapter
        self.cache = adapter.make_model_cache()
        self.lengths = [0] * rows

    def run(self, tokens: Tensor) -> Tensor:
        """tokens [R, T] 接在各行之后，返回隐藏状态 [R, T, H]；之后要 :meth:`keep`。"""
        positions = positions_after(self.lengths, tokens.shape[1], tokens.device)
        return self.adapter.run_model(tokens, positions, self.cache)

    def keep(self, counts: Sequence[int], written: int) -> None:
        """刚写入的 written 个里，各行只留下前 counts 个。"""
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        if any(count != written for count in counts):
            crop_rows(self.cache, self.lengths)

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
        self.lengths = [self.lengths[i] for i in kept]


def positions_after(lengths: Sequence[int], steps: int, device: torch.device) -> Tensor:
    """[R, steps]：各行接在 lengths 之后的位置。"""
    return torch.tensor(lengths, device=device)[:, None] + torch.arange(steps, device=device)


def last_of(x: Tensor, counts: Sequence[int]) -> Tensor:
    """x [R, T, H] 各行的第 counts - 1 个：[R, H]。"""
    if all(count == x.shape[1] for count in counts):
        return x[:, -1]
    index = torch.tensor(counts, device=x.device) - 1
    return x[torch.arange(x.shape[0], device=x.device), index]
