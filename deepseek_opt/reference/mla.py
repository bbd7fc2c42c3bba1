"""MLA 算子的参考实现。"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_opt.reference.dense import linear, rms_norm
from deepseek_opt.reference.precision import wide


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    inverse: bool = False,
    keep_pairs: bool = False,
) -> Tensor:
    """旋转位置编码。x [B, T, H, d]；cos、sin [1 或 B, T, d/2]。

    interleaved=True：输入成对 (2i, 2i+1)，输出前后两半（DeepSeek 的约定），keep_pairs 时输出也成对；False：输入输出
    都是前后两半。inverse=True 为其精确转置（反向传播用）。
    """
    dtype = wide(x)
    half = x.shape[-1] // 2
    c, s = cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2)
    v = x.to(dtype)
    pairs_in, pairs_out = (keep_pairs, interleaved) if inverse else (interleaved, keep_pairs)
    a, b = (v[..., 0::2], v[..., 1::2]) if pairs_in else (v[..., :half], v[..., half:])
    s = -s if inverse else s
    a, b = a * c - b * s, b * c + a * s
    y = torch.stack((a, b), -1).flatten(-2) if pairs_out else torch.cat((a, b), -1)
    return y.to(x.dtype)


def quantize(latent: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """逐词元对称量化成 int8 或 float8_e4m3fn：(码 [..., r]，尺度 [...] fp32)。"""
    values = latent.float()
    most = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    scale = values.abs().amax(-1) / most
    values = values / torch.where(scale > 0, scale, 1.0)[..., None]
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


def mla_cache_write(
    latent_cache: Tensor,
    rope_cache: Tensor,
    scale_cache: Tensor | None,
    latent: Tensor,
    rope: Tensor,
    offsets: Tensor,
) -> None:
    """把 latent [B, T, r]、rope [B, T, dr] 原地写到每行 offsets[b] 起的槽位。

    latent_cache 为 int8、float8_e4m3fn 时逐词元量化：scale = amax / 最大的码（127、448），写入
    scale_cache（fp32）。
    """
    steps = latent.shape[1]
    for row, start in enumerate(offsets.tolist()):
        slots = slice(start, start + steps)
        rope_cache[row, slots] = rope[row].to(rope_cache.dtype)
        if scale_cache is not None:
            codes, scale = quantize(latent[row], latent_cache.dtype)
            latent_cache[row, slots], scale_cache[row, slots] = codes, scale
        else:
            latent_cache[row, slots] = latent[row].to(latent_cache.dtype)


def mla_prefill(
    q: Tensor,
    latent: Tensor,
    rope: Tensor,
    scale: Tensor | None,
    kv_b_weight: Tensor,
    spans: Tensor,
    kv_mask: Tensor | None,
    softmax_scale: float,
    v_head_dim: int,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """展开 K、V 的 MLA 注意力；返回 (out [B, T, H, dv], lse [B, T, H])。

    spans [n, 4] 的每行为 (q_begin, q_end, kv_begin, kv_end)，是展平到 B*T、B*S 的词元下标；
    causal 时右下对齐。没有被任何 span 覆盖、或什么都看不见的查询输出 0，lse 为 -inf。
    """
    dtype = wide(q, latent, kv_b_weight)
    batch, steps, heads, qk_dim = q.shape
    slots, rank = latent.shape[1], latent.shape[2]
    nope_dim = kv_b_weight.shape[0] // heads - v_head_dim
    queries = q.reshape(batch * steps, heads, qk_dim).to(dtype)
    latents = latent.reshape(batch * slots, rank).to(dtype)
    if scale is not None:
        latents = latents * scale.reshape(batch * slots, 1).to(dtype)
    ropes = rope.reshape(batch * slots, -1).to(dtype)
    w_k, w_v = kv_b_weight.to(dtype).view(heads, -1, rank).split((nope_dim, v_head_dim), 1)

    out = queries.new_zeros(batch * steps, heads, v_head_dim)
    lse = queries.new_full((batch * steps, heads), -torch.inf)
    pieces, sums, index = [], [], []
    for q_begin, q_end, kv_begin, kv_end in spans.tolist():
        if q_end <= q_begin or kv_end <= kv_begin:
            continue
        c, k_rope = latents[kv_begin:kv_end], ropes[kv_begin:kv_end]
        key = torch.einsum("sr,hdr->shd", c, w_k)
        key = torch.cat((key, k_rope[:, None].expand(-1, heads, -1)), -1)
        value = torch.einsum("sr,hdr->shd", c, w_v)
        score = torch.einsum("thd,shd->ths", queries[q_begin:q_end], key) * softmax_scale
        visible = _visible(q_end - q_begin, kv_end - kv_begin, causal, q.device)
        if kv_mask is not None:
            visible = visible & kv_mask.reshape(-1)[kv_begin:kv_end][None]
        score = score.masked_fill(~visible[:, None], -torch.inf)
        total = torch.logsumexp(score, -1)
        safe = torch.where(torch.isneginf(total), torch.zeros_like(total), total)
        pieces.append(torch.einsum("ths,shd->thd", torch.exp(score - safe[..., None]), value))
        sums.append(total)
        index.append(torch.arange(q_begin, q_end, device=q.device))
    if pieces:
        rows = torch.cat(index)
        out = out.index_copy(0, rows, torch.cat(pieces))
        lse = lse.index_copy(0, rows, torch.cat(sums))
    shape = (batch, steps, heads)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return out.view(*shape, v_head_dim).to(q.dtype), lse.view(shape).to(lse_dtype)


def mla_decode(
    q: Tensor,
    latent: Tensor,
    rope: Tensor,
    scale: Tensor | None,
    kv_b_weight: Tensor,
    spans: Tensor,
    kv_mask: Tensor | None,
    softmax_scale: float,
    v_head_dim: int,
    causal: bool = True,
    block_table: Tensor | None = None,
) -> Tensor:
    """吸收式 MLA 注意力，数学上与 :func:`mla_prefill` 相同，只返回 out。

    给了 block_table [B, 每行的页数] 时 latent、rope、scale 是 [页数, 每页的槽位数, ...]。
    """
    if block_table is not None:
        latent, rope, scale = (gather_pages(part, block_table) for part in (latent, rope, scale))
    args = (q, latent, rope, scale, kv_b_weight, spans, kv_mask, softmax_scale, v_head_dim, causal)
    return mla_prefill(*args)[0]


def gather_pages(part: Tensor | None, block_table: Tensor) -> Tensor | None:
    """各行的页拼成 [B, S, ...]；用不到的页号可以是任何数，读哪一页都行。"""
    if part is None:
        return None
    return part[block_table.long().clamp(0, part.shape[0] - 1)].flatten(1, 2)


def mla_layer_decode(
    hidden: Tensor,
    q_a_weight: Tensor | None,
    q_a_bias: Tensor | None,
    q_norm_weight: Tensor | None,
    q_eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    kv_a_weight: Tensor,
    kv_a_bias: Tensor | None,
    kv_norm_weight: Tensor,
    kv_eps: float,
    kv_b_weight: Tensor,
    o_weight: Tensor,
    o_bias: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    latent_cache: Tensor,
    rope_cache: Tensor,
    scale_cache: Tensor | None,
    offsets: Tensor,
    spans: Tensor | None,
    kv_mask: Tensor | None,
    softmax_scale: float,
    num_heads: int,
    keep_pairs: bool = False,
) -> Tensor:
    """解码时的整个注意力层：逐步调用上面的参考实现，原地写缓存并前移 offsets。"""
    low = hidden
    if q_a_weight is not None:
        low = rms_norm(linear(hidden, q_a_weight, q_a_bias), q_norm_weight, q_eps)
    q = linear(low, q_weight, q_bias).unflatten(-1, (num_heads, -1))
    rank, rope_dim = kv_norm_weight.shape[0], kv_a_weight.shape[0] - kv_norm_weight.shape[0]
    nope_dim = q.shape[-1] - rope_dim
    turned = rope(q[..., nope_dim:], cos, sin, interleaved, keep_pairs=keep_pairs)
    q = torch.cat((q[..., :nope_dim], turned), -1)
    joint = linear(hidden, kv_a_weight, kv_a_bias)
    latent = rms_norm(joint[..., :rank], kv_norm_weight, kv_eps)
    keys = rope(joint[..., None, rank:], cos, sin, interleaved, keep_pairs=keep_pairs).squeeze(2)
    mla_cache_write(latent_cache, rope_cache, scale_cache, latent, keys, offsets)
    batch, steps = hidden.shape[:2]
    offsets += steps
    if spans is None:
        index, slots = torch.arange(batch), latent_cache.shape[1]
        spans = torch.stack(
            (index * steps, (index + 1) * steps, index * slots, index * slots + offsets), 1
        )
    value_dim = kv_b_weight.shape[0] // num_heads - nope_dim
    cache = (latent_cache, rope_cache, scale_cache)
    out = mla_decode(q, *cache, kv_b_weight, spans, kv_mask, softmax_scale, value_dim)
    return linear(out.flatten(2), o_weight, o_bias)


def _visible(q_len: int, kv_len: int, causal: bool, device: torch.device) -> Tensor:
    """[q_len, kv_len] 的可见性；causal 时右下对齐。"""
    if not causal:
        return torch.ones(q_len, kv_len, dtype=torch.bool, device=device)
    last = torch.arange(kv_len - q_len, kv_len, device=device)
    return torch.arange(kv_len, device=device)[None] <= last[:, None]
