"""随包小模型的结构与初始化。"""

from __future__ import annotations

import torch
from torch import nn

from .tokenizer import VOCAB_SIZE

MAX_LENGTH = 16384


def build_config():
    """DeepSeek-V3 结构的小配置：1 层稠密加 3 层 MoE，各维都是 32 的倍数。"""
    from transformers import DeepseekV3Config

    return DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=2,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        num_nextn_predict_layers=0,
    )


def build_model(seed: int = 0) -> nn.Module:
    """新建 fp32 模型；写回残差流的矩阵从零开始，嵌入的幅度与之后的残差相当。"""
    from transformers import DeepseekV3ForCausalLM

    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(build_config())
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
                param.zero_()
            elif name.endswith("embed_tokens.weight"):
                param.normal_(std=0.5)
            elif param.ndim >= 2 and "lm_head" not in name and "gate.weight" not in name:
                # 正交化更新下，初始谱范数约 1 的矩阵从第一步起就有合适的相对步长。
                param.normal_(std=0.7 / max(param.shape[-2:]) ** 0.5)
    return model
