"""稠密算子的参考实现。"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_opt.reference.precision import wide


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ (+ bias)；x [..., K]，weight [N, K]，返回 [..., N]，dtype 随 x。"""
    dtype = wide(x, weight)
    y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    return y.to(x.dtype)


def swiglu_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate x) * up x)；gate、up [I, K]，down [N, I]，返回 [..., N]。"""
    dtype = wide(x, gate)
    h = F.silu(F.linear(x.to(dtype), gate.to(dtype))) * F.linear(x.to(dtype), up.to(dtype))
    return F.linear(h, down.to(dtype)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """最后一维的 RMS 归一化：fp32 内归一化，转回 x 的 dtype，再乘 weight。"""
    dtype = wide(x)
    normed = x.to(dtype) * torch.rsqrt(x.to(dtype).pow(2).mean(-1, keepdim=True) + eps)
    return (normed.to(x.dtype) * weight).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """先加残差再归一化；返回 (归一化结果, x + residual)。"""
    total = x + residual
    return rms_norm(total, weight, eps), total
