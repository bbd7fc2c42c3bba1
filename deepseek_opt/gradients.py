"""反向把权重的梯度直接加到已有的 ``.grad`` 上，省去一份与权重同样大的临时梯度。"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepseek_opt.errors import InputError

_MARK = "_deepseek_opt_accumulate"


def accumulate_into_grad(model: nn.Module, enabled: bool = True) -> int:
    """让 model 的专家权重在反向里直接累加到 ``.grad``；返回标记的参数个数。

    用于梯度累积，或 ``optimizer.zero_grad(set_to_none=False)``：``.grad`` 已经存在时，反向逐块读改写它，
    不另外生成一整份 [E, ...] 的梯度再相加。半精度时和以 fp32 相加、只舍入一次，误差不大于通常的做法。

    只在安全时这样做，否则照常：``.grad`` 不存在或类型、形状、布局不同，参数上有梯度钩子，
    ``torch.autograd.grad``，``create_graph=True``，autocast 与激活检查点（那里的权重是
    副本），以及 ``torch.distributed`` 已初始化时（DDP、FSDP 要看到每一份梯度）。

    参数
    ----
    model : 任何模块；只有 ``moe_experts`` 的成叠权重会用到这个标记，标记别的参数没有影响。
    enabled : False 取消标记。

    抛出 InputError：model 不是 nn.Module。

    示例
    ----
    >>> import torch
    >>> import deepseek_opt as dso
    >>> layer = dso.MoEFeedForward(dso.MOEConfig(num_experts=4, num_experts_per_tok=2), 8, 16)
    >>> count = dso.accumulate_into_grad(layer)
    >>> for part in torch.randn(2, 3, 8):  # 两个微批次：第二次直接加到第一次的 .grad 上
    ...     layer(part).square().mean().backward()
    """
    if not isinstance(model, nn.Module):
        raise InputError.expected("model", " nn.Module", model)
    parameters = list(model.parameters())
    for parameter in parameters:
        if enabled:
            setattr(parameter, _MARK, True)
        elif hasattr(parameter, _MARK):
            delattr(parameter, _MARK)
    return len(parameters)


def accumulation_targets(*weights: Tensor) -> tuple[Tensor, ...] | None:
    """各权重可以直接累加进去的 ``.grad``；有一个不行就是 None。在反向里调用。"""
    if not all(getattr(weight, _MARK, False) for weight in weights):
        return None
    if torch.is_grad_enabled() or _is_distributed():
        return None
    if not all(_is_suitable(weight) and _will_accumulate(weight) for weight in weights):
        return None
    return tuple(weight.grad for weight in weights)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_suitable(weight: Tensor) -> bool:
    if not (weight.is_leaf and weight.requires_grad and weight.is_contiguous()):
        return False
    grad = weight.grad
    if grad is None or grad.requires_grad or grad.layout != torch.strided:
        return False
    same = grad.shape == weight.shape and grad.dtype == weight.dtype and grad.is_contiguous()
    hooks = (weight._backward_hooks, getattr(weight, "_post_accumulate_grad_hooks", None))
    return same and grad.device == weight.device and not any(hooks)


def _will_accumulate(weight: Tensor) -> bool:
    """这次反向会不会累加 weight 的 .grad；``torch.autograd.grad`` 不会。"""
    with torch.enable_grad():
        node = weight.view_as(weight).grad_fn.next_functions[0][0]
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad 求的正是它
        return False
