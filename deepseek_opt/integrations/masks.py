"""把 transformers 交给注意力层的掩码换成 spans（与必要时的 kv_mask），精确且只算一次。

掩码随 attn_implementation 而变：None、2 维填充掩码、4 维 bool（sdpa）、4 维浮点（eager）。
能表示成“因果 + 键填充（+ 打包分段）”的换成 :class:`MaskPlan`；不能的给出原因，由原实现计算。
"""

from __future__ import annotations

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_opt.integrations.stamp import stamp

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
        self, mask: Tensor | None, batch: int, q_len: int, kv_len: int, slots: int
    ) -> MaskPlan:
        """mask 为 None 时是因果掩码；kv_len 含新词元，slots 为缓冲区的第 1 维。"""
        local = self._local
        key = (batch, q_len, kv_len, slots, stamp(mask))
        if getattr(local, "key", None) == key and local.mask() is mask:
            return local.plan
        plan = build_plan(mask, batch, q_len, kv_len, slots)
        local.mask = _nothing if mask is None else weakref.ref(mask)
        local.key, local.plan = key, plan
        return plan

    def ragged_plan(self, offsets: Tensor, q_len: int, slots: int) -> MaskPlan:
        """各行长度不同且没有掩码时的计划；offsets [B] 不含这次的 q_len 个新词元。"""
        local = self._local
        key = (offsets.tolist(), q_len, slots, stamp(None))
        if getattr(local, "key", None) != key:
            local.plan = _ragged_plan(offsets, q_len, slots)
            local.mask, local.key = _nothing, key
        return local.plan


def _nothing() -> None:
    return None


def build_plan(mask: Tensor | None, batch: int, q_len: int, kv_len: int, slots: int) -> MaskPlan:
    """精确换算；见模块说明。"""
    if mask is None:
        return MaskPlan(_full_spans(batch, q_len, kv_len, slots), None)
    if not isinstance(mask, Tensor):
        return MaskPlan(
            None, None, f"掩码类型 {type(mask).__name__}（如 flex_attention 的 BlockMask）"
        )
    if mask.shape[-1] < kv_len:
        return MaskPlan(None, None, f"掩码宽 {mask.shape[-1]}，少于键的个数 {kv_len}")
    if mask.dim() == 2:
        return _plan_padding(mask[:, :kv_len], batch, q_len, kv_len, slots)
    if mask.dim() == 4:
        return _plan_full(mask, batch, q_len, kv_len, slots)
    return MaskPlan(None, None, f"掩码是 {mask.dim()} 维")


def _full_spans(batch: int, q_len: int, kv_len: int, slots: int) -> Tensor:
    rows = [(b * q_len, (b + 1) * q_len, b * slots, b * slots + kv_len) for b in range(batch)]
    return torch.tensor(rows, dtype=torch.int64)


def _ragged_plan(offsets: Tensor, q_len: int, slots: int) -> MaskPlan:
    rows = [
        (b * q_len, (b + 1) * q_len, b * slots, b * slots + past + q_len)
        for b, past in enumerate(offsets.tolist())
    ]
    return MaskPlan(torch.tensor(rows, dtype=torch.int64), None)


def _plan_padding(mask: Tensor, batch: int, q_len: int, kv_len: int, slots: int) -> MaskPlan:
    """2 维填充掩码 [B, S]：左填充只是起点不同；右填充与空洞用 kv_mask。

    左填充位置上的查询什么都看不见，不计算，输出 0；右填充位置上的照常计算
    （transformers 右填充生成时会取它们的输出）。
    """
    if mask.shape[0] != batch:
        return MaskPlan(None, None, f"掩码有 {mask.shape[0]} 行，输入有 {batch} 行")
    visible = mask != 0 if mask.dtype != torch.bool else mask
    counts = visible.sum(1).tolist()
    if min(counts) == kv_len:
        return MaskPlan(_full_spans(batch, q_len, kv_len, slots), None)
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
    visible, reason = _visible_4d(mask, batch, q_len)
    if reason is not None:
        return MaskPlan(None, None, reason)
    if visible.shape[-1] > kv_len and bool(visible[..., kv_len:].any()):
        return MaskPlan(None, None, "掩码让查询看到尚未写入的位置")
    visible = visible[..., :kv_len]
    rows = visible.shape[0]
    past = kv_len - q_len
    keys = visible.any(1)
    slot = torch.arange(kv_len, device=mask.device)
    any_key = visible.any(2)
    starts = visible.to(torch.uint8).argmax(2)
    expected = (slot <= slot[past:, None]) & (slot >= starts[..., None]) & keys[:, None]
    if not torch.equal(expected & any_key[..., None], visible):
        return MaskPlan(None, None, "掩码不是“因果 + 键填充”（如滑动窗口、双向或自定义分块）")
    if rows != batch:
        starts, any_key, keys = (t.expand(batch, -1) for t in (starts, any_key, keys))
    spans, holes = _segments(starts.tolist(), any_key.tolist(), keys, past, slots)
    if len(spans) > batch * max(_FEW_SEGMENTS, q_len // 8):
        return MaskPlan(None, None, "几乎每个查询的起点都不同（如滑动窗口），分段计算不合算")
    return MaskPlan(_as_spans(spans), _widen(keys, slots) if holes else None)


def _visible_4d(mask: Tensor, batch: int, q_len: int) -> tuple[Tensor | None, str | None]:
    """[B 或 1, T, S] 的 bool；或不支持的原因。"""
    if mask.shape[0] not in (1, batch) or mask.shape[2] != q_len:
        return None, f"掩码形状 {list(mask.shape)} 与输入 [{batch}, {q_len}] 不符"
    if mask.shape[1] != 1:
        if not bool((mask == mask[:, :1]).all()):
            return None, "每个头的掩码不同"
        mask = mask[:, :1]
    mask = mask[:, 0]
    if mask.dtype == torch.bool:
        return mask, None
    if not mask.is_floating_point():
        return None, f"4 维掩码的类型是 {mask.dtype}"
    visible = mask == 0
    hidden = mask <= torch.finfo(mask.dtype).min
    if not bool((visible | hidden).all()):
        return None, "浮点掩码带有加性偏置（既不是 0 也不是最小值）"
    return visible, None


def _segments(
    starts: list[list[int]], any_key: list[list[bool]], keys: Tensor, past: int, slots: int
) -> tuple[list[tuple[int, int, int, int]], bool]:
    """起点相同的一段连续查询是一个 span；返回 (spans, 是否有空洞)。"""
    spans, holes = [], False
    q_len = len(starts[0])
    total = keys.to(torch.int64).cumsum(1).tolist()
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
