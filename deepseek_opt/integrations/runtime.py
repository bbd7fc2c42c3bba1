"""一个已优化模型的共享状态：活的配置、回退计数、按线程的掩码与旋转备忘。"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from typing import Any

from torch import Tensor

from deepseek_opt.cache_layer import cache_dtype
from deepseek_opt.errors import ConfigError
from deepseek_opt.integrations.masks import PlanMemo
from deepseek_opt.integrations.stamp import stamp

logger = logging.getLogger("deepseek_opt")


class Runtime:
    """各层补丁共用；随模型一起被 deepcopy，锁与线程局部的内容不复制。"""

    def __init__(self, profile: Any) -> None:
        self.profile = profile
        self.fallbacks: Counter[tuple[str, str]] = Counter()
        self.masks = PlanMemo()
        self.ropes = RopeMemo()
        self.layer_count = 1  # 预算由各层平分
        self._lock = threading.Lock()
        self._bind(profile.mla)
        self._bind_moe()

    def _bind_moe(self) -> None:
        moe = getattr(self.profile, "moe", None)
        self._moe = None if moe is None else (moe, moe.revision, moe.snapshot())

    def _bind(self, mla: Any) -> None:
        self._mla = mla
        self._revision = getattr(mla, "revision", None)
        self._snapshot = mla.snapshot() if hasattr(mla, "snapshot") else None
        self.store_dtype = cache_dtype(getattr(mla, "cache_dtype", None))
        self.max_length = getattr(mla, "max_cache_length", None)
        self.memory_budget = getattr(mla, "memory_budget_bytes", None)
        self.chunk_size = getattr(mla, "prefill_chunk_size", None)
        self.cuda_graphs = getattr(mla, "cuda_graphs", None) is not False

    def refresh(self) -> None:
        """配置被改动过就重新读取；改了不能动态修改的字段则抛出 ConfigError，说明原因。"""
        mla = self.profile.__dict__["mla"]  # 每层每次调用都要看，绕开 pydantic 的属性查找
        if mla is self._mla and mla.revision == self._revision:
            return
        with self._lock:
            if mla is None:
                raise ConfigError("profile.mla 在已优化的模型上被设为 None；请用 switch 或 restore")
            if self._snapshot is not None:
                mla.require_live(self._snapshot)
            self._bind(mla)

    def require_moe(self) -> None:
        """MoE 的配置在已优化的模型上被改动则抛出 ConfigError：它描述的是结构，没有能动态修改的字段。"""
        moe, revision, snapshot = self._moe
        current = self.profile.__dict__["moe"]
        if current is moe and moe.revision == revision:
            return
        if current is None:
            raise ConfigError("profile.moe 在已优化的模型上被设为 None；请用 switch 或 restore")
        current.require_live(snapshot)

    @property
    def recompute_experts(self) -> bool:
        """训练时专家的 gate、up 是否在反向里重算。"""
        return self.profile.__dict__["moe"].recompute_experts is True

    @property
    def layer_budget(self) -> int | None:
        """每层缓存的字节上限。"""
        return None if self.memory_budget is None else self.memory_budget // self.layer_count

    def count(self, name: str, reason: str) -> None:
        """记一次回退；同一层同一原因第一次用 WARNING，以后用 DEBUG。"""
        with self._lock:
            self.fallbacks[name, reason] += 1
            first = self.fallbacks[name, reason] == 1
        level = logging.WARNING if first else logging.DEBUG
        logger.log(level, "%s 这次由原实现计算：%s", name, reason)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        # 深拷贝之后 profile.mla 是副本：重新绑定，免得被当作用户换了配置
        self._bind(getattr(self.profile, "mla", None))
        self._bind_moe()


class RopeMemo:
    """每个线程记住最近一次的 cos、sin（半宽、连续、fp32）：各层收到的是同一个张量对象。"""

    def __init__(self) -> None:
        self._local = threading.local()

    def __reduce__(self) -> Any:
        return RopeMemo, ()

    def halves(self, embeddings: Any, half: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) 或复数 freqs_cis -> 各 [1 或 B, T, half]。"""
        key = embeddings if isinstance(embeddings, Tensor) else embeddings[0]
        local = self._local
        if getattr(local, "ref", _none)() is key and local.stamp == stamp(key):
            return local.pair
        pair = half_angles(embeddings, half)
        local.ref, local.stamp, local.pair = weakref.ref(key), stamp(key), pair
        return pair


def half_angles(embeddings: Any, half: int) -> tuple[Tensor, Tensor]:
    """旋转模块的输出，(cos, sin) 各 [B, T, dr] 或复数 [B, T, half] -> 半宽、连续、fp32 的 (cos, sin)。"""
    if isinstance(embeddings, Tensor):
        return embeddings.real.contiguous(), embeddings.imag.contiguous()
    return tuple(part[..., :half].float().contiguous() for part in embeddings)


def _none() -> None:
    return None
