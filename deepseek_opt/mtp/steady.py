"""生成期间直接调用算子的各部分：建立、核对、角度的表；哪些模型可以见 integrations/steady.py。"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt.integrations.runtime import half_angles
from deepseek_opt.integrations.stamp import stamp
from deepseek_opt.load import uncounted
from deepseek_opt.mtp.adapter import LayerInputs

_STATIC = ("default", "linear", "llama3", "yarn")
_PROBE = 3
_DECODE = 2e-2  # 解码核与逐个算子的写法，半精度里各自舍入


class AngleTable:
    """各位置的 (cos, sin)，由主模型的旋转模块对 0、1、2… 算出，之后查表。"""

    def __init__(self, rotary: nn.Module | None):
        self.rotary = rotary
        self._halves: dict[torch.dtype, tuple[Tensor, Tensor]] = {}  # 旋转模块按输入的类型舍入
        self._stamps: tuple = ()  # 表由哪些频率算出

    @property
    def static(self) -> bool:
        """角度是否只由位置决定（不随长度改变频率）。"""
        return getattr(self.rotary, "rope_type", "") in _STATIC

    def halves(self, places: Tensor, dtype: torch.dtype, count: int) -> tuple[Tensor, Tensor]:
        """places [R, T] -> 半宽的 cos、sin [R, T, dr / 2] fp32；dtype 是模型的类型，places 都小于 count（不读它）。"""
        cos, sin = self.table(count, dtype, places.device)
        return cos[places], sin[places]

    def table(self, count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """至少 count 个位置的 (cos, sin)；不够长就换一张更长的。"""
        stamps = tuple(stamp(buffer) for buffer in self.rotary.buffers())
        if stamps != self._stamps:
            self._halves, self._stamps = {}, stamps
        found = self._halves.get(dtype)
        if found is None or count > found[0].shape[0] or found[0].device != device:
            every = torch.arange(2 * count + 128, device=device)[None]
            like = torch.empty(0, dtype=dtype, device=device)
            turned = self.rotary(like, every)
            half = turned.shape[-1] if isinstance(turned, Tensor) else turned[0].shape[-1] // 2
            found = tuple(part[0] for part in half_angles(turned, half))
            newest = self._halves.get(dtype)  # 别的线程可能刚换上更长的
            if newest is not None and newest[0].device == device:
                found = max(newest, found, key=lambda table: len(table[0]))
            self._halves[dtype] = found
        return found


class SteadyParts:
    """按当前的补丁建立的各部分；核对过、相符的记着，补丁换了才重新核对。"""

    def __init__(self) -> None:
        self._checked: list[Any] = []  # 核对过、相符的各层的补丁
        self._local = threading.local()

    def __reduce__(self) -> Any:
        return SteadyParts, ()

    @contextmanager
    def during(self, adapter: Any) -> Iterator[None]:
        """块内（本线程）用得上；可以嵌套。"""
        before = getattr(self._local, "parts", None)
        self._local.parts = self.current(adapter) if before is None else before
        try:
            yield
        finally:
            self._local.parts = before

    def find(self, layer: Any, rows: int, steps: int) -> Any:
        """layer（None 为主模型）此刻能直接算的形式；不在生成中、太长等为 None。"""
        found = (getattr(self._local, "parts", None) or {}).get(layer)
        return found if found is not None and found.takes(rows, steps) else None

    def current(self, adapter: Any) -> dict[Any, Any]:
        """{None: 主模型, MTP 的层: 那一层}；不能直接算的不在里面。"""
        from deepseek_opt.integrations import hf_config
        from deepseek_opt.integrations.steady import steady_layer, steady_model

        if not hf_config.is_stand_in(adapter.config) or not adapter._angles.static:
            return {}
        if adapter.altered() is not None:
            return {}
        model = steady_model(adapter.embedding, adapter.layers, adapter.final_norm)
        if model is None or not self._verified(adapter, model):
            return {}
        found = {None: model}
        for block in adapter.blocks():
            layer = steady_layer(block)
            if layer is not None and type(block) is type(adapter.template):
                found[block] = layer
        return found

    def _verified(self, adapter: Any, model: Any) -> bool:
        patches = [layer.attention for layer in model.layers]
        if patches != self._checked:
            with uncounted():
                if not _agrees(adapter, model):
                    return False
            self._checked = patches
        return True


def _agrees(adapter: Any, model: Any) -> bool:
    """几个词元各算一遍：主模型，有 MTP 时还有最后一层（MTP 层照着它建）。"""
    vocabulary = adapter.embedding.weight.shape[0]
    tokens = torch.arange(2 * _PROBE, device=adapter.device).view(2, _PROBE) % vocabulary
    places = torch.arange(_PROBE, device=adapter.device).expand(2, -1)
    wanted = adapter.run_model(tokens, places, adapter.make_model_cache())
    angles = adapter._angles.halves(places, adapter.dtype, _PROBE)
    got = model(tokens, angles, adapter.make_model_cache(), adapter.hidden_normed)
    same = close(got, wanted, _DECODE)
    if not same or not adapter.blocks():
        return same
    x, inputs = adapter.embedding(tokens), LayerInputs(places)
    again = model.layers[-1](x, angles, adapter.make_model_cache())
    return close(again, adapter.run_layer(adapter.template, x, inputs), _DECODE)


def close(got: Tensor, wanted: Tensor, share: float = 1e-2) -> bool:
    """同样的计算，只容半精度在不同核之间的舍入：相差不超过最大值的 share。"""
    scale = wanted.float().abs().max().clamp_min(1e-6)
    return got.shape == wanted.shape and bool((got - wanted).float().abs().max() <= share * scale)
