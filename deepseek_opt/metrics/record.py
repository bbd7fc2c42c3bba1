"""性能指标的数据：定长环形缓冲与汇总结果。"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from html import escape
from typing import Any, Literal

from deepseek_opt.config import format_bytes

Kind = Literal["prefill", "decode", "train"]


@dataclass(frozen=True)
class CallRecord:
    """一次前向：kind 为种类，seconds 为用时，tokens 为新词元总数（全部行），batch 为行数。

    starts_sequence : 是否从空缓存开始（首词延迟由此计起）。cache_bytes : 调用之后缓存的字节数，
    没有缓存时为 None。
    """

    kind: Kind
    seconds: float
    tokens: int
    batch: int
    starts_sequence: bool
    cache_bytes: int | None


class RingBuffer:
    """线程安全的定长环形缓冲：满了之后覆盖最旧的。"""

    def __init__(self, capacity: int):
        if capacity < 1:
            raise ValueError(f"容量应为正整数，得到 {capacity}")
        self.capacity = capacity
        self._items: list[CallRecord | None] = [None] * capacity
        self._count = 0
        self._lock = threading.Lock()

    def append(self, item: CallRecord) -> None:
        """加入一项。"""
        with self._lock:
            self._items[self._count % self.capacity] = item
            self._count += 1

    def snapshot(self) -> tuple[list[CallRecord], int]:
        """(由旧到新的各项, 加入过的总数)。"""
        with self._lock:
            items, count = list(self._items), self._count
        if count <= self.capacity:
            return items[:count], count
        start = count % self.capacity
        return items[start:] + items[:start], count

    def clear(self) -> None:
        """清空。"""
        with self._lock:
            self._items = [None] * self.capacity
            self._count = 0


@dataclass(frozen=True)
class PerformanceMetrics:
    """一个模型的性能指标；除 calls 外都只统计最近的窗口。不适用或还没有数据的为 None。

    示例::

        model.generate(**inputs)
        found = deepseek_opt.metrics(model)
        print(found)                             # 笔记本里是表格
        found.time_per_output_token_seconds      # 各字段；to_dict() 可写成 JSON

    属性：
        calls: 收集以来的前向次数。
        window_calls: 窗口内的次数。
        prefill_calls、decode_calls、train_calls: 窗口内各类次数。
        prefill_tokens、decode_tokens: 窗口内处理的词元数。
        forward_seconds_mean、forward_seconds_p50、forward_seconds_p95: 每次前向的用时，秒。
        time_to_first_token_seconds: 最近一条序列的预填充（分块时为各块之和）用时，秒。
        time_per_output_token_seconds: 解码一步（每行一个或几个词元）的平均用时，秒。
        throughput_tokens_per_second: 窗口内词元数 / 前向用时之和。
        decode_tokens_per_second: 同上，只算解码。
        cache_bytes: 最近一次带缓存的前向之后，缓存的字节数。
        memory_reserved_bytes、memory_max_reserved_bytes: CUDA 为 torch 的保留量及其峰值；
            CPU 为进程的常驻内存及其峰值。
        expert_weight_bytes: 专家（含一次算完的共享专家）正在用的权重的字节数：量化之后是量化的；没有替换 MoE 层的为 None。
        expert_original_bytes: 量化之后另外保留的原权重的字节数；没有量化的为 None，已释放为 0。
        spec_decode_num_drafts、spec_decode_num_draft_tokens、spec_decode_num_accepted_tokens:
            用 MTP 生成时起草的（行，步）数、起草与接受的词元数，从上次清零起累计；没有起草时为 None。
        spec_decode_acceptance_per_depth: 起草到第 k 个时，前 k 个都被接受的比例。
        spec_decode_tokens_per_step: 每行每步得到的词元数。
        mtp_loss_per_depth、mtp_acceptance_per_depth: 训练 MTP 时各深度每词元的损失，与贪心预测和主模型相同的
            比例，从上次清零起累计；没有训练 MTP 的为 None。
        expert_utilization: 各专家分到的词元比例；没有收集路由的模型为 None。
    """

    calls: int = 0
    window_calls: int = 0
    prefill_calls: int = 0
    decode_calls: int = 0
    train_calls: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    forward_seconds_mean: float | None = None
    forward_seconds_p50: float | None = None
    forward_seconds_p95: float | None = None
    time_to_first_token_seconds: float | None = None
    time_per_output_token_seconds: float | None = None
    throughput_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    cache_bytes: int | None = None
    memory_reserved_bytes: int | None = None
    memory_max_reserved_bytes: int | None = None
    expert_weight_bytes: int | None = None
    expert_original_bytes: int | None = None
    spec_decode_num_drafts: int | None = None
    spec_decode_num_draft_tokens: int | None = None
    spec_decode_num_accepted_tokens: int | None = None
    spec_decode_acceptance_per_depth: tuple[float, ...] | None = None
    spec_decode_tokens_per_step: float | None = None
    mtp_loss_per_depth: tuple[float, ...] | None = None
    mtp_acceptance_per_depth: tuple[float, ...] | None = None
    expert_utilization: tuple[float, ...] | None = None

    def to_dict(self) -> dict[str, Any]:
        """全部字段（可写成 JSON）。"""
        return asdict(self)

    def scalars(self) -> dict[str, float]:
        """有值的标量字段，供监控系统使用；各深度的写成 ``名字_深度``。"""
        pairs = [(f.name, getattr(self, f.name)) for f in fields(self)]
        found = {name: float(v) for name, v in pairs if isinstance(v, (int, float))}
        for name, values in pairs:
            if name.endswith("_per_depth") and values is not None:
                found |= {f"{name}_{i}": value for i, value in enumerate(values, 1)}
        return found

    def render(self) -> str:
        """可读的文本。"""
        if not self.calls:
            return "性能指标：还没有前向调用，从现在开始收集"
        lines = [f"性能指标（最近 {self.window_calls} 次前向，共 {self.calls} 次）"]
        lines += [f"  {name} = {_readable(name, value)}" for name, value in self._shown()]
        return "\n".join(lines)

    __str__ = render

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{name}</td><td>{escape(_readable(name, value))}</td></tr>"
            for name, value in self._shown()
        )
        return f"<table><tr><th>指标</th><th>值</th></tr>{rows}</table>"

    def _shown(self) -> list[tuple[str, Any]]:
        return [(f.name, v) for f in fields(self) if (v := getattr(self, f.name)) is not None]


def summarize(records: Sequence[CallRecord], calls: int, **others: Any) -> PerformanceMetrics:
    """把窗口内的记录汇总成指标；others 为其余各字段（内存、MTP）。"""
    groups = {
        kind: [r for r in records if r.kind == kind] for kind in ("prefill", "decode", "train")
    }
    decode = groups["decode"]
    times = sorted(r.seconds for r in records)
    cached = [r.cache_bytes for r in records if r.cache_bytes is not None]
    return PerformanceMetrics(
        calls=calls,
        window_calls=len(records),
        prefill_calls=len(groups["prefill"]),
        decode_calls=len(decode),
        train_calls=len(groups["train"]),
        prefill_tokens=sum(r.tokens for r in groups["prefill"]),
        decode_tokens=sum(r.tokens for r in decode),
        forward_seconds_mean=sum(times) / len(times) if times else None,
        forward_seconds_p50=_quantile(times, 0.5),
        forward_seconds_p95=_quantile(times, 0.95),
        time_to_first_token_seconds=_first_token_seconds(records),
        time_per_output_token_seconds=sum(r.seconds for r in decode) / len(decode)
        if decode
        else None,
        throughput_tokens_per_second=_rate(records),
        decode_tokens_per_second=_rate(decode),
        cache_bytes=cached[-1] if cached else None,
        **others,
    )


def _rate(records: Sequence[CallRecord]) -> float | None:
    seconds = sum(r.seconds for r in records)
    return sum(r.tokens for r in records) / seconds if seconds > 0 else None


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """有序列表的分位数（最近秩）。"""
    if not ordered:
        return None
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _first_token_seconds(records: Sequence[CallRecord]) -> float | None:
    """最近一条序列从空缓存开始的各个预填充块的用时之和。"""
    total = None
    for record in records:
        if record.kind != "prefill":
            continue
        if record.starts_sequence:
            total = record.seconds
        elif total is not None:
            total += record.seconds
    return total


def _readable(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return format_bytes(value)
    if name.endswith("_seconds") or "_seconds_" in name:
        return f"{value * 1e3:.3f} ms"
    if isinstance(value, tuple):
        return " ".join(f"{one:.3f}" for one in value)
    return f"{value:.1f}" if isinstance(value, float) else str(value)
