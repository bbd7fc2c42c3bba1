"""``model.generate`` 逐个词元（没有 MTP）：V2-Lite-3L，4096 个词元的提示之后，每个词元多少微秒。

一次生成得长些、一次短些，相差的时间除以相差的词元数：提示的预填充、录制都减去了，主机的工作（停止条件、取下一个词元）留着。
对照：本库不录 CUDA graph 的（transformers 的循环，同样的核）、transformers 自己的。占带宽按 :mod:`.decode_step` 同样行数的一步读的字节。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_cases import models
from benchmarks.gpu_cases.check import WrongResult
from benchmarks.gpu_cases.row import Peer, Row, Target
from benchmarks.gpu_cases.runner import Case, Env
from benchmarks.gpu_cases.timer import Clocked
from deepseek_opt.generation import graphs
from deepseek_opt.optimize import find_state

BATCHES, CONTEXT = (1, 8, 64), 4096
FAST_COUNTS, SLOW_COUNTS, QUICK_COUNTS = (8, 136), (2, 6), (2, 3)  # 短的、长的各生成几个词元
SPEED, BANDWIDTH = Target(5.0, "倍于 transformers"), Target(0.75, "占拷贝带宽")


def cases(_: Env) -> list[Case]:
    """各批量。"""
    return [Case(f"generate.b{rows}", partial(_run, rows)) for rows in BATCHES]


def _run(rows: int, env: Env) -> Iterator[Row]:
    model = models.build(env, models.shape(env))
    fast, report = models.optimized(model)
    slow, _ = models.optimized(model)
    find_state(slow).runtime.profile.mla.cuda_graphs = False
    ids = models.random_ids(env, model, rows, 32 if env.quick else CONTEXT)
    few, many = (QUICK_COUNTS, QUICK_COUNTS) if env.quick else (SLOW_COUNTS, FAST_COUNTS)
    sides = (
        ("ours", fast, many),
        ("本库，不录 CUDA graph", slow, few),
        ("transformers（sdpa）", model, few),
    )
    calls = [
        Clocked(_generating(side, ids, count), 1) for _, side, counts in sides for count in counts
    ]
    found = env.timer.in_turn(calls)
    models.require_ours(report)
    recorded = _recorded(fast)
    if env.device == "cuda" and not recorded and not env.quick:
        raise WrongResult("generate 没有录成 CUDA graph，由 transformers 的循环生成了")
    each = {
        name: (found[2 * i + 1] - found[2 * i]) / (counts[1] - counts[0])
        for i, (name, _, counts) in enumerate(sides)
    }
    us = each.pop("ours")
    step = env.find(f"decode_step.b{rows}.bandwidth")
    size = step.details.get("read_bytes", 0) if step is not None else 0
    row = Row(f"generate.b{rows}.bandwidth", dtype="bfloat16", us=us)
    row.mode = "graph" if recorded else "eager"
    row.peers = [Peer(name, other, other / us, "eager") for name, other in each.items()]
    row.details = {
        "context": ids.shape[1],
        "tokens_per_second": rows * 1e6 / us,
        "other_fallbacks": models.other_fallbacks(report),
    }
    if size:
        row.gbps = size / us / 1e3
        row.judge(row.gbps / env.copy_gbps, BANDWIDTH.unit, BANDWIDTH)
    yield row
    ratio = each["transformers（sdpa）"] / us
    details = {"ours_us": us, "peer_us": each["transformers（sdpa）"]}
    yield Row(f"generate.b{rows}.transformers", details=details).judge(ratio, SPEED.unit, SPEED)


def _generating(model: nn.Module, ids: Tensor, new: int) -> Callable[[], Any]:
    options = {"max_new_tokens": new, "do_sample": False}
    mask = torch.ones_like(ids)
    return lambda: model.generate(
        ids, attention_mask=mask, **options, eos_token_id=None, pad_token_id=0
    )


def _recorded(model: nn.Module) -> bool:
    """最近的生成是不是重放 CUDA graph 得到的。"""
    predictor = model.__dict__["generate"].predictor
    kept = None if predictor is None else predictor.__dict__.get(graphs._KEPT)
    return kept is not None and bool(kept._recorded) and not kept.failed
