"""MTP 一侧：把已确定的词元补进 MTP 的缓存，再一个接一个地起草。"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepseek_opt.cache_rows import crop_rows, empty_rows, select_rows, settle_rows
from deepseek_opt.generation.target import last_of, positions_after
from deepseek_opt.mtp.predictor import Prediction, TokenPredictor

# 不起草时积着的位置到这么多就先补进缓存，免得一直占着隐藏状态。
_MOST_PENDING = 1024

PickFn = Callable[[Tensor, int, int], Tensor]


@dataclass
class Window:
    """一段已确定而 MTP 还没有看过的：hidden [R, T, H]、其后的词元 tokens [R, T]、各行有效的个数 counts [R]。

    known 是主机上的 counts，读回结果之后才有。
    """

    hidden: Tensor
    tokens: Tensor
    counts: Tensor
    known: list[int] = field(default_factory=list)


class Drafter:
    """每个物理层一份缓存；第 k 个深度的一个条目由词元 t_τ 与上一深度在 τ − 1 的隐藏状态得到。

    一个物理层第一次用到时补上全部已确定的词元；反复使用最后一层的深度每次只接一个位置（同 vLLM）。
    由草稿得到的条目核对之前就截去，下一步用确定的词元与主模型的隐藏状态重算。
    """

    def __init__(self, predictor: TokenPredictor, rows: int, device: torch.device):
        self.predictor = predictor
        self.caches = [predictor.adapter.make_cache() for _ in predictor.layers]
        self.reached = torch.zeros(rows, dtype=torch.int64, device=device)  # known 在设备上的一份
        self.known = [0] * rows  # 已补到第几个词元（从 0 数起）
        self._carry: list[Tensor | None] = [None] * len(self.caches)
        self._windows: list[Window] = []
        self.pending = 0  # 落下几个位置（各行合计）；每步都起草时只有上一步的
        self._wide = 0  # 第一段之后各段的列数之和

    @property
    def behind(self) -> bool:
        """落下的是否不止上一步的。"""
        return len(self._windows) > 1 or not any(self.known)

    @property
    def window(self) -> Window | None:
        """落下的只有一段时的那一段。"""
        return self._windows[0] if len(self._windows) == 1 else None

    @property
    def newest(self) -> Window:
        """刚刚记下的一段。"""
        return self._windows[-1]

    def observe(self, hidden: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """记下已确定的：tokens[r, i] 是 hidden[r, i] 之后的词元，各行前 counts[r] 个有效；之后要 :meth:`settle`。"""
        if self._windows:
            self._wide += hidden.shape[1]
        self._windows.append(Window(hidden, tokens, counts))

    def settle(self, counts: Sequence[int]) -> None:
        """刚才 :meth:`observe` 的 counts 读回来了。"""
        self._windows[-1].known = list(counts)
        self.pending += sum(counts)
        if self._wide > _MOST_PENDING:
            self.draft(0)

    def select(self, kept: Sequence[int]) -> None:
        """只留下 kept 各行。"""
        index = torch.tensor(kept, device=self.reached.device)
        for cache in self.caches:
            select_rows(cache, kept)
        self._carry = [None if c is None else c[index] for c in self._carry]
        self.reached = self.reached[index]
        self.known = [self.known[i] for i in kept]
        self._windows = [
            Window(w.hidden[index], w.tokens[index], w.counts[index], [w.known[i] for i in kept])
            for w in self._windows
        ]
        self.pending = sum(sum(window.known) for window in self._windows)

    def empty(self) -> None:
        """各行都退回开头，缓冲区留着。"""
        for cache in self.caches:
            empty_rows(cache)
        self.reached.zero_()
        self.known = [0] * len(self.known)
        self._carry = [None] * len(self.caches)
        self._windows, self.pending, self._wide = [], 0, 0

    def draft(self, length: int, pick: PickFn | None = None) -> Tensor:
        """起草 length 个 [R, length]；``pick(归一化的隐藏状态 [R, H], 深度, i)`` 选出第 i 个。

        设备上选出的可能是负的（分数里有 NaN）：照样返回，读回来的地方报错。
        """
        window = self._merged()
        end, ends = self._end_of(window), self.reached + window.counts
        drafts: list[Tensor] = []
        last = self._physical(window, length, pick, drafts)
        if len(drafts) < length:
            self._repeat(last, end, ends, length, pick, drafts)
        self.reached.copy_(ends)
        for index in range(len(self.caches)):
            self._crop(index, end, ends)
        self.known = end
        return torch.stack(drafts, 1) if drafts else window.tokens.new_empty(len(end), 0)

    @contextmanager
    def recording(self, entry: Window | None) -> Iterator[None]:
        """块内的计算只是录下来：落下的换成 entry（不起草时为 None，不换），之后主机上的恢复原样。"""
        before = (list(self._windows), list(self.known), self.pending, self._wide)
        if entry is not None:
            known = self._windows[0].known
            self._windows = [Window(entry.hidden, entry.tokens, entry.counts, known)]
        try:
            yield
        finally:
            self._windows, self.known, self.pending, self._wide = before
            self._settle_caches()

    def replayed(self) -> None:
        """:meth:`draft` 由 CUDA graph 重放了：设备上的都已改好，这里只改主机的。"""
        self.known = self._end_of(self._take_windows()[0])
        self._settle_caches()

    # ---- 内部 ----

    def _settle_caches(self) -> None:
        """主机上各缓存的长度改成 known 的。"""
        for index, cache in enumerate(self.caches):
            settle_rows(cache, [max(n - index, 0) for n in self.known])

    def _end_of(self, window: Window) -> list[int]:
        return [n + c for n, c in zip(self.known, window.known, strict=True)]

    def _repeat(  # pylint: disable=too-many-arguments
        self,
        last: Tensor,
        end: list[int],
        ends: Tensor,
        length: int,
        pick: PickFn,
        drafts: list[Tensor],
    ) -> None:
        """反复用最后一个物理层，每次接一个位置，直到有 length 个草稿。"""
        index, done = len(self.caches) - 1, len(drafts)
        self._crop(index, [n + done - 1 for n in end], ends + done - 1)
        places = positions_after(ends + done, length - done)
        for depth in range(done + 1, length + 1):
            tokens, place = real(drafts[-1])[:, None], places[:, depth - done - 1 : depth - done]
            step = self._run(depth, index, tokens, last[:, None], place)
            last = step.hidden[:, 0]
            drafts.append(pick(step.normed[:, 0], depth, depth - 1))

    def _physical(
        self, window: Window, length: int, pick: PickFn | None, drafts: list[Tensor]
    ) -> Tensor | None:
        """依次用各物理层：补上窗口，各起草一个；返回最后一个草稿处的隐藏状态。"""
        hidden, skip, last = window.hidden, 0, None
        for index in range(len(self.caches)):
            tokens = _with_drafts(window, drafts)[:, skip:]
            positions = positions_after(self.reached + 1 + skip, tokens.shape[1])
            out = self._run(index + 1, index, tokens, hidden[:, : tokens.shape[1]], positions)
            if index < length:
                places = window.counts + (index - skip)
                last = last_of(out.hidden, places)
                drafts.append(pick(last_of(out.normed, places), index + 1, index))
            if index + 1 == len(self.caches):
                break
            carry = self._carry[index]
            self._carry[index] = last_of(out.hidden, window.counts - skip)
            if carry is None:
                hidden, skip = out.hidden, skip + 1
            else:
                hidden = torch.cat((carry[:, None], out.hidden), dim=1)
        return last

    def _run(
        self, depth: int, index: int, tokens: Tensor, hidden: Tensor, positions: Tensor
    ) -> Prediction:
        return self.predictor(
            tokens, hidden, depth=depth, position_ids=positions, cache=self.caches[index]
        )

    def _crop(self, index: int, known: Sequence[int], on_device: Tensor) -> None:
        """第 index 个物理层只留下到词元 known 为止的条目；它从第 index + 1 个词元开始。"""
        if index:
            on_device = (on_device - index).clamp_min(0)
        crop_rows(self.caches[index], [max(n - index, 0) for n in known], on_device)

    def _take_windows(self) -> list[Window]:
        windows, self._windows = self._windows, []
        self.pending = self._wide = 0
        return windows

    def _merged(self) -> Window:
        """合并积着的各段，各行有效的靠左。"""
        windows = self._take_windows()
        if len(windows) == 1:
            return windows[0]
        hidden = torch.cat([window.hidden for window in windows], dim=1)
        tokens = torch.cat([window.tokens for window in windows], dim=1)
        counts = sum(window.counts for window in windows)
        known = [sum(part) for part in zip(*(window.known for window in windows), strict=True)]
        if min(known) == hidden.shape[1]:
            return Window(hidden, tokens, counts, known)
        valid = torch.cat([_valid(window) for window in windows], dim=1)
        order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(known)]
        rows = torch.arange(len(known), device=hidden.device)[:, None]
        return Window(hidden[rows, order], tokens[rows, order], counts, known)


class NoDrafter:
    """没有 MTP：什么都不记，从不起草。"""

    caches: tuple = ()
    window, newest = None, None
    behind, pending = False, 0

    def observe(self, hidden: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """不必记。"""

    def settle(self, counts: Sequence[int]) -> None:
        """不必记。"""

    def select(self, kept: Sequence[int]) -> None:
        """没有各行的状态。"""

    def empty(self) -> None:
        """没有各行的状态。"""

    @contextmanager
    def recording(self, entry: Window | None) -> Iterator[None]:
        """没有要恢复的。"""
        del entry
        yield


def real(drafts: Tensor) -> Tensor:
    """能拿去取嵌入的草稿：设备上选不出的（负的，之后报错）换成 0。CPU 上选不出的当时就报错了。"""
    return drafts if drafts.is_cpu else drafts.clamp_min(0)


def _with_drafts(window: Window, drafts: Sequence[Tensor]) -> Tensor:
    """窗口的词元之后接上各行的草稿：[R, T + 草稿数]。"""
    if not drafts:
        return window.tokens
    rows, steps = window.tokens.shape
    out = window.tokens.new_zeros(rows, steps + len(drafts))
    out[:, :steps] = window.tokens
    place = window.counts[:, None] + torch.arange(len(drafts), device=out.device)
    return out.scatter_(1, place, real(torch.stack(list(drafts), 1)))


def _valid(window: Window) -> Tensor:
    steps = torch.arange(window.hidden.shape[1], device=window.counts.device)
    return steps[None] < window.counts[:, None]
