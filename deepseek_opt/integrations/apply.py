"""遍历模型，决定每个模块换不换、为什么，并装上补丁。"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from deepseek_opt.integrations import bridge, dense, specs
from deepseek_opt.integrations.patch import patch_of
from deepseek_opt.integrations.projections import effective_weight
from deepseek_opt.integrations.runtime import Runtime
from deepseek_opt.integrations.transformers import AttentionPatch
from deepseek_opt.report import ReportEntry

_DIMS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_FILTERED = "filter_fn 返回 False"

FilterFn = Callable[[str, nn.Module], bool] | None


def can_replace_attention(module: nn.Module) -> bool:
    """module 是否是能替换的 MLA 注意力层。"""
    return specs.looks_like_mla(module) and _attention_reason(module) is None


def _attention_reason(module: nn.Module) -> str | None:
    reason = specs.skip_reason(module)
    if reason is not None:
        return reason
    if hasattr(module, "_hf_hook"):
        return "accelerate 的设备钩子改写了这一层的 forward"
    if "forward" in module.__dict__:
        return "这一层的 forward 已被别的库在实例上改写"
    return effective_weight(getattr(module, specs.find_spec(module).kv_b_proj))[1]


def replace_attention(
    model: nn.Module, config: Any, runtime: Runtime, filter_fn: FilterFn
) -> list[ReportEntry]:
    """替换全部受支持的 MLA 注意力层；config 为 MLAConfig。"""
    entries, chosen = [], []
    for name, module in model.named_modules():
        if not specs.looks_like_mla(module):
            continue
        kind = type(module).__name__
        if filter_fn is not None and not filter_fn(name, module):
            entries.append(ReportEntry(name, "mla", kind, False, _FILTERED))
            continue
        reason = _attention_reason(module)
        if reason is not None:
            entries.append(ReportEntry(name, "mla", kind, False, reason, True))
            continue
        chosen.append((name, module))
    for name, module in chosen:
        if hasattr(config, "check_against"):
            config.check_against(_actual(module), name)
    runtime.layer_count = max(1, len(chosen))
    for name, module in chosen:
        AttentionPatch(module, specs.find_spec(module), runtime, name).install()
        entries.append(ReportEntry(name, "mla", type(module).__name__, True))
    if not entries:
        entries.extend(_own_layers(model))
    if not entries:
        entries.append(ReportEntry("", "mla", "", False, "模型里没有 MLA 注意力层", True))
    return entries


def _actual(module: nn.Module) -> dict[str, Any]:
    """这一层的实际维度，供配置核对。"""
    spec = specs.find_spec(module)
    actual = {name: getattr(module, getattr(spec, name)) for name in _DIMS}
    width = actual["qk_nope_head_dim"] + actual["v_head_dim"]
    weight = effective_weight(getattr(module, spec.kv_b_proj))[0]
    actual["num_attention_heads"] = weight.shape[0] // width
    rank = getattr(module, "q_lora_rank", None)
    if rank is not None:
        actual["q_lora_rank"] = rank
    return actual


def replace_dense(
    model: nn.Module, config: Any, runtime: Runtime, filter_fn: FilterFn
) -> list[ReportEntry]:
    """替换门控 FFN、LM head 等；config 为 DenseConfig。"""
    entries = []
    for candidate in dense.candidates(model, config):
        name, module, kind, required, make, reason = candidate
        if filter_fn is not None and not filter_fn(name, module):
            reason, required = _FILTERED, False
        if reason is None:
            make(module, runtime, name).install()
        entries.append(
            ReportEntry(
                name, "dense", kind, reason is None, reason or "", required and reason is not None
            )
        )
    return entries


def patch_bases(model: nn.Module, runtime: Runtime) -> None:
    """注意力层全部替换了的基础模型：不再生成 T×S 的掩码，长输入分块预填充。"""
    if not bridge.loaded():
        return
    from deepseek_opt.integrations import hf_config
    from deepseek_opt.integrations.prefill import PrefillPatch

    for name, base, patches in _bases(model):
        if not hf_config.owns_all_attention(base, patches):
            continue
        base.__dict__["config"] = hf_config.stand_in(base.config)
        for patch in patches:
            patch.owns_masks = True
        # 混合模型（_is_stateful）的线性注意力有自己的分块与状态，不在这里分
        if "forward" not in base.__dict__ and not getattr(base, "_is_stateful", False):
            PrefillPatch(base, runtime, name).install()


def _bases(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[AttentionPatch]]]:
    """每个直接含有已替换层的 PreTrainedModel：名字、模块、其中的补丁。"""
    from transformers import PreTrainedModel

    bases = {n: m for n, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    owned: dict[str, list[AttentionPatch]] = {}
    for name, module in model.named_modules():
        patch = patch_of(module)
        if isinstance(patch, AttentionPatch):
            parents = [base for base in bases if base == "" or name.startswith(base + ".")]
            if parents:
                owned.setdefault(max(parents, key=len), []).append(patch)
    for name, patches in owned.items():
        yield name, bases[name], patches


def drop_traces(module: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """取下配置替身与缓存的权重；返回 (模块, 属性, 值) 供重新装上。"""
    removed = []
    state = module.__dict__
    if bridge.loaded() and "config" in state:
        from deepseek_opt.integrations import hf_config

        if hf_config.is_stand_in(state["config"]):
            removed.append((module, "config", state["config"]))
            state["config"] = hf_config.original_config(state["config"])
    state.pop("_deepseek_opt_weight", None)
    return removed


def _own_layers(model: nn.Module) -> list[ReportEntry]:
    """用本库的层搭的模型：不必替换，也不算没做到。"""
    from deepseek_opt.layers import LatentMultiheadAttention, MLAAttention

    kinds = (MLAAttention, LatentMultiheadAttention)
    return [
        ReportEntry(
            name, "mla", type(module).__name__, False, "已经是本库的层，无需替换", native=True
        )
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
