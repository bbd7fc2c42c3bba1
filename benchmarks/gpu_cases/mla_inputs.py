"""mla_decode 与 mla_prefill 的输入，以及只算几行、几头、几个查询的 fp64 参考。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from benchmarks.gpu_cases.runner import Env
from deepseek_opt import ops, reference


@dataclass(frozen=True)
class Dims:
    """形状：B 行，T 个查询，S 个缓存的词元，H 头。"""

    batch: int
    steps: int
    slots: int
    heads: int
    rank: int = 512
    rope: int = 64
    nope: int = 128
    value: int = 128

    @property
    def scale(self) -> float:
        """得分的系数。"""
        return (self.nope + self.rope) ** -0.5


def small(dims: Dims) -> Dims:
    """quick 用的很小的形状。"""
    few = {"batch": min(dims.batch, 2), "slots": 24, "steps": min(dims.steps, 24)}
    return Dims(**few, heads=2, rank=32, rope=16, nope=16, value=16)


def make(env: Env, dims: Dims, spans: Tensor) -> tuple[Tensor, ...]:
    """(q, latent, rope, kv_b_weight, spans)；q 放大一倍，softmax 就不近于平均。"""
    d = dims
    weight = env.randn(d.heads * (d.nope + d.value), d.rank) * d.rank**-0.5
    return (
        env.randn(d.batch, d.steps, d.heads, d.nope + d.rope) * 2,
        env.randn(d.batch, d.slots, d.rank),
        env.randn(d.batch, d.slots, d.rope),
        weight,
        spans,
    )


def make_spans(env: Env, dims: Dims, op: Callable) -> Tensor:
    """spans 放在设备上（录成 CUDA 图要它），算子只认 CPU 的就放在 CPU 上。"""
    spans = ops.make_spans(dims.batch, dims.steps, dims.slots)
    few = replace(dims, batch=1, steps=1, slots=16)
    return spans.to(env.device) if _spans_on_device(env.device, op, few) else spans


@cache
def _spans_on_device(device: str, op: Callable, dims: Dims) -> bool:
    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, device=device, dtype=torch.bfloat16)

    q = zeros(1, 1, dims.heads, dims.nope + dims.rope)
    latent, rope = zeros(1, dims.slots, dims.rank), zeros(1, dims.slots, dims.rope)
    weight = zeros(dims.heads * (dims.nope + dims.value), dims.rank)
    spans = ops.make_spans(1, 1, dims.slots).to(device)
    try:
        op(q, latent, rope, None, weight, spans, None, dims.scale, dims.value)
    except (RuntimeError, ValueError):  # 没有这个核也在内：真正运行时再报
        return False
    return True


def spread(count: int, wanted: int = 4) -> list[int]:
    """0 到 count - 1 里均匀取几个，含两端。"""
    if count <= wanted:
        return list(range(count))
    return sorted({round(i * (count - 1) / (wanted - 1)) for i in range(wanted)})


def pick_heads(dims: Dims, heads: list[int], weight: Tensor) -> Tensor:
    """kv_b_weight 里这几头的部分。"""
    return weight.view(dims.heads, -1, dims.rank)[heads].flatten(0, 1)


def expected(  # pylint: disable=too-many-arguments
    dims: Dims,
    tensors: tuple[Tensor, ...],
    row: int,
    heads: list[int],
    begin: int,
    end: int,
) -> Tensor:
    """第 row 行、这几头、第 [begin, end) 个查询的 fp64 结果 [end - begin, h, dv]；可求导。

    tensors 是 (q, latent, rope, kv_b_weight)，kv_b_weight 已经只含这几头。
    """
    q, latent, rope, weight = tensors
    visible = dims.slots - dims.steps + end
    out, _ = reference.mla_prefill(
        q[row : row + 1, begin:end][:, :, heads].double(),
        latent[row : row + 1, :visible].double(),
        rope[row : row + 1, :visible].double(),
        None,
        weight.double(),
        ops.make_spans(1, end - begin, visible),
        None,
        dims.scale,
        dims.value,
    )
    return out[0]
