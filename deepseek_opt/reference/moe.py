"""MoE 算子的参考实现。"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_opt.reference.precision import wide


def activate(gate: Tensor, up: Tensor | None, name: str, alpha: float, limit: float) -> Tensor:
    """a(gate) * up；没有 up 时为 a(gate)。"""
    if name == "clipped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    functions = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda v: F.relu(v).square(),
    }
    value = functions[name](gate)
    return value if up is None else value * up


def moe_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    shared: Sequence[Tensor] = (),
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    *,
    transposed: bool = False,
    interleaved: bool = False,
    gated: bool = True,
) -> Tensor:
    """逐个专家计算，按专家的次序累加。"""
    dtype = wide(x, gate_up)
    if not transposed:
        gate_up, down = gate_up.mT, down.mT
    y = x.new_zeros(x.shape[0], down.shape[2], dtype=dtype)
    for e in range(gate_up.shape[0]):
        token, place = torch.where(indices == e)
        joint = x[token].to(dtype) @ gate_up[e].to(dtype)
        if gate_up_bias is not None:
            joint = joint + gate_up_bias[e].to(dtype)
        halves = (joint[:, ::2], joint[:, 1::2]) if interleaved else joint.chunk(2, -1)
        gate, up = halves if gated else (joint, None)
        out = activate(gate, up, activation, alpha, limit) @ down[e].to(dtype)
        if down_bias is not None:
            out = out + down_bias[e].to(dtype)
        y = y.index_add(0, token, out * weights[token, place, None].to(dtype))
    if shared:
        gate, up, last = (w.to(dtype) for w in shared[:3])
        wide_x = x.to(dtype)
        out = activate(wide_x @ gate.mT, wide_x @ up.mT, activation, alpha, limit) @ last.mT
        y = y + (out if len(shared) == 3 else out * shared[3][:, None].to(dtype))
    return y.to(x.dtype)
