"""整个模型的各项共用：V2-Lite-3L 的模型、优化过的副本、有没有真的用上本库。"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_cases.runner import Env
from deepseek_opt import DenseConfig, MLAConfig, MOEConfig, OptimizationProfile, optimize
from deepseek_opt.benchmarks import shapes
from deepseek_opt.benchmarks.standard import use_standard_attention
from deepseek_opt.errors import UnsupportedError
from deepseek_opt.metrics import stop_metrics

DTYPE = torch.bfloat16


def shape(env: Env) -> shapes.Shape:
    """参考形状；quick 时为很小的一种。"""
    return shapes.TINY if env.quick else shapes.REFERENCE


def one_layer(env: Env) -> shapes.Shape:
    """只有一层（稠密 FFN）的同样形状。"""
    whole = shape(env)
    return replace(whole, config={**whole.config, "num_hidden_layers": 1})


def build(env: Env, of: shapes.Shape, attention: str = "sdpa") -> nn.Module:
    """设备上的随机模型。"""
    return shapes.build_model(of, DTYPE, attention, env.device)


def optimized(model: nn.Module) -> tuple[nn.Module, Any]:
    """共用权重、优化过的副本，与它的报告。"""
    fast = shapes.twin(model)
    report = optimize(
        fast, OptimizationProfile(mla=MLAConfig(), moe=MOEConfig(), dense=DenseConfig())
    )
    stop_metrics(fast)
    return fast, report


def standard(model: nn.Module, implementation: str) -> nn.Module:
    """其余权重共用、注意力换成标准多头注意力的副本。"""
    return use_standard_attention(shapes.twin(model), implementation)


def require_ours(report: Any) -> None:
    """抛出 UnsupportedError：有注意力层没有用上本库（不然就是原实现与自己比）。"""
    for entry in report.skipped:
        if entry.part == "mla" and not entry.native:
            raise UnsupportedError(f"{entry.name or entry.kind} 没有替换：{entry.reason}")
    for (name, reason), count in report.fallbacks.items():
        if name.endswith("self_attn"):
            raise UnsupportedError(f"{name} 有 {count} 次由原实现计算：{reason}")


def other_fallbacks(report: Any) -> list[str]:
    """注意力之外由原实现计算的原因。"""
    return sorted({reason for (name, reason) in report.fallbacks if not name.endswith("self_attn")})


def empty_cache(model: nn.Module) -> Any:
    """空的 DynamicCache。"""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def random_ids(env: Env, model: nn.Module, *size: int) -> torch.Tensor:
    """随机词元。"""
    return torch.randint(0, model.config.vocab_size, size, device=env.device)
