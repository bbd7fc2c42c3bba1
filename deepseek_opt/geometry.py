"""读出模型的形状（层数、维度、FFN 宽度、权重字节数），供内存估算使用。"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deepseek_opt.errors import UnsupportedError
from deepseek_opt.layers.dims import MLADims
from deepseek_opt.layers.projections import LatentProjections


@dataclass(frozen=True)
class ModelGeometry:
    """模型的形状。

    hidden_size : 残差流宽度 D。
    layers : 有 MLA 的层数（决定缓存）。
    dims : 最宽的一层 MLA 的维度。
    latent_width : 每个词元在全部层里缓存的 (r, dr) 之和。
    ffn_width : 稠密 FFN 的中间宽度（0 为没有）。expert_width、top_k、shared_width : MoE 的专家宽度、
        每个词元的专家数、共享专家总宽度（top_k 为 0 表示没有 MoE）。
    gated : FFN 是否带门（gate、up 两路）。
    vocab_size : 词表大小（0 为没有 LM head）。all_logits : 前向是否对全部位置算 logits。
    numel、weight_bytes : 参数与缓冲区的个数、字节数。dtype : 参数的 dtype。
    own : 是否为自建模型（分块只发生在注意力层内部，而不是整个模型）。
    """

    hidden_size: int
    layers: int
    dims: MLADims
    latent_width: tuple[int, int]
    ffn_width: int
    expert_width: int
    top_k: int
    shared_width: int
    gated: bool
    vocab_size: int
    all_logits: bool
    numel: int
    weight_bytes: int
    dtype: torch.dtype
    own: bool


def read_geometry(model: Any) -> ModelGeometry:
    """模型（nn.Module）或 transformers 的配置 -> :class:`ModelGeometry`。

    抛出 :class:`UnsupportedError`：看不出 MLA 的结构。
    """
    if isinstance(model, nn.Module):
        own = [m for m in model.modules() if isinstance(m, LatentProjections)]
        if own:
            return _from_layers(model, own)
        config = getattr(model, "config", None)
    else:
        config, model = model, None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "kv_lora_rank", None) is None:
        raise UnsupportedError(
            "看不出 MLA 的结构：应为含 MLAAttention 的模型、带 kv_lora_rank 的 transformers 模型，"
            f"或这种模型的配置，得到 {type(config if model is None else model).__name__}"
        )
    return _from_config(_on_meta(config) if model is None else model, text)


def _on_meta(config: Any) -> nn.Module:
    """只有配置时在 meta 设备上建模型来数参数，不占内存。"""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _from_config(model: nn.Module, config: Any) -> ModelGeometry:
    dims = MLADims(
        num_heads=config.num_attention_heads,
        q_lora_rank=getattr(config, "q_lora_rank", None),
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
    )
    layers = config.num_hidden_layers
    top_k = getattr(config, "num_experts_per_tok", None) or 0
    expert_width = (getattr(config, "moe_intermediate_size", None) or 0) if top_k else 0
    shared = getattr(config, "n_shared_experts", None) or 0
    numel, size, dtype = _weights(model)
    return ModelGeometry(
        hidden_size=config.hidden_size,
        layers=layers,
        dims=dims,
        latent_width=(layers * dims.kv_lora_rank, layers * dims.qk_rope_head_dim),
        ffn_width=config.intermediate_size,
        expert_width=expert_width,
        top_k=top_k if expert_width else 0,
        shared_width=shared * expert_width,
        gated=True,
        vocab_size=config.vocab_size if hasattr(model, "lm_head") else 0,
        all_logits=False,
        numel=numel,
        weight_bytes=size,
        dtype=dtype,
        own=False,
    )


def _from_layers(model: nn.Module, attention: list[LatentProjections]) -> ModelGeometry:
    """自建模型：FFN 宽度取注意力之外最宽的 nn.Linear，比 D 宽 8 倍以上的看作 LM head。"""
    inside = {id(m) for layer in attention for m in layer.modules()}
    hidden = max(layer.hidden_size for layer in attention)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inside]
    widths = [m.out_features for m in linears]
    embeddings = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    heads = [w for w in widths if w in embeddings or w > 8 * hidden]
    widest = max(attention, key=lambda layer: layer.dims.q_out)
    numel, size, dtype = _weights(model)
    return ModelGeometry(
        hidden_size=hidden,
        layers=len(attention),
        dims=widest.dims,
        latent_width=(
            sum(layer.dims.kv_lora_rank for layer in attention),
            sum(layer.dims.qk_rope_head_dim for layer in attention),
        ),
        ffn_width=max((w for w in widths if w not in heads), default=0),
        expert_width=0,
        top_k=0,
        shared_width=0,
        gated=False,
        vocab_size=max(heads, default=0),
        all_logits=True,
        numel=numel,
        weight_bytes=size,
        dtype=dtype,
        own=True,
    )


def _weights(model: nn.Module) -> tuple[int, int, torch.dtype]:
    """(个数, 字节数, 第一个浮点参数的 dtype)；共享的参数只算一次。"""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    numel = sum(t.numel() for t in tensors)
    size = sum(t.numel() * t.element_size() for t in tensors)
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return numel, size, next(floats, torch.float32)
