"""16 GB 显存上限之内，V2-Lite-3L 一次预填充得下的最长序列：本库与标准多头注意力的 eager、sdpa 比。

先从 START 起逐次加倍到放不下为止，再试一次中点；本库试到最长的对照的 LIMIT 倍为止。
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from benchmarks.gpu_cases import models
from benchmarks.gpu_cases.row import Row, Target
from benchmarks.gpu_cases.runner import Case, Env, free, out_of_memory, ratio_row

CAP_BYTES = 16 << 30
START, LIMIT = 4096, 4
SECONDS = 60.0
TWICE = Target(2.0, "倍长度")
_GROWTH = 4.0  # 长度加倍，时间至多约 4 倍


def cases(_: Env) -> list[Case]:
    """一项，每个对照一行。"""
    return [Case("length.16gb", run)]


def run(env: Env) -> Iterator[Row]:
    """先量对照，再量本库。"""
    base = models.build(env, models.shape(env))
    start, most = (32, 128) if env.quick else (START, 64 * START)
    # quick 只查脚本：结果不能随机器的忙闲而变。
    seconds = math.inf if env.quick else min(SECONDS, env.remaining())
    deadline = time.monotonic() + seconds
    found: dict[str, tuple[int, str]] = {}
    with capped(env.device):
        for kind in ("eager", "sdpa"):
            model = models.standard(base, kind)
            until = min(deadline, time.monotonic() + seconds / 4)
            found[kind] = longest(_fits(env, model), start, most, until)
            del model
            free(env.device)
        fast, report = models.optimized(base)
        _fits(env, fast)(start)
        models.require_ours(report)
        limit = LIMIT * max(length for length, _ in found.values())
        ours, why = longest(_fits(env, fast), start, max(limit, start), deadline)
    models.require_ours(report)
    for kind, (length, peer_why) in found.items():
        details = {"ours": ours, "ours_stopped": why, "peer": length, "peer_stopped": peer_why}
        details |= {"cap_bytes": CAP_BYTES, "model": models.shape(env).name}
        ratio = ours / length if length else 0.0
        # 没有试到放不下为止的一边，可能还能更长：不下结论。
        decided = peer_why == "memory" and (why == "memory" or ratio >= TWICE.value)
        target = TWICE if decided and length else None
        yield ratio_row(f"length.16gb.standard_{kind}", ratio, TWICE.unit, target, details)


@contextmanager
def capped(device: str) -> Iterator[None]:
    """其间本进程至多用 CAP_BYTES 显存（已经占着的也算）；CPU 上没有上限。"""
    if device != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_BYTES / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def longest(
    fits: Callable[[int], bool], start: int, limit: int, deadline: float
) -> tuple[int, str]:
    """(放得下的最长，为什么停)；start 都放不下时为 0。停在 ``memory`` 以外的，实际可能更长。"""
    length, spent = 0, 0.0
    wanted = start
    while wanted <= limit:
        if length and time.monotonic() + _GROWTH * spent > deadline:
            return length, "time"
        began = time.monotonic()
        if not fits(wanted):
            middle = wanted * 3 // 4
            if length and time.monotonic() + _GROWTH * spent < deadline and fits(middle):
                length = middle
            return length, "memory"
        length, spent = wanted, time.monotonic() - began
        wanted *= 2
    return length, "limit"


def _fits(env: Env, model: nn.Module) -> Callable[[int], bool]:
    """预填充一行这么长放不放得下。"""

    def fits(length: int) -> bool:
        try:
            with torch.inference_mode():
                ids = models.random_ids(env, model, 1, length)
                out = model(ids, past_key_values=models.empty_cache(model), logits_to_keep=1)
                return bool(torch.isfinite(out.logits).all())
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return False
        finally:
            free(env.device)

    return fits
