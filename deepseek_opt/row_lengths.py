"""各行长度不同的缓存层的公共部分：长度、截断、取行、重排。潜变量层与 K、V 层都继承它。"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_opt.errors import InputError


# 容量按 64 个词元取整：一次增长至少够用 64 步，且缓冲区行首保持缓存行对齐。
ROUND = 64


class RowLengths:
    """缓冲区都是 [B, C, ...]，第 b 行的前 ``lengths[b]`` 个槽位有效；子类给出 buffers、replace。"""

    def __init__(self, name: str = ""):
        self.name = name
        self._offsets: Tensor | None = None  # [B] int64，每行下一个要写的槽位
        self._length = 0  # 各行长度的最大值
        self._ragged = False  # 各行长度是否可能不同
        self._untidy = False  # 短的行在 [长度, 最大长度) 的槽位是否可能未初始化

    # ---- 子类给出的 ----

    def buffers(self) -> list[Tensor]:
        """已分配的缓冲区，都是 [B, C, ...]；没有分配为空。"""
        raise NotImplementedError

    def replace(self, buffers: Sequence[Tensor] | None) -> None:
        """换成 buffers（次序同 :meth:`buffers`）；None 为释放。"""
        raise NotImplementedError

    # ---- 状态 ----

    @property
    def length(self) -> int:
        """各行长度的最大值；未写入过为 0。"""
        return self._length

    @property
    def lengths(self) -> Tensor | None:
        """每行长度 [B] int64（副本）；未写入过为 None。"""
        return None if self._offsets is None else self._offsets.clone()

    @property
    def offsets(self) -> Tensor | None:
        """每行下一个要写的槽位 [B] int64；未写入过为 None。"""
        return self._offsets

    @property
    def ragged(self) -> bool:
        """各行长度是否可能不同。"""
        return self._ragged

    @property
    def capacity(self) -> int:
        """已分配的槽位数 C。"""
        buffers = self.buffers()
        return buffers[0].shape[1] if buffers else 0

    def grown(self, length: int, limit: int | None) -> int:
        """要放得下 length 时分配多少：翻倍增长，按 ROUND 取整，不超过 limit。"""
        capacity = max(length, 2 * self.capacity or length + ROUND)
        capacity = -(-capacity // ROUND) * ROUND
        return capacity if limit is None else min(capacity, limit)

    def full(self, length: int, limit: int) -> InputError:
        """每行放不下 length 个词元的错误；limit 是 max_length。"""
        return InputError(
            f"{self.name}缓存放不下：需要每行 {length} 个词元，上限 max_length={limit}"
            f"（已有 {self._length}）"
        )

    @property
    def nbytes(self) -> int:
        """已分配的字节数。"""
        return sum(t.numel() * t.element_size() for t in self.buffers())

    def begin(self, rows: int) -> None:
        """刚分配：rows 行，都是空的。"""
        self._offsets = torch.zeros(rows, dtype=torch.int64)
        self._length, self._ragged, self._untidy = 0, False, False

    def advance(self, steps: int) -> int:
        """每行 steps 个新词元已写入缓冲区，:attr:`offsets` 已前移；返回写入后的最大长度。"""
        self._length += steps
        self._untidy = self._ragged
        return self._length

    def tidy(self) -> None:
        """要给外面看之前：短的行在 [长度, 最大长度) 的槽位清零，免得视图里出现未初始化的数。"""
        if not self._untidy:
            return
        self._untidy = False
        dead = torch.arange(self._length) >= self._offsets[:, None]
        for buffer in self.buffers():
            shape = (*dead.shape, *(1,) * (buffer.dim() - 2))
            buffer[:, : self._length].masked_fill_(dead.view(shape).to(buffer.device), 0)

    def visible(self, steps: int, window: int | None = None) -> Tensor:
        """写入 steps 个新词元之后，它们各看得见哪些槽位：bool [B, 1, steps, S]；window 为滑动窗口的宽。

        还没有写入过时各行相同，B 为 1。
        """
        begin = torch.zeros(1, dtype=torch.int64) if self.offsets is None else self.offsets
        place = begin[:, None] + torch.arange(steps)
        slots = torch.arange(self.length + steps)
        seen = slots <= place[..., None]
        if window is not None:
            seen &= slots > place[..., None] - window
        return seen[:, None]

    # ---- 整体操作 ----

    def crop(self, tokens: int) -> None:
        """tokens <= 0：每行去掉 -tokens 个词元；tokens > 0：只保留前 tokens 个。"""
        if not self.buffers():
            return
        shortest = int(self._offsets.min()) if self._ragged else self._length
        if -tokens > shortest:
            raise InputError(f"{self.name}缓存只有 {shortest} 个词元，不能去掉 {-tokens} 个")
        if tokens > 0:
            self._offsets.clamp_(max=tokens)
            self._length = min(self._length, tokens)
        else:
            self._offsets += tokens
            self._length += tokens
        if self._ragged:
            self._measure()

    def crop_rows(self, lengths: Sequence[int] | Tensor) -> None:
        """逐行截断到 lengths [B]；每个值须在 0 与该行现有长度之间。"""
        wanted = self.check_rows(lengths)
        self.set_rows(wanted, int(wanted.max()), int(wanted.min()))

    def check_rows(self, lengths: Sequence[int] | Tensor) -> Tensor:
        """能逐行截断到 lengths 则返回 int64 张量，不能则报错。"""
        if not self.buffers():
            raise InputError(f"{self.name}缓存还是空的，不能逐行截断")
        wanted = torch.as_tensor(lengths).to("cpu", torch.int64)
        if wanted.shape != self._offsets.shape:
            raise InputError(
                f"lengths 应有 {self._offsets.numel()} 个值，得到形状 {list(wanted.shape)}"
            )
        found, have = wanted.tolist(), self._offsets.tolist()  # 行数不多，比张量运算快
        if not all(0 <= new <= old for new, old in zip(found, have, strict=True)):
            raise InputError(f"lengths 应在 0 与各行现有长度 {have} 之间，得到 {found}")
        return wanted

    def set_rows(self, lengths: Tensor, longest: int, shortest: int) -> None:
        """:meth:`check_rows` 之后的截断；longest、shortest 是 lengths 的最大、最小值。"""
        self._offsets.copy_(lengths)
        self._length, self._ragged = longest, shortest != longest
        self._untidy = self._ragged

    def reorder(self, index: Tensor) -> None:
        """按 index [B] 重排各行（可重复）；只搬动真正变化的行。"""
        buffers = self.buffers()
        if not buffers:
            return
        index = self._check_index(index)
        if index.numel() != buffers[0].shape[0]:
            self.select(index)
            return
        moved = (index != torch.arange(index.numel(), device=index.device)).nonzero().flatten()
        if moved.numel() == 0:
            return
        source = index[moved]
        for buffer in buffers:
            part = buffer[:, : self._length]
            part[moved] = part[source]
        if self._ragged:
            self._offsets = self._offsets[index.cpu()]
            self._measure()

    def select(self, index: Tensor) -> None:
        """只保留 index 指出的行（可重复、可改变行数）。"""
        buffers = self.buffers()
        if not buffers:
            return
        index = self._check_index(index)
        self.replace([buffer.index_select(0, index) for buffer in buffers])
        self._offsets = self._offsets[index.cpu()]
        self._measure()

    def repeat_interleave(self, repeats: int) -> None:
        """每行重复 repeats 次。"""
        buffers = self.buffers()
        if buffers:
            rows = torch.arange(buffers[0].shape[0], device=buffers[0].device)
            self.select(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """清空并释放缓冲区。"""
        self.replace(None)
        self._offsets = None
        self._length, self._ragged, self._untidy = 0, False, False

    # ---- 内部 ----

    def _measure(self) -> None:
        """各行长度变动之后，重新算出最大长度、是否参差。"""
        self._length = int(self._offsets.max())
        self._ragged = int(self._offsets.min()) != self._length
        self._untidy = self._ragged

    def _check_index(self, index: Tensor) -> Tensor:
        buffer = self.buffers()[0]
        index = torch.as_tensor(index, device=buffer.device)
        if index.dtype == torch.bool:
            index = index.nonzero().flatten()
        index = index.to(torch.int64)
        rows = buffer.shape[0]
        if index.dim() != 1 or index.numel() == 0:
            raise InputError(f"{self.name}行下标应为非空的一维整数张量，得到 {list(index.shape)}")
        low, high = int(index.min()), int(index.max())
        if low < -rows or high >= rows:
            raise InputError(f"{self.name}行下标应在 0 与 {rows - 1} 之间，得到 {low} 到 {high}")
        return index % rows
