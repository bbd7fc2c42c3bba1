"""临时：算子的函数式入口，先走参考实现。"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_opt import reference

linear = reference.linear
swiglu_mlp = reference.swiglu_mlp
rms_norm = reference.rms_norm
add_rms_norm = reference.add_rms_norm
rope = reference.rope
mla_cache_write = reference.mla_cache_write
mla_prefill = reference.mla_prefill
mla_decode = reference.mla_decode

DECODE_MAX_TOKENS = 16


def make_spans(
    batch: int,
    q_len: int,
    kv_len: int,
    begin: Tensor | list[int] | None = None,
    end: Tensor | list[int] | None = None,
    *,
    q_end: int | None = None,
    slots: int | None = None,
    causal: bool = True,
) -> Tensor:
    """每行一个 span：行 b 的最后 q_len 个可见槽位就是它的 q_len 个新词元。

    begin、end（各 [B]，默认 0 与 kv_len）给出每行可见槽位 [begin, end)；查询 t 位于槽位
    end - q_len + t，落在 begin 之前的（左填充）不计算。slots 为缓存张量的第 1 维（默认 kv_len）。
    """
    slots = kv_len if slots is None else slots
    base = torch.arange(batch, dtype=torch.int64)
    lo = torch.zeros(batch, dtype=torch.int64) if begin is None else torch.as_tensor(begin).to("cpu", torch.int64)
    hi = torch.full((batch,), kv_len, dtype=torch.int64) if end is None else torch.as_tensor(end).to("cpu", torch.int64)
    skipped = (lo - (hi - q_len)).clamp(0, q_len) if causal else torch.zeros_like(lo)
    spans = (base * q_len + skipped, (base + 1) * q_len, base * slots + lo, base * slots + hi)
    return torch.stack(spans, 1)


def spans_from_cu_seqlens(cu_q: Tensor, cu_k: Tensor | None = None) -> Tensor:
    """打包序列：cu_q、cu_k 为 [n + 1] 的累计长度，返回 [n, 4] 的 spans（B = 1）。"""
    q = cu_q.to("cpu", torch.int64)
    k = q if cu_k is None else cu_k.to("cpu", torch.int64)
    return torch.stack((q[:-1], q[1:], k[:-1], k[1:]), 1)


def mla_attention(q, latent, rope, scale, kv_b_weight, spans, kv_mask, softmax_scale, v_head_dim, causal=True):
    """自动选择：需要梯度或新词元多时 mla_prefill，否则 mla_decode；返回 out [B, T, H, dv]。"""
    args = (q, latent, rope, scale, kv_b_weight, spans, kv_mask, softmax_scale, v_head_dim, causal)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, latent, rope, kv_b_weight))
    if needs_grad or q.shape[1] > DECODE_MAX_TOKENS:
        return mla_prefill(*args)[0]
    return mla_decode(*args)
