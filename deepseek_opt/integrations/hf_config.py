"""让基础模型不再生成 T×S 的掩码：给它一个共享内容的配置替身，其注意力实现名是本库登记的。

替身与原配置共用同一个 ``__dict__``（改一个就是改另一个），只有 ``_attn_implementation`` 不同；
它只放在调用掩码函数的那个模型实例上，注意力层与最外层仍用原配置，所以保存的 config.json 不变。
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    causal_mask_function,
)

from deepseek_opt.row_lengths import RowLengths

NAME = "deepseek_opt"
# 这两种实现的掩码是 T×S 的；flash 系本来就是 2 维，flex 是 BlockMask。
_DENSE = ("eager", "sdpa")


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """登记给 transformers 的掩码函数：因果掩码只返回 2 维填充掩码 [B, S] 或 None。

    其他形状（打包、or_mask 等）仍由原实现生成完整的掩码，各层再换算或回退。不在 CPU 上的掩码不看内容，
    总是返回：看有没有填充要等设备，一个词元一次。
    """
    if mask_function is not causal_mask_function or kv_offset:
        original = config.__dict__["_attn_implementation_internal"]
        return ALL_MASK_ATTENTION_FUNCTIONS[original](
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            config=config,
            **kwargs,
        )
    if attention_mask is None:
        return None
    if isinstance(q_offset, Tensor) and not q_offset.is_cpu:
        return attention_mask  # StaticCache：写到了哪里，各层在设备上自己看
    seen = int(q_offset) + q_length
    mask = attention_mask[:, :seen]
    if mask.shape[1] < seen:  # 与 transformers 一致：缺的部分视为被遮住
        mask = torch.nn.functional.pad(mask, (0, seen - mask.shape[1]))
    return None if mask.is_cpu and bool(mask.all()) else mask


@lru_cache(maxsize=None)
def _stand_in_class(cls: type) -> type:
    """cls 的替身类；同名同模块，只改 _attn_implementation。"""

    def implementation(self: Any) -> str | None:
        name = self.__dict__.get("_attn_implementation_internal")
        return NAME if name in _DENSE else name

    def assign(self: Any, value: Any) -> None:
        cls._attn_implementation.fset(self, value)

    body = {
        "__slots__": ("_deepseek_opt_original",),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__init__": cls.__init__,
        "_attn_implementation": property(implementation, assign),
        "__reduce_ex__": lambda self, _: (stand_in, (original_config(self),)),
        "__deepcopy__": lambda self, memo: stand_in(copy.deepcopy(original_config(self), memo)),
    }
    return type(cls)(cls.__name__, (cls,), body)


def stand_in(config: Any) -> Any:
    """config 的替身。"""
    AttentionMaskInterface.register(NAME, padding_mask)
    other = object.__new__(_stand_in_class(type(config)))
    object.__setattr__(other, "__dict__", config.__dict__)
    object.__setattr__(other, "_deepseek_opt_original", config)
    return other


def original_config(config: Any) -> Any:
    """替身对应的原配置；不是替身则原样返回。"""
    try:
        return object.__getattribute__(config, "_deepseek_opt_original")
    except AttributeError:
        return config


def is_stand_in(config: Any) -> bool:
    """config 是否是替身。"""
    return original_config(config) is not config


def original_mask(
    module: nn.Module, hidden: Tensor, kwargs: dict[str, Any], index: int
) -> dict[str, Any]:
    """回退时把 2 维掩码（或 None）换成原实现要的 4 维；flash 等本来就是 2 维，原样返回。"""
    implementation = module.config._attn_implementation
    if implementation not in _DENSE:
        return kwargs
    cache, steps = kwargs.get("past_key_values"), hidden.shape[1]
    layers = getattr(cache, "layers", ())
    if index < len(layers) and isinstance(layers[index], RowLengths) and layers[index].ragged:
        seen = layers[index].visible(steps)
        return {**kwargs, "attention_mask": mask_form(seen, module.config, hidden.dtype)}
    offset, length = 0, steps
    if cache is not None:
        offset = cache.get_seq_length(index)
        length = cache.get_mask_sizes(steps, index)[0]
    mask = ALL_MASK_ATTENTION_FUNCTIONS[implementation](
        batch_size=hidden.shape[0],
        q_length=steps,
        kv_length=length,
        q_offset=offset,
        kv_offset=0,
        mask_function=causal_mask_function,
        attention_mask=kwargs.get("attention_mask"),
        allow_is_causal_skip=not getattr(cache, "is_compileable", False),
        dtype=hidden.dtype,
        device=hidden.device,
        config=module.config,
    )
    return {**kwargs, "attention_mask": mask}


def mask_form(seen: Tensor, config: Any, dtype: torch.dtype | None) -> Tensor:
    """bool 掩码换成注意力的实现要的形式：eager 把它加在得分上，其余用 bool。"""
    if config._attn_implementation != "eager":
        return seen
    dtype = dtype or torch.float32
    zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return zeros.masked_fill(~seen, torch.finfo(dtype).min)


def owns_all_attention(base: nn.Module, patches: list[Any]) -> bool:
    """base 里收到因果掩码的注意力层是否全部替换了（混合模型的线性注意力不算，它不用这个掩码）。"""
    if base.config._attn_implementation not in _DENSE:
        return False
    recorded = getattr(base, "_can_record_outputs", None) or {}
    target = recorded.get("attentions")
    classes = tuple(t for t in (target if isinstance(target, (list, tuple)) else [target]) if t)
    classes = tuple(getattr(t, "target_class", t) for t in classes)
    if not classes or not all(isinstance(c, type) for c in classes):
        return False
    patched = {id(patch.module) for patch in patches}
    return all(id(m) in patched for m in base.modules() if isinstance(m, classes))
