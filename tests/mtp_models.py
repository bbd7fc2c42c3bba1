"""MTP 测试用的小模型：transformers 的各架构与一个自己的模型。"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_opt import MTPAdapter, MTPConfig, attach_mtp
from deepseek_opt.mtp import LayerInputs

from .tiny_models import make_model, transformers

VOCABULARY = 96
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

#: 名字 -> (类名的前缀, 配置)
FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", SIZES),
    "llama_tied": ("Llama", {**SIZES, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", SIZES),
    "qwen2_sliding": (
        "Qwen2",
        {**SIZES, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4}
        | {"use_sliding_window": True},
    ),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 8}),
    "qwen3_moe": ("Qwen3Moe", {**SIZES, **_MOE, "num_experts": 4, "head_dim": 8}),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 4}),
    "mixtral": ("Mixtral", {**SIZES, "num_local_experts": 4}),
    "glm4_moe": (
        "Glm4Moe",
        {**SIZES, **_MOE, "n_routed_experts": 4, "first_k_dense_replace": 1, "head_dim": 8}
        | {"n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    ),
    "gpt2": ("GPT2", {**_GPT2, "bos_token_id": 1, "eos_token_id": None}),
}
NAMES = [*FAMILIES, "deepseek_v2", "deepseek_v3"]


def make(name: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    """随机权重的小模型，eval 模式。"""
    if name not in FAMILIES:
        return make_model(name, dtype)
    prefix, sizes = FAMILIES[name]
    suffix = "LMHeadModel" if prefix == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, prefix + suffix)(
        getattr(transformers, prefix + "Config")(**sizes)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.to(dtype).eval()


def attached(name: str = "llama", dtype: torch.dtype = torch.float32, **config):
    """装了随机 MTP 的小模型；权重放大，使各部分都起作用。"""
    model = make(name, dtype)
    predictor = attach_mtp(model, config=MTPConfig(**config), fresh=True)
    with torch.no_grad():
        for parameter in predictor.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model, predictor


def tokens_of(batch: int = 2, length: int = 10, seed: int = 1) -> Tensor:
    """随机词元。"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


def hidden_of(model: nn.Module, tokens: Tensor, **inputs) -> Tensor:
    """主模型最后的归一化之后的隐藏状态。"""
    return model.get_decoder()(tokens, **inputs).last_hidden_state


class OwnBlock(nn.Module):
    """因果的单头注意力，认文档。"""

    def __init__(self, width: int):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.RMSNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if documents is not None:
            seen = seen & (documents[:, :, None] == documents[:, None, :])
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen))


class OwnModel(nn.Module):
    """自己的模型。"""

    def __init__(self, width: int = 8):
        super().__init__()
        self.embed, self.block = nn.Embedding(VOCABULARY, width), OwnBlock(width)
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, VOCABULARY)

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.block(self.embed(tokens))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(tokens)))


class OwnAdapter(MTPAdapter):
    """自己的模型的接口；隐藏状态取归一化之前的。"""

    def __init__(self, model: OwnModel, **options):
        width = model.embed.embedding_dim
        parts = {"embedding": model.embed, "head": model.head, "final_norm": model.norm}
        super().__init__(model, hidden_size=width, **parts, **options)

    def make_layer(self) -> nn.Module:
        return OwnBlock(self.hidden_size).to(self.dtype)

    def run_layer(self, layer: nn.Module, x: Tensor, inputs: LayerInputs) -> Tensor:
        return layer(x, inputs.documents)
