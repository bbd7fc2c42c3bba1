"""替换 transformers 的路由器：打分、选组、选专家、归一化由一次 ``ops.moe_route`` 算完。

只换 logits 以 fp32 计算的（DeepSeek-V2、V3 两种写法）：其余的先把 logits 舍入到半精度，换了会在近乎平局时选到
别的专家。认的是属性与结果：用随机数核对过选择、权重与 logits，对不上的不换。
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt import ops
from deepseek_opt.integrations.dense import instance_reason
from deepseek_opt.integrations.experts import input_reason
from deepseek_opt.integrations.patch import Patch
from deepseek_opt.integrations.runtime import Runtime

_COMMON = ("top_k", "num_experts", "routed_scaling_factor", "num_group", "topk_group")
_PROBE_TOKENS = 64


class RouterPatch(Patch):
    """一个路由器实例的新 forward：返回 (logits [T, E] fp32, 权重 [T, k], 下标 [T, k])。"""

    kind = "moe"

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.runtime.require_moe()
        reason = "有额外的参数" if args or kwargs else input_reason(hidden_states, "moe_route")
        if reason is None and self.module.weight.device != hidden_states.device:
            reason = "路由权重与输入不在同一设备上"
        if reason is not None:
            self.runtime.count(self.name, reason)
            return self.call_original(hidden_states, *args, **kwargs)
        return route(self.module, hidden_states)[:3]


def router_reason(module: nn.Module) -> str | None:
    """不能替换的原因；可以则为 None。不像路由器的也给出原因，由调用者决定报不报。"""
    if not looks_like_router(module):
        return "logits 不是以 fp32 计算，或不是 DeepSeek 的写法"
    return instance_reason(module) or _probe(module)


def looks_like_router(module: nn.Module) -> bool:
    """是否有 DeepSeek 路由器的属性。"""
    weight = module._parameters.get("weight")
    state = module.__dict__
    if weight is None or weight.dim() != 2 or not all(name in state for name in _COMMON):
        return False
    return "e_score_correction_bias" in module._buffers or "topk_method" in state


def route(module: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits, 权重, 下标, 各专家的词元数 [E])；属性是活的，改了下一次生效。"""
    state = module.__dict__
    bias = module._buffers.get("e_score_correction_bias")
    groups = (state["num_group"] or 1, state["topk_group"] or 1)
    if bias is not None:
        rule = {"score": "sigmoid", "normalize": state["norm_topk_prob"], "group_score": "top2"}
        bias = bias.float()
    else:
        rule = {"score": "softmax", "normalize": False, "group_score": "max"}
        groups = groups if state["topk_method"] == "group_limited_greedy" else (1, 1)
    return ops.moe_route(
        hidden.reshape(-1, hidden.shape[-1]),
        module._parameters["weight"],
        None,
        bias,
        top_k=state["top_k"],
        n_group=groups[0],
        topk_group=groups[1],
        scaling=float(state["routed_scaling_factor"]),
        **rule,
    )


def install(module: nn.Module, runtime: Runtime, name: str) -> None:
    """换上。"""
    RouterPatch(module, runtime, name).install()


def _probe(module: nn.Module) -> str | None:
    """随机词元走一遍原来的 forward，选择、权重、logits 都要相同；偏置取随机值，免得全 0 时看不出差别。"""
    weight, bias = module.weight, module._buffers.get("e_score_correction_bias")
    if weight.is_meta:
        return "路由权重还在 meta 设备上"
    with torch.no_grad():
        reason = ops.missing(weight, "moe_route")
    if reason is not None:
        return reason
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_TOKENS, weight.shape[1], generator=generator)
    x = x.to(weight.device, weight.dtype)
    saved = None if bias is None else bias.clone()
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        try:
            if bias is not None:
                bias.copy_(torch.randn(bias.shape, generator=generator) * 0.1)
            expected = type(module).forward(module, x)
            actual = route(module, x)[:3]
        except (RuntimeError, TypeError, AttributeError, ValueError, KeyError):
            return "forward 的参数与登记的写法不同"
        finally:
            if bias is not None:
                bias.copy_(saved)
    return None if _same(expected, actual) else "选择或权重与登记的写法不同"


def _same(expected: Any, actual: tuple[Tensor, Tensor, Tensor]) -> bool:
    if not isinstance(expected, tuple) or len(expected) != len(actual):
        return False
    logits, weights, indices = expected
    order, mine = indices.sort(-1), actual[2].sort(-1)
    return (
        torch.allclose(logits.float(), actual[0], rtol=1e-3, atol=1e-4)
        and bool((order.values == mine.values).float().mean() > 0.98)  # 近乎平局的可以不同
        and torch.allclose(weights.float().sum(-1), actual[1].sum(-1), rtol=1e-2, atol=1e-4)
    )
