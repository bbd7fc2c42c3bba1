"""内存的基准项：预填充的实测峰值、缓存大小、两倍长度放不放得进标准注意力的内存。"""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_opt.benchmarks.cases import Case, Env, Row
from deepseek_opt.benchmarks.probe import (
    IMPLEMENTATIONS,
    Probe,
    ProbeError,
    ProbeReading,
    ProbeSpec,
)
from deepseek_opt.benchmarks.process_memory import available_bytes

_MIB = 1 << 20
_NAMES = {"layer": "注意力层", "model": "整个模型"}
_SAVING = 0.40
_CACHE_SAVING = 0.85
_DTYPE = "bfloat16"
_HEADROOM = 0.9  # 只用可用内存的这么多，免得把机器压垮


def probe_once(env: Env, subject: str, implementation: str, length: int) -> ProbeReading:
    """开一个子进程量一次，一行 length 个词元；抛出 ProbeError：放不下，或子进程失败。"""
    need = estimated_bytes(env, subject, implementation, length)
    free = available_bytes()
    if free and need > free * _HEADROOM:
        raise ProbeError(f"未运行：约需 {need / 1e9:.1f} GB，可用 {free / 1e9:.1f} GB")
    spec = ProbeSpec(subject, env.shape.name, implementation, _DTYPE, env.threads, env.isa)
    with Probe(spec) as probe:
        return probe.measure(1, length, repeats=2)


def estimated_bytes(env: Env, subject: str, implementation: str, length: int) -> int:
    """估计要多少内存（整个模型的，作为上限）。"""
    import torch

    from deepseek_opt import estimate_memory
    from deepseek_opt.benchmarks.shapes import make_config

    estimate = estimate_memory(make_config(env.shape), 1, length, dtype=getattr(torch, _DTYPE))
    weights = estimate.weight_bytes if subject == "model" else 0
    if implementation == "optimized":
        return weights + estimate.working_bytes
    return weights + estimate.against(implementation).working_bytes


@dataclass(frozen=True)
class MemoryCase(Case):
    """预填充 length 个词元的工作内存峰值（缓存 + 激活，不含权重），与其余四种实现比；加缓存一行。"""

    key: str
    subject: str
    length: int

    @property
    def title(self) -> str:  # type: ignore[override]
        return f"{_NAMES[self.subject]} 预填充 {self.length} 的内存峰值 bf16"

    def run(self, env: Env) -> list[Row]:
        ours = probe_once(env, self.subject, "optimized", self.length)
        rows, cache = [], None
        for name, label in IMPLEMENTATIONS.items():
            if name == "optimized":
                continue
            try:
                peer = probe_once(env, self.subject, name, self.length)
            except ProbeError as error:
                rows.append(self._row(name, label, None, ours, str(error)))
                continue
            rows.append(self._row(name, label, peer, ours, ""))
            if name.startswith("standard"):
                cache = peer
        if cache is not None:
            rows.append(self._cache_row(cache, ours))
        return rows

    def _row(
        self, name: str, label: str, peer: ProbeReading | None, ours: ProbeReading, note: str
    ) -> Row:
        return Row(
            f"{self.key}.{name}",
            self.title,
            "saving",
            "MiB",
            label,
            None if peer is None else peer.peak_bytes / _MIB,
            ours.peak_bytes / _MIB,
            _SAVING,
            note=note,
            details={"method": ours.method},
        )

    def _cache_row(self, peer: ProbeReading, ours: ProbeReading) -> Row:
        return Row(
            f"{self.key}.cache",
            f"{_NAMES[self.subject]} {self.length} 词元的缓存 bf16",
            "saving",
            "MiB",
            "标准多头注意力",
            peer.cache_bytes / _MIB,
            ours.cache_bytes / _MIB,
            _CACHE_SAVING,
        )


@dataclass(frozen=True)
class LengthCase(Case):
    """本库处理 2 x length 个词元的峰值，应不超过标准注意力处理 length 个的。"""

    key: str
    subject: str
    length: int

    @property
    def title(self) -> str:  # type: ignore[override]
        return f"{_NAMES[self.subject]} 本库 {2 * self.length} 对标准 {self.length} 的内存峰值 bf16"

    def run(self, env: Env) -> list[Row]:
        ours = probe_once(env, self.subject, "optimized", 2 * self.length)
        rows = []
        for name in ("standard_eager", "standard_sdpa"):
            peer, note = None, ""
            try:
                peer = probe_once(env, self.subject, name, self.length).peak_bytes / _MIB
            except ProbeError as error:
                note = str(error)
            size = ours.peak_bytes / _MIB
            label = IMPLEMENTATIONS[name]
            rows.append(
                Row(
                    f"{self.key}.{name}",
                    self.title,
                    "saving",
                    "MiB",
                    label,
                    peer,
                    size,
                    0.0,
                    note=note,
                )
            )
        return rows
