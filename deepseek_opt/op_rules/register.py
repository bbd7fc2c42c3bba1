"""登记 fake、autograd、autocast 的工具。"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deepseek_opt.errors import mixed_devices

OPS = torch.ops.deepseek_opt
_NS = "deepseek_opt::"


# 张量在设备上时这些参数仍可以在 CPU 上：绑定核对之后再送到设备。
_ON_HOST = {"mla_cache_write": ("offsets",), "mla_decode": ("spans", "block_table")}
_SPANS = ("spans",)


def fake(name: str):
    """登记形状推导；设备不一的输入在这里就报错（元张量会抢先决定派发到哪里）。"""

    def register(rule):
        @functools.wraps(rule)
        def checked(*args, **kwargs):
            _require_one_device(name, args, kwargs)
            return rule(*args, **kwargs)

        torch.library.register_fake(_NS + name)(checked)
        return rule

    return register


def _require_one_device(name: str, args: tuple, kwargs: dict) -> None:
    names = [argument.name for argument in getattr(OPS, name).default._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    loose = _ON_HOST.get(name, _SPANS)
    found = [
        (argument, leaf.device)
        for argument, value in given.items()
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor) and not (argument in loose and leaf.is_cpu)
    ]
    if len({device for _, device in found}) > 1:
        raise ValueError(mixed_devices(name, found))


def for_given(ctx, grads):
    """分派器会去掉等于默认值的末尾参数（例如 bias=None），梯度的个数要与实际传入的参数一致。"""
    return grads[: len(ctx.needs_input_grad)]


def autograd(name: str, backward, setup, *, has_backward_op: bool = True) -> None:
    """登记 name 的反向；反向本身是算子 ``<name>_backward`` 时，对它再求导会报错，而不是丢掉梯度。"""
    torch.library.register_autograd(_NS + name, backward, setup_context=setup)
    if has_backward_op:
        torch.library.register_autograd(f"{_NS}{name}_backward", _refuse(f"{name}_backward"))


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
