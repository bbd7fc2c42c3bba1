"""小的随机 transformers MLA 模型：每个受支持的架构一份配置，CPU 上毫秒级。"""

from __future__ import annotations

import importlib
import importlib.util

import pytest
import torch

# 没有安装 transformers 时，凡是用到这里的测试文件整体跳过
transformers = pytest.importorskip("transformers")
DynamicCache, StaticCache = transformers.DynamicCache, transformers.StaticCache

_BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
_MOE = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
}
_LONGCAT = {
    "num_layers": 1,
    "head_dim": 16,
    "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 32,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "moe_topk": 2,
}

# model_type -> (配置类, 模型类, 额外的配置)
MODELS: dict[str, tuple[str, str, dict]] = {
    "axk1": ("AXK1Config", "AXK1ForCausalLM", _MOE),
    "bailing_hybrid": ("BailingHybridConfig", "BailingHybridForCausalLM", {**_MOE, **_HYBRID}),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {**_MOE, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", _MOE),
    "dots3_note": (
        "Dots3NoteTextConfig",
        "Dots3NoteForCausalLM",
        {**_MOE, "layer_types": ["full_attention"] * 2, "use_dsa": False},
    ),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", _MOE),
    "kimi_linear": ("KimiLinearConfig", "KimiLinearForCausalLM", {**_MOE, **_HYBRID}),
    "longcat_flash": ("LongcatFlashConfig", "LongcatFlashForCausalLM", _LONGCAT),
    "minicpm3": ("MiniCPM3Config", "MiniCPM3ForCausalLM", {}),
    "mistral4": ("Mistral4Config", "Mistral4ForCausalLM", _MOE),
    "youtu": ("YoutuConfig", "YoutuForCausalLM", {}),
}


def available(model_type: str) -> bool:
    """这个版本的 transformers 有没有这个架构。"""
    return importlib.util.find_spec(f"transformers.models.{model_type}") is not None


def make_config(model_type: str, **overrides):
    """小配置；attn_implementation 可用关键字给出。"""
    config_name, _, extra = MODELS[model_type]
    module = importlib.import_module(f"transformers.models.{model_type}")
    return getattr(module, config_name)(**{**_BASE, **extra, **overrides})


def make_model(model_type: str = "deepseek_v3", dtype=torch.float32, seed: int = 0, **overrides):
    """随机权重的小模型（eval 模式）；权重放大到注意力不接近均匀。"""
    config = make_config(model_type, **overrides)
    module = importlib.import_module(f"transformers.models.{model_type}")
    torch.manual_seed(seed)
    model = getattr(module, MODELS[model_type][1])(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.12)
            else:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def make_inputs(
    batch: int = 2, length: int = 12, left_pad: int = 0, right_pad: int = 0, seed: int = 1
):
    """(input_ids, attention_mask)；第 0 行按给定的个数填充。"""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 96, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if left_pad:
        ids[0, :left_pad], mask[0, :left_pad] = 0, 0
    if right_pad:
        ids[0, -right_pad:], mask[0, -right_pad:] = 0, 0
    return ids, mask
