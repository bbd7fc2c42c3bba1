"""遍历模型，决定每个 MoE 块与它的专家换不换、为什么，并装上补丁。"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

from torch import nn

from deepseek_opt.integrations import (
    experts,
    moe_adapter,
    moe_block,
    moe_layer,
    own_moe,
    quantized,
    router,
)
from deepseek_opt.integrations.dense import instance_reason
from deepseek_opt.integrations.expert_store import ExpertStore
from deepseek_opt.integrations.experts import ExpertsPatch
from deepseek_opt.integrations.moe_block import MoeBlockPatch
from deepseek_opt.integrations.moe_layer import MoeLayerPatch
from deepseek_opt.integrations.own_moe import OwnMoePatch
from deepseek_opt.integrations.patch import patch_of
from deepseek_opt.integrations.quantized import Known
from deepseek_opt.integrations.runtime import Runtime
from deepseek_opt.load import LoadCounter
from deepseek_opt.report import ReportEntry

FilterFn = Callable[[str, nn.Module], bool] | None
Chosen = tuple[str, nn.Module, Any]  # (名字, 模块, 布局)

_FILTERED = "filter_fn 返回 False"
# 配置字段 -> transformers 各架构的配置里的名字，取第一个有的。
_NAMES = {
    "num_experts_per_tok": ("num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k"),
    "num_shared_experts": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "scoring_func": ("scoring_func",),
    "n_group": ("n_group",),
    "topk_group": ("topk_group",),
    "routed_scaling_factor": ("routed_scaling_factor",),
    "norm_topk_prob": ("norm_topk_prob",),
}
# 这些值就是 transformers 模型本来的做法，不算要求。
_NEUTRAL = {"balance_strategy": "none", "pad_to_capacity": False}
_NO_LIST = "专家是各自的 nn.Linear（register_moe），不能量化；按原精度计算"
# 做到了没有，逐层另有条目；重算对每一层都起作用。
_APPLIED = {
    "recompute_experts",
    "quantization",
    "quantization_group_size",
    "quantization_symmetric",
    "keep_original_weights",
}


def replace_moe(
    model: nn.Module, config: Any, runtime: Runtime, filter_fn: FilterFn, known: Known
) -> list[ReportEntry]:
    """替换全部认得的 Experts 实例与 MoE 块；config 为 MOEConfig，known 为已有的量化专家。

    路由专家的量化全部算好之后再装补丁；共享专家的在整块替换时做，出错由调用者撤销全部补丁。
    """
    chosen, entries = _choose(model, filter_fn, known.stores)
    actual_fields: set[str] = set()
    for name, module, _ in chosen:
        actual = _actual(module)
        config.check_against(actual, name)
        actual_fields.update(actual)
    layers = _choose_layers(model, config, filter_fn, entries)
    stores = _quantize(chosen + layers, config, known, entries)
    keep = config.keep_original_weights is not False
    for name, module, layout in chosen:
        patch = ExpertsPatch(module, runtime, name, layout)
        patch.store = stores.get(name)
        patch.install()
        reason = "" if patch.store is None else patch.store.describe(keep)
        entries.append(ReportEntry(name, "moe", type(module).__name__, True, reason))
    for name, module, _ in layers:
        if name in stores:
            MoeLayerPatch(module, runtime, name, stores[name]).install()
            reason = stores[name].describe(keep)
            entries.append(ReportEntry(name, "moe", type(module).__name__, True, reason))
    entries += _replace_blocks(model, config, runtime, filter_fn, known)
    entries += _replace_routers(model, runtime, filter_fn)
    own, listed = _replace_own(model, config, runtime, filter_fn)
    entries += own
    actual_fields.update(listed)
    if not entries:
        entries += _own_layers(model)
    if not entries:
        entries.append(ReportEntry("", "moe", "", False, "模型里没有 MoE 专家层", True))
    return entries + (_unmet_fields(config, actual_fields) if chosen or listed else [])


def _choose_layers(
    model: nn.Module, config: Any, filter_fn: FilterFn, entries: list[ReportEntry]
) -> list[Chosen]:
    """要量化的 MoEFeedForward；没有要求量化时为空。"""
    found: list[Chosen] = []
    if quantized.scheme_of(config) is None:
        return found
    for name, module in model.named_modules():
        if not moe_layer.is_moe_layer(module):
            continue
        if filter_fn is not None and not filter_fn(name, module):
            entries.append(ReportEntry(name, "moe", type(module).__name__, False, _FILTERED))
        else:
            found.append((name, module, moe_layer.layout_of(module)))
    return found


def _quantize(
    chosen: list[Chosen], config: Any, known: Known, entries: list[ReportEntry]
) -> dict[str, ExpertStore]:
    """模块名 -> 量化的专家；不能量化的在 entries 里写明原因。"""
    scheme, stores = quantized.scheme_of(config), {}
    for name, module, layout in chosen:
        old = quantized.reusable(name, module, known, scheme)
        if old is not None:
            stores[name] = old
        if old is not None or known.exclusive or scheme is None:
            continue
        names = experts.weight_names(module)
        shared = moe_layer.shared_names(module) if moe_layer.is_moe_layer(module) else ()
        reason = quantized.why_not(module, names + shared)
        if reason is None:
            stores[name] = quantized.quantize_module(module, layout, scheme, name, names, shared)
        else:
            entries.append(ReportEntry(name, "moe", "quantization", False, reason, True))
    return stores


def _choose(
    model: nn.Module, filter_fn: FilterFn, stores: Mapping[str, ExpertStore]
) -> tuple[list[Chosen], list[ReportEntry]]:
    """(要换的 (名字, 模块, 布局), 不换的条目)。"""
    chosen, entries = [], []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if experts.resembles_experts(module):
            if getattr(module, "load_counter", None) is None:
                reason = "没有接入 transformers 的 experts 接口，不知道它的 forward 怎样计算"
                entries.append(ReportEntry(name, "moe", kind, False, reason, True))
            continue
        if not experts.looks_like_experts(module):
            continue
        if filter_fn is not None and not filter_fn(name, module):
            entries.append(ReportEntry(name, "moe", kind, False, _FILTERED))
            continue
        layout, reason = None, instance_reason(module)
        if reason is None:
            store = stores.get(name)
            released = store is not None and store.released
            layout, reason = experts.layout_of(module, store if released else None)
        if layout is None:
            entries.append(ReportEntry(name, "moe", kind, False, reason, True))
        else:
            chosen.append((name, module, layout))
    return chosen, entries


def _replace_blocks(
    model: nn.Module, config: Any, runtime: Runtime, filter_fn: FilterFn, known: Known
) -> Iterator[ReportEntry]:
    """专家已换上的块里，能连同共享专家一起算的整块替换。"""
    for name, module in list(model.named_modules()):
        spec = moe_block.find_block(module)
        inner = None if spec is None else getattr(module, spec.experts, None)
        if not isinstance(inner, nn.Module) or not isinstance(patch_of(inner), ExpertsPatch):
            continue
        kind = type(module).__name__
        if filter_fn is not None and not filter_fn(name, module):
            yield ReportEntry(name, "moe", kind, False, _FILTERED)
            continue
        scheme = quantized.scheme_of(config)
        old = quantized.reusable(name, module, known, scheme)
        with nullcontext() if old is None else old.borrowed(module):
            reason = moe_block.block_reason(module, spec, runtime.profile)
        if reason is not None:
            kept = "，保持原来的类型" if patch_of(inner).store is not None else ""
            yield ReportEntry(name, "moe", kind, False, f"共享专家单独计算{kept}：{reason}")
            continue
        patch, note = MoeBlockPatch(module, runtime, name, spec), "共享专家与路由专家一次算完"
        if patch_of(inner).store is not None:
            patch.store = old
            if old is None and not known.exclusive:
                paths = moe_block.shared_paths(module, spec)
                patch.store = quantized.quantize_module(module, None, scheme, name, (), paths)
        if patch.store is not None:
            note += f"；{patch.store.describe(config.keep_original_weights is not False)}"
        patch.install()
        yield ReportEntry(name, "moe", kind, True, note)


def _replace_routers(
    model: nn.Module, runtime: Runtime, filter_fn: FilterFn
) -> Iterator[ReportEntry]:
    """数学上与 ``moe_route`` 相同的路由器。"""
    for name, module in list(model.named_modules()):
        if not router.looks_like_router(module) or patch_of(module) is not None:
            continue
        kind = type(module).__name__
        if filter_fn is not None and not filter_fn(name, module):
            yield ReportEntry(name, "moe", kind, False, _FILTERED)
            continue
        reason = router.router_reason(module)
        if reason is None:
            router.install(module, runtime, name)
        yield ReportEntry(name, "moe", kind, reason is None, reason or "路由一次算完")


def _replace_own(
    model: nn.Module, config: Any, runtime: Runtime, filter_fn: FilterFn
) -> tuple[list[ReportEntry], set[str]]:
    """登记过的自己写的 MoE；没有登记而像 MoE 的也列出。另返回核对过的配置字段。"""
    entries, known = [], set()
    for name, module in list(model.named_modules()):
        adapter, kind = moe_adapter.find_adapter(module), type(module).__name__
        if adapter is None:
            advice = moe_adapter.describe_unregistered(module)
            if advice is not None and patch_of(module) is None:
                entries.append(ReportEntry(name, "moe", kind, False, advice, True))
            continue
        if filter_fn is not None and not filter_fn(name, module):
            entries.append(ReportEntry(name, "moe", kind, False, _FILTERED))
            continue
        reason = own_moe.own_reason(module, adapter)
        if reason is None:
            actual = own_moe.structure(module, adapter)
            config.check_against(actual, name)
            patch = OwnMoePatch(module, runtime, name, adapter)
            reason = own_moe.probe(patch)
        if reason is not None:
            entries.append(ReportEntry(name, "moe", kind, False, reason, True))
            continue
        patch.install()
        known.update(actual)
        note = f"{patch.train_reason}，那时由原 forward 计算" if patch.train_reason else ""
        entries.append(ReportEntry(name, "moe", kind, True, note))
        if quantized.scheme_of(config) is not None:
            entries.append(ReportEntry(name, "moe", "quantization", False, _NO_LIST, True))
    return entries, known


def _actual(module: nn.Module) -> dict[str, Any]:
    """这一层的实际结构，供配置核对；查不到的字段不列。"""
    config = getattr(module, "config", None)
    actual: dict[str, Any] = {"num_experts": module.num_experts}
    for field, names in _NAMES.items():
        values = (getattr(config, name, None) for name in names)
        value = next((v for v in values if v is not None), None)
        if value is not None:
            actual[field] = value
    grouped = actual.get("n_group", 1) > 1 and getattr(config, "topk_method", "") != "greedy"
    actual["routing_strategy"] = "group_limited" if grouped else "topk"
    return actual


def _unmet_fields(config: Any, known: set[str]) -> list[ReportEntry]:
    """给出了、但对 transformers 的 MoE 层不起作用的字段。"""
    entries = []
    for field, value in config.to_dict().items():
        if field in known or field in _APPLIED or _NEUTRAL.get(field) == value:
            continue
        if field in _NAMES:
            reason = "模型的配置里没有这一项，无法核对"
        else:
            reason = "对 transformers 的 MoE 层不起作用：路由与均衡仍按模型自己的做法"
        entries.append(ReportEntry("", "moe", field, False, f"{field}={value!r} {reason}", True))
    return entries


def _own_layers(model: nn.Module) -> list[ReportEntry]:
    """用本库的层搭的模型：不必替换，也不算没做到。"""
    return [
        ReportEntry(
            name, "moe", type(module).__name__, False, "已经是本库的层，无需替换", native=True
        )
        for name, module in model.named_modules()
        if isinstance(getattr(module, "load_counter", None), LoadCounter)
    ]
