"""用前向钩子收集每次调用的用时、词元数与缓存大小。"""

from __future__ import annotations

import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt.errors import InputError
from deepseek_opt.metrics.experts import expert_bytes
from deepseek_opt.metrics.prediction import prediction_metrics
from deepseek_opt.metrics.record import CallRecord, PerformanceMetrics, RingBuffer, summarize

ATTRIBUTE = "_deepseek_opt_metrics"
DEFAULT_WINDOW = 1024
# 有缓存而新词元不多于此数的一次调用算解码（包括验证多词元草稿），更多的算预填充的一块。
_DECODE_MAX_TOKENS = 64
_CACHE_NAMES = ("past_key_values", "cache", "past_key_value")


class MetricsCollector:
    """挂在一个模块上的收集器；一次调用的开销是几微秒。

    多个线程可以同时调用模型；deepcopy 或 pickle 模型时，副本带一个空的新收集器。
    CUDA 上量的是主机端用时，不为计时而同步设备。
    """

    def __init__(self, window: int = DEFAULT_WINDOW):
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise InputError.expected("window", "正整数", window)
        self.window = window
        self._records = RingBuffer(window)
        self._local = threading.local()

    def __reduce__(self) -> Any:
        return MetricsCollector, (self.window,)

    def attach(self, model: nn.Module) -> None:
        """挂上钩子。"""
        model.register_forward_pre_hook(self._before, with_kwargs=True)
        model.register_forward_hook(self._after, with_kwargs=True, always_call=True)
        model.__dict__[ATTRIBUTE] = self

    def detach(self, model: nn.Module) -> None:
        """取下钩子。按函数的主人查找，因此对 deepcopy 得到的模型同样有效。"""
        groups = (
            (model._forward_pre_hooks, (model._forward_pre_hooks_with_kwargs,)),
            (
                model._forward_hooks,
                (model._forward_hooks_with_kwargs, model._forward_hooks_always_called),
            ),
        )
        for hooks, extras in groups:
            mine = [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]
            for key in mine:
                del hooks[key]
                for extra in extras:
                    extra.pop(key, None)
        model.__dict__.pop(ATTRIBUTE, None)

    def record(self, kind: str, seconds: float, tokens: int, rows: int, cache: Any) -> None:
        """记一次不经过钩子的前向（用 MTP 生成的一步）；tokens 是留下的新词元数。"""
        size = cache_bytes(cache)
        self._records.append(CallRecord(kind, seconds, tokens, rows, kind == "prefill", size))

    def clear(self) -> None:
        """清空已收集的。"""
        self._records.clear()

    def metrics(self, model: nn.Module) -> PerformanceMetrics:
        """汇总窗口内的记录。"""
        records, calls = self._records.snapshot()
        reserved, peak = memory_usage(_device(model))
        used, original = expert_bytes(model)
        return summarize(
            records,
            calls,
            memory_reserved_bytes=reserved,
            memory_max_reserved_bytes=peak,
            expert_weight_bytes=used,
            expert_original_bytes=original,
            **prediction_metrics(model),
        )

    # ---- 钩子 ----

    def _stack(self) -> list[Any]:
        stack = getattr(self._local, "stack", None)
        if stack is None:
            stack = self._local.stack = []
        return stack

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():  # 计时不能进入编译的图
            return
        del module
        cache = _find_cache(args, kwargs)
        self._stack().append((_cached_tokens(cache), time.perf_counter()))

    def _after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        now = time.perf_counter()
        stack = self._stack()
        if not stack:  # 钩子是在这次调用途中挂上的
            return
        past, start = stack.pop()
        if output is None:  # 前向抛了异常，不计入
            return
        batch, steps = _token_shape(args, kwargs)
        kind = "decode" if past and steps <= _DECODE_MAX_TOKENS else "prefill"
        if module.training and torch.is_grad_enabled():
            kind = "train"
        cache = _find_cache(args, kwargs)
        size = cache_bytes(getattr(output, "past_key_values", None) if cache is None else cache)
        self._records.append(CallRecord(kind, now - start, batch * steps, batch, not past, size))


def _find_cache(args: tuple, kwargs: dict[str, Any]) -> Any:
    for name in _CACHE_NAMES:
        if kwargs.get(name) is not None:
            return kwargs[name]
    return next((a for a in args if hasattr(a, "get_seq_length")), None)


def _cached_tokens(cache: Any) -> int:
    """缓存里的词元数；在设备上的（StaticCache 写入过之后）不读回来，当作有。"""
    found = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    return 1 if isinstance(found, Tensor) and not found.is_cpu else int(found)


def _token_shape(args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
    """(行数, 每行新词元数)：取第一个张量参数；整数 [B, T]、浮点 [B, T, D] 或 [T, D]。"""
    named = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states", "hidden"))
    tensors = [v for v in (*named, *args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
    if not tensors:
        return 1, 0
    first = tensors[0]
    if first.dim() == 1 or (first.dim() == 2 and first.is_floating_point()):
        return 1, first.shape[0]
    return first.shape[0], first.shape[1]


def cache_bytes(cache: Any) -> int | None:
    """缓存占用的字节数：LatentCache 的 nbytes，或 transformers 的 Cache 各层张量之和。"""
    if cache is None:
        return None
    size = getattr(cache, "nbytes", None)
    if size is not None:
        return int(size)
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    return sum(_layer_bytes(layer) for layer in layers)


def _layer_bytes(layer: Any) -> int:
    """本库的层给出分配的字节数（它的 keys、values 每次都要整理，每步取不合算）；其余为张量之和。"""
    size = getattr(layer, "nbytes", None)
    if size is not None:
        return int(size)
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def memory_usage(device: torch.device) -> tuple[int | None, int | None]:
    """(当前, 峰值) 字节数；CUDA 为 torch 的保留量，CPU 为进程的常驻内存。"""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device), torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    statm = Path("/proc/self/statm")
    if not statm.exists():  # 没有 /proc 的系统只知道峰值
        return None, peak
    resident = int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    return resident, max(peak, resident)


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
