"""自建 Transformer 用的层：MLAAttention、MoEFeedForward、ExpertRouter，以及替换 nn.MultiheadAttention 的层。"""

from __future__ import annotations

from deepseek_opt.layers.mha import LatentMultiheadAttention
from deepseek_opt.layers.mla_attention import MLAAttention
from deepseek_opt.layers.moe import MoEFeedForward, aux_loss
from deepseek_opt.layers.replace import (
    ReplacedAttention,
    ReplacementReport,
    replace_mha,
    restore_mha,
)
from deepseek_opt.layers.router import ExpertRouter, RoutingResult

__all__ = [
    "ExpertRouter",
    "LatentMultiheadAttention",
    "MLAAttention",
    "MoEFeedForward",
    "ReplacedAttention",
    "ReplacementReport",
    "RoutingResult",
    "aux_loss",
    "replace_mha",
    "restore_mha",
]
