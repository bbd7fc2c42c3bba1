"""对照：用 Triton 写的吸收式 MLA 解码，缓存分段、最后合并（split-KV）。不随包发布。

每个程序算一行、BLOCK_H 个头、一段缓存：潜变量读一次，先当键再当值。没有手工的流水与寄存器划分，
各候选的块大小在第一次遇到一种形状时各量几次，取最快的。
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu_cases.triton_tune import Config, fastest

LOG2E = 1.4426950408889634
MIN_SPAN = 128  # 一段至少这么多词元，再短则合并的开销占多数
# (BLOCK_N, num_warps, num_stages)；都在 sm_90 的 227 KiB 共享内存以内，没有溢出的寄存器。
FEW_HEADS = ((64, 4, 3), (64, 4, 2), (64, 8, 3))
MANY_HEADS = ((64, 8, 2), (32, 8, 3), (32, 8, 2))
_chosen: dict[tuple[int, ...], Config] = {}


@triton.jit
def split_kernel(
    q_ptr,
    turned_ptr,
    latent_ptr,
    rope_ptr,
    part_ptr,
    lse_ptr,
    slots,
    heads,
    span,
    splits,
    scale,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """q [B, H, r]、turned [B, H, dr] -> part [B, H, splits, r]（已归一化）、lse [B, H, splits]。"""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    at = row * heads + head
    live = head < heads
    r, d = tl.arange(0, RANK), tl.arange(0, ROPE)
    q = tl.load(q_ptr + at[:, None] * RANK + r[None, :], mask=live[:, None], other=0.0)
    turned = tl.load(turned_ptr + at[:, None] * ROPE + d[None, :], mask=live[:, None], other=0.0)
    latent_ptr += row * slots * RANK
    rope_ptr += row * slots * ROPE
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, RANK], tl.float32)
    begin = split * span
    end = tl.minimum(begin + span, slots)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        seen = n < end
        c = tl.load(latent_ptr + n[:, None] * RANK + r[None, :], mask=seen[:, None], other=0.0)
        k = tl.load(rope_ptr + n[:, None] * ROPE + d[None, :], mask=seen[:, None], other=0.0)
        score = tl.dot(q, tl.trans(c))
        score = tl.dot(turned, tl.trans(k), score) * scale
        score = tl.where(seen[None, :], score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new[:, None])
        fade = tl.exp2(top - new)
        total = total * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(c.dtype), c, acc * fade[:, None])
        top = new
    at = at * splits + split
    part = acc / total[:, None]
    tl.store(part_ptr + at[:, None] * RANK + r[None, :], part, mask=live[:, None])
    tl.store(lse_ptr + at, top + tl.log2(total), mask=live)


@triton.jit
def combine_kernel(part_ptr, lse_ptr, out_ptr, splits, RANK: tl.constexpr):
    """各段按 lse 加权；一个程序一个（行，头）。"""
    at = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, RANK)
    top = float("-inf")
    for split in range(splits):
        top = tl.maximum(top, tl.load(lse_ptr + at * splits + split))
    total = 0.0
    acc = tl.zeros([RANK], tl.float32)
    for split in range(splits):
        weight = tl.exp2(tl.load(lse_ptr + at * splits + split) - top)
        total += weight
        acc += weight * tl.load(part_ptr + (at * splits + split) * RANK + r)
    tl.store(out_ptr + at * RANK + r, (acc / total).to(out_ptr.dtype.element_ty))


def attend(q: Tensor, turned: Tensor, latent: Tensor, rope: Tensor, scale: float) -> Tensor:
    """q [B, H, r]、turned [B, H, dr]、latent [B, S, r]、rope [B, S, dr] -> [B, H, r]。"""
    q, turned = q.contiguous(), turned.contiguous()
    key = (q.shape[0], q.shape[1], latent.shape[1])
    if key not in _chosen:
        configs = MANY_HEADS if q.shape[1] >= 64 else FEW_HEADS
        run = partial(launch, q, turned, latent, rope, scale)
        _chosen[key] = fastest(run, configs, q.device)
    return launch(q, turned, latent, rope, scale, _chosen[key])


def launch(q, turned, latent, rope, scale: float, config: Config) -> Tensor:
    """按给出的块大小算一次。"""
    (batch, heads, rank), slots = q.shape, latent.shape[1]
    block_n, warps, stages = config
    block_h = 64 if heads >= 64 else 16
    groups = triton.cdiv(heads, block_h)
    span, splits = _split(batch * groups, slots, block_n, q.device)
    part = torch.empty(batch, heads, splits, rank, device=q.device, dtype=torch.float32)
    lse = torch.empty(batch, heads, splits, device=q.device, dtype=torch.float32)
    out = torch.empty_like(q)
    split_kernel[(batch, groups, splits)](
        *(q, turned, latent, rope, part, lse),
        *(slots, heads, span, splits, scale * LOG2E),
        **{"RANK": rank, "ROPE": rope.shape[2], "BLOCK_H": block_h, "BLOCK_N": block_n},
        num_warps=warps,
        num_stages=stages,
    )
    combine_kernel[(batch * heads,)](part, lse, out, splits, RANK=rank)
    return out


def _split(programs: int, slots: int, block_n: int, device: torch.device) -> tuple[int, int]:
    """(每段词元数，段数)：凑够两轮多处理器，段不短于 MIN_SPAN，没有空段。"""
    processors = 132
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    wanted = max(1, min(triton.cdiv(2 * processors, programs), triton.cdiv(slots, MIN_SPAN)))
    span = triton.cdiv(triton.cdiv(slots, wanted), block_n) * block_n
    return span, triton.cdiv(slots, span)
