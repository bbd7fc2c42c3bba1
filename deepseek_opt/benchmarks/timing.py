"""计时：对照与本库交替运行，同一次运行里测屋顶线（读带宽、矩阵乘法峰值）。

每次计时前先读一块比末级缓存大的内存：真实模型里一层的权重总是从内存来，不会留在缓存里。
两边同样对待。取最小值（受别的进程打扰最少），另记中位数。
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

_EVICT_BYTES = 192 << 20
_READ_BYTES = 512 << 20
_GEMM = 2048


@dataclass(frozen=True)
class Times:
    """一边的读数，秒。"""

    best: float
    median: float
    rounds: int


@cache
def _evict_buffer() -> torch.Tensor:
    return torch.ones(_EVICT_BYTES // 4)


def _timed(run: Callable[[], Any], evict: bool) -> float:
    if evict:
        _evict_buffer().sum()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def interleaved(
    peer: Callable[[], Any] | None,
    ours: Callable[[], Any],
    *,
    rounds: int,
    seconds: float,
    evict: bool = True,
) -> tuple[Times | None, Times]:
    """对照与本库交替计时；见 :func:`in_turn`。"""
    sides = [side for side in (peer, ours) if side is not None]
    found = in_turn(sides, rounds=rounds, seconds=seconds, evict=evict)
    return (found[0] if peer is not None else None), found[-1]


def in_turn(
    sides: Sequence[Callable[[], Any]], *, rounds: int, seconds: float, evict: bool = True
) -> list[Times]:
    """先各热身一次，再从头到尾轮流…… 至多 rounds 轮，超过 seconds 秒就停（至少一轮）。

    热身就超过 seconds 秒的一边，不再重跑，热身的读数就是它的读数。
    """
    warm = [_timed(side, evict) for side in sides]
    readings: list[list[float]] = [[first] if first > seconds else [] for first in warm]
    deadline = time.perf_counter() + seconds
    for done in range(rounds):
        if done and time.perf_counter() > deadline:
            break
        for side, times, first in zip(sides, readings, warm, strict=True):
            if first <= seconds:
                times.append(_timed(side, evict))
    return [Times(min(t), statistics.median(t), len(t)) for t in readings]


def call_microseconds(run: Callable[[], Any], calls: int, rounds: int = 5) -> float:
    """反复调用一个很小的运算，每次调用的微秒数（多轮取最小）。"""
    run()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, time.perf_counter() - start)
    return best / calls * 1e6


@contextmanager
def settings(threads: int | None = None, isa: str | None = None) -> Iterator[None]:
    """临时改线程数与本库的指令集。"""
    from deepseek_opt import _native

    old_threads, old_isa = torch.get_num_threads(), _native.isa()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        if isa is not None:
            _native.set_isa(isa)
        yield
    finally:
        torch.set_num_threads(old_threads)
        _native.set_isa(old_isa)


@dataclass(frozen=True)
class Roofline:
    """这次运行测到的硬件上限：read_gbps 为读带宽（GB/s），gflops 为各 dtype 的矩阵乘法峰值。"""

    threads: int
    read_gbps: float
    gflops: dict[str, float]

    def floor_seconds(self, flops: float, read_bytes: float, dtype: torch.dtype) -> float:
        """至少要这么久：读完 read_bytes，或算完 flops，取较久的。"""
        peak = self.gflops[str(dtype).removeprefix("torch.")] * 1e9
        return max(read_bytes / (self.read_gbps * 1e9), flops / peak)


def measure_roofline(quick: bool = False) -> Roofline:
    """读带宽：对大数组求和，以及本库的一行矩阵向量乘，取高者；峰值：torch 与本库的方阵乘法，取高者。

    fp16 只测本库：没有 AVX512-FP16 的 x86 上，torch 的 fp16 矩阵乘法慢几百倍。
    """
    size, rounds = (256, 1) if quick else (_GEMM, 4)
    with torch.inference_mode():
        peaks = {
            str(dtype).removeprefix("torch."): _gemm_gflops(dtype, size, rounds)
            for dtype in (torch.bfloat16, torch.float32, torch.float16)
        }
        return Roofline(torch.get_num_threads(), read_gbps(quick), peaks)


def read_gbps(quick: bool = False) -> float:
    """此刻的读带宽，GB/s。"""
    with torch.inference_mode():
        return _read_gbps(*((32 << 20, 1) if quick else (_READ_BYTES, 4)))


@contextmanager
def fresh_read(roofline: Roofline, quick: bool = False) -> Iterator[list[Roofline]]:
    """前后各测一次读带宽，结束时给出取高者的屋顶线：与别人共用内存的机器上，带宽几分钟里会差近一倍。"""
    found: list[Roofline] = []
    before = read_gbps(quick)
    yield found
    found.append(replace(roofline, read_gbps=max(before, read_gbps(quick))))


def _best(run: Callable[[], Any], rounds: int) -> float:
    run()
    return min(_timed(run, False) for _ in range(rounds))


def _read_gbps(size: int, rounds: int) -> float:
    from deepseek_opt import ops

    numbers = torch.ones(size // 4)
    weight = numbers.view(torch.bfloat16).view(-1, 2048)
    row = torch.ones(1, 2048, dtype=torch.bfloat16)
    best = min(_best(numbers.sum, rounds * 2), _best(lambda: ops.linear(row, weight), rounds * 2))
    return size / best / 1e9


def _gemm_gflops(dtype: torch.dtype, size: int, rounds: int) -> float:
    from deepseek_opt import ops

    x, weight = (torch.randn(size, size).to(dtype) for _ in range(2))
    best = _best(lambda: ops.linear(x, weight), rounds)
    if dtype != torch.float16:
        best = min(best, _best(lambda: torch.nn.functional.linear(x, weight), rounds))
    return 2 * size**3 / best / 1e9
