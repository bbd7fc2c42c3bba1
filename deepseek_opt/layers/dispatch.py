"""路由之后、计算之前：容量与丢弃、由专家选词元、强制均衡。

记号：T 词元数，E 专家数，k 每个词元的专家数，C 容量。被丢弃的位置下标为哨兵 E、权重为 0。
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Dispatch(NamedTuple):
    """weights、indices : [T, k]。counts : [E] 选中每个专家的词元数。dropped : 标量，没有丢弃时 None。"""

    weights: Tensor
    indices: Tensor
    counts: Tensor
    dropped: Tensor | None = None


def count_experts(indices: Tensor, experts: int) -> Tensor:
    """下标（哨兵除外）出现的次数 [E]。"""
    flat = indices.reshape(-1)
    counts = flat.new_zeros(experts + 1).scatter_add_(0, flat, torch.ones_like(flat))
    return counts[:experts]


def capacity(tokens: int, top_k: int, experts: int, factor: float) -> int:
    """每个专家至多处理的词元数：⌈factor · T · k / E⌉。"""
    return math.ceil(factor * tokens * top_k / experts)


def drop_over_capacity(
    routed: Dispatch, limit: int, *, by_weight: bool, renormalize: bool
) -> Dispatch:
    """每个专家只留 limit 个词元。

    by_weight 时留权重最大的，否则留先到的（词元次序，同一词元里按名次）。renormalize 时把每个词元
    其余的权重放大到原来的总和；一个都不剩的词元得 0。counts 仍是丢弃之前的：偏置更新要看真实的需求。
    """
    experts = routed.counts.shape[0]
    flat = routed.indices.reshape(-1)
    if by_weight:
        first = routed.weights.detach().reshape(-1).argsort(descending=True, stable=True)
        order = first[flat[first].argsort(stable=True)]
    else:
        order = flat.argsort(stable=True)
    ordered = flat[order]
    begin = torch.searchsorted(ordered, torch.arange(experts + 1, device=flat.device))
    rank = torch.arange(flat.numel(), device=flat.device) - begin[ordered]
    keep = torch.empty_like(flat, dtype=torch.bool)
    keep[order] = rank < limit
    keep = keep.view_as(routed.indices) & (routed.indices < experts)
    weights = routed.weights * keep
    if renormalize:
        total, left = (w.sum(-1, keepdim=True) for w in (routed.weights, weights))
        weights = weights * torch.where(left > 0, total / left.clamp_min(1e-20), 0.0)
    indices = routed.indices.masked_fill(~keep, experts)
    dropped = ((routed.indices < experts) & ~keep).sum()
    return Dispatch(weights, indices, routed.counts, dropped)


def expert_choice(scores: Tensor, limit: int, scale: float) -> Dispatch:
    """每个专家取得分最高的 limit 个词元；scores [T, E] 可求导。"""
    tokens, experts = scores.shape
    limit = min(limit, tokens)
    picked = scores.detach().argsort(dim=0, descending=True, stable=True)[:limit]  # [C, E]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, picked, True)
    width = max(int(chosen.sum(-1).max()), 1) if tokens else 1
    order = chosen.int().argsort(dim=-1, descending=True, stable=True)[:, :width]
    kept = chosen.gather(-1, order)
    weights = scores.gather(-1, order) * kept * scale
    counts = torch.full((experts,), limit, dtype=torch.int64, device=scores.device)
    return Dispatch(weights, order.masked_fill(~kept, experts), counts)


def forced_balance(weights: Tensor, experts: int) -> Dispatch:
    """不看得分，轮流分给各专家；权重不变。只用于测速。"""
    slots = torch.arange(weights.numel(), device=weights.device)
    indices = (slots % experts).view(weights.shape)
    return Dispatch(weights, indices, count_experts(indices, experts))
