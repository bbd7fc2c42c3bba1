"""起草几个：由实测的每步用时与接受率选，不合算就退回逐个词元。

一步用时 t(R, D) 与各深度的接受率 a₁, a₂…（前面都接受时第 k 个被接受的比例）都是边生成边量的，
一步得到的词元数的期望是 E(D) = 1 + a₁ + a₁a₂ + …，取 E(D) / t(R, D) 最大的 D。R 是批里的行数，
行数相近的共用一组读数。一批要等最慢的行，所以 E 按它的接受率算。MTP 落下的位置要先补上，补的用时（按词元量）多于
剩下的词元能省的，也不起草。结果不随 D 变（见 ``choose.py``），所以按时间选不影响生成的内容。
"""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

MAX_DRAFTS = 8
_SAMPLES = 7  # 每个 (行数, D) 留最近几步的用时，取中位数：一次被打断的步不算数
_FIRST = ((0, 2), (1, 1))  # 还没有读数时先量的 (D, 步数)；更大的 D 由外推，看来合算才试
# 起草有一份不随 D 变的用时，由 0 与 1 外推，多起草几个显得比实际贵：1 个不到这么多倍的用时就再量一次 _SECOND 个。
_SECOND, _WORTH = 3, 3.0
_PROBE_EVERY = 96  # 每隔几步重量一次没有选的：上下文变长，用时也变
_PROBE_RARELY = 32  # 一直不合算时间隔逐次加倍，至多这么多倍：一次要补上落下的位置，不便宜
_SHORTEST = 4  # 剩的词元更少时不为起草补落下的位置：补完就到头，量不出也省不下
_MANY = 64  # 补这么多位置以上，用时才看得出每个位置多少
_MARGIN = 1.01  # 起草要比不起草至少快这么多
_DECAY = 0.995  # 接受率按起草的行数衰减：约记得最近 200 次
_PRIOR = 0.5  # 没有读数时的接受率
_LEAST_TRIES = 3.9  # 起草过（衰减后）约 4 次才算有读数


class Acceptance:
    """各深度的接受率，随新读数衰减。"""

    def __init__(self) -> None:
        self._hits = [0.0] * MAX_DRAFTS
        self._tries = [0.0] * MAX_DRAFTS

    def add(self, drafted: int, accepted: Sequence[int]) -> None:
        """各行起草了 drafted 个、接受了 accepted 个。"""
        for count in accepted:
            for k in range(min(count + 1, drafted)):
                self._tries[k] = self._tries[k] * _DECAY + 1
                self._hits[k] = self._hits[k] * _DECAY + (count > k)

    @property
    def unknown(self) -> bool:
        """读数还太少。"""
        return self._tries[0] < _LEAST_TRIES

    def rate(self, depth: int) -> float:
        """前面的都接受时，第 depth 个（从 0 数）被接受的比例；没有读数的同前一个。"""
        if self._tries[depth] < _LEAST_TRIES:
            return self.rate(depth - 1) if depth else _PRIOR
        return self._hits[depth] / self._tries[depth]

    def expected(self, drafts: int, scale: float = 1.0) -> float:
        """一步得到的词元数的期望；scale 是这一行的接受率相对全体的。"""
        total, product = 1.0, 1.0
        for depth in range(drafts):
            product *= min(self.rate(depth) * scale, 1.0)
            total += product
        return total


class Times:
    """一种行数之下，各 D 每步的用时。"""

    def __init__(self) -> None:
        self._recent: dict[int, deque[float]] = {}
        self.steps = 0
        self.next_probe, self.gap = _PROBE_EVERY, _PROBE_EVERY
        self.probing: int | None = None

    def add(self, drafts: int, seconds: float) -> None:
        """记一步。"""
        self._recent.setdefault(drafts, deque(maxlen=_SAMPLES)).append(seconds)
        self.steps += 1

    def count(self, drafts: int) -> int:
        """D = drafts 有几步的读数。"""
        return len(self._recent.get(drafts, ()))

    def estimate(self, drafts: int) -> float:
        """D = drafts 一步的用时：有读数的取（偏小的）中位数，没有的按线性内插、外推。"""
        known = {d: statistics.median_low(v) for d, v in self._recent.items()}
        if drafts in known:
            return known[drafts]
        below = max((d for d in known if d < drafts), default=None)
        above = min((d for d in known if d > drafts), default=None)
        if below is None or above is None:
            ordered = sorted(known)
            if len(ordered) == 1:
                return known[ordered[0]]
            below, above = ordered[:2] if below is None else ordered[-2:]
        slope = (known[above] - known[below]) / (above - below)
        return max(known[below] + slope * (drafts - below), 1e-9)


class DraftLength:
    """选每步起草几个；同一个模型的各次生成共用，可在多个线程里用。

    参数
    ----
    longest : 至多几个。fixed : 每步都恰好这么多，不选。
    """

    def __init__(self, longest: int = MAX_DRAFTS, fixed: bool = False):
        self.longest = longest
        self.fixed = fixed
        self.acceptance = Acceptance()
        self._times: dict[int, Times] = {}
        self._catch_up = 0.0  # 补上一个位置的秒数
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return DraftLength, (self.longest, self.fixed)

    def choose(
        self, rows: int, remaining: int = 1 << 30, pending: int = 0, scale: float = 1.0
    ) -> int:
        """这一步起草几个。

        参数
        ----
        rows : 批里的行数。remaining : 最慢的行还要几个词元。pending : MTP 落下几个位置（各行合计）。
        scale : 最慢的行的接受率相对全体的。
        """
        if self.fixed:
            return self.longest
        with self._lock:
            times = self._times.setdefault(_bucket(rows), Times())
            if pending and remaining < _SHORTEST:
                return 0
            first = self._first(times)
            if first is not None:
                return first
            if times.probing is not None:  # 直到量出它的用时
                return times.probing
            best, gain = self._best(times, scale)
            if gain * remaining < self._catch_up * pending:
                best = 0
            if times.steps >= times.next_probe:
                best = self._probe(times, best)
            return best

    def record(
        self, rows: int, drafts: int, seconds: float | None, accepted: Sequence[int]
    ) -> None:
        """一步的结果；这一步先补上了落下的位置时 seconds 为 None，用时不算数。"""
        with self._lock:
            self.acceptance.add(drafts, accepted)
            if seconds is not None:
                times = self._times.setdefault(_bucket(rows), Times())
                times.add(drafts, seconds)
                times.probing = None

    def record_catch_up(self, positions: int, seconds: float) -> None:
        """补上 positions 个位置（连同起草）的用时；很少时几乎全是起草的，不算数。"""
        if positions < _MANY:
            return
        with self._lock:
            each = seconds / max(positions, 1)
            self._catch_up = each if not self._catch_up else 0.7 * self._catch_up + 0.3 * each

    def _first(self, times: Times) -> int | None:
        """还没有读数时先量的；够了为 None。"""
        for drafts, wanted in _FIRST:
            drafts = min(drafts, self.longest)
            if times.count(drafts) < wanted:
                return drafts
        second = min(_SECOND, self.longest)
        if not times.count(second) and times.estimate(1) < _WORTH * times.estimate(0):
            return second
        if not self.acceptance.unknown:
            return None
        # 量过的里，全都接受就最合算的，用它弄清接受率
        tried = [d for d in (0, 1, second) if times.count(d)]
        return min(tried, key=lambda d: times.estimate(d) / (d + 1)) or None

    def _best(self, times: Times, scale: float) -> tuple[int, float]:
        """(最划算的 D, 每个词元省的秒数)；不起草为 (0, 0)。"""
        plain = times.estimate(0)
        cost = {
            d: times.estimate(d) / self.acceptance.expected(d, scale)
            for d in range(1, self.longest + 1)
        }
        best = min(cost, key=cost.__getitem__, default=0)
        if not best or cost[best] * _MARGIN > plain:
            return 0, 0.0
        return best, plain - cost[best]

    def _probe(self, times: Times, best: int) -> int:
        """轮流重量：不起草、少一个、多一个；不起草时只偶尔试一个。"""
        if best:
            times.gap = _PROBE_EVERY
            turn = times.steps // _PROBE_EVERY % 3
            found = (0, best - 1 if best > 1 else 1, best + 1)[turn]
        else:
            times.gap = min(2 * times.gap, _PROBE_RARELY * _PROBE_EVERY)
            found = 1
        times.next_probe = times.steps + times.gap
        times.probing = min(found, self.longest)
        return times.probing


def _bucket(rows: int) -> int:
    """行数相近的一组：1、2、3–4、5–8、9–16……"""
    return (rows - 1).bit_length()
