"""optimize、restore、switch、optimized：就地优化一个模型实例，随时还原。"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from deepseek_opt.errors import ConfigError, DeepSeekOptError, InputError, UnsupportedError
from deepseek_opt.integrations import apply, apply_generate, apply_moe, apply_mtp, bridge, quantized
from deepseek_opt.integrations.patch import Patch
from deepseek_opt.integrations.quantized import NOTHING_KNOWN, Known
from deepseek_opt.integrations.runtime import Runtime
from deepseek_opt.metrics import is_collecting, start_metrics, stop_metrics
from deepseek_opt.report import OptimizationReport

logger = logging.getLogger("deepseek_opt")

_STATE = "_deepseek_opt_state"
_guard = threading.Lock()
_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()

FilterFn = Callable[[str, nn.Module], bool]


@dataclass
class Owned:
    """metrics : 性能指标是否由 optimize 开始收集。predictor_on : optimize 给哪个模型装上了 MTP。"""

    metrics: bool = False
    predictor_on: nn.Module | None = None


class ModelState:
    """放在被优化的模型实例上的私有记录；deepcopy 时随模型复制。

    owned : 由 optimize 添上、因而由 restore 去掉的。
    """

    def __init__(
        self,
        runtime: Runtime,
        report: OptimizationReport,
        options: dict[str, Any],
        owned: Owned,
    ):
        self.runtime = runtime
        self.report = report
        self.options = options
        self.owned = owned


def optimize(
    model: nn.Module, profile: Any, *, strict: bool = False, filter_fn: FilterFn | None = None
) -> OptimizationReport:
    """就地优化 model（只改这个实例）；返回每个模块替换了没有、为什么。

    参数
    ----
    model : transformers 模型，或登记过注意力类（``register_spec``）的自己的模型。
    profile : :class:`~deepseek_opt.OptimizationProfile`；为 None 的部分不动。
    strict : True 时，凡要求了却做不到的都抛 UnsupportedError，模型保持原样。
    filter_fn : ``filter_fn(名字, 模块) -> bool``；返回 False 的模块不替换。

    参数、缓冲区、类、模块全局都不动；state_dict、save_pretrained、deepcopy 照常。
    中途出错会全部撤销。没有可替换的模块时，报告写明原因并记一条警告（strict 时报错）。
    从此刻起收集性能指标，随时用 ``deepseek_opt.metrics(model)`` 读出，restore 时停止。

    抛出 InputError（参数不对、已经优化过）、ConfigError（配置与模型不符）、UnsupportedError（strict）。

    示例::

        report = deepseek_opt.optimize(model, OptimizationProfile(mla=MLAConfig()))
        print(report)
    """
    check_model(model)
    _check_profile(profile)
    with lock_of(model):
        if is_optimized(model):
            raise InputError(
                f"这个 {type(model).__name__} 已经优化过；要换配置请用 switch(model, profile)，"
                "要撤销请用 restore(model)"
            )
        return apply_profile(model, profile, strict, filter_fn)


def restore(model: nn.Module, *, dequantize: bool = False) -> nn.Module:
    """撤销 optimize，模型（逐位）回到原样；返回 model。

    参数
    ----
    model : 优化过的模型。
    dequantize : 量化的专家没有保留原权重时，由量化的权重还原成原来的布局与类型（近似值，约差量化误差）。

    抛出 InputError（没有优化过）、UnsupportedError（专家的原权重已释放，而 dequantize 为 False；模型不变）。

    示例::

        deepseek_opt.restore(model)
    """
    check_model(model)
    with lock_of(model):
        if not is_optimized(model):
            raise InputError(f"这个 {type(model).__name__} 没有优化过，无需 restore")
        if dequantize:
            quantized.rebuild_released(model)
        else:
            quantized.require_original(model, "restore 无法逐位还原")
        for module, name, value in detach_all(model):
            if name == _STATE:
                _give_back(module, value.owned)
    logger.info("已恢复 %s", type(model).__name__)
    return model


def switch(
    model: nn.Module,
    profile: Any,
    *,
    strict: bool | None = None,
    filter_fn: FilterFn | None = None,
) -> OptimizationReport:
    """在已优化的模型上换一份配置；出错时保持原来的优化不变。

    strict、filter_fn 不给时沿用上一次的。没有优化过则抛 InputError。

    示例::

        deepseek_opt.optimize(model, OptimizationProfile.preset("fast_decode"))
        deepseek_opt.switch(model, OptimizationProfile.preset("low_memory"))
    """
    check_model(model)
    _check_profile(profile)
    with lock_of(model):
        state = find_state(model)
        if state is None:
            raise InputError(
                f"这个 {type(model).__name__} 没有优化过，请先用 optimize(model, profile)"
            )
        strict = state.options["strict"] if strict is None else strict
        chosen = filter_fn or state.options["filter_fn"]
        known = quantized.known_in(model)
        saved = detach_all(model)
        try:
            return apply_profile(model, profile, strict, chosen, state.owned, known)
        except BaseException:
            reattach(saved)
            raise


@contextmanager
def optimized(
    model: nn.Module, profile: Any, *, strict: bool = False, filter_fn: FilterFn | None = None
) -> Iterator[OptimizationReport]:
    """``with`` 块内优化，离开时恢复（出错也恢复）。

    示例::

        with deepseek_opt.optimized(model, profile) as report:
            model.generate(**inputs)
    """
    report = optimize(model, profile, strict=strict, filter_fn=filter_fn)
    try:
        yield report
    finally:
        if is_optimized(model):
            restore(model)


class AttentionOptimizer:
    """MLA 注意力优化器：只优化注意力，类的写法。

    示例::

        optimizer = AttentionOptimizer(MLAConfig(cache_dtype="int8"))
        if any(optimizer.can_optimize(m) for m in model.modules()):
            report = optimizer.apply(model)
            ...
            optimizer.restore(model)
    """

    def __init__(self, config: Any = None):
        from deepseek_opt.config import MLAConfig, OptimizationProfile

        config = MLAConfig() if config is None else config
        if not isinstance(config, MLAConfig):
            raise InputError.expected("config", "MLAConfig", config)
        self.profile = OptimizationProfile(mla=config)

    @property
    def config(self) -> Any:
        """MLA 配置；可动态修改的字段改动后，已优化的模型下一次调用生效。"""
        return self.profile.mla

    def can_optimize(self, module: nn.Module) -> bool:
        """这个模块是否是能替换的 MLA 注意力层。"""
        return apply.can_replace_attention(module)

    def apply(
        self, model: nn.Module, *, strict: bool = False, filter_fn: FilterFn | None = None
    ) -> OptimizationReport:
        """同 :func:`optimize`，只有 MLA 部分。"""
        return optimize(model, self.profile, strict=strict, filter_fn=filter_fn)

    def restore(self, model: nn.Module) -> nn.Module:
        """同 :func:`restore`。"""
        return restore(model)


# ---- 内部 ----


def find_state(model: nn.Module) -> ModelState | None:
    """model 或其子模块（例如被 PEFT 包了一层）上的记录。"""
    for module in model.modules():
        state = module.__dict__.get(_STATE)
        if state is not None:
            return state
    return None


def is_optimized(model: nn.Module) -> bool:
    """model（或其中一部分）是否正处于优化状态。"""
    return any(
        name == _STATE or isinstance(value, Patch)
        for module in model.modules()
        for name, value in module.__dict__.items()
    )


def lock_of(model: nn.Module) -> threading.RLock:
    with _guard:
        return _locks.setdefault(model, threading.RLock())


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InputError.expected("model", "torch.nn.Module", model)


def _check_profile(profile: Any) -> None:
    from deepseek_opt.config import OptimizationProfile

    if not isinstance(profile, OptimizationProfile):
        raise InputError.expected("profile", "OptimizationProfile", profile)


def apply_profile(
    model: nn.Module,
    profile: Any,
    strict: bool,
    filter_fn: FilterFn | None,
    owned: Owned | None = None,
    known: Known = NOTHING_KNOWN,
) -> OptimizationReport:
    """装上全部补丁；出错时全部撤销。known 是已有的量化专家，不必再量化。"""
    if bridge.loaded():
        bridge.check_version()
        bridge.register_experts()
    runtime = Runtime(profile)
    report = OptimizationReport(type(model).__name__, [], runtime.fallbacks)
    mtp = getattr(profile, "mtp", None)
    attached, lacking = (None, None) if mtp is None else apply_mtp.attach_declared(model, mtp)
    try:
        if profile.mla is not None:
            report.entries += apply.replace_attention(model, profile.mla, runtime, filter_fn)
        moe = getattr(profile, "moe", None)
        if moe is not None:
            report.entries += apply_moe.replace_moe(model, profile.moe, runtime, filter_fn, known)
        if getattr(profile, "dense", None) is not None:
            report.entries += apply.replace_dense(model, profile.dense, runtime, filter_fn)
        apply.patch_bases(model, runtime)
        if mtp is not None:
            report.entries += apply_mtp.replace_generate(model, runtime, lacking)
        apply_generate.record_generate(model, runtime)
        if strict:
            _require_met(report)
        quantized.require_reused(known, model)
        options = {"strict": strict, "filter_fn": filter_fn}
        owned = Owned(not is_collecting(model)) if owned is None else owned
        owned = replace(owned, predictor_on=attached or owned.predictor_on)
        model.__dict__[_STATE] = ModelState(runtime, report, options, owned)
        # 不能撤销的一步放在最后
        quantized.release_where(model, getattr(moe, "keep_original_weights", None) is False)
    except BaseException:
        detach_all(model)
        if attached is not None:
            apply_mtp.detach(attached)
        raise
    start_metrics(model)
    _log(report)
    return report


def _give_back(model: nn.Module, owned: Owned) -> None:
    """去掉 optimize 添上的。"""
    if owned.metrics:
        stop_metrics(model)
    if owned.predictor_on is not None:
        apply_mtp.detach(owned.predictor_on)


def _require_met(report: OptimizationReport) -> None:
    lines = [f"{entry.name or entry.part}：{entry.reason}" for entry in report.unmet]
    if not report.replaced and not any(entry.native for entry in report.entries):
        lines.append("模型里没有任何可以替换的模块")
    if lines:
        raise UnsupportedError(f"{report.model} 没有做到配置的全部要求：\n  " + "\n  ".join(lines))


def _log(report: OptimizationReport) -> None:
    if report.replaced:
        logger.info(
            "%s：替换 %d 处，跳过 %d 处", report.model, len(report.replaced), len(report.skipped)
        )
    else:
        reasons = sorted({entry.reason for entry in report.skipped if entry.reason})
        logger.warning(
            "%s 里什么都没有替换：%s", report.model, "；".join(reasons) or "配置各部分都为空"
        )


def detach_all(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """取下全部补丁、替身与记录；返回 (模块, 属性, 值) 供重新装上。"""
    removed = []
    for module in model.modules():
        state = module.__dict__
        if _STATE in state:
            removed.append((module, _STATE, state.pop(_STATE)))
        for patch in [value for value in state.values() if isinstance(value, Patch)]:
            removed.append((module, patch.attribute, patch))
            patch.remove()
        removed += apply.drop_traces(module)
    return removed


def reattach(removed: list[tuple[nn.Module, str, Any]]) -> None:
    for module, name, value in removed:
        module.__dict__[name] = value


__all__ = [
    "AttentionOptimizer",
    "ConfigError",
    "DeepSeekOptError",
    "OptimizationReport",
    "optimize",
    "optimized",
    "restore",
    "switch",
]
