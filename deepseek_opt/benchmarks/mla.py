"""MLA 的基准套件：``deepseek-opt bench mla``。

每项都与 transformers 的 sdpa 实现在同一次运行里交替计时，像使用者那样运行：inference_mode、
DynamicCache、热身过。要求（target）是 2 核 AVX512-BF16、形状 V2-Lite-3L 上的倍数。
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from deepseek_opt.benchmarks import counts, shapes
from deepseek_opt.benchmarks.cases import Case, Env, SpeedCase, Work, register_suite
from deepseek_opt.benchmarks.decode_work import model_decode
from deepseek_opt.benchmarks.memory_cases import LengthCase, MemoryCase
from deepseek_opt.benchmarks.overhead import OverheadCase

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


def _optimized_twin(module: Any, *, dense: bool = False, cache_dtype: str = "auto") -> Any:
    """共用权重的副本，优化过。"""
    from deepseek_opt import DenseConfig, MLAConfig, OptimizationProfile, optimize
    from deepseek_opt.metrics import stop_metrics

    mla = MLAConfig(cache_dtype=cache_dtype)
    profile = OptimizationProfile(mla=mla, dense=DenseConfig() if dense else None)
    copied = shapes.twin(module)
    optimize(copied, profile)
    stop_metrics(copied)  # 指标是整个模型一份，不是每层一份
    return copied


def _decode(
    env: Env, rows: int, context: int, dtype: torch.dtype, cache_dtype: str = "auto"
) -> Work:
    """一层注意力、每行一个新词元、每行已缓存 context 个。"""
    shape = env.shape
    layer = shapes.build_attention(shape, dtype)
    fast = _optimized_twin(layer, cache_dtype=cache_dtype)
    hidden = torch.randn(rows, 1, shape.config["hidden_size"]).to(dtype)
    rope = shapes.rope_tables(shape, rows, context, 1, dtype)

    def step(module: Any) -> Callable[[], Any]:
        cache = shapes.make_cache(shape, rows, context, 1, dtype)
        return lambda: module(hidden, rope, None, past_key_values=cache)

    stored = 1 if cache_dtype == "int8" else dtype.itemsize
    cost = counts.attention_decode(shape.config, rows, context, dtype.itemsize, stored)
    return Work(step(fast), step(layer), *cost, dtype)


def _prefill(env: Env, tokens: int, dtype: torch.dtype) -> Work:
    """一层注意力、从空缓存预填充 tokens 个。"""
    from transformers import DynamicCache

    shape = env.shape
    layer = shapes.build_attention(shape, dtype)
    fast = _optimized_twin(layer)
    hidden = torch.randn(1, tokens, shape.config["hidden_size"]).to(dtype)
    rope = shapes.rope_tables(shape, 1, 0, tokens, dtype)
    config = shapes.make_config(shape)

    def run(module: Any) -> Any:
        return module(hidden, rope, None, past_key_values=DynamicCache(config=config))

    cost = counts.attention_prefill(shape.config, tokens, dtype.itemsize)
    return Work(partial(run, fast), partial(run, layer), *cost, dtype)


def _train(env: Env, tokens: int, dtype: torch.dtype) -> Work:
    """一层注意力的前向加反向：对输入与全部权重求导。"""
    shape = env.shape
    layer = shapes.build_attention(shape, dtype).train()
    fast = _optimized_twin(layer)
    hidden = torch.randn(1, tokens, shape.config["hidden_size"]).to(dtype).requires_grad_()
    gradient = torch.randn(hidden.shape).to(dtype)
    rope = shapes.rope_tables(shape, 1, 0, tokens, dtype)

    def run(module: Any) -> None:
        module.zero_grad(set_to_none=True)
        hidden.grad = None
        module(hidden, rope, None)[0].backward(gradient)

    cost = counts.attention_prefill(shape.config, tokens, dtype.itemsize, backward=True)
    return Work(partial(run, fast), partial(run, layer), *cost, dtype)


def _ffn(env: Env, rows: int, dtype: torch.dtype) -> Work:
    """稠密门控 FFN。"""
    from deepseek_opt import DenseConfig, OptimizationProfile, optimize

    config = env.shape.config
    module = shapes.build_ffn(env.shape, dtype)
    fast = shapes.twin(module)
    optimize(fast, OptimizationProfile(dense=DenseConfig(ffn=True)), strict=True)
    x = torch.randn(1, rows, config["hidden_size"]).to(dtype)
    inner = config["intermediate_size"]
    cost = counts.gated_ffn(config["hidden_size"], inner, rows, dtype.itemsize)
    return Work(partial(fast, x), partial(module, x), *cost, dtype)


def _model_decode(env: Env, rows: int, context: int, dtype: torch.dtype) -> Work:
    """整个模型、每行一个新词元；MoE 是 transformers 的。"""
    return model_decode(env, partial(_optimized_twin, dense=True), rows, context, dtype)


def _attention_cases(env: Env) -> list[Case]:
    shape = env.shape
    long, short = shape.long_context, shape.batch_context
    tokens, few, rows = shape.prefill, shape.short_prefill, shape.batch
    return [
        SpeedCase(
            "attention.decode.long",
            f"注意力层 解码 1 行 已缓存 {long} bf16",
            partial(_decode, rows=1, context=long, dtype=_BF16),
            60.0,
        ),
        SpeedCase(
            "attention.decode.batch",
            f"注意力层 解码 {rows} 行 已缓存 {short} bf16",
            partial(_decode, rows=rows, context=short, dtype=_BF16),
            80.0,
        ),
        SpeedCase(
            "attention.prefill.bf16",
            f"注意力层 预填充 {tokens} bf16",
            partial(_prefill, tokens=tokens, dtype=_BF16),
            2.8,
        ),
        SpeedCase(
            "attention.prefill.fp32",
            f"注意力层 预填充 {tokens} fp32",
            partial(_prefill, tokens=tokens, dtype=_FP32),
            1.6,
        ),
        SpeedCase(
            "attention.prefill.fp16",
            f"注意力层 预填充 {few} fp16",
            partial(_prefill, tokens=few, dtype=_FP16),
            100.0,
        ),
        SpeedCase(
            "attention.train.bf16",
            f"注意力层 前向+反向 {tokens} bf16",
            partial(_train, tokens=tokens, dtype=_BF16),
            2.0,
            grad=True,
        ),
        SpeedCase(
            "attention.train.fp32",
            f"注意力层 前向+反向 {tokens} fp32",
            partial(_train, tokens=tokens, dtype=_FP32),
            1.5,
            grad=True,
        ),
    ]


def _ffn_cases(env: Env) -> list[Case]:
    targets = {1: 2.0, 8: 1.6, 40: 1.3, 512: 1.0}
    return [
        SpeedCase(
            f"ffn.{rows}",
            f"稠密门控 FFN {rows} 行 bf16",
            partial(_ffn, rows=rows, dtype=_BF16),
            targets.get(rows),
        )
        for rows in env.shape.ffn_rows
    ]


def _variant_cases(env: Env) -> list[Case]:
    """没有要求、只报告的：AVX2、int8 缓存、一个线程。"""
    shape = env.shape
    long, tokens = shape.long_context, shape.prefill
    decode = partial(_decode, rows=1, context=long, dtype=_BF16)
    batch = partial(_decode, rows=shape.batch, context=shape.batch_context, dtype=_BF16)
    prefill = partial(_prefill, tokens=tokens, dtype=_BF16)
    full = partial(_prefill, tokens=tokens, dtype=_FP32)
    titles = [
        ("decode.long", f"注意力层 解码 1 行 已缓存 {long} bf16", decode),
        (
            "decode.batch",
            f"注意力层 解码 {shape.batch} 行 已缓存 {shape.batch_context} bf16",
            batch,
        ),
        ("prefill.bf16", f"注意力层 预填充 {tokens} bf16", prefill),
        ("prefill.fp32", f"注意力层 预填充 {tokens} fp32", full),
    ]
    cases: list[Case] = [
        SpeedCase(f"avx2.{key}", f"{title}（本库限 AVX2）", build, isa="avx2")
        for key, title, build in titles
    ]
    cases += [
        SpeedCase(f"threads1.{key}", f"{title}（1 个线程）", build, threads=1)
        for key, title, build in titles[:1] + titles[2:3]
    ]
    int8 = partial(_decode, rows=1, context=long, dtype=_BF16, cache_dtype="int8")
    cases.append(SpeedCase("int8.decode.long", f"{titles[0][1]}（int8 缓存）", int8))
    return cases


def _memory_cases(env: Env) -> list[Case]:
    length = env.shape.memory_length // (4 if env.quick else 1)
    cases: list[Case] = [MemoryCase("memory.layer", "layer", length)]
    if not env.quick:
        cases.append(MemoryCase("memory.model", "model", length))
    cases.append(LengthCase("memory.double.layer", "layer", length))
    if not env.quick:
        cases.append(LengthCase("memory.double.model", "model", length))
    return cases


def build(env: Env) -> list[Case]:
    """MLA 套件的各项。quick 时：计时两轮，内存只测一层、长度减为四分之一。"""
    rows = 1
    whole = SpeedCase(
        "model.decode.long",
        f"整个模型 解码 {rows} 行 已缓存 {env.shape.long_context} bf16（MoE 用 transformers 的）",
        partial(_model_decode, rows=rows, context=env.shape.long_context, dtype=_BF16),
        6.0,
    )
    return [
        *_attention_cases(env),
        *_ffn_cases(env),
        whole,
        *_memory_cases(env),
        *_variant_cases(env),
        OverheadCase("overhead", "每次算子调用的开销"),
    ]


register_suite("mla", "MLA：注意力、稠密 FFN、整个模型、内存", build)
