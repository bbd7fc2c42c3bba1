"""同样多的参数，稀疏对稠密：130 亿参数、每词元用 13 亿的 MoE，与同样大小的稠密模型，bf16，解码 1 行与 8 行。

两个模型的层数、宽度、注意力（MLA）相同，稠密的 FFN 与 MoE 的全部专家（含共享专家）一样大；随机权重，各层都是真的。先后建立、
测量、释放，不同时占显存。两边都由本库计算、录成 CUDA graph；同样的权重由 transformers 逐次调用的是对照。
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu_cases import models
from benchmarks.gpu_cases.check import finite
from benchmarks.gpu_cases.decode_step import GRAPH_STEPS, decode_call, touched_experts
from benchmarks.gpu_cases.row import Peer, Row, Target
from benchmarks.gpu_cases.runner import Case, Env, fill, free
from deepseek_opt.benchmarks import counts, shapes
from deepseek_opt.benchmarks.sparse_dense import dense_config, parameter_counts

BATCHES, AIM = (1, 8), 4.0
LAW = Target(1.3, "倍于同样大小的稠密模型")


@dataclass(frozen=True)
class _Reading:
    """一个模型解码一步：本库的微秒数与方式，transformers 的微秒数，要读的字节、要做的运算，用到的专家数。"""

    us: float
    mode: str
    transformers_us: float
    size: float
    flops: float
    touched: int


def cases(_: Env) -> list[Case]:
    """一项，各行数一行读数。"""
    return [Case("moe13b", run)]


def run(env: Env) -> Iterator[Row]:
    """先 MoE，后稠密。"""
    shape = shapes.TINY_SPARSE if env.quick else shapes.SPARSE_13B
    sparse = _readings(env, shape)
    free(env.device)
    dense = _readings(env, dense_shape(shape))
    free(env.device)
    total, active = parameter_counts(shape.config)
    for rows, ours in sparse.items():
        other = dense[rows]
        row = Row(f"moe13b.b{rows}", dtype="bfloat16")
        fill(env, row, ours.us, ours.mode, ours.size, ours.flops)
        peers = (
            ("本库，稠密", other.us, other.mode),
            ("transformers，同样的 MoE", ours.transformers_us, "eager"),
            ("transformers，稠密", other.transformers_us, "eager"),
        )
        row.peers = [Peer(name, us, us / ours.us, mode) for name, us, mode in peers]
        row.details = {
            "parameters": total,
            "active_parameters": active,
            "touched_experts": ours.touched,
            "context": shape.batch_context,
            "dense_roofline": other.size / env.copy_gbps / 1e3 / other.us,
            "aim": AIM,
        }
        yield row.judge(other.us / ours.us, LAW.unit, LAW)


def dense_shape(shape: shapes.Shape) -> shapes.Shape:
    """同样多参数的稠密模型：每层的专家与共享专家合成一个 FFN。"""
    config = shape.config
    inner = dense_config(config)["moe_intermediate_size"]
    layers = config["num_hidden_layers"]
    return replace(
        shape,
        name=f"{shape.name}-dense",
        config={**config, "first_k_dense_replace": layers, "intermediate_size": inner},
    )


def _readings(env: Env, shape: shapes.Shape) -> dict[int, _Reading]:
    """行数 -> 一个模型的读数。"""
    model, found = models.build(env, shape), {}
    fast, report = models.optimized(model)
    context, sparse = shape.batch_context, shape.config["first_k_dense_replace"] == 0
    with torch.inference_mode():
        for rows in BATCHES:
            ids = models.random_ids(env, model, rows, 1)
            for side in (fast, model):
                finite(decode_call(env, shape, side, ids, context)(), "logits")
            models.require_ours(report)
            call = decode_call(env, shape, model, ids, context)
            touched = touched_experts(model, call) if sparse else 0
            step = decode_call(env, shape, fast, ids, context, GRAPH_STEPS)
            ours = env.timer.prepare(step, [()], True)
            theirs = env.timer.prepare(call, [()])
            us, other = env.timer.in_turn([ours, theirs])
            cost = counts.model_decode(shape.config, rows, context, 2, touched=touched)
            found[rows] = _Reading(us, ours.mode, other, cost.read_bytes, cost.flops, touched)
    return found
