"""登记 fake、autograd、autocast 的工具。"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from deepseek_opt.device_memory import is_out_of_memory, out_of_memory, shapes_of
from deepseek_opt.op_calls import argument_names, call, mixed_places

OPS = torch.ops.deepseek_opt
_NS = "deepseek_opt::"


def run(name: str, *args: Any) -> Any:
    """规则里（反向的计算）执行算子 name：失败时与前向一样说得清。"""
    return call(name, getattr(OPS, name).default, args)


def fake(name: str):
    """登记形状推导；设备不一的输入在这里就报错（元张量会抢先决定派发到哪里）。"""

    def register(rule):
        @functools.wraps(rule)
        def checked(*args, **kwargs):
            others = (kwargs.get(argument) for argument in argument_names(name)[len(args) :])
            mixed = mixed_places(name, (*args, *others))
            if mixed is not None:
                raise mixed
            return rule(*args, **kwargs)

        torch.library.register_fake(_NS + name)(checked)
        return rule

    return register


def for_given(ctx, grads):
    """分派器会去掉等于默认值的末尾参数（例如 bias=None），梯度的个数要与实际传入的参数一致。"""
    return grads[: len(ctx.needs_input_grad)]


def autograd(name: str, backward, setup, *, has_backward_op: bool = True) -> None:
    """登记 name 的反向；反向本身是算子 ``<name>_backward`` 时，对它再求导会报错，而不是丢掉梯度。"""
    torch.library.register_autograd(_NS + name, _guarded(name, backward), setup_context=setup)
    if has_backward_op:
        torch.library.register_autograd(f"{_NS}{name}_backward", _refuse(f"{name}_backward"))


def _guarded(name, backward):
    """反向里不是本库的算子（梯度变成连续的、相加）放不下时，也是 DeviceMemoryError。"""

    @functools.wraps(backward)
    def guarded(ctx, *grads):
        try:
            return backward(ctx, *grads)
        except (RuntimeError, MemoryError) as error:
            device = next((g.device for g in grads if isinstance(g, Tensor)), None)
            if device is None or not is_out_of_memory(error, device):
                raise
            what = f"算子 {name} 的反向，梯度的形状 {shapes_of(grads)}"
            raise out_of_memory(what, device, error) from error

    return guarded


def _refuse(name):
    def backward(_ctx, *_grads):
        raise RuntimeError(f"deepseek_opt：{name} 没有导数，不能再求导。")

    return backward


# ---- autocast：矩阵类算子按 autocast 的 dtype 计算，与 torch 对 F.linear、SDPA 的规则一致 ----

_CAST = (torch.float32, torch.bfloat16, torch.float16)  # fp64 与 fp8（量化的潜变量）不动
_LIBRARY = torch.library.Library("deepseek_opt", "IMPL")  # 模块级引用：回收即撤销登记


def _cast(value, dtype):
    if isinstance(value, (list, tuple)):
        return [_cast(v, dtype) for v in value]
    if isinstance(value, Tensor) and value.dtype in _CAST:
        return value.to(dtype)
    return value


def _register_autocast(name: str, device: str, key: str, keep: tuple[int, ...]) -> None:
    op = getattr(OPS, name).default
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def rule(*args):
        dtype = torch.get_autocast_dtype(device)
        cast = [a if i in keep else _cast(a, dtype) for i, a in enumerate(args)]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*cast)

    _LIBRARY.impl(name, rule, key)


def autocast(name: str, keep: tuple[int, ...] = ()) -> None:
    """在 autocast 里按它的 dtype 计算；keep 为保持原样的参数位置。"""
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _register_autocast(name, device, key, keep)
