"""小的随机 transformers MoE 模型：每个接入 experts 接口的架构一份配置，CPU 上毫秒级。"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from deepseek_opt.integrations import experts
from tests.tiny_models import available, transformers

# 各架构的名字不同，一并给出；用不到的名字配置类会忽略。
_BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
}
# 这几种 MLA 的 head_dim 是旋转部分的宽，由配置自己推出
_NO_HEAD = {**_MLA, "head_dim": None}
_DSA = {**_NO_HEAD, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 8}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_HALF_MROPE = {**_MROPE, "mrope_section": [0, 1, 1], "partial_rotary_factor": 0.5}
_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}

# model_type -> (配置类, 模型类, 额外的配置)
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "afmoe": ("AfmoeConfig", "AfmoeForCausalLM", {}),
    "aria": ("AriaTextConfig", "AriaTextForCausalLM", {}),
    "axk1": ("AXK1Config", "AXK1ForCausalLM", _NO_HEAD),
    "axk2": ("AXK2Config", "AXK2ForCausalLM", _DSA),
    "bailing_hybrid": (
        "BailingHybridConfig",
        "BailingHybridForCausalLM",
        {**_MLA, **_LINEAR, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "beam": ("BeamConfig", "BeamForCausalLM", _SPARSE),
    "cohere2_moe": ("Cohere2MoeConfig", "Cohere2MoeForCausalLM", {}),
    "deepseek_ocr2": ("DeepseekOcr2TextConfig", "DeepseekOcr2TextModel", _SPARSE),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", _NO_HEAD),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", _NO_HEAD),
    "deepseek_v32": ("DeepseekV32Config", "DeepseekV32ForCausalLM", _DSA),
    "deepseek_v4": ("DeepseekV4Config", "DeepseekV4ForCausalLM", _MLA),
    "diffusion_gemma": ("DiffusionGemmaTextConfig", "DiffusionGemmaEncoderTextModel", {}),
    "dots1": ("Dots1Config", "Dots1ForCausalLM", {}),
    "dots3_note": (
        "Dots3NoteTextConfig",
        "Dots3NoteForCausalLM",
        {**_MLA, "layer_types": ["full_attention"] * 2, "use_dsa": False},
    ),
    "ernie4_5_moe": ("Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM", {}),
    "ernie4_5_vl_moe": (
        "Ernie4_5_VLMoeTextConfig",
        "Ernie4_5_VLMoeTextModel",
        {"moe_intermediate_size": [16, 16], "rope_parameters": _MROPE},
    ),
    "exaone_moe": ("ExaoneMoeConfig", "ExaoneMoeForCausalLM", {}),
    "flex_olmo": ("FlexOlmoConfig", "FlexOlmoForCausalLM", {}),
    "flint": ("FlintConfig", "FlintForCausalLM", {}),
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 8,
            "enable_moe_block": True,
            "global_head_dim": 8,
        },
    ),
    "glm4_moe": ("Glm4MoeConfig", "Glm4MoeForCausalLM", {}),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", _NO_HEAD),
    "glm4v_moe": ("Glm4vMoeTextConfig", "Glm4vMoeTextModel", {"rope_parameters": _HALF_MROPE}),
    "glm5_next": (
        "Glm5NextTextConfig",
        "Glm5NextTextModel",
        {
            **_DSA,
            **_SPARSE,
            "qk_rope_head_dim": 0,
            "index_kpool": 4,
            **_LINEAR,
            "layer_types": ["full_attention"] * 2,
        },
    ),
    "glm_moe_dsa": ("GlmMoeDsaConfig", "GlmMoeDsaForCausalLM", _DSA),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {}),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeForCausalLM", {}),
    "granitemoe_swa": ("GraniteMoeSWAConfig", "GraniteMoeSWAForCausalLM", {}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {"mamba_n_heads": 4, "mamba_d_state": 8, "layer_types": ["full_attention"] * 2},
    ),
    "granitemoeshared": ("GraniteMoeSharedConfig", "GraniteMoeSharedForCausalLM", {}),
    "hunyuan_v1_moe": ("HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM", {}),
    "hy_v3": ("HYV3Config", "HYV3ForCausalLM", {}),
    "hy_v4": ("HYV4Config", "HYV4ForCausalLM", _MLA),
    "inkling": ("InklingTextConfig", "InklingForCausalLM", {}),
    "inkling2": ("Inkling2TextConfig", "Inkling2ForCausalLM", {}),
    "jamba": ("JambaConfig", "JambaForCausalLM", {}),
    "kimi_linear": (
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        {**_MLA, **_LINEAR, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "kolibri1": ("Kolibri1Config", "Kolibri1ForCausalLM", {}),
    "laguna": ("LagunaConfig", "LagunaForCausalLM", {}),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        {"layer_types": ["full_attention"] * 2, "num_dense_layers": 1},
    ),
    "mellum": ("MellumConfig", "MellumForCausalLM", {}),
    "mimo_v2_flash": (
        "MiMoV2FlashConfig",
        "MiMoV2FlashForCausalLM",
        {"head_dim": 24, "v_head_dim": 8, "num_key_value_heads": 2},
    ),
    "minimax": ("MiniMaxConfig", "MiniMaxForCausalLM", {}),
    "minimax_m2": ("MiniMaxM2Config", "MiniMaxM2ForCausalLM", {}),
    "minimax_m3_vl": ("MiniMaxM3VLTextConfig", "MiniMaxM3VLForCausalLM", {}),
    "mistral4": ("Mistral4Config", "Mistral4ForCausalLM", _NO_HEAD),
    "mistral_large4": ("MistralLarge4TextConfig", "MistralLarge4TextModel", _DSA),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {}),
    "muse_spark": ("MuseSparkTextConfig", "MuseSparkTextModel", {"moe_hidden_size": 16}),
    "nemotron_h": ("NemotronHConfig", "NemotronHForCausalLM", {}),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {}),
    "openai_privacy_filter": ("OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterModel", {}),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", {}),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {}),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", _LINEAR),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {}),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", _LINEAR),
    "qwen3_omni_moe": ("Qwen3OmniMoeTextConfig", "Qwen3OmniMoeThinkerTextModel", {}),
    "qwen3_vl_moe": ("Qwen3VLMoeTextConfig", "Qwen3VLMoeTextModel", {}),
    "qwen4_exp": ("Qwen4ExpTextConfig", "Qwen4ExpForCausalLM", _LINEAR),
    "solar_open": ("SolarOpenConfig", "SolarOpenForCausalLM", {}),
    "unlimited_ocr": ("UnlimitedOcrTextConfig", "UnlimitedOcrTextModel", _SPARSE),
    "zaya": ("ZayaConfig", "ZayaForCausalLM", {"num_experts_per_tok": 1, "router_hidden_size": 16}),
}


def make_config(model_type: str, **overrides: Any) -> Any:
    """小配置。"""
    name, _, extra = MODELS[model_type]
    module = importlib.import_module(f"transformers.models.{model_type}.configuration_{model_type}")
    fields = {**_BASE, **extra, **overrides}
    return getattr(module, name)(**{k: v for k, v in fields.items() if v is not None})


def make_moe(
    model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> nn.Module:
    """随机权重的小模型（eval 模式，eager 专家）。"""
    config = make_config(model_type, **overrides)
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    torch.manual_seed(seed)
    model = getattr(module, MODELS[model_type][1])(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def make_ids(batch: int = 2, length: int = 6, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 96, (batch, length), generator=generator)


def output_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """logits，或没有 LM head 的模型的最后一层隐藏状态。"""
    out = model(ids, use_cache=False)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def experts_in(model: nn.Module) -> dict[str, nn.Module]:
    """名字 -> 接入 experts 接口的模块。"""
    return {n: m for n, m in model.named_modules() if experts.looks_like_experts(m)}


__all__ = ["MODELS", "available", "experts_in", "make_ids", "make_moe", "output_of", "transformers"]
