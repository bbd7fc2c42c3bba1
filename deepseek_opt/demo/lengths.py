"""各长度的内存、首词元时间、解码速度：五种实现各一个子进程，按长度轮流测量。

时间只够跑完的才跑：预计会超时或放不进内存的，写明“未运行”与原因，不编数字。
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepseek_opt import estimate_memory
from deepseek_opt.benchmarks.probe import (
    IMPLEMENTATIONS,
    Probe,
    ProbeError,
    ProbeReading,
    ProbeSpec,
)
from deepseek_opt.benchmarks.process_memory import available_bytes
from deepseek_opt.demo.compare import Check

LENGTHS = (2048, 4096, 8192, 16384)
SAVING = 0.40  # 规范 SC-001：8192 个词元，内存至少省 40 %
JUDGED = 8192
_DECODE_STEPS = 16
SLOW_REPEATED = 4096  # 逐步计算（eager）超过这个长度只跑一遍：平方增长，两遍来不及
_MEMORY_SHARE = 0.5  # 一次测量至多用可用内存的这么多
_MEMORY_LIMIT = 4 << 30  # 不加 --full 时，单次测量的内存上限
_GROWTH = 4.5  # 长度翻倍时，预计时间至多增长的倍数（平方项，另留余量）


@dataclass(frozen=True)
class Measurement:
    """一种实现、一个长度：reading 为 None 时 note 是没有运行的原因。"""

    implementation: str
    length: int
    reading: ProbeReading | None
    note: str = ""


@dataclass(frozen=True)
class LengthTable:
    """全部读数，dtype 为激活的类型。"""

    dtype: str
    measurements: tuple[Measurement, ...]

    def find(self, implementation: str, length: int) -> Measurement | None:
        """一格；没有这一格为 None。"""
        for entry in self.measurements:
            if (entry.implementation, entry.length) == (implementation, length):
                return entry
        return None

    def saving(self, implementation: str, length: int) -> float | None:
        """本库的内存峰值比它少的比例。"""
        theirs, ours = self.find(implementation, length), self.find("optimized", length)
        if not (theirs and ours and theirs.reading and ours.reading):
            return None
        return 1 - ours.reading.peak_bytes / theirs.reading.peak_bytes

    @property
    def lengths(self) -> list[int]:
        """测过的长度。"""
        return sorted({entry.length for entry in self.measurements})

    def checks(self) -> list[Check]:
        """8192 个词元时，本库的内存比标准多头注意力少 40 % 以上。"""
        found = []
        for name in ("standard_eager", "standard_sdpa"):
            entry = self.find(name, JUDGED)
            if entry is None:
                continue
            title = f"{JUDGED} 词元的内存，对 {IMPLEMENTATIONS[name]}"
            saved = self.saving(name, JUDGED)
            if saved is None:
                found.append(Check(title, None, entry.note or "本库没有读数"))
            else:
                detail = f"少 {saved:.1%}（要求 ≥ {SAVING:.0%}）"
                found.append(Check(title, saved >= SAVING, detail))
        return found


class Planner:
    """决定一次测量跑不跑：内存按估算，时间按上一个长度的读数外推。"""

    def __init__(self, config: Any, dtype: torch.dtype, deadline: float | None):
        self._config = config
        self._dtype = dtype
        self._deadline = deadline
        self._last: dict[str, tuple[int, float]] = {}

    def record(self, implementation: str, length: int, seconds: float) -> None:
        """记下一次预填充用的时间。"""
        self._last[implementation] = (length, seconds)

    def reason(self, implementation: str, length: int) -> str | None:
        """不跑的原因；可以跑则为 None。"""
        need = self._bytes(implementation, length)
        free = available_bytes() * _MEMORY_SHARE or float("inf")
        limit = free if self._deadline is None else min(free, _MEMORY_LIMIT)
        if need > limit:
            return f"未运行：约需 {need / 1e9:.1f} GB"
        if self._deadline is None or implementation not in self._last:
            return None
        before, seconds = self._last[implementation]
        expected = seconds * _GROWTH ** math.log2(length / before)
        if time.monotonic() + expected > self._deadline:
            return f"未运行：预计 {expected:.0f} 秒，超出时间"
        return None

    def _bytes(self, implementation: str, length: int) -> int:
        estimate = estimate_memory(self._config, 1, length, dtype=self._dtype)
        if implementation == "optimized":
            return estimate.working_bytes
        return estimate.against(implementation).working_bytes


def start_probes(
    stack: ExitStack, folder: Path, dtype: torch.dtype, threads: int
) -> dict[str, Probe]:
    """五个子进程一起启动（装模型的时间重叠）；随 stack 结束。"""
    kind = str(dtype).removeprefix("torch.")
    return {
        name: stack.enter_context(Probe(ProbeSpec("folder", str(folder), name, kind, threads)))
        for name in IMPLEMENTATIONS
    }


def measure_lengths(
    probes: dict[str, Probe],
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    planner: Planner,
    tick: Callable[[str], None],
) -> LengthTable:
    """由短到长，每个长度各实现轮流测；逐步计算（eager）最慢，放在最后，时间不够时先舍它们。"""
    slow = {name: probe for name, probe in probes.items() if name.endswith("eager")}
    fast = {name: probe for name, probe in probes.items() if name not in slow}
    found = [m for part in (fast, slow) for m in _measure_all(part, lengths, planner, tick)]
    order = list(IMPLEMENTATIONS)
    found.sort(key=lambda m: (m.length, order.index(m.implementation)))
    return LengthTable(str(dtype).removeprefix("torch."), tuple(found))


def _measure_all(
    probes: dict[str, Probe],
    lengths: tuple[int, ...],
    planner: Planner,
    tick: Callable[[str], None],
) -> Iterator[Measurement]:
    failed: dict[str, str] = {}
    for length in sorted(lengths):
        for name, probe in probes.items():
            tick(f"{IMPLEMENTATIONS[name]}，{length} 词元")
            note = failed.get(name) or planner.reason(name, length)
            if note is not None:
                yield Measurement(name, length, None, note)
                continue
            repeats = 1 if name.endswith("eager") and length > SLOW_REPEATED else 2
            try:
                reading = probe.measure(1, length, decode=_DECODE_STEPS, repeats=repeats)
            except ProbeError as error:
                failed[name] = str(error)
                yield Measurement(name, length, None, str(error))
                continue
            planner.record(name, length, 2 * reading.prefill_s)
            yield Measurement(name, length, reading)
