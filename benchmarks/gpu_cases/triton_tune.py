"""Triton 的对照共用：各候选的块大小量几次，取最快的。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

Config = tuple[int, ...]


def fastest(
    run: Callable[[Config], Any], configs: Sequence[Config], device: torch.device
) -> Config:
    """run(候选) 算一次；共享内存不够的略过。"""
    if device.type != "cuda":
        return configs[0]
    found = []
    for config in configs:
        try:
            times = [_seconds(run, config) for _ in range(3)]
        except triton.runtime.errors.OutOfResources:
            continue
        found.append((min(times[1:]), config))
    return min(found)[1]


def _seconds(run: Callable[[Config], Any], config: Config) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run(config)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
