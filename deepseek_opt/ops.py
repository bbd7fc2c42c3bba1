"""算子的 Python 入口；计算在 ``torch.ops.deepseek_opt.*``（C 或 CUDA 核），此处没有计算。

形状记号：B 行（batch），T 新词元数，S 潜变量槽位数，H 头数，r = kv_lora_rank，
dr = qk_rope_head_dim（可为 0），dn = qk_nope_head_dim，dv = v_head_dim。dtype 为 float32、
bfloat16 或 float16，半精度一律以 fp32 累加。潜变量是 kv_a_layernorm 之后的，旋转键是旋转之后的，
与 transformers 缓存的一致。

每个函数对非法输入抛出 ValueError，消息指明参数、期望与实际，且不改动任何张量。
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_opt import _native, log
from deepseek_opt.errors import UnsupportedError

_READY = _native.load()
if _READY:
    # 导入即登记 fake、autograd、autocast。
    from deepseek_opt import _op_rules  # noqa: F401  # pylint: disable=unused-import

_OPS = torch.ops.deepseek_opt
DECODE_MAX_TOKENS = 64


def _run(name: str, *args):
    if not _READY:
        raise UnsupportedError(f"本地算子库不可用：{_native.load_error()}")
    op = getattr(_OPS, name).default
    try:
        if log.debugging():
            return log.timed(name, _native.isa(), op, args)
        return op(*args)
    except NotImplementedError as error:
        devices = sorted({str(a.device) for a in args if isinstance(a, Tensor)})
        where = "、".join(devices)
        raise UnsupportedError(
            f"{name}：这些张量在 {where} 上，没有对应的核（全部张量应在同一设备上）。"
        ) from error


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ (+ bias)，等价于 ``F.linear``，权重按 nn.Linear 的布局原地读取。

    Args:
        x: [..., K]。
        weight: [N, K]，可与 x 的 dtype 不同。
        bias: [N]，dtype 与 weight 相同，或 None。

    Returns:
        [..., N]，dtype 随 x。可求导。

    Raises:
        ValueError: 形状或 dtype 不符。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> ops.linear(torch.ones(2, 3), torch.ones(4, 3)).shape
        torch.Size([2, 4])
    """
    return _run("linear", x, weight, bias)


def swiglu_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """融合的门控前馈层：down(silu(gate x) * up x)，中间量只有一份。

    Args:
        x: [..., K]。
        gate, up: [I, K]；down: [N, I]。三者 dtype 相同，无偏置。

    Returns:
        [..., N]，dtype 随 x。可求导，反向重算中间量，不保存它们。

    Raises:
        ValueError: 形状或 dtype 不符。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> w = torch.ones(8, 4)
        >>> ops.swiglu_mlp(torch.ones(2, 4), w, w, w.T.contiguous()).shape
        torch.Size([2, 4])
    """
    return _run("swiglu_mlp", x, gate, up, down)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS 归一化：fp32 内归一化，舍入到 x 的 dtype 后乘 weight（与 transformers 一致）。

    Args:
        x: [..., d]；weight: [d]；eps: 加在均方上的小数。

    Returns:
        与 x 同形同 dtype。可求导。

    Raises:
        ValueError: 形状或 dtype 不符。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> ops.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6).shape
        torch.Size([2, 4])
    """
    return _run("rms_norm", x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """加残差再做 RMS 归一化，一趟完成。

    Args:
        x, residual: [..., d]，同形同 dtype；weight: [d]。

    Returns:
        (归一化结果, x + residual)，均与 x 同形同 dtype。可求导。

    Raises:
        ValueError: 形状或 dtype 不符。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> y, total = ops.add_rms_norm(torch.ones(2, 4), torch.ones(2, 4), torch.ones(4), 1e-6)
        >>> total[0, 0].item()
        2.0
    """
    return _run("add_rms_norm", x, residual, weight, eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool = False) -> Tensor:
    """旋转位置编码。

    Args:
        x: [B, T, H, d]，d 为偶数。
        cos, sin: [1 或 B, T, d/2]，任意浮点 dtype，按 fp32 计算；YaRN 的缩放由调用者乘在里面。
        interleaved: True 时输入成对 (2i, 2i+1)、输出为前后两半（DeepSeek）；False 时输入输出
            都是前后两半（rotate_half）。
        inverse: 求转置（亦即逆）。

    Returns:
        与 x 同形同 dtype。对 x 可求导。

    Raises:
        ValueError: 形状或 dtype 不符。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> one, zero = torch.ones(1, 3, 2), torch.zeros(1, 3, 2)
        >>> ops.rope(torch.ones(2, 3, 5, 4), one, zero, False).shape
        torch.Size([2, 3, 5, 4])
    """
    return _run("rope", x, cos, sin, interleaved, inverse)


def rope_(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
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
    _run("rope_", x, cos, sin, interleaved)


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
        latent_cache: [B, C, r]，浮点或 int8；rope_cache: [B, C, dr]，浮点。
        scale_cache: latent_cache 为 int8 时的每词元尺度 [B, C] fp32，否则 None。
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
    _run("mla_cache_write", latent_cache, rope_cache, scale_cache, latent, rope, offsets)


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
) -> Tensor:
    """吸收式 MLA 注意力：不展开缓存，每个缓存词元每头的计算约为展开式的百分之一。

    做法见 DeepSeek-V2（arXiv 2405.04434）第 2.1 节：W_UK 并入查询，W_UV 并入输出。

    Args:
        q: [B, T, H, dn + dr]，后 dr 维已旋转。
        latent: [B, S, r]，浮点或 int8；rope: [B, S, dr]。
        scale: int8 潜变量的每词元尺度 [B, S] fp32，否则 None。
        kv_b_weight: [H * (dn + dv), r]，每头先 dn 行 W_UK、后 dv 行 W_UV（nn.Linear 的布局）。
        spans: [n, 4] int64（CPU），每行 (q_begin, q_end, kv_begin, kv_end)，展平到 B*T、B*S 的下标；
            见 :func:`make_spans` 与 :func:`spans_from_cu_seqlens`。
        kv_mask: [B, S] bool，True 可见；None 表示 span 内都可见。
        softmax_scale: 得分的系数，通常是 (dn + dr) ** -0.5 乘 YaRN 的修正。
        v_head_dim: dv。
        causal: True 时右下对齐的因果；False 时每个查询看整个键范围。

    Returns:
        [B, T, H, dv]，dtype 随 q；不在任何 span 内、或什么都看不见的查询为 0。不可求导
        （训练用 :func:`mla_prefill`）。

    Raises:
        ValueError: 形状、dtype 不符，span 越界、跨行或查询重叠。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> q, c, k = torch.randn(1, 1, 2, 12), torch.randn(1, 5, 16), torch.randn(1, 5, 4)
        >>> w = torch.randn(2 * (8 + 6), 16)
        >>> ops.mla_decode(q, c, k, None, w, ops.make_spans(1, 1, 5), None, 12**-0.5, 6).shape
        torch.Size([1, 1, 2, 6])
    """
    args = (q, latent, rope, scale, kv_b_weight, spans, kv_mask, softmax_scale, v_head_dim, causal)
    return _run("mla_decode", *args)


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
        ValueError: 同 :func:`mla_decode`；或 int8 潜变量却需要梯度。

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
    return _run("mla_prefill", *args)


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
) -> Tensor:
    """解码时的整个 MLA 注意力层，一次调用：投影、归一化、旋转、写缓存、注意力、输出投影；不可求导。

    按行数少（B*T 至多几十）设计；行数多时分开计算更快。两个归一化之前的中间结果保持 fp32。

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
        num_heads: H。

    Returns:
        [B, T, N]，dtype 随 hidden。

    Raises:
        ValueError: 形状、dtype 不符，写到缓存之外，span 越界；此时缓存不变。

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
    return _run(
        "mla_layer_decode", hidden, *queries, *keys, *outputs, *cache, softmax_scale, num_heads
    )


def make_spans(
    batch: int,
    q_len: int,
    kv_len: int,
    begin: Tensor | list[int] | None = None,
    end: Tensor | list[int] | None = None,
    *,
    slots: int | None = None,
    causal: bool = True,
) -> Tensor:
    """每行一个 span：行 b 的 q_len 个新词元就是它最后 q_len 个可见槽位。

    Args:
        batch, q_len, kv_len: B、T 与每行可见的槽位数。
        begin, end: [B]，每行可见槽位 [begin, end)，默认 0 与 kv_len；查询 t 位于槽位
            end - q_len + t，落在 begin 之前的（左填充）不计算。
        slots: 潜变量张量的第 1 维 S，默认 kv_len。
        causal: 与注意力的 causal 一致；False 时不按 begin 裁剪查询。

    Returns:
        [B, 4] int64（CPU）。

    Raises:
        ValueError: begin、end 的长度不是 batch，或范围不合法（begin < 0、end > S、begin > end、
            causal 时 end < q_len）。

    Example:
        >>> from deepseek_opt import ops
        >>> ops.make_spans(2, 1, 4, begin=[0, 2]).tolist()
        [[0, 1, 0, 4], [1, 2, 6, 8]]
    """
    slots = kv_len if slots is None else slots
    rows = torch.arange(batch, dtype=torch.int64)
    if begin is None and end is None and kv_len <= slots and (not causal or kv_len >= q_len):
        first, last = rows * slots, rows * slots + kv_len
        return torch.stack((rows * q_len, (rows + 1) * q_len, first, last), 1)
    low = _per_row(begin, 0, batch, "begin")
    high = _per_row(end, kv_len, batch, "end")
    _check_ranges(low, high, q_len, slots, causal)
    hidden = (low - (high - q_len)).clamp(0, q_len) if causal else torch.zeros_like(low)
    queries = (rows * q_len + hidden, (rows + 1) * q_len)
    return torch.stack((*queries, rows * slots + low, rows * slots + high), 1)


def slice_spans(spans: Tensor, q_len: int, start: int, stop: int, causal: bool = True) -> Tensor:
    """只取每行第 [start, stop) 个查询的 spans，供查询分块：键的张量不变，查询张量换成切片。

    Args:
        spans: [n, 4] int64；q_len: 原来每行的查询数 T。
        start, stop: 0 <= start < stop <= q_len。
        causal: 与注意力的 causal 一致；True 时每段的键截到该段最后一个查询为止。

    Returns:
        [m, 4] int64，m <= n（不含被切空的）。

    Raises:
        ValueError: start、stop 不合法。

    Example:
        >>> from deepseek_opt import ops
        >>> ops.slice_spans(ops.make_spans(1, 8, 8), 8, 2, 5).tolist()
        [[0, 3, 0, 5]]
    """
    if not 0 <= start < stop <= q_len:
        raise ValueError(
            f"slice_spans：应满足 0 <= start < stop <= {q_len}，实际是 {start}、{stop}。"
        )
    rows = spans[:, 0].div(q_len, rounding_mode="floor")
    low = spans[:, 0].maximum(rows * q_len + start)
    high = spans[:, 1].minimum(rows * q_len + stop)
    keys = spans[:, 3] - (spans[:, 1] - high) if causal else spans[:, 3]
    shift = rows * (stop - start) - rows * q_len - start
    return torch.stack((low + shift, high + shift, spans[:, 2], keys), 1)[low < high]


def _per_row(value: Tensor | list[int] | None, default: int, batch: int, name: str) -> Tensor:
    if value is None:
        return torch.full((batch,), default, dtype=torch.int64)
    rows = torch.as_tensor(value).to("cpu", torch.int64)
    if rows.shape != (batch,):
        raise ValueError(f"make_spans：{name} 的形状应为 [{batch}]，实际是 {list(rows.shape)}。")
    return rows


def _check_ranges(low: Tensor, high: Tensor, q_len: int, slots: int, causal: bool) -> None:
    for row, (lo, hi) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        if not 0 <= lo <= hi <= slots:
            raise ValueError(
                f"make_spans：第 {row} 行的可见槽位应满足 0 <= begin <= end <= {slots}，"
                f"实际是 begin = {lo}、end = {hi}。"
            )
        if causal and hi < q_len:
            raise ValueError(
                f"make_spans：第 {row} 行的 end = {hi} 小于新词元数 {q_len}（它们也在缓存里）。"
            )


def spans_from_cu_seqlens(cu_q: Tensor, cu_k: Tensor | None = None) -> Tensor:
    """打包序列（B = 1）的 spans：每个序列只看自己。

    Args:
        cu_q, cu_k: [n + 1] 的累计长度，从 0 起不减；cu_k 默认等于 cu_q。

    Returns:
        [n, 4] int64（CPU）。

    Raises:
        ValueError: 不是一维、不从 0 开始、有下降，或两者长度不同。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> ops.spans_from_cu_seqlens(torch.tensor([0, 3, 5])).tolist()
        [[0, 3, 0, 3], [3, 5, 3, 5]]
    """
    q = _check_cu_seqlens(cu_q, "cu_q")
    k = q if cu_k is None else _check_cu_seqlens(cu_k, "cu_k")
    if q.numel() != k.numel():
        raise ValueError(
            f"spans_from_cu_seqlens：cu_q 与 cu_k 的长度应相同，实际是 {q.numel()} 与 {k.numel()}。"
        )
    return torch.stack((q[:-1], q[1:], k[:-1], k[1:]), 1)


def _check_cu_seqlens(value: Tensor, name: str) -> Tensor:
    rows = torch.as_tensor(value).to("cpu", torch.int64)
    if torch.compiler.is_compiling():  # 编译时看不到数值，核自己会检查范围
        return rows
    ok = rows.dim() == 1 and rows.numel() >= 1 and rows[0] == 0 and bool((rows.diff() >= 0).all())
    if not ok:
        raise ValueError(
            f"spans_from_cu_seqlens：{name} 应为从 0 开始、不下降的一维累计长度，实际是 {rows.tolist()}。"
        )
    return rows
