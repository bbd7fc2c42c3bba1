"""潜变量缓存：每个词元只存 MLA 的潜变量（r 维）与旋转键（dr 维），原地增长。

只依赖 PyTorch。布局与 transformers 5.15+ 的 MLA 缓存一致：潜变量是 ``kv_a_layernorm`` 之后的，
旋转键是旋转之后的；所以同一份缓存，优化前后的模型都能读。

示例::

    import torch
    from deepseek_opt import LatentCache

    cache = LatentCache(num_layers=2, max_length=128)
    latent, rope, scale = cache.update(0, torch.randn(1, 5, 16), torch.randn(1, 5, 8))
    cache.get_seq_length()      # 5
    cache.crop(-2)              # 去掉每行最后 2 个词元
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek_opt.cache_layer import LatentLayer, cache_dtype
from deepseek_opt.cache_rows import crop_layers
from deepseek_opt.errors import InputError


class LatentCache:
    """整个模型的潜变量缓存；可以作为 ``past_key_values`` 传给优化后的模型及其 ``generate()``。

    参数
    ----
    num_layers : 层数。
    max_length : 每行词元数上限；None 为不限。
    dtype : 存储类型，``"auto"``（与写入的一致）、``"bfloat16"``、``"int8"``、``"float8_e4m3fn"`` 等，或 torch.dtype。
    memory_budget_bytes : 整个缓存的字节上限，各层平分；放不下时在分配之前报错并给出最大长度。

    方法的命名与返回值同 transformers 的 Cache；:meth:`update` 两种写法都接受。

    示例
    ----
    >>> import torch
    >>> from deepseek_opt import LatentCache
    >>> cache = LatentCache(num_layers=2, max_length=128)
    >>> latent, rope, scale = cache.update(0, torch.randn(1, 5, 16), torch.randn(1, 5, 8))
    >>> cache.get_seq_length()
    5
    >>> cache.crop(-2)
    >>> cache.get_seq_length()
    3
    """

    is_compileable = False
    is_croppable = True
    offloading = False
    layer_class_to_replicate = None

    def __init__(
        self,
        num_layers: int,
        *,
        max_length: int | None = None,
        dtype: str | torch.dtype | None = None,
        memory_budget_bytes: int | None = None,
    ):
        for name, value in (("num_layers", num_layers), ("max_length", max_length)):
            bad = isinstance(value, bool) or not isinstance(value, int) or value < 1
            if bad and not (name == "max_length" and value is None):
                raise InputError.expected(name, "正整数", value)
        share = None if memory_budget_bytes is None else memory_budget_bytes // num_layers
        store = cache_dtype(dtype)
        self.max_length = max_length
        self.layers = [
            LatentLayer(dtype=store, max_length=max_length, budget_bytes=share, name=f"第 {i} 层")
            for i in range(num_layers)
        ]

    @classmethod
    def for_model(
        cls,
        model: Any,
        batch_size: int | None = None,
        max_length: int | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        memory_budget_bytes: int | None = None,
    ) -> LatentCache:
        """按模型的层数与维度建缓存；给出 batch_size 与 max_length 时立即全部分配。

        抛出 UnsupportedError（模型里没有受支持的 MLA 层）、MemoryBudgetError（放不进预算）。
        """
        from deepseek_opt.integrations import specs

        found = specs.cache_geometry(model)
        cache = cls(
            max(found) + 1,
            max_length=max_length,
            dtype=dtype,
            memory_budget_bytes=memory_budget_bytes,
        )
        if batch_size is None or max_length is None:
            return cache
        for index, (rank, rope_dim, weight) in found.items():
            sample = {"dtype": weight.dtype, "device": weight.device}
            latent = torch.empty(batch_size, 0, rank, **sample)
            cache.layers[index].reserve(
                max_length, latent, latent.new_empty(batch_size, 0, rope_dim)
            )
        return cache

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """写入一层的新词元。

        ``update(layer_idx, latent [B, T, r], rope [B, T, dr])``
            返回 (latent [B, C, r], rope [B, C, dr], scale [B, C] 或 None)：整块缓冲区，不复制；
            其中前 :meth:`get_seq_length` 个槽位有效。
        ``update(keys [B, 1, T, r], values [B, 1, T, dr], layer_idx)``
            transformers 的写法；返回有效部分 [B, 1, S, r]、[B, 1, S, dr]（量化时为还原的副本）。
        """
        if args and isinstance(args[0], Tensor):
            return self._update_transformers(*args, **kwargs)
        return self._update(*args, **kwargs)

    def _update(self, layer_idx: int, latent: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
        layer = self.layer(layer_idx)
        layer.append(latent, rope)
        layer.tidy()
        return layer.latent, layer.rope, layer.scale

    def _update_transformers(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        layer = self.layer(layer_idx)
        if key_states.dim() != 4 or key_states.shape[1] != 1:
            raise InputError.expected("key_states", "[B, 1, T, r]（潜变量）", key_states)
        layer.append(key_states[:, 0], value_states[:, 0])
        return layer.dequantized().unsqueeze(1), layer.rope[:, None, : layer.length]

    def layer(self, layer_idx: int) -> LatentLayer:
        """第 layer_idx 层；越界时说明缓存与模型不符。"""
        if not 0 <= layer_idx < len(self.layers):
            raise InputError(
                f"缓存来自另一个模型：缓存有 {len(self.layers)} 层，而模型要用第 {layer_idx} 层"
            )
        return self.layers[layer_idx]

    # ---- 状态 ----

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return (
            f"LatentCache(层数={len(self.layers)}, 长度={self.get_seq_length()}, "
            f"容量={max(x.capacity for x in self.layers)}, 字节={self.nbytes})"
        )

    @property
    def nbytes(self) -> int:
        """已分配的总字节数。"""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def lengths(self) -> Tensor | None:
        """每行长度 [B]；还没有写入过为 None。"""
        return next((x.lengths for x in self.layers if x.latent is not None), None)

    @property
    def batch_size(self) -> int:
        """行数；还没有写入过为 -1。"""
        return next((x.latent.shape[0] for x in self.layers if x.latent is not None), -1)

    @property
    def is_initialized(self) -> bool:
        """是否每层都写入过。"""
        return all(layer.latent is not None for layer in self.layers)

    @property
    def is_sliding(self) -> list[bool]:
        """每层是否滑动窗口；总是 False。"""
        return [False] * len(self.layers)

    is_linear = is_sliding
    is_dummy = is_sliding

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """第 layer_idx 层各行长度的最大值。"""
        return self.layers[layer_idx].length if layer_idx < len(self.layers) else 0

    get_query_offset = get_seq_length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """每行词元数上限；-1 为不限。"""
        del layer_idx
        return -1 if self.max_length is None else self.max_length

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(键的总数, 起点)；transformers 建掩码用。"""
        return self.get_seq_length(layer_idx) + int(query_length), 0

    def advance(self, steps: int = 1) -> None:
        """重放 CUDA graph 里的一步之后调用：各行多了 steps 个词元（图只前移设备上的位置，主机不知道）。

        录图时执行的那一遍已经算过一次，所以录完之后的第一次重放不必调用。容量要在录图之前留够
        （:meth:`for_model` 给出 max_length），否则增长会换掉图里的缓冲区。
        """
        for layer in self.layers:
            layer.advance(steps)

    # ---- 整体操作：先全部检查，再逐层改 ----

    def crop(self, tokens: int) -> None:
        """tokens <= 0：每行去掉 -tokens 个词元；tokens > 0：只保留前 tokens 个。"""
        for layer in self.layers:
            layer.crop(tokens)

    def crop_rows(self, lengths: Sequence[int] | Tensor) -> None:
        """逐行截断到 lengths [B]（例如每行接受的草稿词元数不同）。"""
        crop_layers(self.layers, lengths)

    def reorder(self, index: Tensor) -> None:
        """按 index [B] 重排各行（束搜索）。"""
        for layer in self.layers:
            layer.reorder(index)

    def select(self, index: Tensor) -> None:
        """只保留 index 指出的行。"""
        for layer in self.layers:
            layer.select(index)

    def repeat_interleave(self, repeats: int) -> None:
        """每行重复 repeats 次。"""
        for layer in self.layers:
            layer.repeat_interleave(repeats)

    def reset(self) -> None:
        """清空全部层。"""
        for layer in self.layers:
            layer.reset()

    # transformers 用的名字
    reorder_cache = reorder
    batch_select_indices = select
    batch_repeat_interleave = repeat_interleave

    def activate_past_recording(self) -> None:
        """transformers 的接口；本缓存总是保留全部词元，无需动作。"""
