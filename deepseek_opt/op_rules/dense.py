"""稠密算子的规则。"""

# 规则的参数表必须与算子的模式一致，用不到的也要列出。
# pylint: disable=unused-argument
from __future__ import annotations

from deepseek_opt.op_rules.register import autocast, autograd, fake, for_given, run

# ---- fake：只推导形状与 dtype ----


@fake("linear")
def _(x, weight, bias=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@fake("linear_backward")
def _(grad, x, weight, need_x, need_weight, need_bias):
    return (
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty((weight.shape[0],) if need_bias else (0,)),
    )


@fake("swiglu_mlp")
def _(x, gate, up, down):
    return x.new_empty((*x.shape[:-1], down.shape[0]))


@fake("swiglu_mlp_backward")
def _(grad, x, gate, up, down):
    return tuple(t.new_empty(t.shape) for t in (x, gate, up, down))


@fake("rms_norm")
def _(x, weight, eps):
    return x.new_empty(x.shape)


@fake("rms_norm_backward")
def _(grad, x, weight, eps):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@fake("add_rms_norm")
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


# ---- autograd ----


def _linear_setup(ctx, inputs, output):
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _linear_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = (*ctx.needs_input_grad, False)[:3]
    need_bias = need_bias and ctx.has_bias
    dx, dw, db = run(
        "linear_backward", grad.contiguous(), x, weight, need_x, need_weight, need_bias
    )
    grads = (dx if need_x else None, dw if need_weight else None, db if need_bias else None)
    return for_given(ctx, grads)


def _swiglu_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx, grad):
    return run("swiglu_mlp_backward", grad.contiguous(), *ctx.saved_tensors)


def _norm_setup(ctx, inputs, output):
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _norm_backward(ctx, grad):
    dx, dw = run("rms_norm_backward", grad.contiguous(), *ctx.saved_tensors, ctx.eps)
    return dx, dw, None


def _add_norm_setup(ctx, inputs, output):
    _, _, weight, ctx.eps = inputs
    ctx.save_for_backward(output[1], weight)


def _add_norm_backward(ctx, grad, grad_total):
    dx, dw = run("rms_norm_backward", grad.contiguous(), *ctx.saved_tensors, ctx.eps)
    dx = dx + grad_total
    return dx, dx, dw, None


autograd("linear", _linear_backward, _linear_setup)
autograd("swiglu_mlp", _swiglu_backward, _swiglu_setup)
autograd("rms_norm", _norm_backward, _norm_setup)
autograd("add_rms_norm", _add_norm_backward, _add_norm_setup, has_backward_op=False)
autocast("linear")
autocast("swiglu_mlp")
