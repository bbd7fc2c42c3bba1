"""各行长度不同时的 transformers 模型：K、V 缓存、掩码，以及哪些模型不行。"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from deepseek_opt.integrations import hf_config
from deepseek_opt.integrations.hf_cache import RowNames, latent_layer
from deepseek_opt.integrations.patch import patch_of
from deepseek_opt.integrations.transformers import AttentionPatch
from deepseek_opt.kv_layer import KVLayer

_KINDS = ("full_attention", "sliding_attention")
_IMPLEMENTATIONS = ("sdpa", "eager")


class RaggedDynamicLayer(RowNames, KVLayer, DynamicLayer):
    """DynamicCache 里的一层：keys [B, H, S, D]、values 是缓冲区的视图，各行长度可以不同。"""

    # DynamicLayer.__init__ 只会给 keys、values 赋 None，那在这里是只读的
    def __init__(self, **kwargs: Any) -> None:  # pylint: disable=super-init-not-called
        KVLayer.__init__(self, **kwargs)

    @property
    def keys(self) -> Tensor | None:
        """[B, H, S, D]；还没有写入过为 None。"""
        return self.views()[0] if self.buffers() else None

    @property
    def values(self) -> Tensor | None:
        """[B, H, S, D]；还没有写入过为 None。"""
        return self.views()[1] if self.buffers() else None

    @property
    def is_initialized(self) -> bool:
        """是否写入过。"""
        return bool(self.buffers())

    @property
    def dtype(self) -> torch.dtype | None:
        """keys 的类型。"""
        return self.buffers()[0].dtype if self.buffers() else None

    @property
    def device(self) -> torch.device | None:
        """所在设备。"""
        return self.buffers()[0].device if self.buffers() else None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """写入 [B, H, T, D]，返回全部。"""
        del args, kwargs
        return self.append(key_states, value_states)

    def get_seq_length(self) -> int:
        """各行长度的最大值。"""
        return self.length

    def reset(self) -> None:
        """清空。"""
        KVLayer.reset(self)


def ragged_cache(layers: Iterable[nn.Module]) -> DynamicCache:
    """各层的空缓存：由潜变量核计算的层用潜变量，其余用 K、V。"""
    cache = DynamicCache()
    for index, layer in enumerate(layers):
        patch = _latent_patch(layer)
        if patch is None:
            cache.layers.append(RaggedDynamicLayer(name=f"第 {index} 层"))
        else:
            cache.layers.append(latent_layer(index, patch.runtime))
    return cache


def _latent_patch(layer: nn.Module) -> AttentionPatch | None:
    """这一层的注意力由潜变量核计算、并且收不到 T×S 的掩码时，它的补丁。"""
    patches = [patch_of(module) for module in layer.modules()]
    found = (p for p in patches if isinstance(p, AttentionPatch) and p.owns_masks)
    return next(found, None)


def ragged_masks(config: Any, cache: DynamicCache, steps: int, device: torch.device) -> Any:
    """各行接着写 steps 个词元的前向要的 attention_mask：潜变量核不要；其余是 4 维的，按层的种类各一个。"""
    layer = next((one for one in cache.layers if isinstance(one, KVLayer)), None)
    if layer is None:
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return layer_mask(config, layer, steps, layer_kind(config, 0), device)
    return {kind: layer_mask(config, layer, steps, kind, device) for kind in set(kinds)}


def layer_kind(config: Any, index: int) -> str:
    """第 index 层的注意力的种类，transformers 的叫法。"""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[index]
    sliding = getattr(config, "sliding_window", None) is not None
    return "sliding_attention" if sliding else "full_attention"


def layer_mask(
    config: Any, layer: Any, steps: int, kind: str, device: torch.device
) -> Tensor | None:
    """layer 上接着写 steps 个词元时 kind 种注意力的掩码；潜变量层不要。"""
    if not isinstance(layer, KVLayer):
        return None
    window = config.sliding_window if kind == "sliding_attention" else None
    return hf_config.mask_form(layer.visible(steps, window, device), config, config.dtype)


def why_not(model: Any) -> str | None:
    """各行长度不能不同的原因；可以则为 None。"""
    decoder = model.get_decoder()
    config = hf_config.original_config(decoder.config)
    kinds = set(getattr(config, "layer_types", None) or ()) - set(_KINDS)
    if getattr(model.config, "is_encoder_decoder", False):
        return "编码器—解码器模型"
    if getattr(decoder, "_is_stateful", False) or kinds:
        what = "、".join(sorted(kinds)) or "有状态的层"
        return f"{what} 不能逐行退回"
    if config._attn_implementation not in _IMPLEMENTATIONS:
        return f"注意力的实现是 {config._attn_implementation}；请用 sdpa 或 eager"
    return None
