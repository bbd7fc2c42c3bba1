"""本进程的内存峰值：先清零内核记的常驻内存峰值，跑完再读。

Linux 上向 ``/proc/self/clear_refs`` 写 5 会把 VmHWM（常驻内存峰值）重置为当前值；清零之前先让
glibc 把空闲的堆页还给系统，免得上一次留下的空闲内存被再次用上而量不到。不能写 clear_refs 的
环境（某些容器）改为另开线程每毫秒读一次 VmRSS，可能漏掉极短的尖峰。
"""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_opt.errors import UnsupportedError

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.001
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_SMALL_BLOCK, _LARGE_BLOCK = 128 << 10, 32 << 20


@dataclass(frozen=True)
class PeakReading:
    """峰值读数：result 为被测函数的返回值；peak_bytes 为相对开始时的常驻内存增量（字节）。

    method 为 ``VmHWM``（内核记的峰值）或 ``sampling``（每毫秒采样）。
    """

    result: Any
    peak_bytes: int
    method: str


def status_bytes(key: str) -> int:
    """/proc/self/status 的一项（如 ``VmRSS``、``VmHWM``），字节。

    抛出 UnsupportedError：这个系统没有 /proc（只有 Linux 有）。
    """
    try:
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    raise UnsupportedError(f"量不到进程内存：没有 /proc/self/status 的 {key}（只支持 Linux）")


def available_bytes() -> int:
    """系统现在还能用的内存（MemAvailable），字节；读不到时为 0。"""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def release_free_memory() -> None:
    """回收垃圾，并让 C 库把空闲的堆页还给系统（没有 malloc_trim 的 C 库略过）。"""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def exact_allocations() -> Iterator[None]:
    """其间大块内存直接向系统要、用完即还，于是先前留下的堆碎片不影响读数（只在 glibc 上有作用）。

    不在计时的时候用：每块都要重新缺页。
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _SMALL_BLOCK)
    try:
        yield
    finally:
        # glibc 自己也会随用随调到这两个值；设过之后它不再自动调整
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGE_BLOCK)


def reset_peak() -> bool:
    """把内核记的常驻内存峰值（VmHWM）重置为当前值；这个环境不允许时返回 False，什么都不变。"""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def measure_peak(run: Callable[[], Any]) -> PeakReading:
    """运行 run()，返回其间常驻内存峰值比开始时多了多少。

    示例::

        reading = measure_peak(lambda: torch.zeros(64 << 20, dtype=torch.uint8))
        assert reading.peak_bytes >= 64 << 20
    """
    release_free_memory()
    before = status_bytes("VmRSS")
    if not reset_peak():
        return _sampled(run, before)
    result = run()
    return PeakReading(result, max(0, status_bytes("VmHWM") - before), "VmHWM")


def _sampled(run: Callable[[], Any], before: int) -> PeakReading:
    highest, done = before, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(_SAMPLE_SECONDS):
            highest = max(highest, status_bytes("VmRSS"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        result = run()
    finally:
        done.set()
        thread.join()
    highest = max(highest, status_bytes("VmRSS"))
    return PeakReading(result, highest - before, "sampling")
