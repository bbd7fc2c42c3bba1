"""optimize 的最后一步：没有用 MTP 的 transformers 模型，generate 在 CUDA 上把解码的一步录成 CUDA graph。"""

from __future__ import annotations

from torch import nn

from deepseek_opt.integrations import bridge
from deepseek_opt.integrations.runtime import Runtime


def record_generate(model: nn.Module, runtime: Runtime) -> None:
    """注意力层全部替换了的各语言模型的 generate；不在 CUDA 上时调用它与原来的相同。"""
    if not bridge.loaded():
        return
    from transformers import PreTrainedModel

    from deepseek_opt.generation.hf_plain import PlainGeneratePatch

    for module in model.modules():
        if isinstance(module, PreTrainedModel) and _generates(module):
            PlainGeneratePatch(module, runtime).install()


def _generates(model: nn.Module) -> bool:
    """能生成、注意力层全部替换了，generate 也没有被改写。"""
    from deepseek_opt.integrations import hf_config
    from deepseek_opt.integrations.hf_kv_cache import why_not

    if "generate" in model.__dict__ or not model.can_generate():
        return False
    decoder = model.get_decoder()
    owned = decoder is not None and hf_config.is_stand_in(getattr(decoder, "config", None))
    return owned and why_not(model) is None
