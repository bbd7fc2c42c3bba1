"""负载均衡的辅助损失与路由的 z 损失。"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-20


def routing_scores(logits: Tensor, kind: str) -> Tensor:
    """logits -> 得分：softmax、sigmoid 或 sqrtsoftplus（softplus 的平方根）。"""
    if kind == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if kind == "sigmoid" else F.softplus(logits).sqrt()


def balance_loss(logits: Tensor, indices: Tensor, kind: str, sequences: int) -> Tensor:
    """均衡损失 Σ_e f_e · P_e，在每个序列里算，再对序列平均；完全均衡时为 1。

    f_e 是专家 e 分到的份额乘以 E（不求导），P_e 是它归一化得分的平均。sequences 为 1 时就是对全部词元
    算的全局损失（Switch Transformer 的写法）。

    logits : [T, E]。indices : [T, k]，丢弃之前的。sequences : 序列数，整除 T。
    """
    experts = logits.shape[-1]
    scores = routing_scores(logits, kind)
    scores = scores / (scores.sum(-1, keepdim=True) + _EPS)
    mean = scores.unflatten(0, (sequences, -1)).mean(1)
    rows = indices.reshape(sequences, -1)
    counts = torch.zeros(sequences, experts, dtype=mean.dtype, device=mean.device)
    counts.scatter_add_(1, rows, torch.ones_like(rows, dtype=mean.dtype))
    share = counts * (experts / rows.shape[1])
    return (share * mean).sum(-1).mean()


def z_loss(logits: Tensor) -> Tensor:
    """logsumexp(logits) 平方的平均：压住 logits 的大小。"""
    return logits.logsumexp(-1).square().mean()
