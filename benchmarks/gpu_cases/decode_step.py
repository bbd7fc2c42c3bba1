"""整个模型（V2-Lite-3L）解码一步：本库与 transformers 比，并看占拷贝带宽的比例。

读的字节：这一步用到的权重（专家按实际选中的个数）加缓存。transformers 编译之后的在 :mod:`.compiled`。
录成图的另有不提前启动的一份（no_pdl_us），各核花的时间（profile）看的是它。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_cases import kernels, models
from benchmarks.gpu_cases.check import LIMITS, PEER_SLACK, WrongResult, finite
from benchmarks.gpu_cases.environment import setting
from benchmarks.gpu_cases.row import Peer, Row, Target
from benchmarks.gpu_cases.runner import Case, Env, fill, ratio_row
from benchmarks.gpu_cases.timer import Clocked
from deepseek_opt.benchmarks import counts, shapes

BATCHES, CONTEXT = (1, 8, 64), 4096
BANDWIDTH, SPEED = Target(0.75, "占拷贝带宽"), Target(5.0, "倍于 transformers")
GRAPH_STEPS = 512  # 图重放时缓存不会增长：先留出热身与各轮计时的位置
_CHECKED_LAYER = 1  # 这一层的注意力之前没有 MoE：舍入不会改变选中的专家


def cases(_: Env) -> list[Case]:
    """各批量。"""
    return [Case(f"decode_step.b{rows}", partial(_run, rows)) for rows in BATCHES]


def _run(rows: int, env: Env) -> Iterator[Row]:
    key = f"decode_step.b{rows}"
    shape, context = models.shape(env), 32 if env.quick else CONTEXT
    model = models.build(env, shape)
    fast, report = models.optimized(model)
    ids = models.random_ids(env, model, rows, 1)

    def clocked(side: nn.Module, graph: bool = False, pdl: str | None = None) -> Clocked:
        step = decode_call(env, shape, side, ids, context, GRAPH_STEPS if graph else 0)
        with setting(kernels.PDL, pdl):
            return env.timer.prepare(step, [()], graph)

    with torch.inference_mode():
        error = _check(env, shape, model, fast, ids, context)
        models.require_ours(report)
        touched = touched_experts(model, decode_call(env, shape, model, ids, context))
        graphs = [clocked(fast, graph=True), clocked(fast, graph=True, pdl="0")]
        if any(side.mode != "graph" for side in graphs):
            graphs = []  # 没录成图的缓存已写乱
        sides = [*graphs, clocked(fast), clocked(model)]
        *ours, peer_us = env.timer.in_turn(sides)
        profile = kernels.profiled(sides[1] if graphs else sides[0], env.device)
    models.require_ours(report)
    cost = counts.model_decode(shape.config, rows, context, 2, touched=touched)
    us, mode = ours[0], sides[0].mode
    row = Row(f"{key}.bandwidth", dtype="bfloat16", error=error)
    fill(env, row, us, mode, cost.read_bytes, cost.flops)
    row.peers = [Peer("transformers（sdpa）", peer_us, peer_us / us, sides[-1].mode)]
    row.details = {"touched_experts": touched, "read_bytes": cost.read_bytes, "eager_us": ours[-1]}
    row.details |= {"no_pdl_us": ours[1] if graphs else None, **profile}
    row.details["other_fallbacks"] = models.other_fallbacks(report)
    yield row.judge(row.gbps / env.copy_gbps, BANDWIDTH.unit, BANDWIDTH)
    details = {"ours_us": us, "ours_eager_us": ours[-1], "peer_us": peer_us, "ours_mode": mode}
    yield ratio_row(f"{key}.transformers", peer_us / us, SPEED.unit, SPEED, details)


def decode_call(
    env: Env, shape: shapes.Shape, model: nn.Module, ids: torch.Tensor, context: int, room: int = 0
) -> Callable[[], Any]:
    """一步：缓存里已有 context 个词元，每调用一次多一个；本库的缓存可以先留出 room 个的位置。"""
    layers, rows = shape.config["num_hidden_layers"], ids.shape[0]
    cache = shapes.make_cache(shape, rows, context, layers, models.DTYPE, env.device)
    if room:
        model(ids, past_key_values=cache)  # 换成本库的缓存层
        for layer in cache.layers:
            layer.reserve(context + room, layer.latent, layer.rope)
    return lambda: model(ids, past_key_values=cache).logits


def _check(
    env: Env,
    shape: shapes.Shape,
    model: nn.Module,
    fast: nn.Module,
    ids: torch.Tensor,
    context: int,
) -> float:
    """第二层注意力的输出与 fp32 的原模型比，不差于 transformers 自己的误差；返回相对误差。"""
    wide = _widened(env, shape, model)
    outputs = [
        _attention_output(m, decode_call(env, shape, m, ids, context)) for m in (fast, model)
    ]
    cache = shapes.make_cache(
        shape, ids.shape[0], context, shape.config["num_hidden_layers"], models.DTYPE, env.device
    )
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.float(), layer.values.float()
    expected = _attention_output(wide, lambda: wide(ids, past_key_values=cache).logits)
    ours, theirs = (_gap(out, expected) for out in outputs)
    limit = max(LIMITS[models.DTYPE], PEER_SLACK * theirs)
    if not ours <= limit:
        raise WrongResult(
            f"第 {_CHECKED_LAYER} 层注意力的输出与 fp32 的 transformers 不符："
            f"相对误差 {ours:.3g}（上限 {limit:.3g}，transformers 自己的是 {theirs:.3g}）"
        )
    return ours


def _widened(env: Env, shape: shapes.Shape, model: nn.Module) -> nn.Module:
    """fp32 的同样模型（权重逐个转换）。"""
    config = shapes.make_config(shape)
    config._experts_implementation = "eager"  # 分组矩阵乘不一定有 fp32 的
    wide = shapes.materialize(shapes.build_on_meta(config, torch.float32), env.device)
    wide.load_state_dict(model.state_dict())
    return wide


def _gap(out: torch.Tensor, expected: torch.Tensor) -> float:
    finite(out, "注意力的输出")
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def _attention_output(model: nn.Module, step: Callable[[], Any]) -> torch.Tensor:
    """跑一步，取 _CHECKED_LAYER 层注意力的输出；logits 应是有限数。"""
    found: list[torch.Tensor] = []
    attention = model.model.layers[_CHECKED_LAYER].self_attn
    handle = attention.register_forward_hook(lambda _m, _a, out: found.append(out[0].clone()))
    try:
        finite(step(), "logits")
    finally:
        handle.remove()
    return found[0]


def touched_experts(model: nn.Module, step: Callable[[], Any]) -> int:
    """跑一步，各 MoE 层选中的不同专家数之和。"""
    found: list[int] = []

    def count(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        indices = (t for t in (*args, *kwargs.values()) if not t.is_floating_point())
        found.append(int(next(indices).unique().numel()))

    handles = [
        layer.mlp.experts.register_forward_pre_hook(count, with_kwargs=True)
        for layer in model.model.layers
        if hasattr(layer.mlp, "experts")
    ]
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    return sum(found)
