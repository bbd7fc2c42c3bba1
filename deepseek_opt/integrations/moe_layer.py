"""量化本库的 MoEFeedForward：路由、容量与共享专家照旧，只有路由专家换成量化的。"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deepseek_opt.integrations.experts import ExpertsLayout, input_reason
from deepseek_opt.integrations.patch import QuantizablePatch
from deepseek_opt.integrations.quantized import ExpertStore
from deepseek_opt.integrations.runtime import Runtime
from deepseek_opt.layers import MoEFeedForward

NAMES = ("gate_up_proj", "down_proj")


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
            reason = input_reason(hidden)
        if reason is None:
            return module.forward_with(hidden, self.store.compute)
        self.give_way(reason)
        return self.call_original(hidden)


def is_moe_layer(module: nn.Module) -> bool:
    """是否是没有改写 forward 的 MoEFeedForward。"""
    return isinstance(module, MoEFeedForward) and type(module).forward is MoEFeedForward.forward


def layout_of(module: nn.Module) -> ExpertsLayout:
    """本库的层总是 gate 在前、up 在后，不转置。"""
    flags: dict[str, Any] = {"transposed": False, "interleaved": False, "gated": True}
    return ExpertsLayout(module.activation, 1.702, 7.0, scalars=(), **flags)
