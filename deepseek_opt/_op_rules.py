"""各算子的 fake（形状推导）、autograd、autocast 规则；导入即登记一次。

前向与反向的计算都在本地库里；这里只有 torch.library 的登记。反向本身也是算子，
没有二阶导数（对它再求导时 torch 会报错，而不是给出错误的结果）。
"""

# 规则的参数表必须与算子的模式一致，用不到的也要列出。
# pylint: disable=unused-argument
from __future__ import annotations

import functools

import torch
from torch import Tensor

_OPS = torch.ops.deepseek_opt
_NS = "deepseek_opt::"


# ---- fake：只推导形状与 dtype ----


def _fake(name: str):
    """登记形状推导；设备不一的输入在这里就报错（元张量会抢先决定派发到哪里）。"""

    def register(rule):
        @functools.wraps(rule)
        def checked(*args, **kwargs):
            devices = {a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor)}
            if len(devices) > 1 and "meta" in devices:
                found = "、".join(sorted(devices))
                raise ValueError(f"deepseek_opt：{name}：全部张量应在同一设备上，实际在 {found}。")
            return rule(*args, **kwargs)

        torch.library.register_fake(_NS + name)(checked)
        return rule

    return register


@_fake("linear")
def _(x, weight, bias=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_fake("linear_backward")
def _(grad, x, weight, need_x, need_weight, need_bias):
    return (
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty((weight.shape[0],) if need_bias else (0,)),
    )


@_fake("swiglu_mlp")
def _(x, gate, up, down):
    return x.new_empty((*x.shape[:-1], down.shape[0]))


@_fake("swiglu_mlp_backward")
def _(grad, x, gate, up, down):
    return tuple(t.new_empty(t.shape) for t in (x, gate, up, down))


@_fake("rms_norm")
def _(x, weight, eps):
    return x.new_empty(x.shape)


@_fake("rms_norm_backward")
def _(grad, x, weight, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@_fake("add_rms_norm")
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_fake("rope")
def _(x, cos, sin, interleaved, inverse=False):
    return x.new_empty(x.shape)


@_fake("rope_")
def _(x, cos, sin, interleaved):
    return None


@_fake("mla_layer_decode")
def _(
    hidden,
    q_a,
    q_a_bias,
    q_norm,
    q_eps,
    q_weight,
    q_bias,
    kv_a,
    kv_a_bias,
    kv_norm,
    kv_eps,
    kv_b,
    o_weight,
    *rest,
):
    return hidden.new_empty((*hidden.shape[:2], o_weight.shape[0]))


@_fake("mla_cache_write")
def _(latent_cache, rope_cache, scale_cache, latent, rope, offsets):
    return None


@_fake("mla_decode")
def _(q, latent, rope, scale, kv_b, spans, kv_mask, softmax_scale, v_head_dim, causal=True):
    return q.new_empty((*q.shape[:3], v_head_dim))


@_fake("mla_prefill")
def _(q, latent, rope, scale, kv_b, spans, kv_mask, softmax_scale, v_head_dim, causal=True):
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return q.new_empty((*q.shape[:3], v_head_dim)), lse


@_fake("mla_prefill_backward")
def _(grad, q, latent, rope, kv_b, spans, kv_mask, out, lse, softmax_scale, v_head_dim, causal):
    return tuple(t.new_empty(t.shape) for t in (q, latent, rope, kv_b))


# ---- autograd ----


def _for_given(ctx, grads):
    """分派器会去掉等于默认值的末尾参数（例如 bias=None），梯度的个数要与实际传入的参数一致。"""
    return grads[: len(ctx.needs_input_grad)]


def _linear_setup(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _linear_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = (*ctx.needs_input_grad, False)[:3]
    need_bias = need_bias and ctx.has_bias
    dx, dw, db = _OPS.linear_backward(grad.contiguous(), x, weight, need_x, need_weight, need_bias)
    grads = (dx if need_x else None, dw if need_weight else None, db if need_bias else None)
    return _for_given(ctx, grads)


def _swiglu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, grad):
    return _OPS.swiglu_mlp_backward(grad.contiguous(), *ctx.saved_tensors)


def _norm_setup(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _norm_backward(ctx, grad):
    dx, dw = _OPS.rms_norm_backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps)
    return dx, dw, None


def _add_norm_setup(ctx, inputs, output):
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _add_norm_backward(ctx, grad, grad_total):
    dx, dw = _OPS.rms_norm_backward(grad.contiguous(), *ctx.saved_tensors, ctx.eps)
    dx = dx + grad_total
    return dx, dx, dw, None


def _rope_setup(ctx, inputs, output):
    _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _rope_backward(ctx, grad):
    cos, sin = ctx.saved_tensors
    dx = _OPS.rope(grad.contiguous(), cos, sin, ctx.interleaved, not ctx.inverse)
    return _for_given(ctx, (dx, None, None, None, None))


def _prefill_setup(ctx, inputs, output):
    q, latent, rope, scale, kv_b, spans, kv_mask, *ctx.options = inputs
    if scale is not None and any(t.requires_grad for t in (q, latent, rope, kv_b)):
        raise ValueError("mla_prefill：int8 潜变量（给了 scale）不能求梯度。")
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, latent, rope, kv_b, spans, kv_mask, out, lse)


def _prefill_backward(ctx, grad, _grad_lse):
    q, latent, rope, kv_b, spans, kv_mask, out, lse = ctx.saved_tensors
    dq, dlatent, drope, dkv_b = _OPS.mla_prefill_backward(
        grad.contiguous(), q, latent, rope, kv_b, spans, kv_mask, out, lse, *ctx.options
    )
    return _for_given(ctx, (dq, dlatent, drope, None, dkv_b, None, None, None, None, None))


for _name, _backward, _setup in (
    ("linear", _linear_backward, _linear_setup),
    ("swiglu_mlp", _swiglu_backward, _swiglu_setup),
    ("rms_norm", _norm_backward, _norm_setup),
    ("add_rms_norm", _add_norm_backward, _add_norm_setup),
    ("rope", _rope_backward, _rope_setup),
    ("mla_prefill", _prefill_backward, _prefill_setup),
):
    torch.library.register_autograd(_NS + _name, _backward, setup_context=_setup)


def _refuse(name):
    def backward(_ctx, *_grads):
        raise RuntimeError(f"deepseek_opt：{name} 没有导数，不能再求导。")

    return backward


# 没有登记 autograd 的算子，torch 只警告一次就丢掉梯度；求二阶导数时改成报错。
for _name in ("linear", "swiglu_mlp", "rms_norm", "mla_prefill"):
    torch.library.register_autograd(f"{_NS}{_name}_backward", _refuse(f"{_name}_backward"))


# ---- autocast：矩阵类算子按 autocast 的 dtype 计算，与 torch 对 F.linear、SDPA 的规则一致 ----

_LIBRARY = torch.library.Library("deepseek_opt", "IMPL")  # 模块级引用：回收即撤销登记


def _cast(value, dtype):
    if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
        return value.to(dtype)
    return value


def _register_autocast(name: str, device: str, key: str) -> None:
    op = getattr(_OPS, name).default
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    scale_index = 3 if name.startswith("mla_") else -1  # int8 潜变量的 scale 保持 fp32

    def rule(*args):
        dtype = torch.get_autocast_dtype(device)
        cast = [a if i == scale_index else _cast(a, dtype) for i, a in enumerate(args)]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*cast)

    _LIBRARY.impl(name, rule, key)


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
    for _name in ("linear", "swiglu_mlp", "mla_decode", "mla_prefill"):
        _register_autocast(_name, _device, _key)
