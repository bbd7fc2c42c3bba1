"""整个模型解码一步的工作：各套件共用，只有优化的部分不同。"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from deepseek_opt.benchmarks import counts, shapes
from deepseek_opt.benchmarks.cases import Env, Work


def model_decode(
    env: Env,
    optimized: Callable[[nn.Module], nn.Module],
    rows: int,
    context: int,
    dtype: torch.dtype,
) -> Work:
    """每行一个新词元、每行已缓存 context 个；optimized(模型) 给出共用权重、优化过的副本。"""
    shape = env.shape
    model = shapes.build_model(shape, dtype)
    fast = optimized(model)
    layers = shape.config["num_hidden_layers"]
    ids = torch.randint(0, shape.config["vocab_size"], (rows, 1))

    def step(module: Any) -> Callable[[], Any]:
        cache = shapes.make_cache(shape, rows, context, layers, dtype)
        return lambda: module(ids, past_key_values=cache)

    cost = counts.model_decode(shape.config, rows, context, dtype.itemsize)
    return Work(step(fast), step(model), *cost, dtype)
