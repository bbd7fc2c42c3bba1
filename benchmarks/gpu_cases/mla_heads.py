"""mla_decode 前后各头的矩阵乘（吸收、W_UV）：缓存只有一块键，时间大半在它们与核之间的空隙上。

没有单独的算子：量的是整个 mla_decode；details 里另有同样两个矩阵乘的 torch.bmm（bmm_us）、不提前启动的（no_pdl_us）与那时各核的
时长（profile）。没有要求。
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_cases import kernels, mla_decode, mla_inputs
from benchmarks.gpu_cases.environment import setting
from benchmarks.gpu_cases.mla_inputs import Dims
from benchmarks.gpu_cases.runner import Case, Env, Row, measure

SLOTS = 64
# 词元 x 头至多 2048 个是自己的核：每种头数最后一个是 cuBLAS
BATCHES = {16: (16, 32, 64, 128, 256), 128: (9, 16, 32, 64)}
SHAPES = [(heads, batch) for heads, batches in BATCHES.items() for batch in batches]


def cases(_: Env) -> list[Case]:
    """每行一个新词元，bf16。"""
    return [
        Case(f"mla_heads.h{heads}.b{batch}", partial(_run, Dims(batch, 1, SLOTS, heads)))
        for heads, batch in SHAPES
    ]


def _run(dims: Dims, env: Env) -> Iterator[Row]:
    key = f"mla_heads.h{dims.heads}.b{dims.batch}"
    dims = mla_inputs.small(dims) if env.quick else dims
    work = mla_decode.work(dims, env, key)
    products = dims.heads * (dims.nope + dims.value) * dims.rank
    cache = dims.slots * (dims.rank + dims.rope)
    work = replace(
        work,
        peers={name: call for name, call in work.peers.items() if name != "Triton"},
        bytes=2 * (products + dims.batch * cache),
        flops=work.flops + 2 * dims.batch * products,
    )
    row = measure(env, work)
    inputs = [work.make() for _ in range(env.timer.copies(int(work.bytes)))]
    with torch.no_grad():
        with setting(kernels.PDL, "0"):
            apart = env.timer.prepare(work.ours, inputs, graph=True)
        both = env.timer.prepare(partial(_bmm, dims), inputs, graph=True)
        row.details["no_pdl_us"], row.details["bmm_us"] = env.timer.in_turn([apart, both])
        row.details |= kernels.profiled(apart, env.device)
    yield row


def _bmm(dims: Dims, q: Tensor, latent: Tensor, _rope: Tensor, weight: Tensor, *_) -> Tensor:
    """只有两个矩阵乘：W_UV 乘的是缓存的第一个词元，各头相同。"""
    w_k, w_v = weight.view(dims.heads, -1, dims.rank).split((dims.nope, dims.value), 1)
    torch.bmm(q[:, 0, :, : dims.nope].transpose(0, 1), w_k)
    return torch.bmm(latent[:, 0].expand(dims.heads, -1, -1), w_v.mT)
