"""经过模块自己的子模块做投影：普通 nn.Linear 直接走本库的核，其余（LoRA、量化、有钩子）走它自己。"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt import ops, reference
from deepseek_opt.integrations.stamp import stamp


def is_plain(module: Any) -> bool:
    """是否是没有钩子、没有被改写的 nn.Linear（参数化会换掉类，因此也不算）。"""
    return type(module) is nn.Linear and not has_hooks(module)


def project(module: nn.Module, x: Tensor) -> Tensor:
    """x [..., K] -> [..., N]；不在 CPU 上也走模块自己：那里 ops.linear 就是它用的 cuBLAS，只是多一层分派。"""
    if is_plain(module) and x.is_cpu:
        parameters = module.__dict__["_parameters"]
        return ops.linear(x, parameters["weight"], parameters["bias"])
    return module(x)


def is_rms_norm(module: Any) -> bool:
    """module 是否就是 HF 约定的 RMSNorm：用一小段随机数核对，而不是只看名字。"""
    weight = getattr(module, "weight", None)
    eps = norm_eps(module)
    if eps is None or not isinstance(weight, Tensor) or weight.dim() != 1 or weight.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(2, weight.numel(), generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            actual = type(module).forward(module, probe)
        except (RuntimeError, TypeError):
            return False
        expected = reference.rms_norm(probe, weight, eps)
    return actual.shape == expected.shape and torch.allclose(
        actual.float(), expected.float(), rtol=0.02, atol=1e-5
    )


def norm_eps(module: Any) -> float | None:
    """RMSNorm 的 epsilon；没有则为 None。"""
    state = getattr(module, "__dict__", {})
    value = state.get("variance_epsilon", state.get("eps"))
    return value if isinstance(value, float) else None


def has_hooks(module: nn.Module) -> bool:
    """模块实例上有没有钩子或被改写的 forward。"""
    return "forward" in module.__dict__ or is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    """模块实例上有没有前向或反向的钩子（不管 forward 有没有被改写，例如被本库的补丁）。"""
    state = module.__dict__
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return True
    return bool(state["_backward_hooks"] or state["_backward_pre_hooks"])


def norm(module: nn.Module, x: Tensor, known: bool) -> Tensor:
    """归一化最后一维；known 为 :func:`is_rms_norm` 的结果，有钩子时仍走模块自己。"""
    if known and not has_hooks(module) and ops.missing(x, "rms_norm") is None:
        return ops.rms_norm(x, module.__dict__["_parameters"]["weight"], norm_eps(module))
    return module(x)


def effective_weight(module: nn.Module) -> tuple[Tensor | None, str | None]:
    """kv_b_proj 的有效权重 [H·(dn + dv), r]；取不到时给出原因。

    潜变量核要的是权重本身而不是一次投影，所以不能经过模块的 forward。
    """
    if is_plain(module):
        if module.bias is not None:
            return None, "kv_b_proj 带偏置"
        return module.weight, None
    if type(module) is nn.Linear:
        return None, "kv_b_proj 上有钩子或被改写的 forward"
    if hasattr(module, "get_base_layer") and hasattr(module, "lora_A"):
        return _lora_weight(module)
    return None, f"kv_b_proj 是 {type(module).__name__}，取不到它的权重"


def _lora_weight(module: Any) -> tuple[Tensor | None, str | None]:
    """PEFT 的 LoRA：W + Σ B·A·scaling；不训练时按参数版本缓存。"""
    base = module.get_base_layer()
    if not is_plain(base) or base.bias is not None or is_hooked(module):
        return None, "kv_b_proj 的 LoRA 底层不是普通 nn.Linear"
    if module.disable_adapters or module.merged:
        return base.weight, None
    names = [name for name in module.active_adapters if name in module.lora_A]
    for name in names:
        if module.use_dora.get(name) or name in getattr(module, "lora_variant", {}):
            return None, "kv_b_proj 用了 DoRA 等 LoRA 变体"
        if module.training and getattr(module.lora_dropout[name], "p", 0.0):
            return None, "kv_b_proj 的 LoRA 在训练中有 dropout"
    parts = [(module.lora_A[n].weight, module.lora_B[n].weight, module.scaling[n]) for n in names]
    tensors = [base.weight, *(t for a, b, _ in parts for t in (a, b))]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _merge(base.weight, parts), None
    key = tuple((id(t), stamp(t)) for t in tensors) + tuple(p[2] for p in parts)
    memo = module.__dict__.get("_deepseek_opt_weight")
    if memo is None or memo[0] != key:
        with torch.no_grad():
            memo = (key, _merge(base.weight, parts))
        module.__dict__["_deepseek_opt_weight"] = memo
    return memo[1], None


def _merge(weight: Tensor, parts: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    for a, b, scaling in parts:
        weight = weight + ((b @ a) * scaling).to(weight.dtype)
    return weight
