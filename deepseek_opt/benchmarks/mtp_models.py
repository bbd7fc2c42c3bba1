"""MTP 基准的模型与提示：随包的小模型（带 MTP 层）、把它加宽而输出不变的副本、留出的源码。"""

from __future__ import annotations

import copy
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt.config import DenseConfig, MLAConfig, MOEConfig, MTPConfig, OptimizationProfile
from deepseek_opt.demo import data

PROMPT, NEW = 128, 128
WIDEN = 24  # 加宽的倍数：约 160 MB 的 bf16 权重，放不进缓存


@lru_cache(maxsize=2)
def original(dtype: torch.dtype) -> nn.Module:
    """随包的小模型，没有优化；不因结束符停，各行都生成满。"""
    return endless(data.load_model(data.MODEL_FOLDER, dtype))


@lru_cache(maxsize=2)
def for_use_mtp(dtype: torch.dtype) -> nn.Module:
    """transformers 自己的 use_mtp 用的：MTP 层要与主模型在同一个文件里，生成时每次从那里读。"""
    from safetensors.torch import load_file, save_file
    from transformers.utils import logging

    folder = Path(tempfile.mkdtemp())
    for name in ("config.json", "generation_config.json"):
        shutil.copy(data.MODEL_FOLDER / name, folder)
    tensors = [load_file(data.MODEL_FOLDER / f"{n}.safetensors") for n in ("model", "mtp")]
    save_file(tensors[0] | tensors[1], folder / "model.safetensors", metadata={"format": "pt"})
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # 会把 MTP 层列成一张“多余的权重”的表
    model = endless(data.load_model(folder, dtype))
    logging.set_verbosity(verbosity)
    # 它按类里写死的名字（第 61 层）找，这里的 MTP 层是第 4 层
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.4\..*"]
    return model


def endless(model: nn.Module) -> nn.Module:
    """不因结束符停，各行都生成满；返回 model。"""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    return model


@lru_cache(maxsize=1)
def widened(dtype: torch.dtype) -> nn.Module:
    """各 FFN 的中间维加宽 WIDEN 倍，新的一份权重全是 0：输出、接受率与原来相同，读写与运算是宽模型的。"""
    from deepseek_opt import attach_mtp

    model = copy.deepcopy(original(dtype))
    attach_mtp(model, config=MTPConfig())
    for name, module in model.named_modules():
        if hasattr(module, "gate_up_proj"):
            half = module.gate_up_proj.shape[1] // 2
            up = _padded(module.gate_up_proj.view(-1, 2, half, module.gate_up_proj.shape[2]), 2)
            module.gate_up_proj = nn.Parameter(up.flatten(1, 2), False)
            module.down_proj = nn.Parameter(_padded(module.down_proj, 2), False)
            module.intermediate_dim = half * WIDEN
        elif name.endswith(("mlp", "shared_experts")) and hasattr(module, "gate_proj"):
            for part in (module.gate_proj, module.up_proj):
                part.weight = nn.Parameter(_padded(part.weight, 0), False)
                part.out_features = part.weight.shape[0]
            module.down_proj.weight = nn.Parameter(_padded(module.down_proj.weight, 1), False)
            module.down_proj.in_features = module.down_proj.weight.shape[1]
    return model


def _padded(weight: Tensor, dim: int) -> Tensor:
    shape = list(weight.shape)
    shape[dim] *= WIDEN - 1
    return torch.cat((weight, weight.new_zeros(shape)), dim)


def optimized(model: nn.Module, mtp: MTPConfig | None) -> nn.Module:
    """优化过的副本。"""
    from deepseek_opt import optimize

    fast = copy.deepcopy(model)
    profile = OptimizationProfile(mla=MLAConfig(), moe=MOEConfig(), dense=DenseConfig(), mtp=mtp)
    optimize(fast, profile, strict=mtp is not None)
    return fast


@lru_cache(maxsize=1)
def _stream(count: int) -> Tensor:
    return torch.tensor(data.held_out_stream(data.load_tokenizer(data.MODEL_FOLDER), count))


def prompts(rows: int, length: int = PROMPT) -> Tensor:
    """[rows, length]：留出源码里均匀取的段。"""
    stream = _stream(100_000)
    starts = torch.linspace(0, len(stream) - length - 1, rows + 2)[1:-1].long()
    return torch.stack([stream[i : i + length] for i in starts.tolist()])


def run(model: nn.Module, ids: Tensor, new: int, **options: Any) -> Tensor:
    """贪心生成 new 个，返回生成的部分。"""
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, **options
    )
    return out[:, ids.shape[1] :]
