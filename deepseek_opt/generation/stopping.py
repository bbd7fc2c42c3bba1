"""何时结束：长度、结束符按数判断，其余的停止条件（停止字符串、时限、自己写的）逐个长度调用。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek_opt.generation.rows import Rows

Criterion = Callable[..., Any]


class Stopping:
    """各行何时结束，与 transformers 相同：没有结束符时，先结束的行也继续生成，直到各行都结束过。

    参数
    ----
    eos : 结束符；空的为没有。criteria : ``条件(input_ids [B, L], scores) -> [B] 或 bool``。

    ``ended`` 是各行（原来的行号）第一次满足条件时生成了几个。
    """

    def __init__(self, eos: Sequence[int], criteria: Sequence[Criterion]):
        self.eos = frozenset(eos)
        self.criteria = list(criteria)
        self.ended: dict[int, int] = {}  # 行 -> 结束时生成了几个

    def cut(self, rows: Rows, fresh: Sequence[Sequence[int]]) -> list[int]:
        """批里各行新生成的 fresh，各留几个（长度上限与结束符）；结束的记下。"""
        kept = []
        for b, tokens in zip(rows.active, fresh, strict=True):
            count = min(len(tokens), rows.max_new - rows.counts[b])
            for i in range(count):
                if tokens[i] in self.eos:
                    count = i + 1
                    break
            kept.append(count)
            if tokens[count - 1] in self.eos or rows.counts[b] + count == rows.max_new:
                self.ended.setdefault(b, rows.counts[b] + count)
        return kept

    def check(self, rows: Rows, before: Sequence[int], scores: Any) -> None:
        """逐个长度问其余的条件；before 是批里各行这一步之前的个数，``scores(n)`` 是前 n 步的分数。"""
        if not self.criteria:
            return
        spans = {b: (old, rows.counts[b]) for b, old in zip(rows.active, before, strict=True)}
        for count in range(min(before) + 1, max(rows.counts[b] for b in spans) + 1):
            asked = [b for b, (old, new) in spans.items() if old < count <= new]
            asked = [b for b in asked if self.ended.get(b, count) >= count]
            if not asked:
                continue
            ids = rows.tokens[:, : rows.width + count].contiguous()
            done = self._ask(ids, scores(count))
            for b in asked:
                if done[b]:
                    self.ended[b] = min(self.ended.get(b, count), count)

    def leaving(self, rows: Rows) -> list[int]:
        """应当离开的（批里的序号）；各行多生成的（结束之后的）截去。"""
        if not self.eos and len(self.ended) < len(rows.counts):
            return [r for r, b in enumerate(rows.active) if rows.counts[b] >= rows.max_new]
        last = max(self.ended.values(), default=0)
        gone = []
        for r, b in enumerate(rows.active):
            end = self.ended.get(b) if self.eos else last
            if end is not None and rows.counts[b] >= end:
                rows.counts[b] = end
                gone.append(r)
        return gone

    def _ask(self, ids: Tensor, scores: Any) -> list[bool]:
        done = torch.zeros(ids.shape[0], dtype=torch.bool)
        for criterion in self.criteria:
            found = criterion(ids, scores)
            done |= torch.as_tensor(found, dtype=torch.bool).cpu()
        return done.tolist()
