"""一次生成期间不变的解码层：检查与取参数只做一次，之后每步直接调用算子。

小模型的一步里，逐个模块的调用与每次的检查（钩子、LoRA、类型……）比计算还久。生成的循环自己掌握每一次前向，
其间参数与钩子不变，所以开始时核对一次：各部分都是本库的补丁、没有钩子，并且用几个词元与原来的前向比较过；
任何一处不符就不用，照常经过各模块。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from deepseek_opt import ops
from deepseek_opt.integrations import experts
from deepseek_opt.integrations.dense import GatedFFNPatch, NormPatch, is_plain_ffn
from deepseek_opt.integrations.moe_block import MoeBlockPatch
from deepseek_opt.integrations.patch import patch_of
from deepseek_opt.integrations.projections import effective_weight, is_hooked, is_rms_norm, norm_eps
from deepseek_opt.integrations.router import RouterPatch, route
from deepseek_opt.integrations.transformers import FUSED_ROWS, OPS, AttentionPatch
from deepseek_opt.load import gathered

_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")

Apply = Callable[[Tensor], Tensor]


class Norm:
    """一个归一化；残差与它一趟做完，少一个核、少一遍读写。"""

    def __init__(self, weight: Tensor, eps: float):
        self.weight, self.eps = weight, eps

    def __call__(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def added(self, part: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + part), x + part)。"""
        return ops.add_rms_norm(part, x, self.weight, self.eps)


class SteadyLayer:
    """一个解码层：x + attn(norm x)，再 + mlp(norm x)。由 :func:`steady_layer` 建立。"""

    def __init__(
        self,
        norms: list[Norm],
        attention: AttentionPatch,
        mlp: Apply,
        kv_b: Tensor,
        projections: tuple,
    ):
        self.norms, self.attention, self.mlp = norms, attention, mlp
        self.projections = projections  # 旋转以外的
        self.heads = kv_b.shape[0] // (attention.nope_dim + attention.value_dim)

    def takes(self, rows: int, steps: int) -> bool:
        """这么多行、每行这么多词元能不能一起算。"""
        return rows * steps <= FUSED_ROWS and steps <= self.attention.decode_limit

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor], cache: Any) -> Tensor:
        """x [R, T, H]，angles 为半宽的 (cos, sin) [R, T, dr / 2] fp32；写进 cache 的这一层。"""
        x, part = self.run(self.norms[0](x), x, angles, cache)
        return x + part

    def run(
        self, normed: Tensor, x: Tensor, angles: tuple[Tensor, Tensor], cache: Any
    ) -> tuple[Tensor, Tensor]:
        """normed 是归一化之后的 x；返回还没有相加的两项：留给下一个归一化一起做。"""
        normed, x = self.norms[1].added(self._attend(normed, angles, cache), x)
        return x, self.mlp(normed)

    def _attend(self, x: Tensor, angles: tuple[Tensor, Tensor], cache: Any) -> Tensor:
        patch = self.attention
        projections = (*self.projections, *angles, patch.rope == "interleaved")
        return patch.decode_layer(x, projections, patch.open_layer(cache, x), self.heads)


class SteadyModel:
    """整个主模型（不含输出头）：嵌入、各层、最后的归一化。"""

    def __init__(self, embedding: nn.Module, layers: list[SteadyLayer], norm: Norm):
        self.embedding, self.layers = embedding, layers
        self.after = [*(layer.norms[0] for layer in layers[1:]), norm]  # 各层之后的归一化

    def takes(self, rows: int, steps: int) -> bool:
        """这么多行、每行这么多词元能不能一起算。"""
        return self.layers[0].takes(rows, steps)

    def __call__(
        self, tokens: Tensor, angles: tuple[Tensor, Tensor], cache: Any, normed: bool
    ) -> Tensor:
        """tokens [R, T] -> 隐藏状态 [R, T, H]；normed 为最后的归一化之后的。"""
        x = self.embedding(tokens)
        ready = self.layers[0].norms[0](x)
        with gathered():
            for layer, after in zip(self.layers, self.after, strict=True):
                x, part = layer.run(ready, x, angles, cache)
                ready, x = after.added(part, x)
        return ready if normed else x


def steady_model(embedding: nn.Module, layers: nn.ModuleList, norm: nn.Module) -> Any:
    """能这样算的主模型；有一层不能就是 None。"""
    last = _norm(norm)
    if is_hooked(embedding) or last is None:
        return None
    found = [steady_layer(layer) for layer in layers]
    return None if None in found else SteadyModel(embedding, found, last)


def steady_layer(layer: nn.Module) -> SteadyLayer | None:
    """能这样算的解码层；不能为 None。这里只看各部分，算法由调用者用几个词元核对。"""
    parts = [layer._modules.get(name) for name in _PARTS]
    if None in parts or any(is_hooked(module) for module in layer.modules()):
        return None
    norms = [_norm(parts[0]), _norm(parts[2])]
    attention, mlp = patch_of(parts[1]), _mlp(parts[3])
    if None in norms or mlp is None or not isinstance(attention, AttentionPatch):
        return None
    weight, reason = effective_weight(attention.module._modules[attention.spec.kv_b_proj])
    reason = reason or ops.missing(weight, *OPS, "swiglu_mlp")
    if reason is not None or not attention.owns_masks:
        return None
    projections = attention.steady_projections(weight)
    if projections is None:
        return None
    return SteadyLayer(norms, attention, mlp, weight, projections)


def _norm(module: nn.Module) -> Norm | None:
    known = isinstance(patch_of(module), NormPatch) or is_rms_norm(module)
    if is_hooked(module) or not known:
        return None
    return Norm(module.weight, norm_eps(module))


def _mlp(module: nn.Module) -> Apply | None:
    patch = patch_of(module)
    if isinstance(patch, GatedFFNPatch):
        weights = [getattr(module, n).weight for n in ("gate_proj", "up_proj", "down_proj")]
        return lambda x: ops.swiglu_mlp(x, *weights)
    if isinstance(patch, MoeBlockPatch):
        return _moe(patch)
    return module if is_plain_ffn(module) else None  # 没有替换的门控 FFN 只有几个矩阵乘


def _moe(patch: MoeBlockPatch) -> Apply:
    """常见的写法直接调用算子；量化的、有系数的经过补丁。"""
    module, spec = patch.module, patch.spec
    inner, gate = patch_of(module._modules[spec.experts]), module._modules[spec.gate]
    plain = patch.store is None and inner.store is None and isinstance(patch_of(gate), RouterPatch)
    plain = plain and ops.missing(gate.weight, "moe_route", "moe_experts") is None
    if not plain or spec.scale or spec.post or spec.shared_gate:
        return patch
    shared = patch.shared_weights()

    def apply(x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        _, weights, indices, counts = route(gate, flat)
        inner.load_counter.add(counts, training=False)
        out = experts.compute(inner.module, inner.layout, flat, indices, weights, shared)
        return out.view(x.shape)

    return apply
