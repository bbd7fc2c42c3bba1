"""基准的形状与随机权重的模型：参考形状 V2-Lite-3L（约 13.7 亿参数），以及测试用的小形状。"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

_FILL = 1_000_003  # 随机块的长度取质数：平铺到矩阵里各行不重复
STD = 0.02  # 矩阵的标准差
_BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Shape:
    """一种形状：config 为 DeepseekV3Config 的参数，其余为各项工作的规模（词元数、行数）。

    int4_group 大于 0 的形状，专家从一开始就是 int4（这么多个一组），没有半精度的权重；只用于 suite 套件。
    """

    name: str
    config: dict[str, Any] = field(hash=False)
    suite: str | None = None
    int4_group: int = 0
    long_context: int = 4096
    batch_context: int = 1024
    batch: int = 8
    prefill: int = 2048
    short_prefill: int = 128
    memory_length: int = 8192
    ffn_rows: tuple[int, ...] = (1, 8, 40, 512)
    moe_tokens: tuple[int, ...] = (1, 8, 40, 512, 2048)
    moe_train: int = 512
    model_prefill: tuple[int, ...] = (512, 2048)


REFERENCE = Shape(
    "V2-Lite-3L",
    {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 3,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "kv_lora_rank": 512,
        "q_lora_rank": 768,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_nope_head_dim": 128,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 16384,
        "norm_topk_prob": True,
    },
)

TINY = Shape(
    "tiny",
    {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 32,
        "q_lora_rank": 48,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "qk_nope_head_dim": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 1024,
        "norm_topk_prob": True,
    },
    long_context=48,
    batch_context=24,
    batch=3,
    prefill=32,
    short_prefill=16,
    memory_length=96,
    ffn_rows=(1, 4),
    moe_tokens=(1, 5),
    moe_train=8,
    model_prefill=(16,),
)

# 除了每次调用的开销什么都没有：27 层、宽 64（DeepSeek-V2-Lite 的层数）。
OVERHEAD = Shape("overhead-27L", {**TINY.config, "num_hidden_layers": 27}, long_context=16)

# 约 131 亿参数，每个词元用其中约 13 亿（含词嵌入）；半精度要 26 GB，专家 int4 时不到 8 GB。
SPARSE_13B = Shape(
    "13b-a1.3b",
    {
        **REFERENCE.config,
        "num_hidden_layers": 25,
        "moe_intermediate_size": 640,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 0,
    },
    suite="moe",
    int4_group=128,
)

TINY_SPARSE = replace(
    TINY,
    name="tiny-int4",
    config={**TINY.config, "n_routed_experts": 8, "first_k_dense_replace": 0},
    suite="moe",
    int4_group=32,
)

SHAPES = {shape.name: shape for shape in (REFERENCE, TINY, SPARSE_13B, TINY_SPARSE)}


def make_config(shape: Shape, attention: str = "sdpa") -> Any:
    """DeepseekV3Config；attention 为 ``"eager"`` 或 ``"sdpa"``。"""
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(**shape.config)
    config._attn_implementation = attention
    config._experts_implementation = "grouped_mm"  # transformers 里最快的一种
    return config


def build_model(
    shape: Shape, dtype: torch.dtype, attention: str = "sdpa", device: str = "cpu"
) -> nn.Module:
    """随机权重的 DeepseekV3ForCausalLM（eval）。先建在 meta 上再填，省去十几秒的逐个初始化。"""
    return materialize(build_on_meta(make_config(shape, attention), dtype), device)


def build_on_meta(config: Any, dtype: torch.dtype) -> nn.Module:
    """只有形状、不占内存的 DeepseekV3ForCausalLM；专家的修正偏置保持 fp32，同 transformers 载入的。"""
    from transformers import DeepseekV3ForCausalLM

    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config).to(dtype)
        for module in model.modules():
            if _BIAS in module._buffers:
                module._buffers[_BIAS] = module._buffers[_BIAS].float()
    return model


def materialize(model: nn.Module, device: str = "cpu") -> nn.Module:
    """给 meta 上的模型随机权重（eval、不求导），放在 device 上。"""
    model = model.to_empty(device=device)
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(model.config).to(device)  # meta 上算出的频率没有数值
    fill_random(model)
    return model.eval().requires_grad_(False)


def fill_random(model: nn.Module) -> None:
    """矩阵填随机数，一维参数（归一化权重）填 1，专家的修正偏置填 0。"""
    block = torch.randn(_FILL, generator=torch.Generator().manual_seed(0)) * STD
    for parameter in model.parameters():
        if parameter.dim() < 2:
            nn.init.ones_(parameter)
            continue
        block = block.to(parameter.device)
        for piece in parameter.data.view(-1).split(_FILL):
            piece.copy_(block[: piece.numel()])
    for name, buffer in model.named_buffers():
        if name.endswith(_BIAS):
            buffer.zero_()


def fill_bytes(packed: torch.Tensor) -> None:
    """uint8 张量填随机字节。"""
    generator = torch.Generator().manual_seed(0)
    block = torch.randint(0, 256, (_FILL,), dtype=torch.uint8, generator=generator)
    for piece in packed.view(-1).split(_FILL):
        piece.copy_(block[: piece.numel()])


def build_attention(shape: Shape, dtype: torch.dtype, attention: str = "sdpa") -> nn.Module:
    """一层 transformers 的 DeepseekV3Attention，随机权重。"""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    layer = DeepseekV3Attention(make_config(shape, attention), 0).to(dtype)
    fill_random(layer)
    return layer


def build_ffn(shape: Shape, dtype: torch.dtype) -> nn.Module:
    """一个 transformers 的稠密门控 FFN，随机权重。"""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP

    ffn = DeepseekV3MLP(make_config(shape)).to(dtype)
    fill_random(ffn)
    return ffn


def build_moe(shape: Shape, dtype: torch.dtype) -> nn.Module:
    """一个 transformers 的 DeepseekV3MoE（路由、专家、共享专家），随机权重。"""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    block = DeepseekV3MoE(make_config(shape)).to(dtype)
    fill_random(block)
    return block.eval()


def build_router(experts: int, groups: int, dtype: torch.dtype) -> nn.Module:
    """一个 transformers 的 DeepseekV3TopkRouter：256 个专家时就是 DeepSeek-V3 的路由。"""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=REFERENCE.config["hidden_size"],
        n_routed_experts=experts,
        num_experts_per_tok=8,
        n_group=groups,
        topk_group=max(1, groups // 2),
    )
    router = DeepseekV3TopkRouter(config).to(dtype)
    fill_random(router)
    return router.eval()


def rope_tables(shape: Shape, batch: int, begin: int, count: int, dtype: torch.dtype) -> Any:
    """第 begin 个位置起 count 个位置的 (cos, sin)，各 [batch, count, dr]。"""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    rotary = DeepseekV3RotaryEmbedding(make_config(shape))
    positions = torch.arange(begin, begin + count)[None].expand(batch, -1)
    return rotary(torch.zeros(1, dtype=dtype), positions)


def make_cache(
    shape: Shape, batch: int, length: int, layers: int, dtype: torch.dtype, device: str = "cpu"
) -> Any:
    """已有 length 个词元的 DynamicCache，内容随机。"""
    from transformers import DynamicCache

    config = make_config(shape)
    cache = DynamicCache(config=config)
    options = {"generator": torch.Generator(device).manual_seed(1), "device": device}
    for index in range(layers):
        sizes = (config.kv_lora_rank, config.qk_rope_head_dim)
        latent, rope = (torch.randn(batch, 1, length, n, **options).to(dtype) for n in sizes)
        cache.update(latent, rope, index)
    return cache


def twin(module: nn.Module) -> nn.Module:
    """与 module 共用参数的副本：一份给 transformers，一份给本库，权重只占一份内存。"""
    shared = {id(p): p for p in module.parameters()}
    return copy.deepcopy(module, shared)
