"""MTP 一侧：把已确定的词元补进 MTP 的缓存，再一个接一个地起草。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_opt.cache_rows import crop_rows, select_rows
from deepseek_opt.generation.target import last_of, positions_after
from deepseek_opt.mtp.predictor import Prediction, TokenPredictor

# 不起草时积着的位置到这么多就先补进缓存，免得一直占着隐藏状态。
_MOST_PENDING = 1024

PickFn = Callable[[Tensor, int, int], Tensor]


class Window(NamedTuple):
    """一段已确定而 MTP 还没有看过的：hidden [R, T, H]、其后的词元 tokens [R, T]、各行有效的个数。"""

    hidden: Tensor
    tokens: Tensor
    counts: list[int]


class Drafter:
    """每个物理层一份缓存；第 k 个深度的一个条目由词元 t_τ 与上一深度在 τ − 1 的隐藏状态得到。

    一个物理层第一次用到时补上全部已确定的词元；反复使用最后一层的深度每次只接一个位置（同 vLLM）。
    由草稿得到的条目核对之前就截去，下一步用确定的词元与主模型的隐藏状态重算。
    """

    def __init__(self, predictor: TokenPredictor, rows: int):
        self.predictor = predictor
        self.caches = [predictor.adapter.make_cache() for _ in predictor.layers]
        self.known = [0] * rows  # 已补到第几个词元（从 0 数起）
        self._carry: list[Tensor | None] = [None] * len(self.caches)
        self._pending: list[Window] = []
        self.pending = 0  # 落下几个位置（各行合计）；每步都起草时只有上一步的
        self._wide = 0  # 第一段之后各段的列数之和

    @property
    def behind(self) -> bool:
        """落下的是否不止上一步的。"""
        return len(self._pending) > 1 or self.known[0] == 0

    def observe(self, hidden: Tensor, tokens: Tensor, counts: Sequence[int]) -> None:
        """记下已确定的：tokens[r, i] 是 hidden[r, i] 之后的词元，各行前 counts[r] 个有效。"""
        if self._pending:
            self._wide += hidden.shape[1]
        self._pending.append(Window(hidden, tokens, list(counts)))
        self.pending += sum(counts)
        if self._wide > _MOST_PENDING:
            self.draft(0)

    def select(self, kept: Sequence[int]) -> None:
        """只留下 kept 各行。"""
        index = torch.tensor(kept)
        for cache in self.caches:
            select_rows(cache, kept)
        self._carry = [None if c is None else c[index.to(c.device)] for c in self._carry]
        self.known = [self.known[i] for i in kept]
        self._pending = [
            Window(
                window.hidden[index.to(window.hidden.device)],
                window.tokens[index.to(window.tokens.device)],
                [window.counts[i] for i in kept],
            )
            for window in self._pending
        ]
        self.pending = sum(sum(window.counts) for window in self._pending)

    def draft(self, length: int, pick: PickFn | None = None) -> Tensor:
        """起草 length 个 [R, length]；``pick(归一化的隐藏状态 [R, H], 深度, i)`` 选出第 i 个。"""
        window = self._merged()
        end = [n + c for n, c in zip(self.known, window.counts, strict=True)]
        drafts: list[Tensor] = []
        last = self._physical(window, length, pick, drafts)
        if len(drafts) < length:
            self._repeat(last, end, length, pick, drafts)
        self.known = end
        for index in range(len(self.caches)):
            self._crop(index, end)
        return torch.stack(drafts, 1) if drafts else window.tokens.new_empty(len(end), 0)

    # ---- 内部 ----

    def _repeat(
        self, last: Tensor, end: list[int], length: int, pick: PickFn, drafts: list[Tensor]
    ) -> None:
        """反复用最后一个物理层，每次接一个位置，直到有 length 个草稿。"""
        index, done = len(self.caches) - 1, len(drafts)
        self._crop(index, [n + done - 1 for n in end])
        places = positions_after([n + done for n in end], length - done, last.device)
        for depth in range(done + 1, length + 1):
            tokens, place = drafts[-1][:, None], places[:, depth - done - 1 : depth - done]
            step = self._run(depth, index, tokens, last[:, None], place)
            last = step.hidden[:, 0]
            drafts.append(pick(step.normed[:, 0], depth, depth - 1))

    def _physical(
        self, window: Window, length: int, pick: PickFn | None, drafts: list[Tensor]
    ) -> Tensor | None:
        """依次用各物理层：补上窗口，各起草一个；返回最后一个草稿处的隐藏状态。"""
        hidden, skip, last = window.hidden, 0, None
        for index in range(len(self.caches)):
            tokens = _with_drafts(window, drafts)[:, skip:]
            begin = [n + 1 + skip for n in self.known]
            positions = positions_after(begin, tokens.shape[1], tokens.device)
            out = self._run(index + 1, index, tokens, hidden[:, : tokens.shape[1]], positions)
            if index < length:
                places = [c + index - skip for c in window.counts]
                last = last_of(out.hidden, places)
                drafts.append(pick(last_of(out.normed, places), index + 1, index))
            carry = self._carry[index]
            self._carry[index] = last_of(out.hidden, [max(c - skip, 1) for c in window.counts])
            if carry is None:
                hidden, skip = out.hidden, skip + 1
            else:
                hidden = torch.cat((carry[:, None], out.hidden), dim=1)
        return last

    def _run(
        self, depth: int, index: int, tokens: Tensor, hidden: Tensor, positions: Tensor
    ) -> Prediction:
        return self.predictor(
            tokens, hidden, depth=depth, position_ids=positions, cache=self.caches[index]
        )

    def _crop(self, index: int, known: Sequence[int]) -> None:
        """第 index 个物理层只留下到词元 known 为止的条目；它从第 index + 1 个词元开始。"""
        crop_rows(self.caches[index], [max(n - index, 0) for n in known])

    def _merged(self) -> Window:
        """合并积着的各段，各行有效的靠左。"""
        pending, self._pending = self._pending, []
        self.pending = self._wide = 0
        if len(pending) == 1:
            return pending[0]
        hidden = torch.cat([window.hidden for window in pending], dim=1)
        tokens = torch.cat([window.tokens for window in pending], dim=1)
        counts = [sum(part) for part in zip(*(window.counts for window in pending), strict=True)]
        if min(counts) == hidden.shape[1]:
            return Window(hidden, tokens, counts)
        valid = torch.cat([_valid(window) for window in pending], dim=1)
        order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(counts)]
        order = order.to(hidden.device)
        rows = torch.arange(len(counts), device=hidden.device)[:, None]
        return Window(hidden[rows, order], tokens[rows, order], counts)


def _with_drafts(window: Window, drafts: Sequence[Tensor]) -> Tensor:
    """窗口的词元之后接上各行的草稿：[R, T + 草稿数]。"""
    if not drafts:
        return window.tokens
    rows, steps = window.tokens.shape
    out = window.tokens.new_zeros(rows, steps + len(drafts))
    out[:, :steps] = window.tokens
    place = torch.tensor(window.counts, device=out.device)[:, None]
    place = place + torch.arange(len(drafts), device=out.device)
    return out.scatter_(1, place, torch.stack(list(drafts), 1))


def _valid(window: Window) -> Tensor:
    counts = torch.tensor(window.counts)
    return torch.arange(window.hidden.shape[1])[None] < counts[:, None]
