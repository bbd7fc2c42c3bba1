"""在独立进程里实测一次预填充的常驻内存峰值，供 test_memory.py 与估算比较。

运行 ``python -m tests.memory_probe``，输出一行 JSON：名字 -> [实测字节, 估算字节]。
"""

from __future__ import annotations

import copy
import functools
import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from deepseek_opt import (
    LatentCache,
    MLAAttention,
    MLAConfig,
    OptimizationProfile,
    estimate_memory,
    optimize,
)

LENGTH = 768


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def peak(run: Callable[[], object]) -> int:
    """run() 期间常驻内存峰值的增量，字节。"""
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # 峰值从现在重新计
    kept = run()
    grown = _status("VmHWM") - before
    del kept
    return grown


class OwnModel(nn.Module):
    """一个自建的小模型：两层 MLA 与 FFN。"""

    def __init__(self, config: MLAConfig, width: int):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.attention = nn.ModuleList([MLAAttention(config, width, layer_idx=i) for i in range(2)])
        self.up = nn.ModuleList([nn.Linear(width, 4 * width) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(4 * width, width) for _ in range(2)])
        self.head = nn.Linear(width, 256)

    def forward(self, ids, cache=None):
        x = self.embed(ids)
        for attention, up, down in zip(self.attention, self.up, self.down, strict=True):
            x = x + attention(x, cache=cache)
            x = x + down(up(x).relu())
        return self.head(x)


def own_cases() -> dict[str, tuple[int, int]]:
    """自建模型：核从不生成分数矩阵，因此可以量更长的输入。"""
    results = {}
    length = 8 * LENGTH
    for dtype in (torch.float32, torch.bfloat16):
        config = MLAConfig(num_attention_heads=8, kv_lora_rank=64, q_lora_rank=64)
        model = OwnModel(config, 128).to(dtype).eval()
        model(torch.zeros(1, 80, dtype=torch.long))
        ids = torch.randint(0, 256, (1, length))
        cache = LatentCache(2, max_length=length)
        measured = peak(lambda model=model, ids=ids, cache=cache: model(ids, cache=cache))
        estimate = estimate_memory(model, 1, length)
        results[f"own {dtype}"] = measured, estimate.working_bytes
    return results


def transformers_cases() -> dict[str, tuple[int, int]]:
    """transformers 自己的 MLA，以及同样头数、同样宽度的标准注意力（Llama）。"""
    from transformers import (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        DynamicCache,
        LlamaConfig,
        LlamaForCausalLM,
    )

    shared = {
        "vocab_size": 256,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    latent = {
        "moe_intermediate_size": 128,
        "n_shared_experts": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 128,
        "q_lora_rank": 96,
        "v_head_dim": 64,
    }
    # 每头的键与值不同宽（DeepSeek 的样子）、同宽（能与标准注意力比，SDPA 也走另一条路）。
    wide = DeepseekV3Config(**shared, **latent, qk_nope_head_dim=64, qk_rope_head_dim=32)
    even = DeepseekV3Config(**shared, **latent, qk_nope_head_dim=48, qk_rope_head_dim=16)
    standard = LlamaConfig(**shared, head_dim=64)
    cases = (
        ("transformers_eager", wide, wide, DeepseekV3ForCausalLM),
        ("transformers_sdpa", wide, wide, DeepseekV3ForCausalLM),
        ("transformers_sdpa", even, even, DeepseekV3ForCausalLM),
        ("standard_eager", standard, even, LlamaForCausalLM),
        ("standard_sdpa", standard, even, LlamaForCausalLM),
    )
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        results |= optimized_cases(DeepseekV3ForCausalLM, wide, dtype)
        # bf16 只差在分数的字节数，量一种就够
        for name, config, described, cls in cases if dtype == torch.float32 else cases[:1]:
            config._attn_implementation = name.split("_")[1]
            model = cls(config).to(dtype).eval()
            model(torch.zeros(1, 8, dtype=torch.long))
            ids = torch.randint(0, 256, (1, LENGTH))
            cache = DynamicCache(config=config)
            measured = peak(
                lambda model=model, ids=ids, cache=cache: model(
                    ids, past_key_values=cache, logits_to_keep=1
                )
            )
            estimate = estimate_memory(described, 1, LENGTH, dtype=dtype).against(name)
            results[f"{len(results)} {name} {dtype}"] = measured, estimate.working_bytes
    return results


def optimized_cases(cls, config, dtype) -> dict[str, tuple[int, int]]:
    """优化之后的 transformers 模型，自动分块与指定块。

    不含 MoE：bf16 的专家每次行数都不同，BLAS 库会为每种行数留下一份生成的代码，那不是激活。
    """
    config = copy.deepcopy(config)
    config.first_k_dense_replace = config.num_hidden_layers
    results = {}
    for chunk in (None, 512):
        profile = OptimizationProfile(mla=MLAConfig(prefill_chunk_size=chunk))
        model = cls(config).to(dtype).eval()
        optimize(model, profile)
        model(torch.zeros(1, 8, dtype=torch.long))
        ids = torch.randint(0, 256, (1, 8 * LENGTH))
        cache = LatentCache.for_model(model)
        run = functools.partial(model, ids, past_key_values=cache, logits_to_keep=1)
        measured = peak(run)
        estimate = estimate_memory(model, 1, 8 * LENGTH, profile=profile)
        results[f"optimized {chunk} {dtype}"] = measured, estimate.working_bytes
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.inference_mode():
        found = own_cases()
        try:
            import transformers  # noqa: F401  # pylint: disable=unused-import

            found |= transformers_cases()
        except ImportError:
            pass
    print(json.dumps(found))
