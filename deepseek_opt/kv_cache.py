"""自己的模型用的 K、V 缓存：各行长度可以不同，逐行退回；只依赖 PyTorch。"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deepseek_opt.cache_rows import crop_layers
from deepseek_opt.errors import InputError
from deepseek_opt.kv_layer import KVLayer


class KVCache:
    """普通多头（或分组查询）注意力的缓存，用 MTP 生成时主模型与 MTP 层各一份。

    参数
    ----
    num_layers : 层数。max_length : 每行词元数上限，None 为不限。

    抛出 InputError：参数不是正整数；写入的形状与已有的不符、放不下（缓存不变）。

    示例
    ----
    >>> import torch
    >>> from deepseek_opt import KVCache
    >>> cache = KVCache(num_layers=1)
    >>> k, v = cache.update(0, torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8))
    >>> cache.crop_rows([5, 3])                 # 第二行退回两个词元
    >>> mask = cache.mask(0, 1)                 # 再写一个词元时看得见哪些：[2, 1, 1, 6]
    >>> k, v = cache.update(0, torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 8))
    >>> k.shape, mask[1, 0, 0].tolist()
    (torch.Size([2, 4, 6, 8]), [True, True, True, True, False, False])
    """

    def __init__(self, num_layers: int, *, max_length: int | None = None):
        for name, value in (("num_layers", num_layers), ("max_length", max_length)):
            bad = isinstance(value, bool) or not isinstance(value, int) or value < 1
            if bad and not (name == "max_length" and value is None):
                raise InputError.expected(name, "正整数", value)
        self.layers = [KVLayer(max_length=max_length, name=f"第 {i} 层") for i in range(num_layers)]

    def update(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """第 index 层写入 K [B, H, T, D]、V；返回全部的视图 [B, H, S, D]，行尾之后由 :meth:`mask` 遮住。"""
        return self.layers[index].append(keys, values)

    def mask(self, index: int, steps: int, window: int | None = None) -> Tensor:
        """接着写 steps 个词元时各看得见哪些槽位：bool [B 或 1, 1, steps, S + steps]；要在 update 之前取。"""
        return self.layers[index].visible(steps, window)

    @property
    def lengths(self) -> Tensor | None:
        """每行长度 [B]；还没有写入过为 None。"""
        return next((layer.lengths for layer in self.layers if layer.buffers()), None)

    @property
    def nbytes(self) -> int:
        """已分配的字节数。"""
        return sum(layer.nbytes for layer in self.layers)

    def get_seq_length(self, index: int = 0) -> int:
        """第 index 层各行长度的最大值。"""
        return self.layers[index].length

    def crop_rows(self, lengths: Sequence[int] | Tensor) -> None:
        """各行截断到 lengths。"""
        crop_layers([layer for layer in self.layers if layer.buffers()], lengths)

    def select(self, index: Tensor) -> None:
        """只保留 index 指出的行。"""
        for layer in self.layers:
            layer.select(index)
