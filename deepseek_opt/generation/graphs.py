"""一步录成 CUDA graph：小的批一步有几百个小核，逐个启动比计算还久；录好之后一次启动。

一步的张量都在固定的地址上（缓存、各行的个数、窗口），每种（起草几个，窗口多宽）录一个：第一次照常计算（各库借此
准备好），第二次录，之后重放。行数不变：结束的行留在批里不再前进（:meth:`StepGraphs.park`）。录好的随 predictor
留到下一次生成，同样多的行、参数的地址没变就接着用；至多留一份。

能录的条件：真的 CUDA 设备，各层由本库的算子直接计算（integrations/steady.py），一个物理的 MTP 层，选词元只是设备上
的计算（贪心，或随机数在一步之前取好的采样；不看已有的词元，不返回分数）。不满足的照常逐个算子计算，结果相同。
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseek_opt import log
from deepseek_opt.cache_rows import settle_rows
from deepseek_opt.generation.adaptive import MAX_DRAFTS
from deepseek_opt.generation.drafter import Window
from deepseek_opt.generation.step import Found, Step

_KEPT = "_step_graphs"
_WIDEST = MAX_DRAFTS + 2  # 一步至多在各行之后写这么多个
_GROW = 1024  # 缓存一次至少多留这么多词元：增长要换缓冲区，录好的都作废


@dataclass
class _Recorded:
    """录好的一步：从 entry（不起草时没有）读，写到 out 与 packed。"""

    graph: Any
    entry: Window | None
    out: Window
    packed: Tensor


@contextmanager
def step_graphs(plan: Any, step: Step) -> Iterator[StepGraphs | None]:
    """块内的一次生成可用的录制；不能录为 None。块内没有出错才留到下一次。"""
    if not _can_record(plan, step):
        yield None
        return
    kept = plan.predictor.__dict__.pop(_KEPT, None)  # 取走：别的线程同时生成就另录一份
    stamp = _stamp(plan, step)
    found = kept if kept is not None and kept.stamp == stamp else StepGraphs(step, stamp)
    found.begin(plan)
    yield found
    found.end()
    plan.predictor.__dict__[_KEPT] = found


def forget(predictor: Any) -> None:
    """不再留着：缓存要交给用户。"""
    predictor.__dict__.pop(_KEPT, None)


def _can_record(plan: Any, step: Step) -> bool:
    if plan.rows.device.type != "cuda" or not torch.cuda.is_available():
        return False
    if torch.cuda.is_current_stream_capturing() or len(plan.predictor.layers) != 1:
        return False
    collects = plan.collected.scores is not None or plan.collected.logits is not None
    return plan.chooser.on_device and not collects and step.adapter.capturable(step.rows, 1)


def _stamp(plan: Any, step: Step) -> tuple:
    """决定录好的还能不能用的一切：行数、选词元的规则、缓存的种类、参数与缓冲区的地址。"""
    model = step.adapter.model
    caches = (step.target.cache, *step.drafter.caches)
    kinds = [
        (type(layer), layer.store_dtype, layer.max_length, layer.budget_bytes)
        for cache in caches
        for layer in cache.layers
    ]
    vocabulary = plan.predictor.draft_vocabulary
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [] if vocabulary is None else [vocabulary]
    return (step.rows, plan.chooser.key, tuple(kinds), tuple(t.data_ptr() for t in tensors))


class StepGraphs:
    """一批行的各种一步；``step`` 是它们共用的状态。"""

    def __init__(self, step: Step, stamp: tuple):
        self.step, self.stamp = step, stamp
        device = step.last.device
        self.alive = torch.ones(step.rows, dtype=torch.int64, device=device)
        self.pool = torch.cuda.graph_pool_handle()
        self.failed = False
        self._recorded: dict[tuple[int, int], _Recorded] = {}
        self._seen: set[tuple[int, int]] = set()
        self._windows: dict[int, Window] = {}
        self._capacity: list[int] = []  # 各层缓存的容量：增长就是换了地址
        self._table: Any = None  # 角度的表：录好的读它的地址
        self._total = 0

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    def begin(self, plan: Any) -> None:
        """又一次生成：各行回到开头。"""
        self._total = plan.rows.width + plan.rows.max_new + 2 * _WIDEST
        self.step.empty()
        self.alive.fill_(1)
        self.step.alive = self.alive

    def end(self) -> None:
        """这次生成结束：不留着用不到的。"""
        self.step.chooser = None

    def park(self, live: Sequence[int]) -> bool:
        """批里只有 live 各行还要前进；返回 True：其余的行留在批里。"""
        mask = [0] * self.step.rows
        for row in live:
            mask[row] = 1
        self.alive.copy_(torch.tensor(mask), non_blocking=True)
        return True

    def run(self, length: int, timed: bool = False) -> Found:
        """同 :meth:`Step.run`；能重放就重放。"""
        window = self.step.drafter.window
        room = self._make_room()
        if timed or self.failed or not room or (length and window is None):
            return self.step.run(length, timed)
        width = window.hidden.shape[1] if length else 0
        key = (length, width)
        if key not in self._recorded:
            steps = max(length + 1, width)
            if key not in self._seen or not self.step.adapter.capturable(self.step.rows, steps):
                self._seen.add(key)
                return self.step.run(length)
            self._record(key)
            if self.failed:
                return self.step.run(length)
        return self._replay(self._recorded[key], window)

    # ---- 内部 ----

    def _replay(self, recorded: _Recorded, window: Window | None) -> Found:
        drafter = self.step.drafter
        if recorded.entry is not None:
            _load(recorded.entry, window)
        recorded.graph.replay()
        out = recorded.out
        if recorded.entry is not None:
            drafter.replayed()
            drafter.observe(out.hidden, out.tokens, out.counts)
        else:  # 积着的要留到起草时，不能被下一次重放盖掉
            drafter.observe(out.hidden.clone(), out.tokens.clone(), out.counts.clone())
        return Found(recorded.packed, replayed=True)

    def _record(self, key: tuple[int, int]) -> None:
        """录下一步；录的时候设备上什么都没有做，主机上的恢复成录之前的。录不成就记下，之后都照常计算。"""
        length, width = key
        drafter, target = self.step.drafter, self.step.target
        windows, known = list(drafter._windows), list(drafter.known)
        counts = (drafter.pending, drafter._wide)
        entry = self._window(width) if length else None
        out = self._window(length + 1)
        if entry is not None:
            drafter._windows = [Window(entry.hidden, entry.tokens, entry.counts, windows[0].known)]
        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            # thread_local：别的线程照常分配显存
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                found = self.step.run(length)
                _load(out, drafter._windows[-1])
            self._recorded[key] = _Recorded(graph, entry, out, found.packed)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # 录制中途出错时 torch 不会换回原来的流
            torch.cuda.synchronize()
            log.LOGGER.warning("一步录不成 CUDA graph，改为逐个算子计算：%s", error)
            self.failed = True
        drafter._windows, drafter.known = windows, known
        drafter.pending, drafter._wide = counts
        settle_rows(target.cache, target.lengths)
        settle_rows(drafter.caches[0], known)

    def _window(self, width: int) -> Window:
        """宽 width 的窗口，地址固定。"""
        if width not in self._windows:
            rows, like = self.step.rows, self.step.adapter.embedding.weight
            hidden = like.new_empty(rows, width, self.step.adapter.hidden_size)
            tokens = self.step.last.new_zeros(rows, width)
            self._windows[width] = Window(hidden, tokens, torch.zeros_like(self.step.last))
        return self._windows[width]

    def _make_room(self) -> bool:
        """缓存与角度的表放得下随便哪一种步；换了地址，录好的就作废。返回 False：到了缓存的上限，放不下。"""
        needed = max(self.step.target.lengths) + _WIDEST
        caches = (self.step.target.cache, *self.step.drafter.caches)
        layers = [layer for cache in caches for layer in cache.layers if layer.buffers()]
        if min(layer.capacity for layer in layers) < needed:
            wanted = min(self._total, max(needed + _GROW, 2 * needed))
            for layer in layers:
                layer.extend(wanted)
        capacity = [layer.capacity for layer in layers]
        table = self.step.adapter.reserve_positions(max(capacity) + 2)
        if capacity != self._capacity or table is not self._table:
            self._capacity, self._table = capacity, table
            self._recorded.clear()
        return min(capacity) >= needed


def _load(to: Window, source: Window) -> None:
    if source.hidden is to.hidden:
        return
    to.hidden.copy_(source.hidden)
    to.tokens.copy_(source.tokens)
    to.counts.copy_(source.counts)
