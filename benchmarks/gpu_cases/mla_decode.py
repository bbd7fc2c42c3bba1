"""mla_decode：128 头看算力，16 头看带宽；对照是 torch 的吸收式（bmm）与一个 Triton 核。分页的缓存另有几项，对照是同样内容不分页的。"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_cases import mla_inputs
from benchmarks.gpu_cases.check import Pairs
from benchmarks.gpu_cases.environment import has_triton
from benchmarks.gpu_cases.mla_inputs import Dims
from benchmarks.gpu_cases.row import Target
from benchmarks.gpu_cases.runner import Case, Env, Row, Work, measure
from deepseek_opt import ops

MANY_HEADS, FEW_HEADS = 128, 16
COMPUTE = Target(600.0, "TFLOP/s")
BANDWIDTH = Target(0.80, "占拷贝带宽")
MANY = [(128, slots << 10) for slots in (4, 8, 16, 32)]
FEW = [(batch, slots << 10) for batch in (32, 64, 128) for slots in (1, 4, 8, 32)]
PAGED = [(MANY_HEADS, 128, 4096), (FEW_HEADS, 64, 8192)]
PAGES = (64, 16)  # 一页几个槽位


def cases(_: Env) -> list[Case]:
    """每行一个新词元，bf16。"""
    shapes = [(MANY_HEADS, *shape) for shape in MANY] + [(FEW_HEADS, *shape) for shape in FEW]
    plain = [(key_of(*shape), shape, 0) for shape in shapes]
    paged = [(f"{key_of(*shape)}.page{size}", shape, size) for shape in PAGED for size in PAGES]
    return [
        Case(key, partial(_run, key, Dims(batch, 1, slots, heads), size))
        for key, (heads, batch, slots), size in plain + paged
    ]


def key_of(heads: int, batch: int, slots: int) -> str:
    return f"mla_decode.h{heads}.b{batch}.s{slots}"


def _run(key: str, dims: Dims, page_size: int, env: Env) -> Iterator[Row]:
    many, used = dims.heads == MANY_HEADS, mla_inputs.small(dims) if env.quick else dims
    if page_size:
        row = measure(env, paged_work(used, min(page_size, used.slots // 3), env, key))
    else:
        row = measure(env, work(used, env, key))
    if many:
        yield row.judge(row.tflops, COMPUTE.unit, COMPUTE)
    else:
        yield row.judge(row.gbps / env.copy_gbps, BANDWIDTH.unit, BANDWIDTH)


def work(dims: Dims, env: Env, key: str) -> Work:
    """flops 只数吸收之后的注意力；bytes 只数缓存。"""
    spans = mla_inputs.make_spans(env, dims, ops.mla_decode)
    width = dims.rank + dims.rope
    return Work(
        key,
        torch.bfloat16,
        lambda: mla_inputs.make(env, dims, spans),
        partial(_ours, dims),
        peers(dims, env.device),
        partial(_pairs, dims),
        bytes=dims.batch * dims.slots * width * 2,
        flops=2 * dims.batch * dims.heads * dims.slots * (width + dims.rank),
        graph=True,
        details={"spans": str(spans.device)},
    )


def paged_work(dims: Dims, page_size: int, env: Env, key: str) -> Work:
    """同样的一项，另有打乱次序的页与页表；参考与不分页的用原来的缓存。"""
    plain = work(dims, env, key)

    def make() -> tuple:
        tensors = plain.make()
        return (*tensors, *to_pages(page_size, *tensors[1:3]))

    return replace(
        plain,
        make=make,
        ours=partial(_paged, dims),
        peers={"本库，不分页": lambda *args: _ours(dims, *args[:5])},
        pairs=lambda args, out: _pairs(dims, args[:5], out),
        details=plain.details | {"page_size": page_size},
    )


def to_pages(page_size: int, *caches: Tensor) -> list[Tensor]:
    """各 [B, S, *] 的缓存换成打乱的页 [页数, page_size, *]，最后是页表 [B, S / page_size] int32。"""
    batch, slots = caches[0].shape[:2]
    order = torch.randperm(batch * slots // page_size, device=caches[0].device)
    stores = [torch.empty_like(c).view(len(order), page_size, -1) for c in caches]
    for store, cache in zip(stores, caches, strict=True):
        store[order] = cache.view(len(order), page_size, -1)
    return [*stores, order.view(batch, -1).to(torch.int32)]


def _paged(dims: Dims, q, _latent, _rope, weight, spans, *paged: Tensor) -> Tensor:
    latent, rope, table = paged
    return ops.mla_decode(
        q, latent, rope, None, weight, spans, None, dims.scale, dims.value, block_table=table
    )


def peers(dims: Dims, device: str) -> dict[str, Callable]:
    """torch 的吸收式；装了 triton 时另有 Triton 核。"""
    found = {"torch 吸收式 bmm": partial(absorbed, dims, attend_bmm)}
    if has_triton(device):
        found["Triton"] = partial(absorbed, dims, attend_triton)
    return found


def attend_triton(*args: Any) -> Tensor:
    """Triton 核；用到时才导入，导入不了也只是没有这个对照。"""
    from benchmarks.gpu_cases.triton_mla_decode import attend

    return attend(*args)


def _ours(dims: Dims, q, latent, rope, weight, spans) -> Tensor:
    return ops.mla_decode(q, latent, rope, None, weight, spans, None, dims.scale, dims.value)


def _pairs(dims: Dims, args: tuple, out: Tensor) -> Pairs:
    q, latent, rope, weight, _ = args
    heads = mla_inputs.spread(dims.heads)
    part = mla_inputs.pick_heads(dims, heads, weight)
    for row in mla_inputs.spread(dims.batch):
        wanted = mla_inputs.expected(dims, (q, latent, rope, part), row, heads, 0, 1)
        yield f"第 {row} 行", out[row, :, heads], wanted


def absorbed(dims: Dims, attend: Callable, q, latent, rope, weight, _spans) -> Tensor:
    """W_UK 并入查询，attend 在潜变量上做注意力，W_UV 并入输出；两处都是 bmm。"""
    w_k, w_v = weight.view(dims.heads, -1, dims.rank).split((dims.nope, dims.value), 1)
    nope, turned = q[:, 0].split((dims.nope, dims.rope), -1)
    wide = torch.bmm(nope.transpose(0, 1), w_k).transpose(0, 1)  # [B, H, r]
    out = attend(wide, turned, latent, rope, dims.scale)
    return torch.bmm(out.transpose(0, 1), w_v.mT).transpose(0, 1)[:, None]


def attend_bmm(q: Tensor, turned: Tensor, latent: Tensor, rope: Tensor, scale: float) -> Tensor:
    """逐步计算：得分 [B, H, S] 存成半精度，softmax 用 fp32。"""
    scores = torch.bmm(turned * scale, rope.mT)
    scores = torch.baddbmm(scores, q * scale, latent.mT)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights, latent)
