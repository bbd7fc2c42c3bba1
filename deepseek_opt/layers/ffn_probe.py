"""认出门控 FFN：三个普通 nn.Linear，并用一小段随机数核对它真的计算 down(act(gate x) * up x)。"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_opt.eval_mode import evaluating

FFN_NAMES = ("gate_proj", "up_proj", "down_proj")

_ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
_ACT_NAMES = ("act_fn", "activation_fn", "act", "activation")
_TOKENS = 4
# 核对时的相对误差上限：半精度的一次取整约 2⁻⁸。
_CLOSE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def why_not_gated(module: nn.Module, names: tuple[str, str, str] = FFN_NAMES) -> str:
    """module 不是可以换掉的门控 FFN 的原因；可以时为空串。"""
    if "forward" in module.__dict__:
        return "forward 已被替换（例如 optimize 过）；请先 restore"
    for name in names:
        linear = getattr(module, name, None)
        if type(linear) is not nn.Linear:
            return f"{name} 是 {type(linear).__name__}，不是普通 nn.Linear"
        if linear.bias is not None:
            return f"{name} 带偏置"
    gate, up, down = (getattr(module, name).weight for name in names)
    if gate.shape != up.shape or down.shape != gate.shape[::-1]:
        return f"三个投影的形状不相配：{list(gate.shape)}、{list(up.shape)}、{list(down.shape)}"
    if gate.is_meta or gate.dtype not in _CLOSE:
        return f"权重在 {gate.device} 上、类型 {gate.dtype}，无法核对"
    if any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules()):
        return "带 dropout，MoE 层没有"
    return "" if activation_of(module, names) else "计算的不是 down(act(gate x) * up x)"


@torch.no_grad()
def activation_of(module: nn.Module, names: tuple[str, str, str] = FFN_NAMES) -> str | None:
    """与 module 的输出最接近的激活函数；都对不上时为 None。"""
    gate, up, down = (getattr(module, name).weight for name in names)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TOKENS, gate.shape[1], generator=generator).to(gate.device, gate.dtype)
    try:
        with evaluating(module):
            want = module(x)
            likely = _named_activation(module) or _ACTIVATIONS
    except Exception:  # pylint: disable=broad-exception-caught  # 别人的 forward 可能抛出任何错误
        return None
    if not isinstance(want, Tensor) or want.shape != x.shape:
        return None
    scale = want.float().abs().max().clamp_min(1e-30)
    errors = {}
    for name in likely:
        got = F.linear(_ACTIVATIONS[name](F.linear(x, gate)) * F.linear(x, up), down)
        errors[name] = float((got - want).float().abs().max() / scale)
    best = min(errors, key=errors.get)
    return best if errors[best] <= _CLOSE[gate.dtype] else None


def _named_activation(module: nn.Module) -> list[str]:
    """激活函数是单独的属性时，直接看它的取值：半精度的输出分不清两种 GELU。"""
    points = torch.linspace(-4, 4, 33)
    for attribute in _ACT_NAMES:
        function = getattr(module, attribute, None)
        if callable(function):
            values = function(points)
            return [n for n, f in _ACTIVATIONS.items() if torch.allclose(f(points), values)]
    return []
