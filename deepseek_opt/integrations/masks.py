"""把 transformers 交给注意力层的掩码换成 spans（与必要时的 kv_mask），精确且只算一次。

掩码随 attn_implementation 而变：None、2 维填充掩码、4 维 bool（sdpa）、4 维浮点（eager）。
能表示成“因果 + 键填充（+ 打包分段）”的换成 :class:`MaskPlan`；不能的给出原因，由原实现计算。

不在 CPU 上时，spans 也放在那个设备上。没有掩码与 2 维掩码的就在设备上算，不读回来：不知道有没有空洞，所以填充的
总带着 kv_mask；4 维掩码要逐元素核对，读回来一次。
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_opt.integrations.stamp import stamp
from deepseek_opt.ops.spans import row_spans
from deepseek_opt.row_lengths import RowLengths, to_device

_CPU = torch.device("cpu")
# 每行分成这么多段以内，分段计算总是合算的。
_FEW_SEGMENTS = 8


class MaskPlan(NamedTuple):
    """一次前向的可见范围；reason 不为 None 时其余字段无意义。"""

    spans: Tensor | None
    kv_mask: Tensor | None
    reason: str | None = None


class PlanMemo:
    """每个线程记住最近一次的结果：同一次前向的各层掩码是同一个对象，只有第一层真正计算。"""

    def __init__(self) -> None:
        self._local = threading.local()

    def __reduce__(self) -> Any:
        return PlanMemo, ()

    def plan(
        self,
        mask: Tensor | None,
        batch: int,
        q_len: int,
        kv_len: int | Tensor,
        slots: int,
        device: torch.device = _CPU,
    ) -> MaskPlan:
        """mask 为 None 时是因果掩码；kv_len 含新词元，slots 为缓冲区的第 1 维。

        kv_len 是设备上的标量（StaticCache）时不记：张量会被原地改。
        """
        if isinstance(kv_len, Tensor):
            return build_plan(mask, batch, q_len, kv_len, slots, device)
        local = self._local
        key = (batch, q_len, kv_len, slots, device, stamp(mask))
        if getattr(local, "key", None) == key and local.mask() is mask:
            return local.plan
        plan = build_plan(mask, batch, q_len, kv_len, slots, device)
        local.mask = _nothing if mask is None else weakref.ref(mask)
        local.key, local.plan = key, plan
        return plan

    def ragged_plan(self, layer: RowLengths, q_len: int) -> MaskPlan:
        """layer 各行长度不同且没有掩码时的计划；长度不含这次的 q_len 个新词元。"""
        local, offsets = self._local, layer.offsets
        key = (layer.row_lengths(), q_len, layer.capacity, offsets.device, stamp(None))
        if getattr(local, "key", None) != key:
            local.plan = _ragged_plan(layer, q_len)
            local.mask, local.key = _nothing, key
        return local.plan


def _nothing() -> None:
    return None


def build_plan(
    mask: Tensor | None,
    batch: int,
    q_len: int,
    kv_len: int | Tensor,
    slots: int,
    device: torch.device = _CPU,
) -> MaskPlan:
    """精确换算；见模块说明。"""
    if mask is None:
        return MaskPlan(_full_spans(batch, q_len, kv_len, slots, device), None)
    reason = _refusal(mask, batch, kv_len, device)
    if reason is not None:
        return MaskPlan(None, None, reason)
    if mask.dim() == 4:
        return _plan_full(mask, batch, q_len, kv_len, slots)
    if isinstance(kv_len, Tensor) or not mask.is_cpu:
        return _plan_on_device(mask, q_len, kv_len, slots)
    return _plan_padding(mask[:, :kv_len], batch, q_len, kv_len, slots)


def _refusal(mask: Any, batch: int, kv_len: int | Tensor, device: torch.device) -> str | None:
    """不看内容就知道不支持的原因。"""
    if not isinstance(mask, Tensor):
        return f"掩码类型 {type(mask).__name__}（如 flex_attention 的 BlockMask）"
    if mask.device != device:
        return f"掩码在 {mask.device}，输入在 {device}"
    if isinstance(kv_len, int) and mask.shape[-1] < kv_len:
        return f"掩码宽 {mask.shape[-1]}，少于键的个数 {kv_len}"
    if mask.dim() not in (2, 4):
        return f"掩码是 {mask.dim()} 维"
    if mask.dim() == 2 and mask.shape[0] != batch:
        return f"掩码有 {mask.shape[0]} 行，输入有 {batch} 行"
    if mask.dim() == 4 and isinstance(kv_len, Tensor):
        return "设备上的 StaticCache 配 4 维的掩码"
    return None


def _full_spans(
    batch: int, q_len: int, kv_len: int | Tensor, slots: int, device: torch.device
) -> Tensor:
    if device.type != "cpu":
        return row_spans(batch, q_len, slots, kv_len, device)
    rows = [(b * q_len, (b + 1) * q_len, b * slots, b * slots + kv_len) for b in range(batch)]
    return torch.tensor(rows, dtype=torch.int64)


def _ragged_plan(layer: RowLengths, q_len: int) -> MaskPlan:
    slots, offsets = layer.capacity, layer.offsets
    if not offsets.is_cpu:
        ends = offsets + q_len
        return MaskPlan(row_spans(len(offsets), q_len, slots, ends, offsets.device), None)
    rows = [
        (b * q_len, (b + 1) * q_len, b * slots, b * slots + past + q_len)
        for b, past in enumerate(layer.row_lengths())
    ]
    return MaskPlan(torch.tensor(rows, dtype=torch.int64), None)


def _plan_on_device(mask: Tensor, q_len: int, kv_len: int | Tensor, slots: int) -> MaskPlan:
    """同 :func:`_plan_padding`，全在设备上算；比缓存窄的掩码缺的部分视为被遮住。

    全是填充的行：起点在末尾，查询范围因而是空的。
    """
    device, rows = mask.device, torch.arange(mask.shape[0], device=mask.device)
    visible = _widen(mask[:, :slots] != 0, slots)
    visible &= torch.arange(slots, device=device) < kv_len
    begins = torch.where(visible.any(1), visible.to(torch.uint8).argmax(1), kv_len)
    first = (begins - (kv_len - q_len)).clamp(min=0)
    spans = (rows * q_len + first, (rows + 1) * q_len, rows * slots + begins, rows * slots + kv_len)
    return MaskPlan(torch.stack(spans, 1), visible)


def _plan_padding(mask: Tensor, batch: int, q_len: int, kv_len: int, slots: int) -> MaskPlan:
    """2 维填充掩码 [B, S]：左填充只是起点不同；右填充与空洞用 kv_mask。

    左填充位置上的查询什么都看不见，不计算，输出 0；右填充位置上的照常计算
    （transformers 右填充生成时会取它们的输出）。
    """
    visible = mask != 0 if mask.dtype != torch.bool else mask
    counts = visible.sum(1).tolist()
    if min(counts) == kv_len:
        return MaskPlan(_full_spans(batch, q_len, kv_len, slots, mask.device), None)
    begins = visible.to(torch.uint8).argmax(1).tolist()
    past, rows, holes = kv_len - q_len, [], False
    for b, (begin, count) in enumerate(zip(begins, counts, strict=True)):
        if count == 0:
            continue
        holes = holes or count < kv_len - begin
        first = b * q_len + max(begin - past, 0)
        rows.append((first, (b + 1) * q_len, b * slots + begin, b * slots + kv_len))
    return MaskPlan(_as_spans(rows), _widen(visible, slots) if holes else None)


def _plan_full(mask: Tensor, batch: int, q_len: int, kv_len: int, slots: int) -> MaskPlan:
    """4 维掩码 [B 或 1, 头数或 1, T, S]：拆成键掩码、因果、每个查询的起点，再逐元素核对。"""
    if mask.shape[0] not in (1, batch) or mask.shape[2] != q_len:
        shape = f"掩码形状 {list(mask.shape)} 与输入 [{batch}, {q_len}] 不符"
        return MaskPlan(None, None, shape)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return MaskPlan(None, None, f"4 维掩码的类型是 {mask.dtype}")
    wrong, visible = _visible_4d(mask)
    wrong["掩码让查询看到尚未写入的位置"] = visible[..., kv_len:].any()
    visible = visible[..., :kv_len]
    rows, past = visible.shape[0], kv_len - q_len
    keys, any_key = visible.any(1), visible.any(2)
    starts = visible.to(torch.uint8).argmax(2)
    slot = torch.arange(kv_len, device=mask.device)
    expected = (slot <= slot[past:, None]) & (slot >= starts[..., None]) & keys[:, None]
    odd = ((expected & any_key[..., None]) != visible).any()
    wrong["掩码不是“因果 + 键填充”（如滑动窗口、双向或自定义分块）"] = odd
    counts = keys.to(torch.int64).cumsum(1)
    flags, starts, any_key, counts = _read(
        (torch.stack([*wrong.values()]), starts, any_key, counts)
    )
    reason = next((why for why, bad in zip(wrong, flags[0], strict=True) if bad), None)
    if reason is not None:
        return MaskPlan(None, None, reason)
    if rows != batch:
        starts, any_key, counts = (part * batch for part in (starts, any_key, counts))
        keys = keys.expand(batch, -1)
    spans, holes = _segments(starts, any_key, counts, past, slots)
    if len(spans) > batch * max(_FEW_SEGMENTS, q_len // 8):
        return MaskPlan(None, None, "几乎每个查询的起点都不同（如滑动窗口），分段计算不合算")
    on_device = to_device(_as_spans(spans), mask.device)
    return MaskPlan(on_device, _widen(keys, slots) if holes else None)


def _visible_4d(mask: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """({不支持的原因: 是不是}, [B 或 1, T, S] 的 bool)。"""
    wrong = {}
    if mask.shape[1] != 1:
        wrong["每个头的掩码不同"] = (mask != mask[:, :1]).any()
    mask = mask[:, 0]
    if mask.dtype == torch.bool:
        return wrong, mask
    visible = mask == 0
    hidden = mask <= torch.finfo(mask.dtype).min
    odd = ~(visible | hidden).all()
    return {**wrong, "浮点掩码带有加性偏置（既不是 0 也不是最小值）": odd}, visible


def _read(parts: tuple[Tensor, ...]) -> list[list[list[int]]]:
    """各张量（末维之前合成行）的数值；一起读回来，只等设备一次。"""
    parts = tuple(part.reshape(-1, part.shape[-1]).to(torch.int64) for part in parts)
    flat = torch.cat([part.flatten() for part in parts]).cpu()
    sizes = [part.numel() for part in parts]
    return [
        found.view(part.shape).tolist()
        for found, part in zip(flat.split(sizes), parts, strict=True)
    ]


def _segments(
    starts: list[list[int]],
    any_key: list[list[int]],
    total: list[list[int]],
    past: int,
    slots: int,
) -> tuple[list[tuple[int, int, int, int]], bool]:
    """起点相同的一段连续查询是一个 span；total 是到各键为止可见的个数。返回 (spans, 是否有空洞)。"""
    spans, holes = [], False
    q_len = len(starts[0])
    for b, row in enumerate(starts):
        seen = any_key[b]
        t = 0
        while t < q_len:
            stop = t + 1
            while stop < q_len and row[stop] == row[t] and seen[stop] == seen[t]:
                stop += 1
            if seen[t]:
                begin, end = row[t], past + stop
                spans.append((b * q_len + t, b * q_len + stop, b * slots + begin, b * slots + end))
                before = total[b][begin - 1] if begin else 0
                holes = holes or total[b][end - 1] - before < end - begin
            t = stop
    return spans, holes


def _as_spans(rows: list[tuple[int, int, int, int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)


def _widen(visible: Tensor, slots: int) -> Tensor:
    """[B, S] 补到缓冲区宽度 [B, slots]。"""
    wide = visible.new_zeros(visible.shape[0], slots)
    wide[:, : visible.shape[1]] = visible
    return wide
