"""可见范围 spans 的构造；见 :func:`mla_decode`。"""

from __future__ import annotations

import torch
from torch import Tensor


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


def row_spans(
    batch: int, q_len: int, slots: int, ends: Tensor | int, device: torch.device
) -> Tensor:
    """每行看见自己的前 ends 个槽位（整数，或 device 上的 [B]）；在 device 上算，不经过主机，也不检查。"""
    rows = torch.arange(batch, device=device)
    return torch.stack((rows * q_len, (rows + 1) * q_len, rows * slots, rows * slots + ends), 1)


def slice_spans(spans: Tensor, q_len: int, start: int, stop: int, causal: bool = True) -> Tensor:
    """只取每行第 [start, stop) 个查询的 spans，供查询分块：键的张量不变，查询张量换成切片。

    Args:
        spans: [n, 4] int64；q_len: 原来每行的查询数 T。
        start, stop: 0 <= start < stop <= q_len。
        causal: 与注意力的 causal 一致；True 时每段的键截到该段最后一个查询为止。

    Returns:
        [m, 4] int64，与 spans 同设备；CPU 上 m <= n（不含被切空的），别的设备上 m = n，被切空的查询范围为空。

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
    part = _sliced(spans, q_len, start, stop, causal)
    # 去掉空的要知道有几个，得等设备；核会跳过它们
    return part[part[:, 0] < part[:, 1]] if spans.is_cpu else part


def _sliced(spans: Tensor, q_len: int, start: int, stop: int, causal: bool) -> Tensor:
    """[n, 4]：被切空的，查询范围为空。"""
    rows = spans[:, 0].div(q_len, rounding_mode="floor")
    low = spans[:, 0].maximum(rows * q_len + start)
    high = spans[:, 1].minimum(rows * q_len + stop).maximum(low)
    keys = spans[:, 3]
    if causal:
        keys = (keys - (spans[:, 1] - high)).maximum(spans[:, 2])
    shift = rows * (stop - start) - rows * q_len - start
    return torch.stack((low + shift, high + shift, spans[:, 2], keys), 1)


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
