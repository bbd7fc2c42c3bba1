"""量化本库的 MoEFeedForward：路由、容量照旧，路由专家与共享专家换成量化的。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from deepseek_opt.integrations.expert_store import ExpertStore
from deepseek_opt.integrations.experts import ExpertsLayout, input_reason
from deepseek_opt.integrations.patch import QuantizablePatch
from deepseek_opt.integrations.runtime import Runtime
from deepseek_opt.layers import MoEFeedForward

_SHARED = ("shared_gate", "shared_up", "shared_down")


class MoeLayerPatch(QuantizablePatch):
    """一个 MoEFeedForward 实例的新 forward；计数仍在模块的 ``load_counter`` 上。"""

    kind = "moe"

    def __init__(self, module: nn.Module, runtime: Runtime, name: str, store: ExpertStore):
        super().__init__(module, runtime, name)
        self.store = store

    def __call__(self, hidden: Tensor) -> Tensor:
        self.runtime.require_moe()
        module = self.module
        reason = self.store.refusal(module)
        if reason is None and isinstance(hidden, Tensor):
            reason = input_reason(hidden, "moe_experts_quantized")
        if reason is None:
            return module.forward_with(hidden, self._compute)
        self.give_way(reason)
        return self.call_original(hidden)

    def _compute(
        self, x: Tensor, indices: Tensor, weights: Tensor, shared: Sequence[Tensor]
    ) -> Tensor:
        store = self.store
        common = store.shared_tensors(shared[len(_SHARED) :]) if store.shared else None
        return store.compute(x, indices, weights, common)


def is_moe_layer(module: nn.Module) -> bool:
    """是否是没有改写 forward 的 MoEFeedForward。"""
    return isinstance(module, MoEFeedForward) and type(module).forward is MoEFeedForward.forward


def shared_names(module: nn.Module) -> tuple[str, ...]:
    """共享专家的三个参数名；没有共享专家为空。"""
    return () if module.shared_gate is None else _SHARED


def layout_of(module: nn.Module) -> ExpertsLayout:
    """本库的层总是 gate 在前、up 在后，不转置。"""
    flags: dict[str, Any] = {"transposed": False, "interleaved": False, "gated": True}
    return ExpertsLayout(module.activation, 1.702, 7.0, scalars=(), **flags)
