"""量化的精度：``deepseek-opt bench quant``，随包模型在留出的标准库源码上。

对照是 transformers 的 bf16 原模型；要求是下一词元准确率相差不超过 0.5 个百分点。
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from deepseek_opt.benchmarks.cases import Case, Env, Row, register_suite
from deepseek_opt.config import DenseConfig, MLAConfig, MOEConfig, OptimizationProfile
from deepseek_opt.demo import compare, data
from deepseek_opt.quantize import (
    DEFAULT_GROUP_SIZE,
    DEFAULT_SYMMETRIC,
    FP8_GROUP_SIZE,
    GROUP_SIZES,
)

_WINDOW, _WINDOWS, _QUICK = 2048, 16, 1
_PEER = "transformers bf16"
_LIMIT = -100 * compare.ACCURACY_LIMIT  # 百分点


@lru_cache(maxsize=1)
def _windows(count: int) -> torch.Tensor:
    """留出源码 [count, 2048]。"""
    stream = data.held_out_stream(data.load_tokenizer(data.MODEL_FOLDER), count * _WINDOW)
    return torch.tensor(stream).view(count, _WINDOW)


@lru_cache(maxsize=1)
def _baseline(count: int) -> tuple[float, float]:
    model = data.load_model(data.MODEL_FOLDER, torch.bfloat16, "eager")
    return compare.score(model, _windows(count))


@dataclass(frozen=True)
class QuantCase(Case):
    """一种量化（quantization 为空是不量化）的准确率、损失与专家权重的大小。"""

    key: str
    title: str
    fields: dict[str, Any] = field(hash=False)
    target: float | None = None

    def run(self, env: Env) -> list[Row]:
        from deepseek_opt import metrics, optimize

        count = _QUICK if env.quick else _WINDOWS
        moe = MOEConfig(**self.fields, **({"keep_original_weights": False} if self.fields else {}))
        profile = OptimizationProfile(mla=MLAConfig(), moe=moe, dense=DenseConfig())
        with torch.inference_mode():
            peer = _baseline(count)
            model = data.load_model(data.MODEL_FOLDER, torch.bfloat16)
            optimize(model, profile, strict=bool(self.fields))
            ours = compare.score(model, _windows(count))
        size = metrics(model).expert_weight_bytes
        weights = _expert_weights(model)
        details = {
            "loss": ours[1],
            "peer_loss": peer[1],
            "tokens": count * (_WINDOW - 1),
            "expert_mib": size / 2**20,
            "bits_per_weight": 8 * size / weights,
        }
        values = (100 * peer[0], 100 * ours[0])
        row = Row(
            self.key, self.title, "accuracy", "%", _PEER, *values, self.target, details=details
        )
        return [row]


def _expert_weights(model: Any) -> int:
    """路由专家与共享专家的权重个数。"""
    return sum(p.numel() for name, p in model.named_parameters() if "experts." in name)


def _build(_env: Env) -> list[Case]:
    cases: list[Case] = [
        QuantCase("quant.none", "bf16（不量化）", {}, _LIMIT),
        QuantCase("quant.int8", "int8", {"quantization": "int8"}, _LIMIT),
        QuantCase("quant.fp8", "fp8", {"quantization": "fp8"}, _LIMIT),
        QuantCase(
            f"quant.fp8.{FP8_GROUP_SIZE}",
            f"fp8，{FP8_GROUP_SIZE} 个一组",
            {"quantization": "fp8", "quantization_group_size": FP8_GROUP_SIZE},
        ),
    ]
    for group, symmetric in itertools.product(GROUP_SIZES, (True, False)):
        fields = {
            "quantization": "int4",
            "quantization_group_size": group,
            "quantization_symmetric": symmetric,
        }
        chosen = (group, symmetric) == (DEFAULT_GROUP_SIZE, DEFAULT_SYMMETRIC)
        title = f"int4，{group} 个一组，{'对称' if symmetric else '带零点'}"
        key = f"quant.int4.{group}.{'symmetric' if symmetric else 'zero'}"
        title += "（默认）" if chosen else ""
        cases.append(QuantCase(key, title, fields, _LIMIT if chosen else None))
    return cases


register_suite("quant", "量化的精度", _build, model="随包的 stdlib_model")
