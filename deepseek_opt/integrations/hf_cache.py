"""transformers 的缓存里放进原地增长的潜变量层。

用户或 generate() 传入的 DynamicCache 不换对象：它的普通 DynamicLayer 在第一次用到时换成
:class:`LatentDynamicLayer`。keys、values 仍是有效的张量（缓冲区的视图），所以裁剪、重排、
恢复原模型之后继续用，都照常。
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from deepseek_opt.cache_layer import LatentLayer
from deepseek_opt.errors import InputError
from deepseek_opt.row_lengths import Mark


class RowNames:
    """transformers 给缓存层的名字，转到 :class:`~deepseek_opt.row_lengths.RowLengths` 的同一操作。"""

    def absorb(self) -> None:
        """先把外面直接放进来的内容搬进缓冲区；不会有的不用管。"""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """无需提前分配；第一次写入时才知道形状。"""

    def crop(self, tokens_to_remove: int) -> None:
        """负数为去掉的个数；正数为保留的个数（旧写法）。参数名随 transformers。"""
        self.absorb()
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """束搜索重排。"""
        self.absorb()
        self.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """每行重复 repeats 次。"""
        self.absorb()
        self.repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """只保留 indices 指出的行。"""
        self.absorb()
        self.select(indices)


class LatentDynamicLayer(RowNames, LatentLayer, DynamicLayer):
    """keys [B, 1, S, r]、values [B, 1, S, dr] 是缓冲区的视图（量化时 keys 为还原的副本）。

    外部直接给 keys、values 赋值（或在记录梯度时写入）会退回普通张量；下一次写入再搬进缓冲区。
    """

    # DynamicLayer.__init__ 只会给 keys、values 赋 None，那在这里是有含义的操作
    def __init__(self, **kwargs: Any) -> None:  # pylint: disable=super-init-not-called
        LatentLayer.__init__(self, **kwargs)
        self._plain: list[Tensor | None] | None = None

    # ---- keys、values ----

    @property
    def keys(self) -> Tensor | None:
        """[B, 1, S, r]；还没有写入过为 None。"""
        if self._plain is not None:
            return self._plain[0]
        return None if self.latent is None else self.dequantized().unsqueeze(1)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._detach()[0] = value

    @property
    def values(self) -> Tensor | None:
        """[B, 1, S, dr]；还没有写入过为 None。"""
        if self._plain is not None:
            return self._plain[1]
        if self.rope is None:
            return None
        self.tidy()
        return self.rope[:, None, : self._length]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._detach()[1] = value

    def _detach(self) -> list[Tensor | None]:
        """改用普通张量，释放缓冲区。"""
        if self._plain is None:
            plain = [self.keys, self.values]
            LatentLayer.reset(self)
            self._plain = plain
        return self._plain

    def absorb(self) -> None:
        """把普通张量搬进缓冲区；没有则不动。"""
        if self._plain is None:
            return
        keys, values = self._plain
        if keys is None or values is None or keys.numel() == 0:
            self._plain = None
            return
        if keys.dim() != 4 or keys.shape[1] != 1 or values.shape[1] != 1:
            raise InputError(
                f"{self.name}缓存来自另一个模型：应为 [B, 1, S, r] 的潜变量，缓存里是 {list(keys.shape)}"
            )
        plain, self._plain = self._plain, None
        try:
            LatentLayer.append(self, keys[:, 0], values[:, 0])
        except Exception:
            self._plain = plain  # 放不下时内容不能丢
            raise

    # ---- LatentLayer 的接口 ----

    @property
    def length(self) -> int:
        """各行长度的最大值。"""
        return self.get_seq_length()

    def mark(self) -> Mark:
        if self._plain is None:
            return LatentLayer.mark(self)
        length = self.get_seq_length()
        return length, None, length > 0

    def unwind(self, mark: Mark) -> None:
        length, _, held = mark
        if self._plain is None or not held:
            LatentLayer.unwind(self, mark)
        else:  # 这以来拼接的截去
            self._plain = [t if t is None else t[..., :length, :] for t in self._plain]

    def prepare(self, latent: Tensor, rope: Tensor) -> None:
        """检查并保证容量；先把普通张量搬进缓冲区。"""
        self.absorb()
        LatentLayer.prepare(self, latent, rope)

    def reserve(self, length: int, latent: Tensor, rope: Tensor) -> None:
        self.absorb()
        LatentLayer.reserve(self, length, latent, rope)

    # ---- transformers 的接口 ----

    @property
    def is_initialized(self) -> bool:
        """是否写入过。"""
        return self.keys is not None

    @property
    def dtype(self) -> torch.dtype | None:
        """keys 的类型。"""
        return None if self.keys is None else self.keys.dtype

    @property
    def device(self) -> torch.device | None:
        """所在设备。"""
        return None if self.keys is None else self.keys.device

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """写入 [B, 1, T, r]、[B, 1, T, dr]，返回全部；记录梯度时与 DynamicLayer 一样拼接。"""
        del args, kwargs
        tracked = torch.is_grad_enabled() and (
            key_states.requires_grad or value_states.requires_grad
        )
        tracked = tracked or (self._plain is not None and _requires_grad(self._plain))
        if tracked:
            plain = self._detach()
            for i, fresh in enumerate((key_states, value_states)):
                plain[i] = fresh if plain[i] is None else torch.cat((plain[i], fresh), -2)
        else:
            self.append(key_states[:, 0], value_states[:, 0])
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """已有的词元数。"""
        if self._plain is None:
            return self._length
        keys = self._plain[0]
        return 0 if keys is None or keys.numel() == 0 else keys.shape[-2]

    def reset(self) -> None:
        """清空。"""
        self._plain = None
        LatentLayer.reset(self)


def _requires_grad(tensors: list[Tensor | None]) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def resolve_layer(cache: Any, index: int, runtime: Any, tracked: bool) -> LatentLayer | None:
    """cache 的第 index 层的潜变量存储；普通 DynamicLayer 就地升级，其他种类返回 None。

    tracked（记录梯度）时不升级：transformers 的拼接能让梯度流过缓存。
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    if tracked or getattr(cache, "offloading", False):
        return None
    if index >= len(layers):
        if getattr(cache, "layer_class_to_replicate", None) is not DynamicLayer:
            return None
        while len(layers) <= index:
            layers.append(DynamicLayer())
    if type(layers[index]) is not DynamicLayer:
        return None
    layers[index] = _upgrade(layers[index], index, runtime)
    return layers[index]


def latent_layer(index: int, runtime: Any) -> LatentDynamicLayer:
    """第 index 层的空的潜变量存储，上限与类型按配置。"""
    return LatentDynamicLayer(
        dtype=runtime.store_dtype,
        max_length=runtime.max_length,
        budget_bytes=runtime.layer_budget,
        name=f"第 {index} 层",
    )


def _upgrade(old: DynamicLayer, index: int, runtime: Any) -> LatentDynamicLayer:
    new = latent_layer(index, runtime)
    if old.is_initialized and old.keys is not None and old.keys.numel():
        new._plain = [old.keys, old.values]
        new.absorb()
    return new
