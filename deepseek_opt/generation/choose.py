"""由 logits 选词元：起草时选草稿，核对时定接受几个与其后的一个。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_opt import ops
from deepseek_opt.generation.rows import Rows
from deepseek_opt.generation.scores import Scores
from deepseek_opt.mtp.predictor import TokenPredictor
from deepseek_opt.row_lengths import to_device

# 采样的随机数按位置存着，等最慢的行用到；至多占这么多字节，领先太多的行先不起草。
NOISE_BYTES = 256 << 20
_TINY = torch.finfo(torch.float32).tiny


class Verified(NamedTuple):
    """核对的结果：各行接受的草稿数 [R] 与其后的词元 [R]，都还在设备上；following 为负是出错，见 mtp_verify_greedy。

    scores [R, D + 1, V] 是处理过的分数；races 的 argmax 是各位置自己的词元。
    """

    accepted: Tensor
    following: Tensor
    scores: Tensor
    races: Tensor


class Greedy:
    """贪心：草稿等于 argmax 就接受，结果与逐个词元的贪心解码相同。"""

    def __init__(self, scores: Scores, rows: Rows, predictor: TokenPredictor):
        self.scores, self.rows, self.predictor = scores, rows, predictor

    def limit(self, length: int) -> int:
        """这一步至多起草几个。"""
        return length

    def drafted(self, drafts: Tensor) -> None:
        """草稿 [R, D] 起好了，还没有核对。"""
        if self.scores.reads_tokens:
            self.rows.place(drafts)

    def prepare(self, step: Any, length: int, live: Sequence[int], ahead: int = 0) -> None:
        """step 就要起草 length 个并核对；批里的 live 各行还在前进，前面有 ahead 个词元还没有读回。"""

    def settle(self) -> None:
        """这一步的结果读回来了。"""

    @property
    def key(self) -> tuple:
        """决定怎样选的一切：相同的可以接着用录好的 CUDA graph。"""
        return (type(self),)

    @property
    def on_device(self) -> bool:
        """选词元是否只是设备上的计算：不看已有的词元，不调用别人的处理器。"""
        return not self.scores.reads_tokens

    def pick(self, normed: Tensor, depth: int, place: int) -> Tensor:
        """depth 深度归一化的隐藏状态 [R, H] -> 第 place 个草稿 [R]。"""
        del place
        return self.predictor.draft_tokens(normed, depth)

    def verify(self, logits: Tensor, drafts: Tensor) -> Verified:
        """logits [R, D + 1, V]，drafts [R, D]。"""
        scores = self.scores.process(logits, self.rows)
        return _verified(scores, scores, drafts)

    def finish(self, length: int) -> None:
        """各行都结束了，最长的生成了 length 个。"""


class Sampled:
    """采样，与 transformers 的 ``do_sample=True`` 在同一随机种子下逐个词元相同。

    torch.multinomial 抽一个词元是取 argmax(p / E)，E 为一批指数分布的随机数。这里第 g 个生成的词元用的
    E 就是逐个词元生成时第 g 步的那一批，草稿等于 argmax(p / E) 就接受：结果只由 p 与 E 决定，与起草几个、
    接受几个、线程数都无关，分布恰好是 p。草稿用同一批 E 由 MTP 的分布抽，所以常常相同。
    """

    def __init__(
        self,
        scores: Scores,
        rows: Rows,
        predictor: TokenPredictor,
        generator: torch.Generator | None = None,
    ):
        self.scores, self.rows, self.predictor = scores, rows, predictor
        self.generator = generator or default_generator(rows.device)
        self._block: Tensor | None = None  # 这一步要用的 [R, D + 1, V]
        self._noise: list[Tensor] = []  # 从第 _first 个词元起，各 [B, V]
        self._states: list[Tensor] = []
        self._first = 0

    def limit(self, length: int) -> int:
        """随机数不超过 NOISE_BYTES。"""
        counts = [self.rows.counts[b] for b in self.rows.active]
        if not self._noise:
            return length
        most = max(NOISE_BYTES // (self._noise[0].numel() * 4), 1)
        return max(0, min(length, most - 1 - (max(counts) - min(counts))))

    @property
    def key(self) -> tuple:
        """同 :class:`Greedy`。"""
        return (type(self), *sorted(self.scores.options.items()))

    @property
    def on_device(self) -> bool:
        """同 :class:`Greedy`；随机数在一步之前取好。"""
        return not self.scores.reads_tokens

    def prepare(self, step: Any, length: int, live: Sequence[int], ahead: int = 0) -> None:
        """取好这一步的随机数，放在 step.noise 里固定的地址上（录好的 CUDA graph 从那里读）。"""
        shape = (step.rows, length + 1, step.vocabulary)
        block = step.noise.get(shape)
        if block is None:
            block = step.noise[shape] = torch.ones(shape, device=self.rows.device)
        block[to_device(torch.tensor(live), block.device)] = self._for_rows(
            length + 1, step.vocabulary, ahead
        )
        self._block = block

    def drafted(self, drafts: Tensor) -> None:
        """草稿 [R, D] 起好了，还没有核对。"""
        if self.scores.reads_tokens:
            self.rows.place(drafts)

    def pick(self, normed: Tensor, depth: int, place: int) -> Tensor:
        """归一化的隐藏状态 [R, H] -> 草稿 [R]：由 MTP 的分布，用第 place 个位置的随机数抽。"""
        probs = self.scores.draft_probabilities(self.predictor.draft_logits(normed, depth))
        return (probs / self._block[:, place]).argmax(-1)

    def verify(self, logits: Tensor, drafts: Tensor) -> Verified:
        """logits [R, D + 1, V]，drafts [R, D]。"""
        scores = self.scores.process(logits, self.rows)
        probs = self.scores.probabilities(scores, self.rows)
        return _verified(scores, probs / self._block, drafts)

    def finish(self, length: int) -> None:
        """随机数发生器停在逐个词元生成会停的地方。"""
        used = length - 1 - self._first
        if 0 <= used < len(self._states):
            self.generator.set_state(self._states[used])

    def _for_rows(self, steps: int, vocabulary: int, ahead: int) -> Tensor:
        """还在前进的各行从第 counts + ahead 个词元起 steps 个位置的随机数 [R, steps, V]。"""
        active, device = self.rows.active, self.rows.device
        begins = [self.rows.counts[b] + ahead for b in active]
        while self._first + len(self._noise) < max(begins) + steps:
            noise = torch.empty(len(self.rows.counts), vocabulary, device=device)
            noise.exponential_(1, generator=self.generator).clamp_min_(_TINY)  # 0 会得 0 / 0
            self._noise.append(noise)
            self._states.append(self.generator.get_state())
        used = self._noise[min(begins) - self._first : max(begins) - self._first + steps]
        late = torch.tensor([n - min(begins) for n in begins])[:, None] + torch.arange(steps)
        index = to_device(
            torch.stack((late, torch.tensor(active)[:, None].expand_as(late))), device
        )
        return torch.stack(used)[index[0], index[1]]

    def settle(self) -> None:
        """这一步的结果读回来了：最慢的行已经用过的随机数不再留。"""
        if not self.rows.active:
            return
        oldest = min(self.rows.counts[b] for b in self.rows.active)
        drop = oldest - self._first
        if drop > 0:
            del self._noise[:drop], self._states[:drop]
            self._first = oldest


def _verified(scores: Tensor, races: Tensor, drafts: Tensor) -> Verified:
    return Verified(*ops.mtp_verify_greedy(races, drafts), scores, races)


def default_generator(device: torch.device) -> torch.Generator:
    """device 上缺省的随机数发生器。"""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator
