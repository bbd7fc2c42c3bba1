"""生成的循环：起草、核对、各行各自前进，结束的行离开。与模型来自哪里无关。"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deepseek_opt.errors import InputError
from deepseek_opt.generation.adaptive import DraftLength
from deepseek_opt.generation.choose import Verified
from deepseek_opt.generation.collect import Collected
from deepseek_opt.generation.drafter import Drafter
from deepseek_opt.generation.rows import Rows
from deepseek_opt.generation.stopping import Stopping
from deepseek_opt.generation.target import Target, last_of
from deepseek_opt.mtp.predictor import TokenPredictor


@dataclass
class Plan:
    """一次生成要用的各部分。

    属性：
        predictor: MTP 模块。rows: 序列。chooser: 怎样选词元（:mod:`.choose`）。stopping: 何时结束。
        length: 每步起草几个。streamer: 有 put(tokens)、end()，可以没有。
        collected: 要返回的分数。collector: 模型的性能指标，可以没有。
    """

    predictor: TokenPredictor
    rows: Rows
    chooser: Any
    stopping: Stopping
    length: DraftLength
    streamer: Any = None
    collected: Collected = field(default_factory=Collected)
    collector: Any = None


class Loop:
    """执行一次 :class:`Plan`；:meth:`run` 之后 ``plan.rows`` 是结果。"""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.rows = plan.rows
        count = len(plan.rows.counts)
        self.target = Target(plan.predictor.adapter, count)
        self.drafter = Drafter(plan.predictor, count)
        self.last: list[int] = []  # 批里各行最后一个词元，还没有进主模型的缓存
        self.streamed = 0
        self.caught_up = False  # 这一步是否先补上了落下的位置，用时因而不是平常的
        self.hits: dict[int, list[int]] = {}  # 行 -> [第一个草稿被接受的次数, 起草的次数]

    def run(self) -> int:
        """生成完；返回最长的行生成了几个。"""
        self._require_vocabulary()
        with torch.no_grad(), _below_autograd(), self.plan.predictor.adapter.generating():
            self._prefill()
            while self.rows.active:
                self._step()
        length = max(self.plan.stopping.ended.values())
        self.plan.chooser.finish(length)
        self.plan.predictor.draft_statistics.last = self.rows.drafted(length)
        if self.plan.streamer is not None:
            self.plan.streamer.end()
        return length

    def _prefill(self) -> None:
        tokens, lengths = self.rows.packed()
        started = time.perf_counter()
        hidden = self.target.run(tokens)
        self.target.keep(lengths, tokens.shape[1])
        logits = self.plan.predictor.adapter.logits(last_of(hidden, lengths))[:, None]
        known = torch.cat((tokens[:, 1:], tokens.new_zeros(len(lengths), 1)), dim=1)
        _, before = self._advance(hidden, known, logits, self._no_drafts(), lengths)
        self._collect("prefill", time.perf_counter() - started, sum(lengths), len(lengths))
        self._leave(before)

    def _step(self) -> None:
        rows, plan = self.rows, self.plan
        started = time.perf_counter()
        drafts = self._draft()
        last = torch.tensor(self.last, device=drafts.device)[:, None]
        tokens = torch.cat((last, drafts), dim=1)
        hidden = self.target.run(tokens)
        known = torch.cat((drafts, drafts.new_zeros(len(rows.active), 1)), dim=1)
        logits = plan.predictor.adapter.logits(hidden)
        found, before = self._advance(hidden, known, logits, drafts)
        kept = sum(rows.counts[b] for b in rows.active) - sum(before)
        seconds = time.perf_counter() - started
        self._record(drafts.shape[1], seconds, found.accepted, kept)
        self._leave(before)

    def _draft(self) -> Tensor:
        rows, plan = self.rows, self.plan
        count = len(rows.active)
        behind = self.drafter.pending if self.drafter.behind else 0
        length = plan.length.choose(count, rows.room(), behind, self._slowest())
        length = plan.chooser.limit(min(length, rows.room() - 1, self.target.room() - 1))
        self.caught_up = length > 0 and behind > 0
        if length <= 0:
            return self._no_drafts()
        started = time.perf_counter()
        drafts = self.drafter.draft(length, plan.chooser.pick)
        if behind:
            plan.length.record_catch_up(behind, time.perf_counter() - started)
        if plan.chooser.scores.reads_tokens:
            rows.place(drafts)
        return drafts

    def _advance(
        self,
        hidden: Tensor,
        known: Tensor,
        logits: Tensor,
        drafts: Tensor,
        lengths: list[int] | None = None,
    ) -> tuple[Verified, list[int]]:
        """由 logits 定下各行的新词元，截去没有接受的；lengths 是预填充时各行的长度。

        返回（核对的结果, 批里各行这一步之前生成了几个）。
        """
        rows, plan = self.rows, self.plan
        found = plan.chooser.verify(logits, drafts)
        counts = lengths
        if counts is None:
            counts = [accepted + 1 for accepted in found.accepted]
            self.target.keep(counts, hidden.shape[1])
        place = torch.tensor(counts, device=known.device)[:, None] - 1
        following = torch.tensor(found.following, device=known.device)
        known.scatter_(1, place, following[:, None])
        self.drafter.observe(hidden, known, counts)
        self.last = found.following
        before = [rows.counts[b] for b in rows.active]
        self._commit(drafts, found, logits)
        return found, before

    def _commit(self, drafts: Tensor, found: Verified, logits: Tensor) -> None:
        rows, plan = self.rows, self.plan
        fresh = [
            [*row[:accepted], following]
            for row, accepted, following in zip(
                drafts.tolist(), found.accepted, found.following, strict=True
            )
        ]
        kept = plan.stopping.cut(rows, fresh)
        plan.collected.add(rows, kept, found.scores, logits)
        drafted = [min(pair) for pair in zip(found.accepted, kept, strict=True)]
        rows.commit([t[:n] for t, n in zip(fresh, kept, strict=True)], drafted)

    def _record(self, drafts: int, seconds: float, accepted: list[int], kept: int) -> None:
        count = len(accepted)
        if drafts:
            for b, hits in zip(self.rows.active, accepted, strict=True):
                mine = self.hits.setdefault(b, [0, 0])
                mine[0], mine[1] = mine[0] + bool(hits), mine[1] + 1
        self.plan.length.record(count, drafts, None if self.caught_up else seconds, accepted)
        self.plan.predictor.draft_statistics.add(drafts, accepted)
        self._collect("decode", seconds, kept, count)

    def _no_drafts(self) -> Tensor:
        return self.rows.tokens.new_empty(len(self.rows.active), 0)

    def _slowest(self) -> float:
        """还要最多词元的行的接受率相对全体的。"""
        rate = max(self.plan.length.acceptance.rate(0), 0.05)
        worst, scale = 0.0, 1.0
        for b in self.rows.active:
            hits, tries = self.hits.get(b, (0, 0))
            own = (hits + 4 * rate) / (tries + 4)
            left = (self.rows.max_new - self.rows.counts[b]) / (1 + own)
            if left > worst:
                worst, scale = left, own / rate
        return scale

    def _collect(self, kind: str, seconds: float, tokens: int, rows: int) -> None:
        if self.plan.collector is not None:
            self.plan.collector.record(kind, seconds, tokens, rows, self.target.cache)

    def _leave(self, before: list[int]) -> None:
        rows, plan = self.rows, self.plan
        plan.stopping.check(rows, before, plan.collected.scores_until)
        gone = set(plan.stopping.leaving(rows))
        if plan.streamer is not None:
            self._stream()
        if not gone:
            return
        kept = [r for r in range(len(rows.active)) if r not in gone]
        rows.leave(kept)
        if kept:
            self.target.select(kept)
            self.drafter.select(kept)
            self.last = [self.last[r] for r in kept]

    def _stream(self) -> None:
        """各行都有了的列交给 streamer；结束的行是 pad。"""
        rows = self.rows
        open_rows = [b for b in rows.active if not self._closed(b)]
        ready = min((rows.counts[b] for b in open_rows), default=max(rows.counts))
        if ready > self.streamed:
            columns = rows.sequences(ready)[:, rows.width + self.streamed :]
            for column in columns.unbind(1):
                self.plan.streamer.put(column.cpu())
            self.streamed = ready

    def _closed(self, row: int) -> bool:
        end = self.plan.stopping.ended.get(row)
        return end is not None and self.rows.counts[row] <= end

    def _require_vocabulary(self) -> None:
        size = self.plan.predictor.adapter.embedding.weight.shape[0]
        prompt = self.rows.tokens[:, : self.rows.width]
        low, high = int(prompt.min()), int(prompt.max())
        if low < 0 or high >= size:
            wrong = low if low < 0 else high
            raise InputError(f"参数 input_ids：词元 {wrong} 不在词表 [0, {size}) 之内")


def _below_autograd() -> Any:
    """块内的算子不经过 autograd 的分派：每个自定义算子省几微秒，一步有几十个。"""
    return getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)()
