"""一步录成 CUDA graph：小的批一步有几百个小核，逐个启动比计算还久；录好之后一次启动。

一步的张量都在固定的地址上（缓存、各行的个数、窗口），每种（起草几个，窗口多宽）录一个：第一次照常计算（各库借此
准备好），第二次录，之后重放。行数不变：结束的行留在批里不再前进（:meth:`StepGraphs.park`）。录好的随 predictor
留到下一次生成，同样多的行、参数的地址没变就接着用；至多留一份。设备的内存不够（DeviceMemoryError，不论是哪次前向、
哪次生成的）时，留在那个设备上的都放掉，下一次重录。

能录的条件（:func:`obstacle`）：真的 CUDA 设备，各层由本库的算子直接计算（integrations/steady.py），没有 MTP 或只有
一个物理的 MTP 层，选词元只是设备上的计算（贪心，或随机数在一步之前取好的采样；不看已有的词元，不返回分数）。
不满足的照常逐个算子计算，结果相同。
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseek_opt import log
from deepseek_opt.cache_rows import settle_rows
from deepseek_opt.device_memory import capturing, on_shortage
from deepseek_opt.generation.adaptive import MAX_DRAFTS
from deepseek_opt.generation.drafter import Window
from deepseek_opt.generation.step import Found, Step
from deepseek_opt.load import load_holders

_KEPT = "_step_graphs"
_PLAIN = (0, 0)  # 不起草的一步
_WIDEST = MAX_DRAFTS + 2  # 一步至多在各行之后写这么多个
_TRIES = 3  # 录不成几次之后不再试
_KEPT_SHARE = 16  # 留着的缓存至多占设备内存的几分之一
_GROW = 1024  # 缓存一次至少多留这么多词元：增长要换缓冲区，录好的都作废

_recording = threading.Lock()
_holding = threading.Lock()
_holders: weakref.WeakSet[Any] = weakref.WeakSet()  # 留着录好的 predictor
_streams: dict[torch.device, Any] = {}


@dataclass
class _Recorded:
    """录好的一步：从 entry（不起草时没有）读，写到 out（没有 MTP 时没有）与 packed。"""

    graph: Any
    entry: Window | None
    out: Window | None
    packed: Tensor


@contextmanager
def step_graphs(plan: Any, step: Step) -> Iterator[StepGraphs | None]:
    """块内的一次生成可用的录制；不能录为 None。块内没有出错才留到下一次。"""
    if obstacle(plan) is not None:
        if not plan.graphs:
            forget(plan.predictor)
        yield None
        return
    found = plan.predictor.__dict__.pop(_KEPT, None)  # 取走：别的线程同时生成就另录一份
    stamp = _stamp(plan, step)
    if found is None or found.stamp != stamp:
        found = StepGraphs(step, stamp)
    found.begin(plan)
    yield found
    found.end()
    if not plan.hands_out and found.nbytes <= _kept_bytes(plan.rows.device):
        plan.predictor.__dict__[_KEPT] = found
        with _holding:
            _holders.add(plan.predictor)


def forget(predictor: Any) -> None:
    """不再留着录好的与它的缓存。"""
    predictor.__dict__.pop(_KEPT, None)


def release(device: torch.device) -> None:
    """device 的内存不够：各模型留在它上面的都放掉。正在用的已经取走，不在其中；正在录时不动。"""
    if capturing(device):
        return
    with _holding:
        found = list(_holders)
    for predictor in found:
        kept = predictor.__dict__.get(_KEPT)
        if kept is not None and kept.step.last.device == device:
            forget(predictor)


on_shortage(release)


def obstacle(plan: Any) -> str | None:
    """这一次生成不能录的原因；能则为 None。要在 ``adapter.generating()`` 的块内问。"""
    collected, adapter = plan.collected, plan.predictor.adapter
    checks = (
        (not plan.graphs, "配置里 cuda_graphs=False"),
        (not can_capture(plan.rows.device), "不在 CUDA 设备上，或正在录别的"),
        (len(plan.predictor.layers) > 1, "有几个物理的 MTP 层"),
        (not plan.chooser.on_device, "处理器要看已有的词元"),
        (collected.scores is not None or collected.logits is not None, "要返回分数"),
    )
    reason = next((reason for wrong, reason in checks if wrong), None)
    if reason is None and not adapter.capturable(len(plan.rows.counts), 1):
        reason = "有的层不是由本库的算子直接计算，或行数太多"
    return reason


def _kept_bytes(device: torch.device) -> int:
    """留到下一次的缓存至多占多少：长的、行多的不留，免得占着用户的显存。"""
    if device.type != "cuda":
        return 1 << 62
    return torch.cuda.get_device_properties(device).total_memory // _KEPT_SHARE


def can_capture(device: torch.device) -> bool:
    """设备此刻能不能录。"""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return not torch.cuda.is_current_stream_capturing()


def _stamp(plan: Any, step: Step) -> tuple:
    """决定录好的还能不能用的一切：相等的才接着用。

    行数、选词元的规则、缓存的种类；各参数、缓冲区、专家计数的地址与类型；各模块上的补丁与数（缩放、top_k、eps……都定在
    录下的一步里）；是不是推理模式（其中的张量出了它不能原地改）。
    """
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
    places = [(t.data_ptr(), t.dtype, t.shape) for t in tensors]
    modules = [one for module in model.modules() for one in _state(module)]
    mode = torch.is_inference_mode_enabled()
    return (step.rows, plan.chooser.key, tuple(kinds), tuple(places), tuple(modules), mode)


def _state(module: Any) -> Iterator[Any]:
    """一个模块里定在录下的一步里的：forward 的补丁（比的是同一个对象）、计数的地址、各个数。"""
    yield module.__dict__.get("forward")
    for holder in load_holders(module):
        yield holder.load_counter.address
    for name, value in module.__dict__.items():
        if isinstance(value, (int, float, str)) and not name.startswith("_"):
            yield value


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
        self._hosts: list[Tensor | None] = [None, None]  # 不起草的一步读回的地方
        self._last: Any = None  # 上一次生成的最后一步之后
        self._failures = 0

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    @property
    def nbytes(self) -> int:
        """缓存的缓冲区占用的字节数。"""
        return sum(layer.nbytes for layer in self._layers())

    def begin(self, plan: Any) -> None:
        """又一次生成：各行回到开头。上一次可能在别的流上，提前启动的一步也可能还没有算完。"""
        if self._last is not None:
            torch.cuda.current_stream().wait_event(self._last)
        self.failed = self._failures >= _TRIES
        self._total = plan.rows.width + plan.rows.max_new + 2 * _WIDEST
        self.step.empty()
        self.alive.fill_(1)
        self.step.alive = self.alive

    def end(self) -> None:
        """这次生成结束：不留着用不到的。"""
        self.step.chooser = None
        self._last = _event() if self.step.last.is_cuda else None

    def park(self, live: Sequence[int]) -> None:
        """批里只有 live 各行还要前进，其余的留在批里。"""
        mask = [0] * self.step.rows
        for row in live:
            mask[row] = 1
        self.alive.copy_(torch.tensor(mask), non_blocking=True)

    def runs_ahead(self) -> bool:
        """没有 MTP 的下一步已经录好、也放得下：不必等上一步读回就可以重放。"""
        known = not self.step.drafter.caches and _PLAIN in self._recorded and not self.failed
        return known and max(self.step.target.lengths) + 1 + _WIDEST <= min(self._capacity)

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
        elif out is not None:  # 积着的要留到起草时，不能被下一次重放盖掉
            drafter.observe(out.hidden.clone(), out.tokens.clone(), out.counts.clone())
        else:
            return self._sent(recorded.packed)
        return Found(recorded.packed, replayed=True)

    def _sent(self, packed: Tensor) -> Found:
        """送往主机，不等：下一次重放会盖掉设备上的。两块轮流，所以至多一步没有读。"""
        self._hosts.reverse()
        if self._hosts[0] is None:
            self._hosts[0] = torch.empty_like(packed, device="cpu", pin_memory=packed.is_cuda)
        host = self._hosts[0].copy_(packed, non_blocking=True)
        return Found(host, replayed=True, ready=_event() if packed.is_cuda else None)

    def _record(self, key: tuple[int, int]) -> None:
        """录下一步；录的时候设备上什么都没有做，主机上的恢复成录之前的。录不成就记下，之后都照常计算。"""
        length, width = key
        drafter, target = self.step.drafter, self.step.target
        entry = self._window(width) if length else None
        out = self._window(length + 1) if drafter.caches else None
        device = self.step.last.device
        current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        # 一个进程里同时只能录一个；thread_local：别的线程照常分配显存
        options = {"pool": self.pool, "capture_error_mode": "thread_local"}
        with _recording, drafter.recording(entry):
            try:
                with torch.cuda.graph(graph, stream=_stream(device), **options):
                    found = self.step.run(length)
                    if out is not None:
                        _load(out, drafter.newest)
                self._recorded[key] = _Recorded(graph, entry, out, found.packed)
            except RuntimeError as error:
                torch.cuda.set_stream(current)  # 录制中途出错时 torch 不会换回原来的流
                with suppress(RuntimeError):
                    torch.cuda.synchronize()
                log.LOGGER.warning("一步录不成 CUDA graph，改为逐个算子计算：%s", error)
                self.failed = True
                self._failures += 1
        settle_rows(target.cache, target.lengths)

    def _window(self, width: int) -> Window:
        """宽 width 的窗口，地址固定。"""
        if width not in self._windows:
            rows, like = self.step.rows, self.step.adapter.embedding.weight
            hidden = like.new_zeros(rows, width, self.step.adapter.hidden_size)
            tokens = self.step.last.new_zeros(rows, width)
            self._windows[width] = Window(hidden, tokens, torch.zeros_like(self.step.last))
        return self._windows[width]

    def _make_room(self) -> bool:
        """缓存与角度的表放得下随便哪一种步；换了地址，录好的就作废。返回 False：到了缓存的上限，放不下。"""
        needed = max(self.step.target.lengths) + _WIDEST
        layers = self._layers()
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

    def _layers(self) -> list[Any]:
        """各缓存里写入过的层。"""
        caches = (self.step.target.cache, *self.step.drafter.caches)
        return [layer for cache in caches for layer in cache.layers if layer.buffers()]


def _stream(device: torch.device) -> Any:
    """录制用的流，各设备一个：torch 缺省的只有一个，属于第一次录制的设备。"""
    if device.type != "cuda":
        return None
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def _event() -> Any:
    event = torch.cuda.Event()
    event.record()
    return event


def _load(to: Window, source: Window) -> None:
    if source.hidden is to.hidden:
        return
    to.hidden.copy_(source.hidden)
    to.tokens.copy_(source.tokens)
    to.counts.copy_(source.counts)
