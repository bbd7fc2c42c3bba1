"""MLA 算子的规则。"""

# 规则的参数表必须与算子的模式一致，用不到的也要列出。
# pylint: disable=unused-argument
from __future__ import annotations

import torch

from deepseek_opt.op_rules.register import autocast, autograd, fake, for_given, run

# ---- fake：只推导形状与 dtype ----


@fake("rope")
def _(x, cos, sin, interleaved, inverse=False, keep_pairs=False):
    return x.new_empty(x.shape)


@fake("rope_")
def _(x, cos, sin, interleaved, keep_pairs=False):
    return None


@fake("mla_layer_decode")
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


@fake("mla_cache_write")
def _(latent_cache, rope_cache, scale_cache, latent, rope, offsets):
    return None


@fake("mla_decode")
def _(
    q,
    latent,
    rope,
    scale,
    kv_b,
    spans,
    kv_mask,
    softmax_scale,
    v_head_dim,
    causal=True,
    block_table=None,
):
    return q.new_empty((*q.shape[:3], v_head_dim))


@fake("mla_prefill")
def _(q, latent, rope, scale, kv_b, spans, kv_mask, softmax_scale, v_head_dim, causal=True):
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    return q.new_empty((*q.shape[:3], v_head_dim)), lse


@fake("mla_prefill_backward")
def _(grad, q, latent, rope, kv_b, spans, kv_mask, out, lse, softmax_scale, v_head_dim, causal):
    return tuple(t.new_empty(t.shape) for t in (q, latent, rope, kv_b))


# ---- autograd ----


def _rope_setup(ctx, inputs, output):
    _, cos, sin, ctx.interleaved, ctx.inverse, ctx.keep_pairs = inputs
    ctx.save_for_backward(cos, sin)


def _rope_backward(ctx, grad):
    cos, sin = ctx.saved_tensors
    turn = (ctx.interleaved, not ctx.inverse, ctx.keep_pairs)
    dx = run("rope", grad.contiguous(), cos, sin, *turn)
    return for_given(ctx, (dx, None, None, None, None, None))


def _prefill_setup(ctx, inputs, output):
    q, latent, rope, scale, kv_b, spans, kv_mask, *ctx.options = inputs
    if scale is not None and any(t.requires_grad for t in (q, latent, rope, kv_b)):
        raise ValueError("mla_prefill：量化的潜变量（给了 scale）不能求梯度。")
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, latent, rope, kv_b, spans, kv_mask, out, lse)


def _prefill_backward(ctx, grad, _grad_lse):
    q, latent, rope, kv_b, spans, kv_mask, out, lse = ctx.saved_tensors
    dq, dlatent, drope, dkv_b = run(
        "mla_prefill_backward",
        grad.contiguous(),
        q,
        latent,
        rope,
        kv_b,
        spans,
        kv_mask,
        out,
        lse,
        *ctx.options,
    )
    return for_given(ctx, (dq, dlatent, drope, None, dkv_b, None, None, None, None, None))


autograd("rope", _rope_backward, _rope_setup, has_backward_op=False)
autograd("mla_prefill", _prefill_backward, _prefill_setup)
_SCALE = 3  # 量化的潜变量的 scale 保持 fp32
autocast("mla_decode", keep=(_SCALE,))
autocast("mla_prefill", keep=(_SCALE,))
