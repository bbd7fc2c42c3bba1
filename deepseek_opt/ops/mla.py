"""MLA 的算子：旋转、写缓存、解码、预填充、整层解码。"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_opt.ops._run import run

DECODE_MAX_TOKENS = 64


def rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    inverse: bool = False,
    keep_pairs: bool = False,
) -> Tensor:
    """旋转位置编码。

    Args:
        x: [B, T, H, d]，d 为偶数。
        cos, sin: [1 或 B, T, d/2]，任意浮点 dtype，按 fp32 计算；YaRN 的缩放由调用者乘在里面。
        interleaved: True 时输入成对 (2i, 2i+1)、输出为前后两半（DeepSeek）；False 时输入输出
            都是前后两半（rotate_half）。
        inverse: 求转置（亦即逆）。
        keep_pairs: 只与 interleaved=True 一起：输出也成对（transformers 的 DeepSeek-V2）。

    Returns:
        与 x 同形同 dtype。对 x 可求导。

    Raises:
        ValueError: 形状或 dtype 不符，keep_pairs 而不 interleaved。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> one, zero = torch.ones(1, 3, 2), torch.zeros(1, 3, 2)
        >>> ops.rope(torch.ones(2, 3, 5, 4), one, zero, False).shape
        torch.Size([2, 3, 5, 4])
    """
    return run("rope", x, cos, sin, interleaved, inverse, keep_pairs)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, keep_pairs: bool = False) -> None:
    """:func:`rope` 的原地版本，x 可以是切片（最后一维步长为 1）；不可求导。

    Raises:
        ValueError: 形状、dtype 或步长不符，此时 x 不变。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> x = torch.ones(1, 1, 2, 8)
        >>> ops.rope_(x[..., 4:], torch.zeros(1, 1, 2), torch.ones(1, 1, 2), False)
        >>> x[0, 0, 0].tolist()
        [1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0]
    """
    run("rope_", x, cos, sin, interleaved, keep_pairs)


def mla_cache_write(
    latent_cache: Tensor,
    rope_cache: Tensor,
    scale_cache: Tensor | None,
    latent: Tensor,
    rope: Tensor,
    offsets: Tensor,
) -> None:
    """把新词元的潜变量与旋转键原地写进缓存：行 b 写到槽位 offsets[b] 起的 T 个。

    Args:
        latent_cache: [B, C, r]，浮点，或量化的 int8、float8_e4m3fn；rope_cache: [B, C, dr]，浮点。
        scale_cache: latent_cache 量化时的每词元尺度 [B, C] fp32，否则 None。
        latent: [B, T, r]；rope: [B, T, dr]。
        offsets: [B] int64。

    Raises:
        ValueError: 形状、dtype 不符，或写到缓存之外；此时缓存不变。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> cache, keys = torch.zeros(1, 8, 4), torch.zeros(1, 8, 2)
        >>> ops.mla_cache_write(
        ...     cache, keys, None, torch.ones(1, 3, 4), torch.ones(1, 3, 2), torch.tensor([5])
        ... )
        >>> cache.sum().item()
        12.0
    """
    run("mla_cache_write", latent_cache, rope_cache, scale_cache, latent, rope, offsets)


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
    """吸收式 MLA 注意力：不展开缓存，每个缓存词元每头的计算约为展开式的百分之一。

    做法见 DeepSeek-V2（arXiv 2405.04434）第 2.1 节：W_UK 并入查询，W_UV 并入输出。

    Args:
        q: [B, T, H, dn + dr]，后 dr 维已旋转。
        latent: [B, S, r]，浮点，或量化的 int8、float8_e4m3fn；rope: [B, S, dr]。
        scale: 量化的潜变量的每词元尺度 [B, S] fp32，否则 None。
        kv_b_weight: [H * (dn + dv), r]，每头先 dn 行 W_UK、后 dv 行 W_UV（nn.Linear 的布局）。
        spans: [n, 4] int64（CPU，或与 q 同设备），每行 (q_begin, q_end, kv_begin, kv_end)，展平到 B*T、B*S 的下标；
            见 :func:`make_spans` 与 :func:`spans_from_cu_seqlens`。
        kv_mask: [B, S] bool，True 可见；None 表示 span 内都可见。
        softmax_scale: 得分的系数，通常是 (dn + dr) ** -0.5 乘 YaRN 的修正。
        v_head_dim: dv。
        causal: True 时右下对齐的因果；False 时每个查询看整个键范围。
        block_table: 分页的缓存的页表 [B, P] int32（CPU，或与 q 同设备）；None 表示缓存不分页。给出时 latent 是
            [页数, 每页的槽位数, r]，rope、scale 同样，第 b 行的槽位 i 是第 block_table[b, i // 每页的槽位数]
            页的第 i % 每页的槽位数 个；S = P * 每页的槽位数，spans、kv_mask 仍按各行的槽位。用不到的页号不看。

    Returns:
        [B, T, H, dv]，dtype 随 q；不在任何 span 内、或什么都看不见的查询为 0。不可求导
        （训练用 :func:`mla_prefill`）。

    Raises:
        ValueError: 形状、dtype 不符，span 越界、跨行或查询重叠；要读的页不存在（页表与 spans 都在 CPU 上时
            检查）。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> q, c, k = torch.randn(1, 1, 2, 12), torch.randn(1, 5, 16), torch.randn(1, 5, 4)
        >>> w = torch.randn(2 * (8 + 6), 16)
        >>> ops.mla_decode(q, c, k, None, w, ops.make_spans(1, 1, 5), None, 12**-0.5, 6).shape
        torch.Size([1, 1, 2, 6])

        分页的缓存也用 :func:`mla_cache_write` 写：整个缓存看成一行，一个词元一个位置。

        >>> store, keys = torch.zeros(9, 4, 16), torch.zeros(9, 4, 4)  # 9 页，每页 4 个槽位
        >>> table = torch.tensor([[7, 2]], dtype=torch.int32)
        >>> flat = [part.view(1, 36, -1).expand(5, -1, -1) for part in (store, keys)]
        >>> places = table[0].repeat_interleave(4)[:5] * 4 + torch.arange(5) % 4
        >>> ops.mla_cache_write(*flat, None, c.view(5, 1, 16), k.view(5, 1, 4), places.long())
        >>> spans = ops.make_spans(1, 1, 8, end=[5])
        >>> paged = ops.mla_decode(q, store, keys, None, w, spans, None, 12**-0.5, 6, True, table)
        >>> spans = ops.make_spans(1, 1, 5)
        >>> torch.equal(paged, ops.mla_decode(q, c, k, None, w, spans, None, 12**-0.5, 6))
        True
    """
    args = (q, latent, rope, scale, kv_b_weight, spans, kv_mask, softmax_scale, v_head_dim, causal)
    return run("mla_decode", *args, block_table)


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
    """展开式 MLA 注意力：K、V 按块在核内展开，既无 S x S 的得分，也无整份的 K、V。

    参数同 :func:`mla_decode`。在线 softmax 的做法见 FlashAttention（arXiv 2205.14135）。

    Returns:
        (out [B, T, H, dv]，lse [B, T, H] fp32)。out 对 q、latent、rope、kv_b_weight 可求导
        （反向重算，不保存中间量）；lse 不可求导。

    Raises:
        ValueError: 同 :func:`mla_decode`；或量化的潜变量却需要梯度。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> q, c, k = torch.randn(1, 5, 2, 12), torch.randn(1, 5, 16), torch.randn(1, 5, 4)
        >>> w = torch.randn(2 * (8 + 6), 16)
        >>> out, lse = ops.mla_prefill(q, c, k, None, w, ops.make_spans(1, 5, 5), None, 0.3, 6)
        >>> out.shape, lse.shape
        (torch.Size([1, 5, 2, 6]), torch.Size([1, 5, 2]))
    """
    args = (q, latent, rope, scale, kv_b_weight, spans, kv_mask, softmax_scale, v_head_dim, causal)
    return run("mla_prefill", *args)


def mla_attention(
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
) -> Tensor:
    """自动选择：需要梯度或新词元多时 :func:`mla_prefill`，否则 :func:`mla_decode`。

    参数与返回的 out 同上。两者数学上相同，只差舍入。

    Raises:
        ValueError: 同 :func:`mla_decode`。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> q, c, k = torch.randn(1, 1, 2, 12), torch.randn(1, 5, 16), torch.randn(1, 5, 4)
        >>> w = torch.randn(2 * (8 + 6), 16)
        >>> ops.mla_attention(q, c, k, None, w, ops.make_spans(1, 1, 5), None, 12**-0.5, 6).shape
        torch.Size([1, 1, 2, 6])
    """
    args = (q, latent, rope, scale, kv_b_weight, spans, kv_mask, softmax_scale, v_head_dim, causal)
    tensors = (q, latent, rope, kv_b_weight)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if needs_grad or q.shape[1] > decode_limit(
        latent.shape[2], q.shape[3] - rope.shape[2], v_head_dim
    ):
        return mla_prefill(*args)[0]
    return mla_decode(*args)


def decode_limit(rank: int, nope_dim: int, v_head_dim: int) -> int:
    """吸收式不慢于展开式的最大新词元数。

    每个（查询，键，头）吸收式多算 2r - dn - dv 次乘加，展开式则每个（键，头）要先算 r (dn + dv) 次；
    两者相等处的一半作为界（展开式的核更接近峰值）。

    Example:
        >>> from deepseek_opt import ops
        >>> ops.decode_limit(512, 128, 128)  # DeepSeek-V3 的维度
        64
    """
    expanded = nope_dim + v_head_dim
    extra = 2 * rank - expanded
    if extra <= 0:
        return DECODE_MAX_TOKENS
    return max(1, min(DECODE_MAX_TOKENS, rank * expanded // (2 * extra)))


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
    """解码时的整个 MLA 注意力层，一次调用：投影、归一化、旋转、写缓存、注意力、输出投影；不可求导。

    按行数少（B*T 至多二三百）设计；再多时与分开计算一样快。两个归一化之前的中间结果保持 fp32。

    Args:
        hidden: [B, T, K]。
        q_a_weight: [qr, K] 或 None（模型没有 q_lora）；q_a_bias: [qr] 或 None；
            q_norm_weight: [qr]，与 q_a_weight 同有同无。
        q_weight: [H * (dn + dr), qr]，没有 q_a 时为 [H * (dn + dr), K]；q_bias: 它的偏置或 None。
        kv_a_weight: [r + dr, K]；kv_a_bias: [r + dr] 或 None；kv_norm_weight: [r]。
        q_eps, kv_eps: 两个归一化的 eps。
        kv_b_weight: [H * (dn + dv), r]；o_weight: [N, H * dv]；o_bias: [N] 或 None。
        cos, sin: [1 或 B, T, dr/2]（为 1 时要求 B 或 T 是 1）；interleaved: 同 :func:`rope`。
        latent_cache, rope_cache, scale_cache, offsets: 同 :func:`mla_cache_write`，原地写入；offsets
            随后加上 T。
        spans: 同 :func:`mla_decode`，键的下标指缓存的槽位，含新词元；None 表示每行看见自己的整个缓存，
            即槽位 [0, offsets[b] + T)。
        kv_mask, softmax_scale: 同 :func:`mla_decode`。
        num_heads: H。keep_pairs: 同 :func:`rope`。

    Returns:
        [B, T, N]，dtype 随 hidden。

    Raises:
        ValueError: 形状、dtype 不符，写到缓存之外，span 越界；此时缓存不变。
        DeviceMemoryError: 设备的内存不够；offsets 没有前移，已有的槽位不变。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> cache, keys, angle = torch.zeros(1, 8, 4), torch.zeros(1, 8, 2), torch.zeros(1, 1, 1)
        >>> ops.mla_layer_decode(
        ...     torch.randn(1, 1, 8), None, None, None, 0.0, torch.randn(2 * 5, 8), None,
        ...     torch.randn(4 + 2, 8), None, torch.ones(4), 1e-6, torch.randn(2 * (3 + 3), 4),
        ...     torch.randn(8, 2 * 3), None, angle, angle, True, cache, keys, None,
        ...     torch.tensor([0]), None, None, 0.5, 2,
        ... ).shape
        torch.Size([1, 1, 8])
    """
    queries = (q_a_weight, q_a_bias, q_norm_weight, q_eps, q_weight, q_bias)
    keys = (kv_a_weight, kv_a_bias, kv_norm_weight, kv_eps, kv_b_weight)
    cache = (latent_cache, rope_cache, scale_cache, offsets, spans, kv_mask)
    outputs = (o_weight, o_bias, cos, sin, interleaved)
    options = (softmax_scale, num_heads, keep_pairs)
    return run("mla_layer_decode", hidden, *queries, *keys, *outputs, *cache, *options)
