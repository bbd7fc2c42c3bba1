"""verify：同一份输入分别走原实现与优化后的实现，逐项比较；结束后模型与之前完全一样。"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepseek_opt.cache_layer import QUANTIZED
from deepseek_opt.errors import InputError
from deepseek_opt.eval_mode import evaluating
from deepseek_opt.integrations import quantized
from deepseek_opt.metrics import paused
from deepseek_opt.optimize import (
    check_model,
    detach_all,
    find_state,
    is_optimized,
    lock_of,
    optimized,
    reattach,
)
from deepseek_opt.report import LayerError, VerificationReport

# fp32：只差求和次序，相对误差远小于此；16 位：相对 logits 的均方根。
_RELATIVE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
_INT8_RELATIVE = 0.1  # 缓存或专家是 int8、fp8
_INT4_RELATIVE = 0.3  # 专家是 int4；毫不相干的输出约为 1.1
_ACCURACY_DROP = 0.005  # 规范：精度下降不超过 0.5 %


class _Run(NamedTuple):
    logits: Tensor
    hidden: list[tuple[str, Tensor]]
    generated: Tensor | None


def verify(
    model: nn.Module,
    inputs: Any,
    *,
    profile: Any = None,
    max_new_tokens: int = 16,
) -> VerificationReport:
    """原实现与优化后的对照：logits、逐层误差、下一词元、贪心生成。

    参数
    ----
    model : 已优化的模型（与它自己的原实现比较），或未优化的模型（按 profile 临时优化）。
    inputs : input_ids [B, T]，或交给 ``model(**inputs)`` 的字典（可含 attention_mask、labels）。
    profile : 未优化的模型用的配置，默认只优化 MLA；已优化的模型不要给。
    max_new_tokens : 贪心生成的词元数；0 为不生成（自己的、没有 generate 的模型也不生成）。

    期间会临时取下再装回补丁，别的线程不要同时使用这个模型。

    量化了专家时上限放宽（int8、fp8 平均误差 10 %，int4 30 %），报告里写明所用的上限；贪心生成只报告、不作要求。

    抛出 InputError（输入不对，或已优化的模型又给了 profile）、UnsupportedError（专家的原权重已释放，没有对照）。

    示例::

        report = deepseek_opt.verify(model, tokenizer("def main():", return_tensors="pt"))
        print(report)
        assert report.passed
    """
    inputs = _as_inputs(inputs)
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 0
    ):
        raise InputError.expected("max_new_tokens", "非负整数", max_new_tokens)
    check_model(model)
    with lock_of(model), evaluating(model):
        already = is_optimized(model)
        if already and profile is not None:
            raise InputError(
                "模型已经优化过，verify 用它现在的配置；要换配置请先用 switch(model, profile)"
            )
        if already:
            quantized.require_original(model, "verify 没有可以对照的原实现")
            return _compare_optimized(model, inputs, max_new_tokens)
        if profile is None:
            from deepseek_opt.config import MLAConfig, OptimizationProfile

            profile = OptimizationProfile(mla=MLAConfig())
        with optimized(model, profile):
            return _compare_optimized(model, inputs, max_new_tokens)


def _compare_optimized(
    model: nn.Module, inputs: dict[str, Any], max_new_tokens: int
) -> VerificationReport:
    with paused(model):
        return _compare_paused(model, inputs, max_new_tokens)


def _compare_paused(
    model: nn.Module, inputs: dict[str, Any], max_new_tokens: int
) -> VerificationReport:
    state = find_state(model)
    names = [entry.name for entry in state.report.replaced]
    before = dict(state.runtime.fallbacks)
    mine = _run(model, inputs, max_new_tokens, names)
    used = {k: n - before.get(k, 0) for k, n in state.runtime.fallbacks.items()}
    used = {k: n for k, n in used.items() if n}
    removed = detach_all(model)
    try:
        reference = _run(model, inputs, max_new_tokens, names)
    finally:
        reattach(removed)
    return _compare(model, inputs, reference, mine, len(names), used)


def _as_inputs(inputs: Any) -> dict[str, Any]:
    if isinstance(inputs, Tensor):
        return {"input_ids": inputs}
    if not isinstance(inputs, Mapping) or not inputs:
        raise InputError.expected("inputs", "input_ids 张量或输入字典", inputs)
    return {name: value for name, value in inputs.items() if name != "labels"}


@torch.no_grad()
def _run(model: nn.Module, inputs: dict[str, Any], max_new_tokens: int, names: list[str]) -> _Run:
    captured: list[tuple[str, Tensor]] = []
    modules = dict(model.named_modules())
    whole = hasattr(model, "config") and hasattr(model, "base_model")
    hooks = [] if whole else [modules[n].register_forward_hook(_keep(n, captured)) for n in names]
    try:
        extra = {"output_hidden_states": True} if whole else {}
        out = model(**inputs, **extra)
    finally:
        for hook in hooks:
            hook.remove()
    logits = _main_output(out)
    if whole and getattr(out, "hidden_states", None):
        captured = [(f"第 {i} 层", h.detach().clone()) for i, h in enumerate(out.hidden_states)]
    generated = None
    if max_new_tokens and hasattr(model, "generate") and "input_ids" in inputs:
        generated = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1
        )
    return _Run(logits.detach().clone(), captured, generated)


def _keep(name: str, captured: list[tuple[str, Tensor]]) -> Any:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        captured.append((name, tensor.detach().clone()))

    return hook


def _main_output(out: Any) -> Tensor:
    for name in ("logits", "last_hidden_state"):
        value = getattr(out, name, None)
        if isinstance(value, Tensor):
            return value
    value = out[0] if isinstance(out, tuple) else out
    if not isinstance(value, Tensor):
        raise InputError.expected("model 的输出", "张量、(张量, …) 或带 logits 的对象", value)
    return value


def _compare(
    model: nn.Module,
    inputs: dict[str, Any],
    reference: _Run,
    mine: _Run,
    replaced: int,
    fallbacks: dict[tuple[str, str], int],
) -> VerificationReport:
    valid = _valid(inputs, reference.logits)
    old, new = reference.logits[valid].float(), mine.logits[valid].float()
    error = (old - new).abs()
    same = (old.argmax(-1) == new.argmax(-1)).float().mean()
    hits = [_hits(run.logits, inputs, valid) for run in (reference, mine)]
    accuracy = [None if hit is None else float(hit.float().mean()) for hit in hits]
    layers = tuple(
        _layer_error(name, a, b, valid)
        for (name, a), (_, b) in zip(reference.hidden, mine.hidden, strict=False)
    )
    equal, matched, total = _greedy(reference.generated, mine.generated, inputs)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    fields = {
        "max_error": float(error.max()),
        "mean_error": float(error.mean()),
        "scale": float(old.pow(2).mean().sqrt()),
        "agreement": float(same),
    }
    scheme = quantized.scheme_in(model)
    quantized_cache = _quantizes_cache(model)
    limit = _limit(dtype, scheme, quantized_cache)
    exact = dtype == torch.float32 and not quantized_cache and scheme is None
    drop = _allowed_drop(hits, scheme)
    return VerificationReport(
        model=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        tokens=old.shape[0],
        original_accuracy=accuracy[0],
        optimized_accuracy=accuracy[1],
        greedy_equal=equal,
        greedy_matched=matched,
        greedy_total=total,
        layers=layers,
        replaced=replaced,
        fallbacks=fallbacks,
        quantization=None if scheme is None else str(scheme),
        error_limit=limit,
        accuracy_limit=drop,
        failures=tuple(_failures(fields, limit, accuracy, drop, equal, exact, replaced)),
        **fields,
    )


def _failures(
    fields: dict[str, float],
    limit: float,
    accuracy: list[float | None],
    drop: float | None,
    greedy_equal: bool | None,
    exact: bool,
    replaced: int,
) -> Iterator[str]:
    if not replaced:
        yield "没有替换任何模块，无从核对"
    worst = fields["max_error"] if exact else fields["mean_error"]
    kind = "最大" if exact else "平均"
    if not worst <= limit * fields["scale"]:  # NaN 也算未通过
        yield f"logits {kind}误差 {worst:.3e} 超过均方根 {fields['scale']:.3g} 的 {limit:.0e}"
    if exact and greedy_equal is False:
        yield "fp32 贪心生成的词元与原实现不同"
    if drop is not None and accuracy[0] - accuracy[1] > drop:
        yield f"下一词元准确率下降 {accuracy[0] - accuracy[1]:.4%}，超过 {drop:.2%}"


def _limit(dtype: torch.dtype, scheme: Any, quantized_cache: bool) -> float:
    """logits 误差与均方根之比的上限。"""
    if scheme is not None and scheme.bits == 4:
        return _INT4_RELATIVE
    byte = scheme is not None or quantized_cache
    return _INT8_RELATIVE if byte else _RELATIVE.get(dtype, 0.05)


def _allowed_drop(hits: list[Tensor | None], scheme: Any) -> float | None:
    """准确率可以下降多少；不能比较时为 None。

    0.5 % 加一个词元；量化时再加两个标准差：输出改变的词元里对错互换是随机的，词元少时光凭运气就会超过。
    """
    old, new = hits
    if old is None or new is None:
        return None
    count = old.numel()
    changed = int((old != new).sum()) if scheme is not None else 0
    return _ACCURACY_DROP + (1 + 2 * math.sqrt(changed)) / count


def _quantizes_cache(model: nn.Module) -> bool:
    state = find_state(model)
    return state is not None and state.runtime.store_dtype in QUANTIZED


def _valid(inputs: dict[str, Any], logits: Tensor) -> Tensor:
    """参与比较的位置 [B, T]：不是填充的。"""
    shape = logits.shape[:-1]
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == shape:
        return mask.bool()
    return torch.ones(shape, dtype=torch.bool, device=logits.device)


def _hits(logits: Tensor, inputs: dict[str, Any], valid: Tensor) -> Tensor | None:
    """各位置的下一词元猜对没有（一维）；没有可比的为 None。"""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape != logits.shape[:2] or ids.shape[1] < 2:
        return None
    pairs = valid[:, :-1] & valid[:, 1:]
    if not bool(pairs.any()):
        return None
    return (logits[:, :-1].argmax(-1) == ids[:, 1:])[pairs]


def _layer_error(name: str, old: Tensor, new: Tensor, valid: Tensor) -> LayerError:
    if old.shape[:2] == valid.shape:
        old, new = old[valid], new[valid]
    error = (old.float() - new.float()).abs()
    scale = float(old.float().pow(2).mean().sqrt())
    return LayerError(name, float(error.max()), float(error.mean()), scale)


def _greedy(
    old: Tensor | None, new: Tensor | None, inputs: dict[str, Any]
) -> tuple[bool | None, int, int]:
    if old is None or new is None:
        return None, 0, 0
    start = inputs["input_ids"].shape[1]
    width = max(old.shape[1], new.shape[1]) - start
    matched = 0
    for a, b in zip(old[:, start:].tolist(), new[:, start:].tolist(), strict=True):
        for x, y in zip(a, b, strict=False):
            if x != y:
                break
            matched += 1
    total = width * old.shape[0]
    return matched == total, matched, total
