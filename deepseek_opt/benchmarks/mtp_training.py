"""训练一步加上 MTP 之后慢多少。"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from deepseek_opt.benchmarks import mtp_models, timing
from deepseek_opt.benchmarks.cases import Case, Env, Row, speed_row
from deepseek_opt.config import DenseConfig, MLAConfig, MOEConfig, MTPConfig, OptimizationProfile

_ROWS, _LENGTH = 4, 256


def _deep(layers: int) -> Any:
    """与随包模型同样的结构、更深更宽，随机权重：MTP 层与输出头只占一小部分。"""
    from transformers import DeepseekV3ForCausalLM

    config = copy.deepcopy(mtp_models.original(torch.float32).config)
    config.num_hidden_layers, config.hidden_size = layers, 512
    config.intermediate_size, config.moe_intermediate_size = 1536, 256
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config)


def _step(model: Any, ids: torch.Tensor, with_mtp: bool) -> Callable[[], None]:
    from deepseek_opt import MTPTraining, attach_mtp, optimize

    attach_mtp(model, config=MTPConfig(depth=1), fresh=True)
    model.train().requires_grad_(True)
    profile = OptimizationProfile(mla=MLAConfig(), moe=MOEConfig(), dense=DenseConfig())
    optimize(model, profile)

    def backward() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def both() -> None:
        with MTPTraining(model):
            backward()

    return both if with_mtp else backward


@dataclass(frozen=True)
class TrainCase(Case):
    """前向与反向，fp32，深度 1；对照是同一个模型不加 MTP 的一步。layers 为 None 是随包的模型。"""

    key: str
    title: str
    layers: int | None
    target: float

    def run(self, env: Env) -> list[Row]:
        layers = self.layers if not env.quick or self.layers is None else 2
        source = mtp_models.original(torch.float32) if layers is None else _deep(layers)
        ids = mtp_models.prompts(_ROWS, _LENGTH)
        plain, ours = (_step(copy.deepcopy(source), ids, flag) for flag in (False, True))
        with torch.enable_grad():
            peer, times = timing.interleaved(
                plain, ours, rounds=env.rounds, seconds=env.seconds, evict=False
            )
        slower = times.best / peer.best
        details = {"tokens": ids.numel(), "slower": slower}
        return [
            speed_row(self, "不加 MTP", peer, times, note=f"慢 {slower - 1:.0%}", details=details)
        ]
