"""moe_experts_list 测试共用：把成叠的专家拆成列表，调用、梯度。"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from deepseek_opt import ops
from tests.moe_cases import Experts

LISTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias", "shared")


@dataclasses.dataclass
class Lists:
    """``moe_experts_list`` 的参数，权重都是列表。"""

    x: Tensor
    indices: Tensor
    weights: Tensor
    lists: dict[str, list[Tensor]]
    activation: str = "silu"
    gated: bool = True

    @classmethod
    def of(cls, case: Experts, joint: bool = False) -> Lists:
        """把成叠的权重拆开；joint 时 gate、up 仍上下相接。"""
        way, found = case.layout, {name: [] for name in LISTS}
        found["shared"] = list(case.shared)
        for name, stack in (("", case.gate_up), ("_bias", case.gate_up_bias)):
            for whole in () if stack is None else stack:
                split = way.gated and not joint
                parts = whole.chunk(2) if split else (whole,)
                for side, part in zip(("gate", "up"), parts, strict=False):
                    found[side + name].append(part.clone())
        for name in ("down", "down_bias"):
            stack = getattr(case, name)
            found[name] = [] if stack is None else [t.clone() for t in stack]
        return cls(case.x, case.indices, case.weights, found, way.activation, way.gated)

    def flat(self) -> list[Tensor]:
        return [self.x, self.weights, *(t for name in LISTS for t in self.lists[name])]

    def map(self, function) -> Lists:
        lists = {name: [function(t) for t in group] for name, group in self.lists.items()}
        x, weights = function(self.x), function(self.weights)
        return dataclasses.replace(self, x=x, weights=weights, lists=lists)

    def leaves(self) -> Lists:
        return self.map(lambda t: t.detach().clone().requires_grad_())

    def args(self) -> tuple:
        lists = (self.lists[name] for name in LISTS)
        return (self.x, self.indices, self.weights, *lists, self.activation, 1.702, 0.7, self.gated)

    def run(self, function=ops.moe_experts_list, **more) -> Tensor:
        *plain, gated = self.args()
        return function(*plain, gated=gated, **more)

    def gradients(self, grad: Tensor, function=ops.moe_experts_list, **more) -> list[Tensor]:
        leaf = self.leaves()
        leaf.run(function, **more).backward(grad)
        return [t.grad for t in leaf.flat()]
