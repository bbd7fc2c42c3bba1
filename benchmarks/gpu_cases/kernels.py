"""一步的时间花在哪些核上：torch.profiler 看一次重放，按总时间从多到少列出。

提前启动的核要在 grid_wait 里等前一个，时长里有等的时间；要看各核自己的，先关掉（:data:`PDL`）再录图。
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_cases.timer import Clocked, first_line

PDL = "DEEPSEEK_OPT_CUDA_PDL"
LISTED = 16
_NAME = 96
# 没有它们，CUDA 12.6 之前的 CUPTI 反复开关时，重放已录好的图会出错。
_CUPTI = {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
_NOISE = re.compile(r"\(anonymous namespace\)::|\bvoid |\bat::native::|\bc10::|\bdso::")


def profiled(side: Clocked, device: str) -> dict[str, Any]:
    """side 一步里：kernels（个数）、kernels_us（时长之和）、span_us（头到尾）、profile（最久的几种，各 name、count、us）。

    头到尾减去时长之和就是核之间的空隙。看不到时只有 profile_note。
    """
    try:
        events = _events(side.run, device)
    except RuntimeError as error:
        return {"profile_note": first_line(error)}
    if not events:
        return {"profile_note": "分析器没有看到核（没有权限，或没有 CUPTI）"}
    return summary(events, side.calls)


def summary(events: list[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """各核的（名字，开始，时长）合成一步的；微秒。"""
    found: dict[str, list[float]] = {}
    for name, _, us in events:
        found.setdefault(short(name), []).append(us)
    ranked = sorted(found.items(), key=lambda item: -sum(item[1]))
    listed = [
        {"name": name, "count": len(times) / steps, "us": sum(times) / steps}
        for name, times in ranked[:LISTED]
    ]
    first, last = min(at for _, at, _ in events), max(at + us for _, at, us in events)
    return {
        "kernels": len(events) / steps,
        "kernels_us": sum(us for *_, us in events) / steps,
        "span_us": (last - first) / steps,
        "profile": listed,
    }


def short(name: str) -> str:
    """去掉命名空间与参数，截短；模板参数里有逐元素的核做什么，所以留着。"""
    return _NOISE.sub("", name).split("(")[0][:_NAME]


def _events(run: Callable[[], Any], device: str) -> list[tuple[str, float, float]]:
    cuda = device == "cuda"
    if cuda:
        for name, value in _CUPTI.items():
            os.environ.setdefault(name, value)
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as seen:
        run()
        if cuda:
            torch.cuda.synchronize()
    wanted = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    return [
        (event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in seen.events()
        if event.device_type == wanted
    ]
