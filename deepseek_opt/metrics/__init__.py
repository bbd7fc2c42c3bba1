"""性能指标：用时、吞吐、缓存与内存；脚本与笔记本里用法相同。

示例
----
>>> import torch
>>> from deepseek_opt.metrics import metrics, stop_metrics
>>> model = torch.nn.Linear(4, 4)
>>> print(metrics(model))
性能指标：还没有前向调用，从现在开始收集
>>> _ = model(torch.randn(2, 4))
>>> metrics(model).calls
1
>>> stop_metrics(model)
True
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from deepseek_opt.errors import InputError
from deepseek_opt.metrics.collector import ATTRIBUTE, DEFAULT_WINDOW, MetricsCollector
from deepseek_opt.metrics.experts import ExpertStatistics, expert_statistics
from deepseek_opt.metrics.record import PerformanceMetrics
from deepseek_opt.metrics.sinks import JSONLSink, PrometheusSink, TensorBoardSink


def metrics(model: nn.Module) -> PerformanceMetrics:
    """model 的性能指标；优化过的模型从 optimize 起就在收集，其他模型从这次调用起收集。

    参数
    ----
    model : 任何 nn.Module，优化过与否都可以。

    返回 :class:`PerformanceMetrics`。抛出 InputError：不是 nn.Module。停止用 :func:`stop_metrics`。

    示例
    ----
    >>> import torch
    >>> from deepseek_opt import metrics
    >>> model = torch.nn.Linear(4, 4)
    >>> print(metrics(model))
    性能指标：还没有前向调用，从现在开始收集
    >>> _ = model(torch.randn(2, 4))
    >>> metrics(model).calls
    1
    """
    return start_metrics(model).metrics(model)


def start_metrics(model: nn.Module, window: int = DEFAULT_WINDOW) -> MetricsCollector:
    """开始收集（已在收集时返回原来的收集器）。window 为保留的最近调用次数。"""
    if not isinstance(model, nn.Module):
        raise InputError.expected("model", " nn.Module", model)
    collector = model.__dict__.get(ATTRIBUTE)
    if collector is None:
        collector = MetricsCollector(window)
        collector.attach(model)
    return collector


def is_collecting(model: nn.Module) -> bool:
    """model 是否正在收集性能指标。"""
    return ATTRIBUTE in model.__dict__


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """块内的前向不计入指标（例如 verify 为对照而做的）；没有在收集时什么也不做。"""
    collector = model.__dict__.get(ATTRIBUTE)
    if collector is None:
        yield
        return
    collector.detach(model)
    try:
        yield
    finally:
        collector.attach(model)


def stop_metrics(model: nn.Module) -> bool:
    """停止收集并取下钩子；返回之前是否在收集。"""
    collector = model.__dict__.get(ATTRIBUTE)
    if collector is None:
        return False
    collector.detach(model)
    return True


__all__ = [
    "ExpertStatistics",
    "JSONLSink",
    "MetricsCollector",
    "PerformanceMetrics",
    "PrometheusSink",
    "TensorBoardSink",
    "expert_statistics",
    "is_collecting",
    "metrics",
    "paused",
    "start_metrics",
    "stop_metrics",
]
