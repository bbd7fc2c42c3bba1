"""路由：隐状态 -> 每个词元的专家与权重。"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_opt.config import MOEConfig

_EPS = 1e-20


class RoutingResult(NamedTuple):
    """logits [T, E] fp32，weights [T, k] fp32，indices [T, k] int64，counts [E] int64。"""

    logits: Tensor
    weights: Tensor
    indices: Tensor
    counts: Tensor


class ExpertRouter(nn.Module):
    """按 MOEConfig 选专家。"""

    def __init__(self, config: MOEConfig, hidden_size: int, *, device=None, dtype=None):
        super().__init__()
        self.config = config
        experts = config.num_experts
        self.weight = nn.Parameter(torch.empty(experts, hidden_size, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)
        bias = torch.zeros(experts, device=device, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, hidden: Tensor) -> RoutingResult:
        """[..., hidden] -> RoutingResult。"""
        config = self.config
        x = hidden.reshape(-1, hidden.shape[-1]).float()
        if self.training and config.router_jitter:
            x = x * torch.empty_like(x).uniform_(1 - config.router_jitter, 1 + config.router_jitter)
        logits = F.linear(x, self.weight.float())
        after = config.normalize_before_topk is False
        scores = logits if after else _scores(logits, config.scoring_func or "sigmoid")
        choice = scores.detach() + self.e_score_correction_bias.float()
        if (config.n_group or 1) > 1:
            choice = _limited(choice, config)
        indices = choice.argsort(dim=-1, descending=True, stable=True)[
            :, : config.num_experts_per_tok
        ]
        weights = scores.gather(-1, indices)
        if after:
            weights = weights.softmax(-1)
        elif config.norm_topk_prob is not False:
            weights = weights / (weights.sum(-1, keepdim=True) + _EPS)
        weights = weights * (config.routed_scaling_factor or 1.0)
        counts = torch.bincount(indices.flatten(), minlength=config.num_experts)
        return RoutingResult(logits, weights, indices, counts)


def _scores(logits: Tensor, name: str) -> Tensor:
    if name == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if name == "sigmoid" else F.softplus(logits).sqrt()


def _limited(choice: Tensor, config: MOEConfig) -> Tensor:
    """没有选中的组里的专家记 -inf。"""
    groups = choice.unflatten(-1, (config.n_group, -1))
    if config.group_score == "max":
        score = groups.amax(-1)
    else:
        score = groups.topk(min(2, groups.shape[-1]), -1)[0].sum(-1)
    chosen = score.topk(config.topk_group or config.n_group, -1)[1]
    keep = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, chosen, True)
    return groups.masked_fill(~keep[..., None], float("-inf")).flatten(-2)
