"""MoE 算子的规则。"""

# 规则的参数表必须与算子的模式一致，用不到的也要列出。
# pylint: disable=unused-argument
from __future__ import annotations

import torch

from deepseek_opt.gradients import accumulation_targets
from deepseek_opt.op_rules.register import autocast, autograd, fake, for_given, run

# moe_experts 的参数位置；之后是 _OPTIONS 个选项，再是 save。
_X, _WEIGHTS, _GATE_UP, _GATE_UP_BIAS, _DOWN, _DOWN_BIAS, _SHARED = 0, 2, 3, 4, 5, 6, 7
_OPTIONS = 6


def _saved(indices, x, gated, widest, shared, save):
    """前向留给反向的 gate、up：见 csrc/dso.h 的 dso_moe_saved。"""
    if not save:
        return x.new_empty(0)
    tokens, top_k = indices.shape
    common = tokens * shared[0].shape[0] if shared else 0
    return x.new_empty((2 if gated else 1) * (tokens * top_k * ((widest + 7) // 8 * 8) + common))


@fake("moe_experts")
def _(x, indices, weights, gate_up, gate_up_bias, down, down_bias, shared, *options):
    transposed, gated, save = options[3], options[5], options[_OPTIONS:]
    y = x.new_empty((x.shape[0], down.shape[2 if transposed else 1]))
    inner = down.shape[1 if transposed else 2]
    return y, _saved(indices, x, gated, inner, shared, save and save[0])


def _grad_like(t, wanted, x):
    return x.new_empty(0) if t is None else t.new_empty(t.shape if wanted else (0,))


@fake("moe_experts_backward")
def _(grad, x, indices, weights, gate_up, gate_up_bias, down, down_bias, shared, *options):
    _, _, _, _, _, _, need_x, need_experts, need_shared, *_ = options

    def like(t, wanted):
        return _grad_like(t, wanted, x)

    experts = (gate_up, down, gate_up_bias, down_bias)
    return (
        like(x, need_x),
        weights.new_empty(weights.shape),
        *(like(t, need_experts) for t in experts),
        [like(t, need_shared) for t in shared],
    )


@fake("moe_experts_backward_into")
def _(grad, x, indices, weights, gate_up, gate_up_bias, down, down_bias, shared, *options):
    _, _, _, _, _, _, need_x, need_shared, *_ = options
    return (
        _grad_like(x, need_x, x),
        weights.new_empty(weights.shape),
        _grad_like(gate_up_bias, True, x),
        _grad_like(down_bias, True, x),
        *(_grad_like(t, need_shared, x) for t in [*shared, *[None] * (4 - len(shared))]),
    )


def _experts_setup(ctx, inputs, output):
    shared = inputs[_SHARED]
    ctx.options = inputs[_SHARED + 1 : _SHARED + 1 + _OPTIONS]
    ctx.shared = len(shared)
    saved = _mark_saved(ctx, output)
    ctx.save_for_backward(saved, *inputs[:_SHARED], *shared)


def _mark_saved(ctx, output):
    """第二个输出没有导数；没有留下时（空的）是 None，反向重算。"""
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    return output[1] if output[1].numel() else None


def _no_grads(ctx):
    given = ctx.needs_input_grad
    return tuple([None] * len(w) if isinstance(w, (list, tuple)) else None for w in given)


def _experts_backward(ctx, grad, _):
    if grad is None:
        return _no_grads(ctx)
    saved, *tensors = ctx.saved_tensors
    inputs, shared = tensors[:_SHARED], tensors[_SHARED:]
    given = ctx.needs_input_grad
    experts = (_GATE_UP, _GATE_UP_BIAS, _DOWN, _DOWN_BIAS)
    need_shared = _any(given[_SHARED])
    call = (grad.contiguous(), *inputs, shared, *ctx.options)
    targets = accumulation_targets(inputs[_GATE_UP], inputs[_DOWN])
    if targets is None:
        needs = (given[_X], any(given[i] for i in experts), need_shared)
        dx, dw, dgu, dd, dgub, ddb, ds = run("moe_experts_backward", *call, *needs, saved)
    else:
        dx, dw, dgub, ddb, *ds = run(
            "moe_experts_backward_into", *call, given[_X], need_shared, *targets, saved
        )
        dgu = dd = None  # 已经加进 .grad
    found = {_X: dx, _WEIGHTS: dw, _GATE_UP: dgu, _GATE_UP_BIAS: dgub, _DOWN: dd, _DOWN_BIAS: ddb}
    grads = [found.get(i) if given[i] else None for i in range(_SHARED)]
    shared_grads = list(ds[: ctx.shared]) if need_shared else [None] * ctx.shared
    return for_given(ctx, (*grads, shared_grads, *(None for _ in ctx.options), None))


autograd("moe_experts", _experts_backward, _experts_setup)
autocast("moe_experts", keep=(_WEIGHTS,))


# ---- 每个专家的权重单独给出：三个张量之后是七个列表（最后一个是 shared） ----

_LISTS = slice(3, 10)
_LIST_OPTIONS = 4


@fake("moe_experts_list")
def _(x, indices, weights, *rest):
    down, shared, options = rest[2], rest[6], rest[7:]
    gated, save = options[3], options[_LIST_OPTIONS:]
    widest = max(d.shape[1] for d in down)
    y = x.new_empty((x.shape[0], down[0].shape[0]))
    return y, _saved(indices, x, gated, widest, shared, save and save[0])


@fake("moe_experts_list_backward")
def _(grad, x, indices, weights, *rest):
    lists, options = rest[:7], rest[7:]
    _, _, _, _, need_x, need_experts, need_shared, *_ = options

    def like(t, wanted):
        return t.new_empty(t.shape if wanted else (0,))

    experts = ([like(t, need_experts) for t in group] for group in lists[:-1])
    shared = [like(t, need_shared) for t in lists[-1]]
    return like(x, need_x), weights.new_empty(weights.shape), *experts, shared


def _list_setup(ctx, inputs, output):
    lists = inputs[_LISTS]
    ctx.options = inputs[_LISTS.stop : _LISTS.stop + _LIST_OPTIONS]
    ctx.sizes = [len(group) for group in lists]
    saved = _mark_saved(ctx, output)
    ctx.save_for_backward(saved, *inputs[: _LISTS.start], *(t for group in lists for t in group))


def _any(wanted):
    return any(wanted) if isinstance(wanted, (list, tuple)) else bool(wanted)


def _list_backward(ctx, grad, _):
    if grad is None:
        return _no_grads(ctx)
    saved, x, indices, weights, *flat = ctx.saved_tensors
    remaining = iter(flat)
    lists = [[next(remaining) for _ in range(size)] for size in ctx.sizes]
    wanted = [_any(w) for w in ctx.needs_input_grad[_LISTS]]
    needs = (ctx.needs_input_grad[_X], any(wanted[:-1]), wanted[-1])
    dx, dw, *found = run(
        "moe_experts_list_backward",
        grad.contiguous(),
        x,
        indices,
        weights,
        *lists,
        *ctx.options,
        *needs,
        saved,
    )
    pairs = zip(found, wanted, ctx.sizes, strict=True)
    grads = [list(group) if want else [None] * size for group, want, size in pairs]
    plain = (dx if needs[0] else None, None, dw if ctx.needs_input_grad[_WEIGHTS] else None)
    return for_given(ctx, (*plain, *grads, *(None for _ in ctx.options), None))


autograd("moe_experts_list", _list_backward, _list_setup)
autocast("moe_experts_list", keep=(_WEIGHTS,))


# ---- 路由：logits 与权重一律 fp32，autocast 里也不降精度（不登记 autocast，按原样的输入计算） ----


@fake("moe_route")
def _(x, weight, logit_bias, choice_bias, top_k, *rule):
    tokens = x.shape[0]
    experts = x.shape[1] if weight is None else weight.shape[0]
    return (
        x.new_empty((tokens, experts), dtype=torch.float32),
        x.new_empty((tokens, top_k), dtype=torch.float32),
        x.new_empty((tokens, top_k), dtype=torch.int64),
        x.new_empty((experts,), dtype=torch.int64),
    )


@fake("moe_route_backward")
def _(d_logits, d_weights, logits, indices, *rule):
    return logits.new_empty(logits.shape)


def _route_setup(ctx, inputs, output):
    x, weight, logit_bias, _, _, score, normalize, softmax_after, *_, scaling, eps = inputs
    logits, _, indices, counts = output
    ctx.mark_non_differentiable(indices, counts)
    ctx.set_materialize_grads(False)
    ctx.rule = (score, normalize, softmax_after, scaling, eps)
    ctx.count = len(inputs)
    ctx.bias_dtype = None if logit_bias is None else logit_bias.dtype
    ctx.save_for_backward(x, weight, logits, indices)


def _route_backward(ctx, d_logits, d_weights, *_unused):
    x, weight, logits, indices = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
    nothing = (None,) * (ctx.count - 3)
    if d_logits is None and d_weights is None:
        return (None, None, None, *nothing)
    grad = run("moe_route_backward", d_logits, d_weights, logits, indices, *ctx.rule)
    bias = grad.sum(0).to(ctx.bias_dtype) if need_bias else None
    if weight is None:
        return (grad.to(x.dtype) if need_x else None, None, bias, *nothing)
    dx, dw, _ = run("linear_backward", grad, x, weight, need_x, need_weight, False)
    return (dx if need_x else None, dw if need_weight else None, bias, *nothing)


autograd("moe_route", _route_backward, _route_setup)
