"""要返回的分数与 logits：第 g 个词元一张 [B, V]，由各行在不同的步里填。"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_opt.generation.rows import Rows


class Collected:
    """scores、logits 两列；不要的不存。

    行结束之后的位置不再计算，填成“补 pad 的概率是 1”：pad 处为 0，其余为 −inf。
    """

    def __init__(self, scores: bool = False, logits: bool = False):
        self.scores: list[Tensor] | None = [] if scores else None
        self.logits: list[Tensor] | None = [] if logits else None

    def add(self, rows: Rows, kept: Sequence[int], scores: Tensor, logits: Tensor) -> None:
        """批里各行这一步留下的前 kept 个位置；scores、logits [R, D + 1, V]。"""
        for store, values in ((self.scores, scores), (self.logits, logits)):
            if store is None:
                continue
            for r, (b, count) in enumerate(zip(rows.active, kept, strict=True)):
                begin = rows.counts[b]
                while len(store) < begin + count:
                    store.append(_closed(rows, values))
                for i in range(count):
                    store[begin + i][b] = values[r, i]

    def scores_until(self, count: int) -> tuple[Tensor, ...] | None:
        """前 count 个词元的分数；没有收集为 None。"""
        return None if self.scores is None else tuple(self.scores[:count])

    def tuples(self, length: int) -> tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """前 length 个词元的 (scores, logits)；没有收集的为 None。"""
        found = (self.scores, self.logits)
        return tuple(None if store is None else tuple(store[:length]) for store in found)


def _closed(rows: Rows, like: Tensor) -> Tensor:
    out = torch.full(
        (len(rows.counts), like.shape[-1]), -torch.inf, dtype=torch.float32, device=like.device
    )
    out[:, 0 if rows.pad is None else rows.pad] = 0.0
    return out
