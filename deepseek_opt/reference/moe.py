"""MoE 算子的参考实现。"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_opt.reference.precision import wide


def activate(gate: Tensor, up: Tensor | None, name: str, alpha: float, limit: float) -> Tensor:
    """a(gate) * up；没有 up 时为 a(gate)。"""
    if name in ("clipped", "clipped_silu"):
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        if name == "clipped_silu":
            return F.silu(gate) * up
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


def moe_experts_list(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_bias: Sequence[Tensor] = (),
    up_bias: Sequence[Tensor] = (),
    down_bias: Sequence[Tensor] = (),
    shared: Sequence[Tensor] = (),
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    *,
    gated: bool = True,
) -> Tensor:
    """每个专家的权重叠成 [1, ...]，分别用 :func:`moe_experts` 算，再相加。"""
    dtype = wide(x, gate[0])
    y = x.new_zeros(x.shape[0], down[0].shape[0], dtype=dtype)

    if up and bool(gate_bias) != bool(up_bias):  # 只有一个有偏置：另一个为 0
        zeros = [t[:, 0] * 0 for t in up]
        gate_bias, up_bias = gate_bias or zeros, up_bias or zeros

    def joined(first: Sequence[Tensor], second: Sequence[Tensor], e: int) -> Tensor | None:
        parts = [t[e].to(dtype) for t in (first, second) if t]
        return torch.cat(parts)[None] if parts else None

    flags = {"gated": gated}
    for e, last in enumerate(down):
        mine = torch.where(indices == e, 0, 1)
        bias = down_bias[e][None] if down_bias else None
        args = (joined(gate, up, e), joined(gate_bias, up_bias, e), last[None], bias, ())
        act = (activation, alpha, limit)
        y = y + moe_experts(x.to(dtype), mine, weights, *args, *act, **flags)
    if shared:
        none = torch.full_like(indices, 1)
        empty = (joined(gate, up, 0), None, down[0][None], None, shared)
        y = y + moe_experts(x.to(dtype), none, weights, *empty, activation, alpha, limit, **flags)
    return y.to(x.dtype)


def route_scores(logits: Tensor, score: str) -> Tensor:
    """路由的打分。"""
    if score == "sqrtsoftplus":
        return F.softplus(logits, threshold=100.0).sqrt()
    return torch.sigmoid(logits) if score == "sigmoid" else torch.softmax(logits, -1)


def _best(values: Tensor, count: int) -> Tensor:
    """最大的 count 个的下标，从大到小；相同时下标小的在前，NaN 最大。"""
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :count]


def _open_groups(choice: Tensor, n_group: int, topk_group: int, group_score: str) -> Tensor:
    """[T, E]：属于得分最高的 topk_group 组的为 True。"""
    groups = choice.unflatten(-1, (n_group, -1))
    best = min(groups.shape[-1], 2 if group_score == "top2" else 1)
    chosen = _best(groups.topk(best, dim=-1).values.sum(-1), topk_group)
    mask = torch.zeros(groups.shape[:-1], dtype=torch.bool, device=choice.device)
    return mask.scatter(-1, chosen, True).repeat_interleave(groups.shape[-1], -1)


def moe_route(
    x: Tensor,
    weight: Tensor | None,
    logit_bias: Tensor | None,
    choice_bias: Tensor | None,
    top_k: int,
    score: str,
    normalize: bool,
    softmax_after: bool,
    n_group: int,
    topk_group: int,
    group_score: str,
    scaling: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """全排序选 top-k。"""
    dtype = wide(x) if weight is None else wide(x, weight)
    logits = x.to(dtype) if weight is None else x.to(dtype) @ weight.to(dtype).mT
    logits = logits if logit_bias is None else logits + logit_bias.to(dtype)
    scores = logits if softmax_after else route_scores(logits, score)
    choice = scores.detach() if choice_bias is None else scores.detach() + choice_bias.to(dtype)
    if topk_group < n_group:
        allowed = _open_groups(choice, n_group, topk_group, group_score)
        order = _best(choice, choice.shape[-1])  # 只留开放的组；得分可能是 -inf，不能靠填 -inf
        keep = _best(allowed.gather(-1, order).int(), top_k)
        indices = order.gather(-1, keep)
    else:
        indices = _best(choice, top_k)
    weights = scores.gather(-1, indices)
    weights = torch.softmax(weights, -1) if softmax_after else weights
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    counts = torch.bincount(indices.flatten(), minlength=choice.shape[-1])
    return logits, weights * scaling, indices, counts
