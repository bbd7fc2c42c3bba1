"""MTP 与采样算子的规则。"""

# 规则的参数表必须与算子的模式一致，用不到的也要列出。
# pylint: disable=unused-argument
from __future__ import annotations

import torch

from deepseek_opt.op_rules.register import autocast, autograd, fake, run

# ---- fake：只推导形状与 dtype ----


@fake("mtp_draft_head")
def _(hidden, weight, bias, vocabulary):
    return hidden.new_empty(hidden.shape[:1], dtype=torch.int64)


@fake("mtp_verify_greedy")
def _(logits, drafts, draft_len):
    return drafts.new_empty(drafts.shape[:1]), drafts.new_empty(drafts.shape[:1])


@fake("mtp_verify_sample")
def _(probs, drafts, draft_len, draft_probs, uniform):
    return drafts.new_empty(drafts.shape[:1]), drafts.new_empty(drafts.shape[:1])


@fake("mtp_input")
def _(embedding, hidden, embedding_norm, hidden_norm, weight, eps):
    return embedding.new_empty((*embedding.shape[:-1], weight.shape[0]))


@fake("sample_filter")
def _(logits, token_ids, token_len, *options):
    return logits.new_empty(logits.shape, dtype=torch.float32)


@fake("sample_tokens")
def _(probs, uniform):
    return probs.new_empty(probs.shape[:1], dtype=torch.int64)


# ---- autograd：只有 mtp_input ----


def _input_setup(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _norm_gradient(grad, x, norm, eps, need_x, need_norm):
    if not (need_x or need_norm):
        return None, None
    dx, dnorm = run("rms_norm_backward", grad, x, norm, eps)
    return dx if need_x else None, dnorm if need_norm else None


def _input_backward(ctx, grad):
    """归一化重算一遍，拼起来当 linear 的输入；前后各一半分别交给 rms_norm 的反向。"""
    e, h, e_norm, h_norm, weight = ctx.saved_tensors
    need_e, need_h, need_en, need_hn, need_w, _ = ctx.needs_input_grad
    need_rows = need_e or need_h or need_en or need_hn
    halves = (run("rms_norm", e, e_norm, ctx.eps), run("rms_norm", h, h_norm, ctx.eps))
    rows = torch.cat(halves, -1)
    drows, dw, _ = run("linear_backward", grad.contiguous(), rows, weight, need_rows, need_w, False)
    de = dh = den = dhn = None
    if need_rows:
        left, right = drows.split(e.shape[-1], -1)
        de, den = _norm_gradient(left, e, e_norm, ctx.eps, need_e, need_en)
        dh, dhn = _norm_gradient(right, h, h_norm, ctx.eps, need_h, need_hn)
    return de, dh, den, dhn, dw if need_w else None, None


autograd("mtp_input", _input_backward, _input_setup, has_backward_op=False)
autocast("mtp_input")
