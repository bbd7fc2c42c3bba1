"""采样算子的参考实现。"""

from __future__ import annotations

import torch
from torch import Tensor


def pick(weights: Tensor, u: Tensor) -> Tensor:
    """weights [V] 中第一个累计超过 u · 总和的、权重大于 0 的下标。"""
    total = weights.double().cumsum(0)
    beyond = (total > u.double() * total[-1]) & (weights > 0)
    last = (weights > 0).nonzero()[-1, 0]  # 舍入使得没有一个超过时
    return beyond.int().argmax() if beyond.any() else last


def sample_tokens(probs: Tensor, uniform: Tensor) -> Tensor:
    """逐行的逆累积分布抽样。"""
    rows = [pick(row, u) for row, u in zip(probs, uniform, strict=True)]
    return torch.stack(rows) if rows else uniform.new_zeros(0, dtype=torch.int64)


def _penalized(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """scores [V]；seen 里的词元正的除以 penalty，负的乘。"""
    ids = seen[(seen >= 0) & (seen < scores.numel())].unique()
    old = scores[ids]
    return scores.scatter(0, ids, torch.where(old < 0, old * penalty, old / penalty))


def _filtered(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """scores [V] 依次做 top-k、top-p、min-p，去掉的为 -inf。"""
    if top_k:
        bound = scores.topk(min(top_k, scores.numel())).values[-1]
        scores = scores.masked_fill(scores < bound, -torch.inf)
    if top_p < 1:
        values, order = torch.sort(scores, stable=True)
        dropped = values.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[-1] = False
        scores = scores.masked_fill(dropped.scatter(0, order, dropped), -torch.inf)
    if min_p > 0:
        p = scores.softmax(-1)
        scores = scores.masked_fill(p < min_p * p.amax(), -torch.inf)
    return scores


def sample_filter(
    logits: Tensor,
    token_ids: Tensor | None,
    token_len: Tensor | None,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
) -> Tensor:
    """transformers 各处理器的写法，逐个位置，top-p 用稳定的排序；fp64 输入时以 fp64 计算。"""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    probs = torch.empty(logits.shape, dtype=dtype)
    for r, i in torch.cartesian_prod(*(torch.arange(n) for n in logits.shape[:2])).tolist():
        scores = logits[r, i].to(dtype)
        if repetition_penalty != 1:
            seen = token_ids[r] if token_len is None else token_ids[r, : int(token_len[r, i])]
            scores = _penalized(scores, seen, repetition_penalty)
        scores = _filtered(scores / temperature, top_k, top_p, min_p)
        probs[r, i] = scores.softmax(-1)
    return probs
