"""计时与屋顶线：GPU 用事件，CPU 用时钟；能录成 CUDA 图的另录一份，量到的就不含逐次启动的开销。

输入轮换多份，总量大过 L2，读到的是显存而不是缓存；各边逐轮交替，取各轮的中位数。
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

ROTATE_BYTES = 512 << 20  # 轮换的输入总量：任何现有 GPU 的 L2 都装不下
ROUNDS, CALLS = 7, 20
ROUND_SECONDS = 0.02  # 一轮至少这么久（或 CALLS 次）：事件的分辨率约 0.5 微秒
COPY_BYTES, GEMM = 1 << 30, 8192


@dataclass
class Clocked:
    """要计时的一边：run() 连续调用 calls 次；note 说明为什么没能录成图。

    图里只有地址，不持有张量：used 拿住被录的函数（连同它的输入、缓存），直到不再重放。
    """

    run: Callable[[], Any]
    calls: int
    mode: str = "eager"
    note: str = ""
    used: Any = None


class Timer:
    """按设备计时；quick 只跑一轮一次。"""

    def __init__(self, device: str, quick: bool):
        self.device, self.quick = device, quick
        self.cuda = device == "cuda"
        self.rounds, self.calls = (1, 1) if quick else (ROUNDS, CALLS)
        self.rotate = (1 << 20) if quick else ROTATE_BYTES

    def copies(self, size: int) -> int:
        """每份 size 字节的输入要几份。"""
        return max(1, min(self.calls, -(-self.rotate // max(size, 1))))

    def prepare(self, call: Callable, inputs: Sequence[tuple], graph: bool = False) -> Clocked:
        """热身、定出一轮调用几次；graph 时试着录成 CUDA 图。"""
        for args in inputs[:2]:
            call(*args)
        once = self._elapsed(lambda: call(*inputs[0]))
        calls = min(self.calls, max(2, round(ROUND_SECONDS / max(once, 1e-9))))

        def run() -> None:
            for index in range(calls):
                call(*inputs[index % len(inputs)])

        if not (graph and self.cuda):
            return Clocked(run, calls)
        captured, note = capture(run)
        if captured is None:
            return Clocked(run, calls, note=f"录不成 CUDA 图：{note}")
        return Clocked(captured.replay, calls, "graph", used=run)

    def in_turn(self, sides: Sequence[Clocked]) -> list[float]:
        """各边逐轮交替；每次调用的微秒数（各轮中位数）。"""
        readings: list[list[float]] = [[] for _ in sides]
        for side in sides:
            side.run()
        for _ in range(self.rounds):
            for side, found in zip(sides, readings, strict=True):
                found.append(self._elapsed(side.run) * 1e6 / side.calls)
        return [statistics.median(found) for found in readings]

    def us(self, call: Callable, inputs: Sequence[tuple]) -> float:
        """一次调用的微秒数。"""
        return self.in_turn([self.prepare(call, inputs)])[0]

    def _elapsed(self, run: Callable[[], Any]) -> float:
        """run() 的秒数。"""
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def copy_gbps(self) -> float:
        """拷贝带宽（读加写）GB/s。"""
        size = (1 << 20) if self.quick else COPY_BYTES
        pair = [tuple(torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2))]
        return 2 * size / self.us(lambda to, source: to.copy_(source), pair) / 1e3

    def bf16_tflops(self) -> float:
        """bf16 方阵乘法的 TFLOP/s。"""
        size = 128 if self.quick else GEMM
        a, b = (torch.randn(size, size, device=self.device).bfloat16() for _ in range(2))
        return 2 * size**3 / self.us(torch.matmul, [(a, b)]) / 1e6


def capture(run: Callable[[], Any]) -> tuple[Any, str]:
    """把 run() 录成 CUDA 图；录不成返回 (None, 原因)，当前流不变。"""
    stream = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except (RuntimeError, ValueError) as error:
        # 录制中途出错时 torch 不会换回原来的流。
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize()
        return None, first_line(error)
    return graph, ""


def first_line(error: BaseException) -> str:
    """异常的类名与消息的第一行。"""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}：{lines[0][:200]}" if lines else type(error).__name__
