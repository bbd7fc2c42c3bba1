"""生成的循环：起草、核对、各行各自前进，结束的行离开。与模型来自哪里无关。"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from deepseek_opt.device_memory import shortage
from deepseek_opt.errors import DeviceMemoryError, InputError
from deepseek_opt.generation.adaptive import DraftLength
from deepseek_opt.generation.collect import Collected
from deepseek_opt.generation.graphs import step_graphs
from deepseek_opt.generation.plain import PlainPredictor
from deepseek_opt.generation.rows import Rows
from deepseek_opt.generation.step import Found, Step
from deepseek_opt.generation.stopping import Stopping
from deepseek_opt.generation.target import Target
from deepseek_opt.mtp.predictor import TokenPredictor


@dataclass
class Plan:
    """一次生成要用的各部分。

    属性：
        predictor: MTP 模块，或只有主模型的（:mod:`.plain`）。rows: 序列。chooser: 怎样选词元（:mod:`.choose`）。
        stopping: 何时结束。length: 每步起草几个。streamer: 有 put(tokens)、end()，可以没有。
        collected: 要返回的分数。collector: 模型的性能指标，可以没有。
        graphs: 能录的话是否把一步录成 CUDA graph。hands_out: 缓存要交给用户，不能留着给下一次生成。
    """

    predictor: TokenPredictor | PlainPredictor
    rows: Rows
    chooser: Any
    stopping: Stopping
    length: DraftLength
    streamer: Any = None
    collected: Collected = field(default_factory=Collected)
    collector: Any = None
    graphs: bool = True
    hands_out: bool = False


class _Launched(NamedTuple):
    """启动了、还没有读回的一步：批里的 rows 各行在前进，起草 length 个；behind 是当时 MTP 落下的位置数。"""

    found: Found
    rows: list[int]
    length: int
    behind: int
    timed: bool


class Loop:
    """执行一次 :class:`Plan`；:meth:`run` 之后 ``plan.rows`` 是结果。"""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.rows = plan.rows
        count, device = len(plan.rows.counts), plan.rows.device
        self.graphs = None  # 一步录成的 CUDA graph；不能录为 None
        self.step = Step(plan.predictor, count, device)
        self.live = list(range(count))  # rows.active 的各行是批里的第几行
        self.clock = 0.0  # 上一步结束的时刻
        self.streamed = 0
        self.hits: dict[int, list[int]] = {}  # 行 -> [第一个草稿被接受的次数, 起草的次数]

    @property
    def target(self) -> Target:
        """主模型一侧。"""
        return self.step.target

    def cache_of_one(self, length: int) -> Any:
        """只有一行时，生成之后截到前 length 个词元的缓存；归调用者（``plan.hands_out``）。"""
        return self.target.cache_of_one(length)

    def run(self) -> int:
        """生成完；返回最长的行生成了几个。抛出 DeviceMemoryError：设备的内存不够。"""
        self._require_vocabulary()
        try:
            self._generate()
        except (RuntimeError, MemoryError) as error:
            better = shortage(f"生成，词元 {list(self.rows.tokens.shape)}", self.rows.device, error)
            if better is None and not isinstance(error, DeviceMemoryError):
                raise
            self.step = self.graphs = None  # 这次的缓存、录好的也放掉
            if better is None:
                raise
            raise better from error
        length = max(self.plan.stopping.ended.values())
        self.plan.chooser.finish(length)
        self.plan.predictor.draft_statistics.last = self.rows.drafted(length)
        if self.plan.streamer is not None:
            self.plan.streamer.end()
        return length

    def _generate(self) -> None:
        adapter = self.plan.predictor.adapter
        with torch.no_grad(), _below_autograd(), adapter.generating(), _current(self.rows.device):
            with step_graphs(self.plan, self.step) as self.graphs:
                if self.graphs is not None:
                    self.step = self.graphs.step
                self.step.chooser = self.plan.chooser
                self._prefill()
                self._decode()

    def _prefill(self) -> None:
        tokens, lengths = self.rows.packed()
        started = time.perf_counter()
        found = self.step.prefill(tokens, lengths)
        accepted, following, drafts = found.read()
        before = self._commit(found, accepted, following, drafts)
        self._collect("prefill", time.perf_counter() - started, sum(lengths), len(lengths))
        self._leave(before)

    def _decode(self) -> None:
        """一步接一步，直到各行都结束；能的话设备上总有一步在算，主机同时处理上一步的。"""
        self.clock, waiting = time.perf_counter(), None
        while self.rows.active:
            current = self._launch() if waiting is None else waiting
            waiting = self._launch(1) if self._runs_ahead() else None
            self._finish(current)

    def _runs_ahead(self) -> bool:
        """还有一步没有读回时能不能启动下一步：它与读回的无关，没有读回的也不是最后一步。

        别的停止条件要读词元，会等到下一步算完，所以不提前。
        """
        if self.graphs is None or self.plan.stopping.criteria:
            return False
        return self.rows.room() > 1 and self.graphs.runs_ahead()

    def _launch(self, ahead: int = 0) -> _Launched:
        """启动一步；ahead 是已经启动、还没有读回的步数。"""
        drafter = self.step.drafter
        behind = drafter.pending if drafter.behind else 0
        length = self._draft_length(behind)
        timed = length > 0 and behind > 0 and not self.plan.length.fixed  # 要多等设备一次
        self.plan.chooser.prepare(self.step, length, self.live, ahead)
        if self.graphs is not None:
            found = self.graphs.run(length, timed)
        else:
            found = self.step.run(length, timed)
        return _Launched(found, list(self.live), length, behind, timed)

    def _finish(self, launched: _Launched) -> None:
        """读回一步的结果；启动之后才知道已经结束的行，得到的不要。"""
        found, length = launched.found, launched.length
        accepted, following, drafts = found.read()
        moved = [0] * self.step.rows
        for r in launched.rows:
            moved[r] = accepted[r] + 1
        self.step.settle(moved)
        accepted, following, drafts = (
            [part[r] for r in self.live] for part in (accepted, following, drafts)
        )
        before = self._commit(found, accepted, following, drafts)
        kept = sum(self.rows.counts[b] for b in self.rows.active) - sum(before)
        if launched.timed:
            self.plan.length.record_catch_up(launched.behind, found.drafting)
        started, self.clock = self.clock, time.perf_counter()
        caught_up = length > 0 and launched.behind > 0
        steady = not caught_up and (self.graphs is None or found.replayed)
        self._record(length, self.clock - started, steady, accepted, kept)
        self._leave(before)

    def _draft_length(self, behind: int) -> int:
        """这一步起草几个；behind 是 MTP 落下的位置数。"""
        rows, plan = self.rows, self.plan
        length = plan.length.choose(self._width(), rows.room(), behind, self._slowest())
        if self.graphs is None:  # 录好的不为最后几步另录：多出的截去
            length = min(length, rows.room() - 1)
        return max(plan.chooser.limit(min(length, self.target.room() - 1)), 0)

    def _width(self) -> int:
        """计时按几行算：录好的 graph 里结束的行也占着。"""
        return self.step.rows if self.graphs is not None else len(self.rows.active)

    def _commit(
        self,
        found: Found,
        accepted: list[int],
        following: list[int],
        drafts: list[list[int]],
    ) -> list[int]:
        """各行的新词元写进 rows；返回批里各行这一步之前生成了几个。"""
        rows, plan = self.rows, self.plan
        before = [rows.counts[b] for b in rows.active]
        plan.chooser.settle()
        fresh = [
            [*row[:count], token]
            for row, count, token in zip(drafts, accepted, following, strict=True)
        ]
        kept = plan.stopping.cut(rows, fresh)
        plan.collected.add(rows, kept, found.scores, found.logits)
        drafted = [min(pair) for pair in zip(accepted, kept, strict=True)]
        rows.commit([t[:n] for t, n in zip(fresh, kept, strict=True)], drafted)
        return before

    def _record(
        self, drafts: int, seconds: float, steady: bool, accepted: list[int], kept: int
    ) -> None:
        """steady 为 False 的步（先补了落下的位置、正在录 CUDA graph）用时不是平常的，不算数。"""
        count = len(accepted)
        if drafts:
            for b, hits in zip(self.rows.active, accepted, strict=True):
                mine = self.hits.setdefault(b, [0, 0])
                mine[0], mine[1] = mine[0] + bool(hits), mine[1] + 1
        self.plan.length.record(self._width(), drafts, seconds if steady else None, accepted)
        self.plan.predictor.draft_statistics.add(drafts, accepted)
        self._collect("decode", seconds, kept, count)

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
        self.live = [self.live[r] for r in kept]
        if not kept:
            return
        if self.graphs is not None:
            self.graphs.park(self.live)
        else:
            self.step.select(self.live)
            self.live = list(range(len(kept)))

    def _stream(self) -> None:
        """各行都有了的列交给 streamer；结束的行是 pad。"""
        rows = self.rows
        open_rows = [b for b in rows.active if not self._closed(b)]
        ready = min((rows.counts[b] for b in open_rows), default=max(rows.counts))
        if ready > self.streamed:
            for column in rows.columns(self.streamed, ready):
                self.plan.streamer.put(column)
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


def _current(device: torch.device) -> Any:
    """块内 device 是当前的设备：CUDA graph 录的是它的流。"""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _below_autograd() -> Any:
    """块内的算子不经过 autograd 的分派：每个自定义算子省几微秒，一步有几十个。"""
    return getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)()
