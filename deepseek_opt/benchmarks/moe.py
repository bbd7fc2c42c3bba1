"""MoE 的基准套件：``deepseek-opt bench moe``。

对照是 transformers 的 grouped_mm 实现（它最快的一种），同一次运行里交替计时。要求（target）是 2 核
AVX512-BF16、形状 V2-Lite-3L 上的倍数。
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch

from deepseek_opt.benchmarks import counts, llamacpp, moe_quantized, shapes
from deepseek_opt.benchmarks.cases import Case, Env, Row, SpeedCase, Work, register_suite
from deepseek_opt.benchmarks.decode_work import model_decode
from deepseek_opt.benchmarks.sparse_dense import SparseDenseCase

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_PEER = "transformers grouped_mm"
_MIB = 1 << 20
_ROUTER = (256, 8)  # DeepSeek-V3 的专家数与组数


def _optimized_twin(module: Any, *, everything: bool = False) -> Any:
    """共用权重的副本，优化过；everything 时连同注意力与稠密层。"""
    from deepseek_opt import DenseConfig, MLAConfig, MOEConfig, OptimizationProfile, optimize
    from deepseek_opt.metrics import stop_metrics

    others = {"mla": MLAConfig(), "dense": DenseConfig()} if everything else {}
    copied = shapes.twin(module)
    optimize(copied, OptimizationProfile(moe=MOEConfig(), **others))
    if not everything:
        stop_metrics(copied)  # 指标是整个模型一份，不是每层一份
    return copied


def _touched(block: Any, x: torch.Tensor) -> int:
    with torch.inference_mode():
        return int(block.gate(x)[2].unique().numel())


def _layer(
    env: Env, tokens: int, dtype: torch.dtype, train: bool = False, accumulate: bool = False
) -> Work:
    """一个 MoE 块（含路由与共享专家）；train 时前向加反向，对输入与全部权重求导。

    accumulate：梯度累积的第二个微批次起，``.grad`` 已经存在；否则每次先清空（set_to_none）。
    """
    from deepseek_opt import accumulate_into_grad

    block = shapes.build_moe(env.shape, dtype)
    fast = _optimized_twin(block)
    x = torch.randn(1, tokens, env.shape.config["hidden_size"]).to(dtype)
    cost = counts.moe_layer(env.shape.config, tokens, dtype.itemsize, _touched(block, x), train)
    if not train:
        return Work(partial(fast, x), partial(block, x), *cost, dtype)
    gradient = torch.randn(x.shape).to(dtype)
    x.requires_grad_()

    if accumulate:
        block, fast = (copy.deepcopy(module) for module in (block, fast))  # 各有各的 .grad
        accumulate_into_grad(fast)

    def run(module: Any) -> None:
        if not accumulate:
            module.zero_grad(set_to_none=True)
        x.grad = None
        module(x).backward(gradient)

    return Work(partial(run, fast), partial(run, block), *cost, dtype)


def _router(_env: Env, tokens: int, dtype: torch.dtype) -> Work:
    """只有路由：打分、选组、选专家、归一化。"""
    from deepseek_opt import ops

    experts, groups = _ROUTER
    router = shapes.build_router(experts, groups, dtype)
    width = router.weight.shape[1]
    x = torch.randn(tokens, width).to(dtype)
    bias = router.e_score_correction_bias.float()
    rule = {
        "top_k": router.top_k,
        "normalize": router.norm_topk_prob,
        "n_group": router.num_group,
        "topk_group": router.topk_group,
        "scaling": router.routed_scaling_factor,
    }

    def ours() -> Any:
        return ops.moe_route(x, router.weight, None, bias, **rule)

    reads = experts * width * dtype.itemsize
    return Work(ours, partial(router, x), 2 * tokens * experts * width, reads, dtype)


def _model_decode(env: Env, rows: int, context: int, dtype: torch.dtype) -> Work:
    """整个模型、每行一个新词元；注意力、稠密层、MoE 都是本库的。"""
    return model_decode(env, partial(_optimized_twin, everything=True), rows, context, dtype)


def _model_prefill(env: Env, tokens: int, dtype: torch.dtype) -> Work:
    """整个模型从头预填充一行。"""
    from transformers import DynamicCache

    shape = env.shape
    model = shapes.build_model(shape, dtype)
    fast = _optimized_twin(model, everything=True)
    ids = torch.randint(0, shape.config["vocab_size"], (1, tokens))

    def run(module: Any) -> Any:
        cache = DynamicCache(config=module.config)
        return module(ids, past_key_values=cache, logits_to_keep=1)

    cost = counts.model_prefill(shape.config, tokens, dtype.itemsize)
    return Work(partial(run, fast), partial(run, model), *cost, dtype)


def _overhead(env: Env) -> Work:
    """27 层、宽 64 的模型解码一步：几乎只有每次调用的开销。"""
    tiny = Env(shapes.OVERHEAD, env.quick, env.threads, env.isa)
    return _model_decode(tiny, 1, shapes.OVERHEAD.long_context, _FP32)


class ActivationCase(Case):
    """训练时一个 MoE 块前向的内存峰值（含为反向留下的），与 transformers 比。"""

    def __init__(self, tokens: int, target: float | None):
        self.key, self.tokens, self.target = "layer.train.memory", tokens, target
        self.title = f"MoE 层 {tokens} 个词元 训练时前向的内存峰值 bf16"

    def run(self, env: Env) -> list[Row]:
        from deepseek_opt import release_buffers
        from deepseek_opt.benchmarks.process_memory import measure_peak

        block = shapes.build_moe(env.shape, _BF16)
        fast = _optimized_twin(block)
        x = torch.randn(1, self.tokens, env.shape.config["hidden_size"]).to(_BF16).requires_grad_()
        peaks = []
        for module in (block, fast):
            module(x)  # 各库常驻的不算在读数里
            release_buffers()  # 本库留在回收池里的暂存要算
            peaks.append(measure_peak(partial(module, x)).peak_bytes / _MIB)
        return [Row(self.key, self.title, "saving", "MiB", _PEER, peaks[0], peaks[1], self.target)]


def _layer_cases(env: Env) -> list[Case]:
    targets = {1: 2.0, 8: 1.6, 40: 1.7, 512: 1.3, 2048: 1.2}
    cases: list[Case] = [
        SpeedCase(
            f"layer.{tokens}",
            f"MoE 层 {tokens} 个词元 bf16",
            partial(_layer, tokens=tokens, dtype=_BF16),
            targets.get(tokens),
            _PEER,
        )
        for tokens in env.shape.moe_tokens
    ]
    tokens = env.shape.moe_train
    cases += [
        SpeedCase(
            f"layer.train.{name}",
            f"MoE 层 {tokens} 个词元 前向+反向 {name}",
            partial(_layer, tokens=tokens, dtype=dtype, train=True),
            target,
            _PEER,
            grad=True,
        )
        for name, dtype, target in (("bf16", _BF16, 3.0), ("fp32", _FP32, 2.0))
    ]
    cases.append(
        SpeedCase(
            "layer.train.accumulate",
            f"MoE 层 {tokens} 个词元 梯度累积 前向+反向 bf16",
            partial(_layer, tokens=tokens, dtype=_BF16, train=True, accumulate=True),
            None,
            _PEER,
            grad=True,
        )
    )
    cases.append(ActivationCase(tokens, 0.4))
    cases += [
        SpeedCase(
            f"layer.fp16.{count}",
            f"MoE 层 {count} 个词元 fp16",
            partial(_layer, tokens=count, dtype=_FP16),
            target,
            _PEER,
        )
        for count, target in ((8, 20.0), (64, 60.0))
    ]
    return cases


def _model_cases(env: Env) -> list[Case]:
    shape = env.shape
    decode = (
        (1, shape.batch_context, 4.5),
        (1, shape.long_context, 18.0),
        (shape.batch, shape.batch_context, 15.0),
    )
    cases: list[Case] = [
        SpeedCase(
            f"model.decode.{rows}x{context}",
            f"整个模型 解码 {rows} 行 已缓存 {context} bf16",
            partial(_model_decode, rows=rows, context=context, dtype=_BF16),
            target,
            _PEER,
        )
        for rows, context, target in decode
    ]
    targets = {512: 1.9, 2048: 2.2}
    cases += [
        SpeedCase(
            f"model.prefill.{tokens}",
            f"整个模型 预填充 {tokens} bf16",
            partial(_model_prefill, tokens=tokens, dtype=_BF16),
            targets.get(tokens),
            _PEER,
        )
        for tokens in shape.model_prefill
    ]
    title = "27 层、宽 64 的模型 解码一步 fp32（只有开销）"
    cases.append(SpeedCase("model.overhead", title, _overhead, 2.5, _PEER))
    return cases


def build(env: Env) -> list[Case]:
    """MoE 套件的各项；专家从一开始就是 int4 的形状，只与同样大小的稠密模型比。"""
    if env.shape.int4_group:
        return [SparseDenseCase()]
    experts, groups = _ROUTER
    routers = [
        SpeedCase(
            f"router.{tokens}",
            f"路由 {tokens} 个词元 {experts} 个专家 {groups} 组 bf16",
            partial(_router, tokens=tokens, dtype=_BF16),
            3.0,
            "transformers",
        )
        for tokens in (1, 512)
    ]
    beside = llamacpp.cases(env, _model_decode, _model_prefill, _BF16)
    return [*_layer_cases(env), *routers, *moe_quantized.build(), *_model_cases(env), *beside]


register_suite("moe", "MoE：专家、路由、整个模型", build)
