"""optimize 的 MTP 部分：需要时从检查点装上 MTP，再换掉 generate。"""

from __future__ import annotations

from typing import Any

from torch import nn

from deepseek_opt.errors import InputError, UnsupportedError
from deepseek_opt.integrations import bridge
from deepseek_opt.integrations.patch import patch_of
from deepseek_opt.integrations.runtime import Runtime
from deepseek_opt.report import ReportEntry

NAME = "generate"


def attach_declared(model: nn.Module, config: Any) -> tuple[nn.Module | None, str | None]:
    """还没有装 MTP、而检查点里有的，从那里装上：(装上的那个模型, 没有装上的原因)，已经装过则都为 None。"""
    from deepseek_opt.mtp.attach import attach_mtp, find_predictor
    from deepseek_opt.mtp.hf import is_hf_model

    if find_predictor(model) is not None:
        return None, None
    inner = _unwrapped(model)
    if not is_hf_model(inner):
        return None, "没有装 MTP；请先用 attach_mtp(model, ..., adapter=...)"
    if not getattr(inner.config, "num_nextn_predict_layers", None) or not inner.config.name_or_path:
        return (
            None,
            "检查点没有 MTP 层；可以用 attach_mtp(model, fresh=True) 加上并训练，见文档“MTP”",
        )
    try:
        attach_mtp(inner, config=config)
    except (InputError, UnsupportedError) as error:
        return None, str(error)
    return inner, None


def detach(model: nn.Module) -> None:
    """取下 attach_declared 装上的。"""
    from deepseek_opt.mtp.attach import detach_mtp

    detach_mtp(model)


def replace_generate(model: nn.Module, runtime: Runtime, reason: str | None) -> list[ReportEntry]:
    """换掉 generate；reason 是没有装上 MTP 的原因。"""
    from deepseek_opt.mtp.attach import find_predictor

    predictor = find_predictor(model)
    if predictor is None:
        return [ReportEntry("", "mtp", "", False, reason or "没有装 MTP", True)]
    from deepseek_opt.mtp.hf import is_hf_model

    target = predictor.adapter.model
    kind = type(target).__name__
    if not is_hf_model(target):
        why = "自己的模型没有 generate；请用 deepseek_opt.generate(model, ...)"
        return [ReportEntry(NAME, "mtp", kind, False, why, native=True)]
    from deepseek_opt.generation.hf import GeneratePatch
    from deepseek_opt.integrations.hf_kv_cache import why_not

    reason = why_not(target)
    if reason is not None:
        return [ReportEntry(NAME, "mtp", kind, False, reason, True)]
    _own_masks(predictor)
    GeneratePatch(target, runtime, NAME, predictor).install()
    return [ReportEntry(NAME, "mtp", kind, True)]


def _own_masks(predictor: Any) -> None:
    """主模型不再生成 T×S 的掩码时，MTP 层的注意力也收不到。"""
    from deepseek_opt.integrations import hf_config
    from deepseek_opt.integrations.transformers import AttentionPatch

    if not hf_config.is_stand_in(predictor.adapter.config):
        return
    for module in predictor.modules():
        patch = patch_of(module)
        if isinstance(patch, AttentionPatch):
            patch.owns_masks = True


def _unwrapped(model: nn.Module) -> nn.Module:
    """被 PEFT 等包着的 transformers 模型。"""
    if not bridge.loaded():
        return model
    from transformers import PreTrainedModel

    return next((m for m in model.modules() if isinstance(m, PreTrainedModel)), model)
