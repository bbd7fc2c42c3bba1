"""一步的全部张量计算：起草、主模型、核对、定下接受几个、截去没有接受的。

这里不读任何张量的内容：各行的个数都在设备上。读回来只有一次（:meth:`Found.read`），在一步的最后；读回之后用
:meth:`Step.settle` 让主机知道。所以一步可以录进 CUDA graph（:mod:`.graphs`）。
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_opt import ops
from deepseek_opt.generation.drafter import Drafter, NoDrafter, real
from deepseek_opt.generation.target import Target, last_of
from deepseek_opt.mtp.predictor import TokenPredictor


class Found(NamedTuple):
    """一步的结果。

    packed [R, 2 + D]：接受的个数、其后的词元、草稿；给了 ready 的已在送往主机的路上，等到 ready 才有。
    scores、logits [R, D + 1, V]：处理过的与原始的；重放 CUDA graph 得到的没有。
    drafting：起草的秒数，没有计时为 0。replayed：是否由重放得到。
    """

    packed: Tensor
    scores: Tensor | None = None
    logits: Tensor | None = None
    drafting: float = 0.0
    replayed: bool = False
    ready: Any = None

    def read(self) -> tuple[list[int], list[int], list[list[int]]]:
        """(接受的个数, 其后的词元, 草稿)；等设备做完，一步只这一次。抛出 InputError：有 NaN，指出行与位置。"""
        if self.ready is not None:
            self.ready.synchronize()
        rows = self.packed.tolist()
        accepted, following = [row[0] for row in rows], [row[1] for row in rows]
        drafts = [row[2:] for row in rows]
        for place in zip(*drafts, strict=True):
            ops.check_drafts(place)
        ops.check_verified(accepted, following)
        return accepted, following, drafts


class Step:
    """批里各行的状态与一步的计算；与何时结束、生成到哪里无关。

    ``last`` [R] 是各行最后一个词元，还没有进主模型的缓存。``alive`` [R] 为 0 的行不再前进（录好的 graph 不换行数，
    结束的行留在里面）；None 为都在前进。``vocabulary`` 是 logits 的宽，``noise`` 是采样的
    随机数，一种形状一块。
    """

    def __init__(self, predictor: TokenPredictor, rows: int, device: torch.device):
        self.adapter = predictor.adapter
        self.target = Target(predictor.adapter, rows, device)
        self.drafter = Drafter(predictor, rows, device) if predictor.layers else NoDrafter()
        self.last = torch.zeros(rows, dtype=torch.int64, device=device)
        self.alive: Tensor | None = None
        self.vocabulary = 0
        self.noise: dict[tuple[int, int, int], Tensor] = {}
        self.chooser: Any = None

    @property
    def rows(self) -> int:
        """批里的行数。"""
        return self.last.shape[0]

    def prefill(self, tokens: Tensor, lengths: Sequence[int]) -> Found:
        """提示 tokens [R, T]，各行前 lengths[r] 个有效；定下各行的第一个词元。"""
        hidden = self.target.run(tokens)
        counts = torch.tensor(lengths).to(tokens.device)
        self.target.keep(counts)
        logits = self.adapter.logits(last_of(hidden, counts))[:, None]
        drafts = tokens.new_empty(len(lengths), 0)
        self.vocabulary = logits.shape[-1]
        self.chooser.prepare(self, 0, range(self.rows))
        found = self.chooser.verify(logits, drafts)
        following = real(found.following)
        self._observe(hidden, tokens[:, 1:], counts - 1, following, counts)
        self.last.copy_(following)
        self.settle(lengths)
        return Found(_packed(found, drafts), found.scores, logits)

    def run(self, length: int, timed: bool = False) -> Found:
        """起草 length 个，核对；timed 时量起草的用时（要等设备）。之后要 :meth:`settle`。"""
        started = time.perf_counter()
        drafts = self.last.new_empty(self.rows, 0)
        if length:
            drafts = self.drafter.draft(length, self.chooser.pick)
            self.chooser.drafted(drafts)
        if timed:
            _wait(drafts)
        drafting = time.perf_counter() - started
        safe, tokens = real(drafts), self.last[:, None]
        hidden = self.target.run(torch.cat((tokens, safe), dim=1) if length else tokens)
        logits = self.adapter.logits(hidden)
        found = self.chooser.verify(logits, drafts)
        following, counts = real(found.following), self._advance(found.accepted)
        self.target.keep(counts)
        self._observe(hidden, safe, found.accepted, following, counts)
        self.last.copy_(following)
        return Found(_packed(found, drafts), found.scores, logits, drafting if timed else 0.0)

    def settle(self, counts: Sequence[int]) -> None:
        """各行前进了 counts[r] 个（停住的行是 0）：读回来了，让主机知道。"""
        self.target.settle(counts)
        self.drafter.settle(counts)

    def select(self, kept: Sequence[int]) -> None:
        """只留下 kept 各行。"""
        self.target.select(kept)
        self.drafter.select(kept)
        index = torch.tensor(kept, device=self.last.device)
        self.last = self.last[index]
        self.noise.clear()
        self.alive = None if self.alive is None else self.alive[index]

    def empty(self) -> None:
        """回到开头，缓冲区留着。"""
        self.target.empty()
        self.drafter.empty()
        self.alive = None

    def _advance(self, accepted: Tensor) -> Tensor:
        """各行前进几个 [R]：接受的与其后的一个，停住的行是 0。"""
        if self.alive is None:
            return accepted + 1
        # 没有 MTP 时总是接受 0 个，也没有谁留着这个张量：直接给出 alive
        return (accepted + 1) * self.alive if self.drafter.caches else self.alive

    def _observe(
        self, hidden: Tensor, known: Tensor, place: Tensor, following: Tensor, counts: Tensor
    ) -> None:
        """让起草的一侧记下：known [R, T - 1] 之后再接一列，各行的第 place [R] 个是 following [R]。"""
        if not self.drafter.caches:
            return
        tokens = torch.cat((known, known.new_zeros(self.rows, 1)), dim=1)
        tokens.scatter_(1, place[:, None], following[:, None])
        self.drafter.observe(hidden, tokens, counts)


def _packed(found: Any, drafts: Tensor) -> Tensor:
    return torch.cat((found.accepted[:, None], found.following[:, None], drafts), dim=1)


def _wait(x: Tensor) -> None:
    """等设备做完。"""
    if x.is_cuda:
        torch.cuda.current_stream(x.device).synchronize()
