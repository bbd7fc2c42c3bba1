"""MTP 算子的参考实现。"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_opt.reference.dense import rms_norm
from deepseek_opt.reference.precision import wide
from deepseek_opt.reference.sample import pick


def mtp_draft_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, vocabulary: Tensor | None
) -> Tensor:
    """候选的分数的 argmax。"""
    kept = slice(None) if vocabulary is None else vocabulary
    dtype = wide(hidden)
    scores = hidden.to(dtype) @ weight[kept].to(dtype).T
    if bias is not None:
        scores = scores + bias[kept].to(dtype)
    best = scores.argmax(-1)
    return best if vocabulary is None else vocabulary[best]


def mtp_verify_greedy(
    logits: Tensor, drafts: Tensor, draft_len: Tensor | None
) -> tuple[Tensor, Tensor]:
    """逐行、逐个草稿地比较。"""
    rows, most = drafts.shape
    accepted, chosen = drafts.new_zeros(rows), drafts.new_zeros(rows)
    for r in range(rows):
        length = most if draft_len is None else int(draft_len[r])
        best = logits[r].argmax(-1)
        n = 0
        while n < length and drafts[r, n] == best[n]:
            n += 1
        accepted[r], chosen[r] = n, best[n]
    return accepted, chosen


def mtp_verify_sample(
    probs: Tensor,
    drafts: Tensor,
    draft_len: Tensor | None,
    draft_probs: Tensor | None,
    uniform: Tensor,
) -> tuple[Tensor, Tensor]:
    """逐行、逐个草稿地接受或拒绝，以 fp64 计算。"""
    rows, most = drafts.shape
    p = probs.double()
    q = F.one_hot(drafts, p.shape[-1]).double() if draft_probs is None else draft_probs.double()
    accepted, chosen = drafts.new_zeros(rows), drafts.new_zeros(rows)
    for r in range(rows):
        length = most if draft_len is None else int(draft_len[r])
        n = 0
        while n < length:
            x = drafts[r, n]
            if not uniform[r, n].double() * q[r, n, x] < p[r, n, x]:
                break
            n += 1
        weights = p[r, n]
        if n < length and (p[r, n] > q[r, n]).any():
            weights = (p[r, n] - q[r, n]).clamp(min=0)
        accepted[r], chosen[r] = n, pick(weights, uniform[r, most])
    return accepted, chosen


def mtp_input(
    embedding: Tensor,
    hidden: Tensor,
    embedding_norm: Tensor,
    hidden_norm: Tensor,
    weight: Tensor,
    eps: float,
) -> Tensor:
    """两个 RMS 归一化，拼接（词嵌入在前），再投影。"""
    rows = torch.cat(
        [rms_norm(embedding, embedding_norm, eps), rms_norm(hidden, hidden_norm, eps)], -1
    )
    dtype = wide(rows, weight)
    return F.linear(rows.to(dtype), weight.to(dtype)).to(embedding.dtype)
