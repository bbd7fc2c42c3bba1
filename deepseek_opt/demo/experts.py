"""专家：留出源码上各层各专家分到多少词元；MoE 部分的速度、内存与准确率，原类型、int8、int4 对 transformers。

各实现共用一份权重。MoE 部分是模型里全部的 MoE 块（路由、专家、共享专家），输入是原模型读留出源码时真实的
隐藏状态。
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from deepseek_opt import (
    DenseConfig,
    ExpertStatistics,
    MLAConfig,
    MOEConfig,
    OptimizationProfile,
    expert_statistics,
    optimize,
)
from deepseek_opt.benchmarks import timing
from deepseek_opt.benchmarks.process_memory import exact_allocations, measure_peak
from deepseek_opt.benchmarks.shapes import twin
from deepseek_opt.demo.compare import ACCURACY_LIMIT, Check, score
from deepseek_opt.integrations.experts import looks_like_experts
from deepseek_opt.integrations.quantized import stores_in

#: 各行的键名与中文名，第一行是对照；次序即表格里的次序。
VARIANTS = {
    "transformers": "transformers（grouped_mm）",
    "none": "本库",
    "int8": "本库，int8 专家",
    "int4": "本库，int4 专家",
}
_ROUNDS, _SECONDS = 12, 1.5  # 每种词元数的计时
_PEAKS = 3


@dataclass(frozen=True)
class ExpertReading:
    """一种实现的 MoE 部分。

    weight_bytes : 路由专家的权重。accuracy : 整个模型的下一词元准确率。seconds : 一次的词元数 -> 秒。
    peak_bytes : 一次送入最多的词元时，内存峰值比开始时多出的。
    """

    weight_bytes: int
    accuracy: float
    seconds: dict[int, float] = field(hash=False)
    peak_bytes: int


@dataclass(frozen=True)
class ExpertStudy:
    """专家的全部读数；tokens 为统计负载与准确率的词元数，peak_tokens 为量内存时一次的词元数。"""

    dtype: str
    tokens: int
    peak_tokens: int
    loads: dict[str, ExpertStatistics] = field(hash=False)
    readings: dict[str, ExpertReading] = field(hash=False)

    def checks(self) -> list[Check]:
        """换了专家的计算、量化之后，准确率与 transformers 相差不超过 0.5 个百分点。"""
        found, before = [], self.readings["transformers"].accuracy
        for name, reading in self.readings.items():
            if name == "transformers":
                continue
            drop = abs(before - reading.accuracy)
            detail = (
                f"transformers {before:.3%}，本库 {reading.accuracy:.3%}，相差 {drop * 100:.3f} 个百分点"
                f"（{self.tokens} 个词元，限 {ACCURACY_LIMIT * 100:.1f}）"
            )
            kind = self.dtype if name == "none" else name
            found.append(Check(f"{kind} 专家的准确率", drop <= ACCURACY_LIMIT, detail))
        return found

    def speedup(self, name: str, tokens: int) -> float:
        """transformers 的时间 / name 的时间。"""
        theirs, ours = self.readings["transformers"], self.readings[name]
        return theirs.seconds[tokens] / ours.seconds[tokens]


def study(
    model: Any,
    windows: Tensor,
    baseline: float,
    counts: tuple[int, ...],
    tick: Callable[[str], None],
) -> ExpertStudy | None:
    """model 为原模型，baseline 是它在留出源码 windows [N, T] 上的准确率，counts 为计时的各种词元数。

    没有 MoE 块时返回 None。

    tick 每完成一种实现调用一次，没有 MoE 块时也一样。
    """
    if not moe_blocks(model):
        for label in VARIANTS.values():
            tick(label)
        return None
    model.set_experts_implementation("grouped_mm")  # transformers 最快的一种
    inputs = _hidden_states(model, windows[:1])
    models, accuracy, loads = {"transformers": model}, {"transformers": baseline}, {}
    for name, label in VARIANTS.items():
        if name not in models:
            models[name] = _optimized(model, name)
            accuracy[name] = score(models[name], windows)[0]
        if name == "none":
            loads = dict(expert_statistics(models[name]))
        tick(f"专家：{label}")
    seconds = _seconds(models, inputs, counts)
    readings = {
        name: ExpertReading(_weight_bytes(m), accuracy[name], seconds[name], _peak(m, inputs))
        for name, m in models.items()
    }
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    scored = windows.shape[0] * (windows.shape[1] - 1)
    return ExpertStudy(dtype, scored, inputs[0].shape[1], loads, readings)


def moe_blocks(model: nn.Module) -> list[nn.Module]:
    """直接含有路由专家的模块。"""
    return [m for m in model.modules() if any(looks_like_experts(c) for c in m.children())]


def _optimized(model: Any, quantization: str) -> Any:
    copied = twin(model)
    moe = MOEConfig(quantization=quantization)
    optimize(copied, OptimizationProfile(mla=MLAConfig(), dense=DenseConfig(), moe=moe))
    return copied


def _hidden_states(model: Any, ids: Tensor) -> list[Tensor]:
    """各 MoE 块的输入 [1, T, H]。"""
    found: list[Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
        for block in moe_blocks(model)
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


def _run(blocks: list[nn.Module], inputs: list[Tensor]) -> None:
    for block, x in zip(blocks, inputs, strict=True):
        block(x)


def _seconds(
    models: dict[str, Any], inputs: list[Tensor], counts: tuple[int, ...]
) -> dict[str, dict[int, float]]:
    """各实现轮流计时，取最短。"""
    found: dict[str, dict[int, float]] = {name: {} for name in models}
    for count in counts:
        part = [x[:, :count].contiguous() for x in inputs]
        sides = [partial(_run, moe_blocks(m), part) for m in models.values()]
        times = timing.in_turn(sides, rounds=_ROUNDS, seconds=_SECONDS)
        for name, each in zip(models, times, strict=True):
            found[name][count] = each.best
    return found


def _peak(model: Any, inputs: list[Tensor]) -> int:
    """几次里最少的：头几次还有各库按形状缓存的代码，别的线程偶尔也会分配。"""
    run = partial(_run, moe_blocks(model), inputs)
    with exact_allocations():
        return min(measure_peak(run).peak_bytes for _ in range(_PEAKS))


def _weight_bytes(model: Any) -> int:
    """路由专家与共享专家。"""
    stores = stores_in(model)
    if stores:
        return sum(store.nbytes for _, store in stores.values())
    named = (pair for block in moe_blocks(model) for pair in block.named_parameters())
    return sum(w.numel() * w.element_size() for name, w in named if "experts." in name)
