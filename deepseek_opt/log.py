"""日志：记录器 "deepseek_opt"，中文消息。

默认不输出（库不该替用户决定日志去向）；``enable("DEBUG")`` 后每次算子调用记一行：
算子、指令集、形状、耗时（毫秒）。

>>> from deepseek_opt import log
>>> _ = log.enable("WARNING")
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

LOGGER = logging.getLogger("deepseek_opt")
LOGGER.addHandler(logging.NullHandler())

_FORMAT = "%(asctime)s %(levelname)s %(name)s：%(message)s"


def enable(level: str | int = "INFO") -> logging.Logger:
    """把本库的日志打到标准错误；重复调用只改级别。返回记录器。"""
    LOGGER.setLevel(level)
    if not any(isinstance(h, logging.StreamHandler) for h in LOGGER.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_FORMAT))
        LOGGER.addHandler(handler)
    return LOGGER


def debugging() -> bool:
    """是否要逐次记录算子调用（torch.compile 追踪时不记）。"""
    return not torch.compiler.is_compiling() and LOGGER.isEnabledFor(logging.DEBUG)


def timed(name: str, isa: str, op: Callable[..., Any], args: tuple) -> Any:
    """执行 op(*args) 并记录一行 DEBUG。"""
    start = time.perf_counter()
    result = op(*args)
    spent = (time.perf_counter() - start) * 1e3
    shapes = "，".join(_describe(a) for a in args if isinstance(a, torch.Tensor))
    LOGGER.debug("%s（%s）%s：%.3f 毫秒", name, isa, shapes, spent)
    return result


def _describe(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
