"""量化专家的参考实现：逐个下标反量化，再用 moe_experts 的参考实现。"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_opt.reference.moe import moe_experts


def dequantize(
    packed: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, columns: int, dtype
) -> Tensor:
    """[E, N, columns]。int4：第 k 个权重在第 k / 32 段（16 字节）的第 k % 16 字节，k % 32 >= 16 时是高 4 位。"""
    if group_size == 0:
        return packed.to(dtype) * scale[..., None].to(dtype)
    k = torch.arange(columns)
    if packed.dtype == torch.float8_e4m3fn:
        return packed.to(dtype) * scale[..., k // group_size].to(dtype)
    byte = packed[..., k // 32 * 16 + k % 16]
    codes = torch.where(k % 32 < 16, byte & 15, byte >> 4).to(dtype)
    group = k // group_size
    shift = 8 if zero is None else zero[..., group].to(dtype)
    return (codes - shift) * scale[..., group].to(dtype)


def moe_experts_quantized(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    gate_up_zero: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero: Tensor | None,
    shared: Sequence[Tensor] = (),
    group_size: int = 0,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    *,
    gated: bool = True,
    shared_scale: Sequence[Tensor] = (),
    shared_zero: Sequence[Tensor] = (),
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """反量化（x 是 fp64 时以 fp64），再逐个专家计算。"""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    inner = gate_up.shape[1] // (2 if gated else 1)
    first = dequantize(gate_up, gate_up_scale, gate_up_zero, group_size, x.shape[1], dtype)
    last = dequantize(down, down_scale, down_zero, group_size, inner, dtype)
    if shared_scale:
        zeros = shared_zero or (None,) * 3
        columns = (x.shape[1], x.shape[1], shared[0].shape[0])
        formats = (0 if t.dtype == torch.int8 else group_size for t in shared[:3])
        matrices = zip(shared, shared_scale, zeros, formats, columns)
        shared = [*(dequantize(*m, dtype) for m in matrices), *shared[3:]]
    options = (shared, activation, alpha, limit)
    biases = [None if b is None else b.to(dtype) for b in (gate_up_bias, down_bias)]
    stacked = (first, biases[0], last, biases[1])
    return moe_experts(x, indices, weights, *stacked, *options, gated=gated)
