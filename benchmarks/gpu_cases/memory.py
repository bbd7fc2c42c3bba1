"""一层注意力前向的显存峰值与缓存大小，同 transformers 的 MLA、标准多头注意力的 eager 与 sdpa 比。

在只有一层的模型里跑完整的前向，用钩子只量注意力层：它开始之前已有的（权重、输入、掩码）不算，它写的缓存算。
长输入由本库分段送入时，取各段的最大值，前面各段留下的（缓存）也算。
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_cases import models
from benchmarks.gpu_cases.check import PEER_SLACK, compare
from benchmarks.gpu_cases.row import SKIPPED, Row, Target
from benchmarks.gpu_cases.runner import Case, Env, free, out_of_memory, ratio_row
from benchmarks.gpu_cases.timer import first_line
from deepseek_opt.benchmarks import process_memory
from deepseek_opt.benchmarks.probe import IMPLEMENTATIONS, cache_bytes

LENGTHS = (2048, 4096, 8192, 16384)
SAVING = Target(0.40, "省下的比例")
_OURS = "optimized"


@dataclass(frozen=True)
class Usage:
    """注意力层的峰值与缓存，字节。"""

    peak: int
    cache: int


class Meter:
    """注意力层前向期间的分配峰值：钩子开始与停止。"""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.base: int | None = None
        self.peak = 0

    def start(self, *_: Any) -> None:
        """一次前向开始。"""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            now = torch.cuda.memory_allocated()
        else:
            process_memory.reset_peak()
            now = process_memory.status_bytes("VmRSS")
        self.base = now if self.base is None else self.base

    def stop(self, *_: Any) -> None:
        """一次前向结束。"""
        if self.cuda:
            now = torch.cuda.max_memory_allocated()
        else:
            now = process_memory.status_bytes("VmHWM")
        self.peak = max(self.peak, now - self.base)


def cases(_: Env) -> list[Case]:
    """各长度。"""
    return [Case(f"memory.s{length}", partial(_run, length)) for length in LENGTHS]


def _run(length: int, env: Env) -> Iterator[Row]:
    key = f"memory.s{length}"
    if env.quick:
        length //= 16
    with nullcontext() if env.device == "cuda" else process_memory.exact_allocations():
        ours, expected = _measured(env, _OURS, length)
        for name, label in IMPLEMENTATIONS.items():
            if name != _OURS:
                yield _peer_row(env, key, name, label, length, ours, expected)


def _peer_row(
    env: Env, key: str, name: str, label: str, length: int, ours: Usage, out: torch.Tensor
) -> Row:
    """与一种实现比；它放不下时没有比值，只记下我们的。"""
    details = {"peer": label, "ours_bytes": ours.peak, "ours_cache_bytes": ours.cache}
    try:
        peer, expected = _measured(env, name, length)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return Row(f"{key}.{name}", SKIPPED, f"对照放不下：{first_line(error)}", details=details)
    finally:
        free(env.device)
    if name == "transformers_sdpa":  # 同样的权重，同样的输入
        details["error"] = compare(out, expected, "注意力的输出", PEER_SLACK)
    details |= {"peer_bytes": peer.peak, "peer_cache_bytes": peer.cache}
    details["cache_saving"] = 1 - ours.cache / peer.cache
    if not peer.peak:
        return Row(f"{key}.{name}", SKIPPED, "对照的峰值太小，没有量到", details=details)
    return ratio_row(f"{key}.{name}", 1 - ours.peak / peer.peak, SAVING.unit, SAVING, details)


def _measured(env: Env, name: str, length: int) -> tuple[Usage, torch.Tensor]:
    """(峰值与缓存，注意力最后一次前向的输出)。第一遍不算：库的暂存、按形状缓存的代码。"""
    kind = "eager" if name.endswith("eager") else "sdpa"
    model, report = models.build(env, models.one_layer(env), kind), None
    if name == _OURS:
        model, report = models.optimized(model)
    elif name.startswith("standard"):
        model = models.standard(model, kind)
    torch.manual_seed(length)
    ids = models.random_ids(env, model, 1, length)
    with torch.inference_mode():
        prefill(env, model, ids)
        usage, out = prefill(env, model, ids)
    if report is not None:
        models.require_ours(report)
    return usage, out


def prefill(env: Env, model: nn.Module, ids: torch.Tensor) -> tuple[Usage, torch.Tensor]:
    """从空缓存预填充一遍。"""
    cache, meter, outputs = models.empty_cache(model), Meter(env.device), []
    attention = model.model.layers[0].self_attn

    def keep(_module: Any, _args: Any, output: Any) -> None:
        meter.stop()
        outputs[:] = [output[0][:, -1:].clone()]

    handles = [
        attention.register_forward_pre_hook(meter.start),
        attention.register_forward_hook(keep),
    ]
    try:
        model(ids, past_key_values=cache, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return Usage(meter.peak, cache_bytes(cache)), outputs[0]
