"""一行读数、它的对照与要求；JSON 与表格都由它来。"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

OK, SKIPPED, FAILED = "ok", "skipped", "failed"


@dataclass(frozen=True)
class Target:
    """要求：value 至少这么多，单位 unit。"""

    value: float
    unit: str


@dataclass
class Peer:
    """同一次运行里的对照；没能运行或结果不对时 us 为 None，note 说明原因。"""

    name: str
    us: float | None = None
    speedup: float | None = None  # 对照的时间 / 我们的时间
    mode: str = ""
    error: float | None = None
    note: str = ""


@dataclass
class Row:  # pylint: disable=too-many-instance-attributes
    """一行读数。

    status : ``ok``、``skipped``（没有运行，reason 说明）、``failed``（结果不对或出错，脚本的退出码非零）。
    us、mode : 每次调用的微秒数；``graph`` 为录成 CUDA 图之后的，``eager`` 为逐次调用的。
    roofline : 屋顶线规定的最短时间 / us。
    value、unit、target、met : 与要求比的量；没有要求或不下结论时 met 为 None。
    error : 对参考实现的相对误差。
    """

    key: str
    status: str = OK
    reason: str = ""
    dtype: str = ""
    us: float | None = None
    mode: str = ""
    tflops: float | None = None
    gbps: float | None = None
    roofline: float | None = None
    value: float | None = None
    unit: str = ""
    target: float | None = None
    met: bool | None = None
    error: float | None = None
    peers: list[Peer] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def judge(self, value: float, unit: str, target: Target | None) -> Row:
        """填上与要求比的量；返回自己。"""
        self.value, self.unit = value, unit
        if target is not None:
            self.target, self.met = target.value, value >= target.value
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON 用：浮点数留 5 位有效数字，没有的项不写。"""
        return _compact(asdict(self))

    def line(self) -> str:
        """表格的一行。"""
        if self.status != OK:
            word = {SKIPPED: "跳过", FAILED: "失败"}[self.status]
            return f"{self.key:44} {word}：{self.reason}"
        parts = [f"{self.key:44}"]
        if self.us is not None:
            parts.append(f"{self.us:11.2f} us")
        if self.tflops:
            parts.append(f"{self.tflops:7.1f} TFLOP/s")
        if self.gbps:
            parts.append(f"{self.gbps:8.1f} GB/s")
        if self.roofline is not None:
            parts.append(f"屋顶线 {self.roofline:6.1%}")
        if self.value is not None:
            parts.append(f"{self.value:.3g} {self.unit}{self._verdict()}")
        parts += [_peer_text(peer) for peer in self.peers]
        return "  ".join(parts)

    def _verdict(self) -> str:
        if self.target is None:
            return ""
        judged = {True: "，达到", False: "，未达到", None: ""}[self.met]
        return f"（要求 {self.target:g}{judged}）"


def _peer_text(peer: Peer) -> str:
    if peer.speedup is None:
        return f"[{peer.name}：{peer.note[:60] or '没有读数'}]"
    return f"[{peer.name} 的 {peer.speedup:.2f} 倍]"


def _compact(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        empty = (None, "", [], {})
        return {key: _compact(item) for key, item in value.items() if item not in empty}
    if isinstance(value, list):
        return [_compact(item) for item in value]
    return value
