"""一项基准（Case）、一行读数（Row）、运行环境（Env）与套件的登记表。

写一个新套件：在自己的模块里造 :class:`Case`（计时用 :class:`SpeedCase`），再
``register_suite("moe", "MoE", build)``；build(env) 返回这次要跑的各项。命令行自动认得它。
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from deepseek_opt.benchmarks import timing
from deepseek_opt.benchmarks.shapes import REFERENCE, Shape
from deepseek_opt.errors import InputError

#: 套件名 -> 登记它的模块；第一次用到时才导入。
_MODULES = {name: f"deepseek_opt.benchmarks.{name}" for name in ("mla", "moe", "mtp", "quant")}
_SUITES: dict[str, Suite] = {}


@dataclass
class Env:
    """这次运行：形状、快慢、线程数、指令集；屋顶线按线程数各测一次。"""

    shape: Shape = REFERENCE
    quick: bool = False
    threads: int = 2
    isa: str | None = None
    rooflines: dict[int, timing.Roofline] = field(default_factory=dict)

    def roofline(self) -> timing.Roofline:
        """当前线程数的屋顶线。"""
        threads = torch.get_num_threads()
        if threads not in self.rooflines:
            self.rooflines[threads] = timing.measure_roofline(self.quick)
        return self.rooflines[threads]

    @property
    def rounds(self) -> int:
        """每项至多计时多少轮。"""
        return 2 if self.quick else 15

    @property
    def seconds(self) -> float:
        """每项两边合计至多计时多少秒（超过就停在整轮）。"""
        return 2.0 if self.quick else 12.0


@dataclass(frozen=True)
class Row:
    """一行读数。

    kind : ``speed``（ratio = 对照 / 本库，越大越好）、``saving``（ratio = 1 - 本库 / 对照）、
        ``accuracy``（ratio = 本库 - 对照，百分点）、``info``（只报告）。
    unit : ``ms``、``MiB``、``us``、``B``、``%``。
    target : 要求的 ratio；没有要求为 None。
    roofline : 屋顶线规定的最短时间 / 本库的时间；不适用为 None。
    note : 说明，例如没有运行的原因。
    """

    key: str
    title: str
    kind: str
    unit: str
    peer_name: str
    peer: float | None
    ours: float | None
    target: float | None = None
    roofline: float | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def ratio(self) -> float | None:
        """对照 / 本库（speed、info），省下的比例（saving），或相差（accuracy）；缺一边时为 None。"""
        if self.peer is None or not self.ours:
            return None
        if self.kind == "accuracy":
            return self.ours - self.peer
        if self.kind == "saving":
            return 1 - self.ours / self.peer if self.peer else None
        return self.peer / self.ours

    @property
    def met(self) -> bool | None:
        """达到要求没有；没有要求、或对照没能运行为 None；本库没能运行为 False。"""
        if self.target is None:
            return None
        if self.ours is None:
            return False
        if self.ratio is None:
            return None
        return self.ratio >= self.target

    def to_dict(self) -> dict[str, Any]:
        """JSON 用。"""
        return {**asdict(self), "ratio": self.ratio, "met": self.met}


class Case(ABC):
    """一项基准：key 供挑选，title 供显示，run 给出一行或几行读数。"""

    key: str
    title: str

    @abstractmethod
    def run(self, env: Env) -> list[Row]:
        """运行。"""


@dataclass
class Work:
    """一项计时工作：peer、ours 各跑一次；flops、read_bytes 为至少要做的运算与要读的字节。"""

    ours: Callable[[], Any]
    peer: Callable[[], Any] | None
    flops: float
    read_bytes: float
    dtype: torch.dtype


@dataclass(frozen=True)
class SpeedCase(Case):
    """与对照交替计时；build(env) 造输入与模块。isa、threads 给出时临时改用。"""

    key: str
    title: str
    build: Callable[[Env], Work]
    target: float | None = None
    peer_name: str = "transformers SDPA"
    isa: str | None = None
    threads: int | None = None
    grad: bool = False

    def run(self, env: Env) -> list[Row]:
        if self.isa is not None:
            from deepseek_opt import _native

            if self.isa not in _native.available_isas():
                return [self._missing(f"这台机器没有 {self.isa}")]
        mode = torch.enable_grad() if self.grad else torch.inference_mode()
        with timing.settings(self.threads, self.isa), mode:
            work = self.build(env)
            with timing.fresh_read(env.roofline(), env.quick) as found:
                peer, ours = timing.interleaved(
                    work.peer, work.ours, rounds=env.rounds, seconds=env.seconds
                )
        roofline = found[0]
        floor = roofline.floor_seconds(work.flops, work.read_bytes, work.dtype)
        details = _details(peer, ours, self, roofline)
        return [speed_row(self, self.peer_name, peer, ours, floor=floor, details=details)]

    def _missing(self, note: str) -> Row:
        return Row(self.key, self.title, "speed", "ms", self.peer_name, None, None, note=note)


def speed_row(
    case: Any,
    peer_name: str,
    peer: timing.Times | None,
    ours: timing.Times,
    *,
    floor: float | None = None,
    note: str = "",
    details: dict[str, Any],
) -> Row:
    """一行计时的读数，毫秒；case 给出键名、标题与要求，floor 是屋顶线规定的最短秒数。"""
    return Row(
        case.key,
        case.title,
        "speed",
        "ms",
        peer_name,
        None if peer is None else peer.best * 1e3,
        ours.best * 1e3,
        case.target,
        None if floor is None else floor / ours.best,
        note,
        details,
    )


def _details(peer: Any, ours: Any, case: SpeedCase, roofline: timing.Roofline) -> dict[str, Any]:
    details = {
        "ours_median_ms": ours.median * 1e3,
        "ours_rounds": ours.rounds,
        "threads": roofline.threads,
        "read_gbps": roofline.read_gbps,
    }
    if peer is not None:
        details |= {"peer_median_ms": peer.median * 1e3, "peer_rounds": peer.rounds}
    if case.isa is not None:
        details["isa"] = case.isa
    return details


@dataclass(frozen=True)
class Suite:
    """一个套件：名字、中文名、按环境给出各项的函数；model 是不随 --shape 变的模型，没有为 None。"""

    name: str
    title: str
    build: Callable[[Env], list[Case]]
    model: str | None = None


def register_suite(
    name: str, title: str, build: Callable[[Env], list[Case]], model: str | None = None
) -> None:
    """登记一个套件；同名的后来者取代先来者。"""
    _SUITES[name] = Suite(name, title, build, model)


def suite_names() -> list[str]:
    """可用的套件名。"""
    return sorted({*_MODULES, *_SUITES})


def find_suite(name: str) -> Suite:
    """按名字取套件；抛出 InputError：没有这个套件。"""
    if name not in _SUITES and name in _MODULES:
        importlib.import_module(_MODULES[name])
    if name not in _SUITES:
        raise InputError.expected("SUITE", "、".join(suite_names()) + " 之一", name)
    return _SUITES[name]
