"""对照：用 Triton 写的分组矩阵乘专家（SwiGLU），两个核。不随包发布。

按专家排好的行切成块，各块的专家由设备上的表给出，不等设备；x 在读入时收集，gate 与 up 一次算完、激活在写出时，
第二个核乘上系数、写回词元原来的位置，最后按词元求和。各候选的块大小在第一次遇到一种形状时各量几次，取最快的。
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu_cases.triton_tune import Config, fastest

GROUP_ROWS = 8  # 相邻几块行一起走完各列：它们的 x 与权重在 L2 里
# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages)；第一个核每块的累加器是 BLOCK_M x 2 BLOCK_N。
CONFIGS = ((128, 128, 64, 8, 3), (128, 64, 64, 4, 3), (64, 128, 64, 4, 3), (128, 128, 32, 8, 4))
_chosen: dict[tuple[int, ...], Config] = {}


@triton.jit
def _place(tiles, columns, GROUP: tl.constexpr):
    """第几块行、第几块列：GROUP 块行一组，组内先换行。"""
    pid = tl.program_id(0)
    size = GROUP * columns
    first = pid // size * GROUP
    rows = tl.minimum(tiles - first, GROUP)
    return first + pid % size % rows, pid % size // rows


@triton.jit
def _rows(tile, begin_ptr, end_ptr, BLOCK_M: tl.constexpr):
    """一块的各行，以及是不是真的有。"""
    row = tl.load(begin_ptr + tile) + tl.arange(0, BLOCK_M)
    return row, row < tl.load(end_ptr + tile)


@triton.jit
def up_kernel(
    x_ptr,
    weight_ptr,
    h_ptr,
    order_ptr,
    expert_ptr,
    begin_ptr,
    end_ptr,
    tiles,
    top_k,
    experts,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h [排好的行, I] = silu(x gateᵀ) * (x upᵀ)；weight [E, 2 I, H]。"""
    tile, column = _place(tiles, tl.cdiv(INNER, BLOCK_N), GROUP)
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    if expert >= experts:
        return
    row, live = _rows(tile, begin_ptr, end_ptr, BLOCK_M)
    token = tl.load(order_ptr + row, mask=live, other=0) // top_k
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + token[:, None] * HIDDEN + k[None, :]
    gate_at = weight_ptr + expert * 2 * INNER * HIDDEN + n[None, :] * HIDDEN + k[:, None]
    up_at = gate_at + INNER * HIDDEN
    wide = n[None, :] < INNER
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        inside = start + k < HIDDEN
        x = tl.load(x_at + start, mask=live[:, None] & inside[None, :], other=0.0)
        a = tl.load(gate_at + start, mask=wide & inside[:, None], other=0.0)
        b = tl.load(up_at + start, mask=wide & inside[:, None], other=0.0)
        gate = tl.dot(x, a, gate)
        up = tl.dot(x, b, up)
    h = gate * tl.sigmoid(gate) * up
    at = h_ptr + row[:, None].to(tl.int64) * INNER + n[None, :]
    tl.store(at, h.to(h_ptr.dtype.element_ty), mask=live[:, None] & wide)


@triton.jit
def down_kernel(
    h_ptr,
    weight_ptr,
    mix_ptr,
    out_ptr,
    order_ptr,
    expert_ptr,
    begin_ptr,
    end_ptr,
    tiles,
    experts,
    HIDDEN: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out [词元 x top_k, H] = 系数 * (h downᵀ)，写回原来的位置；weight [E, H, I]。"""
    tile, column = _place(tiles, tl.cdiv(HIDDEN, BLOCK_N), GROUP)
    expert = tl.load(expert_ptr + tile).to(tl.int64)
    if expert >= experts:
        return
    row, live = _rows(tile, begin_ptr, end_ptr, BLOCK_M)
    slot = tl.load(order_ptr + row, mask=live, other=0)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    h_at = h_ptr + row[:, None].to(tl.int64) * INNER + k[None, :]
    down_at = weight_ptr + expert * HIDDEN * INNER + n[None, :] * INNER + k[:, None]
    wide = n[None, :] < HIDDEN
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, INNER, BLOCK_K):
        inside = start + k < INNER
        h = tl.load(h_at + start, mask=live[:, None] & inside[None, :], other=0.0)
        down = tl.load(down_at + start, mask=wide & inside[:, None], other=0.0)
        acc = tl.dot(h, down, acc)
    acc = acc * tl.load(mix_ptr + slot, mask=live, other=0.0)[:, None]
    at = out_ptr + slot[:, None].to(tl.int64) * HIDDEN + n[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=live[:, None] & wide)


@dataclass
class Tiles:
    """排好的行切成的块：order 是各行原来的位置；各块的专家（没有的为 E）、起止行。"""

    order: Tensor
    expert: Tensor
    begin: Tensor
    end: Tensor


def make_tiles(indices: Tensor, experts: int, rows: int) -> Tiles:
    """每块至多 rows 行；块数取上界，不等设备。"""
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.zeros(experts, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat))
    ends, blocks = counts.cumsum(0), (counts + rows - 1) // rows
    last = blocks.cumsum(0)
    tile = torch.arange(triton.cdiv(flat.numel(), rows) + experts, device=flat.device)
    expert = torch.searchsorted(last, tile, right=True)
    inside = expert.clamp(max=experts - 1)
    begin = (ends - counts)[inside] + (tile - (last - blocks)[inside]) * rows
    return Tiles(order, expert, begin, torch.minimum(begin + rows, ends[inside]))


def experts_forward(
    x: Tensor, indices: Tensor, mix: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """x [T, H]、indices 与 mix [T, k]、gate_up [E, 2 I, H]、down [E, H, I] -> [T, H]。"""
    key = (*indices.shape, *down.shape)
    if key not in _chosen:
        run = partial(launch, x, indices, mix, gate_up, down)
        _chosen[key] = fastest(run, CONFIGS, x.device)
    return launch(x, indices, mix, gate_up, down, _chosen[key])


def launch(x, indices, mix, gate_up, down, config: Config) -> Tensor:
    """按给出的块大小算一次。"""
    block_m, block_n, block_k, warps, stages = config
    (tokens, top_k), (experts, hidden, inner) = indices.shape, down.shape
    tiles = make_tiles(indices, experts, block_m)
    count = len(tiles.expert)
    h = torch.empty(tokens * top_k, inner, device=x.device, dtype=x.dtype)
    out = torch.empty(tokens * top_k, hidden, device=x.device, dtype=x.dtype)
    table = (tiles.order, tiles.expert, tiles.begin, tiles.end, count)
    sizes = {"HIDDEN": hidden, "INNER": inner, "GROUP": GROUP_ROWS}
    sizes |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    options = {"num_warps": warps, "num_stages": stages}
    up_grid, down_grid = ((count * triton.cdiv(columns, block_n),) for columns in (inner, hidden))
    up_kernel[up_grid](x, gate_up, h, *table, top_k, experts, **sizes, **options)
    down_kernel[down_grid](h, down, mix, out, *table, experts, **sizes, **options)
    return out.view(tokens, top_k, hidden).sum(1)
