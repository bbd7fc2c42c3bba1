"""各行长度不同的缓存层的公共部分：长度、截断、取行、重排。潜变量层与 K、V 层都继承它。

各行的长度在主机上只用 Python 的整数记（最长的一行，与每行比它短多少），检查与分配都看它，不读张量；核要的
``offsets`` 是缓冲区所在设备上的张量，随写入原地前移。所以设备上解码的一步既不等设备，也不往设备送东西，
张量的地址不变，可以录进 CUDA graph。
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_opt import log
from deepseek_opt.device_memory import capturing, is_out_of_memory, out_of_memory
from deepseek_opt.errors import InputError
from deepseek_opt.memo import TensorMemo


# 容量按 64 个词元取整：一次增长至少够用 64 步，且缓冲区行首保持缓存行对齐。
ROUND = 64


class Parts(NamedTuple):
    """一层要哪些缓冲区：rows 行，都在 device 上，各为 [rows, 容量, *尾部]；tails 为 (尾部, 类型)。"""

    rows: int
    device: torch.device
    tails: list[tuple[tuple[int, ...], torch.dtype]]

    def allocate(self, capacity: int, make: Any) -> list[Tensor]:
        """make 是 torch.empty 或 torch.zeros。"""
        return [
            make(self.rows, capacity, *tail, dtype=dtype, device=self.device)
            for tail, dtype in self.tails
        ]

    def nbytes(self, capacity: int) -> int:
        """一共多少字节。"""
        token = sum(math.prod(tail) * dtype.itemsize for tail, dtype in self.tails)
        return self.rows * capacity * token


# 一层在某一时刻：最长的一行，各行比它短多少，有没有分配过。每次前向每层记一次，所以只是元组。
Mark = tuple[int, list[int] | None, bool]
NEVER: Mark = (0, None, False)


class _Moves(NamedTuple):
    """一次取行：rows 是各行取自哪一行；index 是缓冲区设备上的同一份；改变了的行 moved 取自 source。"""

    rows: list[int]
    index: Tensor
    moved: Tensor
    source: Tensor


_moves = TensorMemo()


class RowLengths:
    """缓冲区都是 [B, C, ...]，第 b 行的前 ``lengths[b]`` 个槽位有效；子类给出 buffers、replace。"""

    def __init__(self, name: str = ""):
        self.name = name
        self._offsets: Tensor | None = None  # [B] int64，每行下一个要写的槽位，与缓冲区同设备
        self._length = 0  # 各行长度的最大值
        self._short: list[int] | None = None  # 各行比最长的短多少；一样长为 None
        self._untidy = False  # 短的行在 [长度, 最大长度) 的槽位是否可能未初始化
        self._joint: tuple[Tensor, Tensor] | None = (
            None  # 与别的层合在一起的 offsets，见 write_offsets
        )

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
        """每行长度 [B] int64（CPU 上的副本）；未写入过为 None。"""
        return None if self._offsets is None else torch.tensor(self.row_lengths())

    def row_lengths(self) -> list[int]:
        """每行长度；不读设备。"""
        if self._short is None:
            return [self._length] * (0 if self._offsets is None else self._offsets.shape[0])
        return [self._length - less for less in self._short]

    @property
    def offsets(self) -> Tensor | None:
        """每行下一个要写的槽位 [B] int64，与缓冲区同设备；未写入过为 None。"""
        return self._offsets

    @property
    def ragged(self) -> bool:
        """各行长度是否可能不同。"""
        return self._short is not None

    @property
    def capacity(self) -> int:
        """已分配的槽位数 C。"""
        buffers = self.buffers()
        return buffers[0].shape[1] if buffers else 0

    def grow(self, length: int, limit: int | None, parts: Parts, make: Any) -> None:
        """容量增长到至少 length（翻倍，按 ROUND 取整，不超过 limit），已有内容搬过去；``make`` 分配。

        内存放不下翻倍的就只取够用的；仍不够则抛出 DeviceMemoryError，什么都没有改动。
        """
        least = _rounded(length, limit)
        capacity = _rounded(max(length, 2 * self.capacity or length + ROUND), limit)
        try:
            fresh = parts.allocate(capacity, make)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error, parts.device):
                raise
            fresh = None
        if fresh is None:  # 出了 except，上面的分配已经归还
            fresh = self._allocate_least(least, parts, make)
        old = self.buffers()
        if not old:
            self.begin(parts.rows, parts.device)
        for new, before in zip(fresh, old, strict=bool(old)):
            new[:, : self._length] = before[:, : self._length]
        self.replace(fresh)

    def _allocate_least(self, capacity: int, parts: Parts, make: Any) -> list[Tensor]:
        try:
            return parts.allocate(capacity, make)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error, parts.device):
                raise
            shapes = "、".join(str([parts.rows, capacity, *tail]) for tail, _ in parts.tails)
            what = f"{self.name}缓存要增长到每行 {capacity} 个词元（{shapes}），原有内容没有改动"
            size = parts.nbytes(capacity)
            raise out_of_memory(what, parts.device, error, size) from error

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

    def begin(self, rows: int, device: torch.device) -> None:
        """刚分配在 device 上：rows 行，都是空的。"""
        self._offsets = torch.zeros(rows, dtype=torch.int64, device=device)
        self._length, self._short, self._untidy = 0, None, False

    def advance(self, steps: int) -> int:
        """每行 steps 个新词元已写入缓冲区，:attr:`offsets` 已前移；返回写入后的最大长度。

        重放 CUDA graph 里的一步之后也要调用：图只前移设备上的 offsets。
        """
        self._length += steps
        self._untidy = self._short is not None
        return self._length

    def mark(self) -> Mark:
        """此刻的长度；写入中途失败时 :meth:`unwind` 退回到这里。不读设备。"""
        return self._length, self._short, self._offsets is not None

    def unwind(self, mark: Mark) -> None:
        """退回 mark：这以来只写入过（没有换过行），才分配的释放。

        设备上的 :attr:`offsets` 也总是按 mark 重写：写了一半的一步可能已经前移了它，而主机还不知道。只写固定地址上的
        几个数，不另分配。正在录 CUDA graph 时设备上什么都没有做，不写。不抛出：调用者正要抛出的才是原因。
        """
        length, short, held = mark
        if not held:
            self.reset()
        elif self._offsets is not None:
            self.settle(length, short)
            try:
                self._rewrite_offsets()
            except RuntimeError as error:  # 设备已经出错：上面的内容反正不能用了
                log.LOGGER.error("%s缓存在设备上的位置没有退回：%s", self.name, error)

    def tidy(self) -> None:
        """要给外面看之前：短的行在 [长度, 最大长度) 的槽位清零，免得视图里出现未初始化的数。"""
        if not self._untidy:
            return
        self._untidy = False
        dead = torch.arange(self._length, device=self._offsets.device) >= self._offsets[:, None]
        for buffer in self.buffers():
            shape = (*dead.shape, *(1,) * (buffer.dim() - 2))
            as_bits(buffer)[:, : self._length].masked_fill_(dead.view(shape), 0)

    def visible(
        self, steps: int, window: int | None = None, device: torch.device | None = None
    ) -> Tensor:
        """写入 steps 个新词元之后，它们各看得见哪些槽位：bool [B, 1, steps, S]；window 为滑动窗口的宽。

        还没有写入过时各行相同，B 为 1，放在 device 上（缺省 CPU）；写入过则与缓冲区同设备。
        """
        begin = self._offsets
        if begin is None:
            begin = torch.zeros(1, dtype=torch.int64, device=device)
        place = begin[:, None] + torch.arange(steps, device=begin.device)
        slots = torch.arange(self.length + steps, device=begin.device)
        seen = slots <= place[..., None]
        if window is not None:
            seen &= slots > place[..., None] - window
        return seen[:, None]

    # ---- 整体操作 ----

    def crop(self, tokens: int) -> None:
        """tokens <= 0：每行去掉 -tokens 个词元；tokens > 0：只保留前 tokens 个。"""
        if not self.buffers():
            return
        rows = self.row_lengths()
        shortest = min(rows, default=self._length)
        if -tokens > shortest:
            raise InputError(f"{self.name}缓存只有 {shortest} 个词元，不能去掉 {-tokens} 个")
        if tokens > 0:
            self._offsets.clamp_(max=tokens)
            self._measure([min(n, tokens) for n in rows])
        else:
            self._offsets += tokens
            self._measure([n + tokens for n in rows])

    def crop_rows(self, lengths: Sequence[int] | Tensor) -> None:
        """逐行截断到 lengths [B]；每个值须在 0 与该行现有长度之间。"""
        wanted = self.check_rows(lengths)
        self.set_rows(*measured(wanted), to_device(wanted, self._offsets.device))

    def check_rows(self, lengths: Sequence[int] | Tensor) -> list[int]:
        """能逐行截断到 lengths 则返回各行的长度，不能则报错。"""
        if not self.buffers():
            raise InputError(f"{self.name}缓存还是空的，不能逐行截断")
        have = self.row_lengths()
        try:
            given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
            found = [int(n) for n in given]
        except TypeError:
            found = None
        if found is None or len(found) != len(have):
            shape = list(torch.as_tensor(lengths).shape)
            raise InputError(f"lengths 应有 {len(have)} 个值，得到形状 {shape}")
        if not all(0 <= new <= old for new, old in zip(found, have, strict=True)):
            raise InputError(f"lengths 应在 0 与各行现有长度 {have} 之间，得到 {found}")
        return found

    def set_rows(self, longest: int, short: list[int] | None, on_device: Tensor) -> None:
        """:meth:`check_rows` 之后的截断：:func:`measured` 的结果，与缓冲区设备上的各行长度。"""
        self._offsets.copy_(on_device)
        self.settle(longest, short)

    def settle(self, longest: int, short: list[int] | None) -> None:
        """主机上的长度改为 :func:`measured` 的结果；:attr:`offsets` 已在设备上改好（:func:`write_offsets`）。"""
        self._length, self._short = longest, short
        self._untidy = short is not None

    def empty(self) -> None:
        """各行长度都变成 0，缓冲区与 :attr:`offsets` 留着（地址不变）。"""
        if self._offsets is not None:
            self._offsets.zero_()
        self.settle(0, None)

    def reorder(self, index: Tensor) -> None:
        """按 index [B] 重排各行（可重复）；只搬动真正变化的行。"""
        buffers = self.buffers()
        if not buffers:
            return
        moves = self._check_index(index)
        if len(moves.rows) != buffers[0].shape[0]:
            self._take(moves)
            return
        if moves.moved.numel() == 0:
            return
        for buffer in buffers:
            part = as_bits(buffer)[:, : self._length]
            part[moves.moved] = part[moves.source]
        if self._short is not None:
            have = self.row_lengths()
            self._offsets.copy_(self._offsets[moves.index])
            self._measure([have[row] for row in moves.rows])

    def select(self, index: Tensor) -> None:
        """只保留 index 指出的行（可重复、可改变行数）。"""
        if self.buffers():
            self._take(self._check_index(index))

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
        self._length, self._short, self._untidy = 0, None, False

    # ---- 内部 ----

    def _rewrite_offsets(self) -> None:
        """设备上的 offsets 改成主机上的长度；录制时不写。"""
        if capturing(self._offsets.device):
            return
        if self._short is None:
            self._offsets.fill_(self._length)
        else:
            self._offsets.copy_(torch.tensor(self.row_lengths()))

    def _take(self, moves: _Moves) -> None:
        have = self.row_lengths()
        taken = [(as_bits(b).index_select(0, moves.index), b.dtype) for b in self.buffers()]
        offsets = self._offsets[moves.index]  # 要分配的都在改动之前
        self.replace([bits.view(dtype) for bits, dtype in taken])
        self._offsets = offsets
        self._measure([have[row] for row in moves.rows])

    def _measure(self, rows: list[int]) -> None:
        """各行长度变成 rows。"""
        self.settle(*measured(rows))

    def _check_index(self, index: Tensor) -> _Moves:
        """核对过的 index；它在设备上时要读回来一次，各层收到同一个对象时只读一次。"""
        buffer = self.buffers()[0]
        index = torch.as_tensor(index)
        key = (buffer.shape[0], buffer.device)
        return _moves.get(index, key, lambda: _as_moves(index, buffer, self.name))


def write_offsets(layers: Sequence[RowLengths], lengths: Tensor) -> None:
    """各层在设备上的长度都改成 lengths [B]，主机上的不变；不等设备。

    同一设备上各层的 offsets 第一次就合成一个 [层, B] 的张量，之后一次写完；地址从此不变，可以录进 CUDA graph。
    """
    for device in {layer._offsets.device: None for layer in layers}:
        _joined([one for one in layers if one._offsets.device == device]).copy_(lengths)


def _joined(layers: Sequence[RowLengths]) -> Tensor:
    """各层的 offsets 合成的 [层, B]；有一层的换过就重新合。"""
    first = layers[0]._joint
    if first is not None and first[0].shape[0] == len(layers):
        found = [layer._joint for layer in layers]
        if all(
            one is not None and one[0] is first[0] and one[1] is layer._offsets
            for one, layer in zip(found, layers, strict=True)
        ):
            return first[0]
    base = torch.stack([layer._offsets for layer in layers])
    for layer, row in zip(layers, base.unbind(0), strict=True):
        layer._offsets, layer._joint = row, (base, row)
    return base


def as_bits(buffer: Tensor) -> Tensor:
    """fp8 的看成字节：清零、搬动与类型无关，而 torch 对 fp8 只有很少的核。"""
    return buffer.view(torch.uint8) if buffer.dtype == torch.float8_e4m3fn else buffer


def _as_moves(index: Tensor, buffer: Tensor, name: str) -> _Moves:
    rows = buffer.shape[0]
    host = index.cpu()
    if host.dtype == torch.bool:
        host = host.nonzero().flatten()
    host = host.to(torch.int64)
    if host.dim() != 1 or host.numel() == 0:
        raise InputError(f"{name}行下标应为非空的一维整数张量，得到 {list(host.shape)}")
    low, high = int(host.min()), int(host.max())
    if low < -rows or high >= rows:
        raise InputError(f"{name}行下标应在 0 与 {rows - 1} 之间，得到 {low} 到 {high}")
    host = host % rows
    moved = (host != torch.arange(host.numel())).nonzero().flatten()
    on_device = (to_device(t, buffer.device) for t in (host, moved, host[moved]))
    return _Moves(host.tolist(), *on_device)


def _rounded(length: int, limit: int | None) -> int:
    capacity = -(-length // ROUND) * ROUND
    return capacity if limit is None else min(capacity, limit)


def measured(rows: list[int]) -> tuple[int, list[int] | None]:
    """(最长的一行, 各行比它短多少)；一样长时后者为 None。"""
    longest = max(rows, default=0)
    short = [longest - n for n in rows]
    return longest, short if any(short) else None


def to_device(values: Tensor | list[int], device: torch.device) -> Tensor:
    """主机上的几个整数放到 device 上，不等设备做完前面的事。"""
    return torch.as_tensor(values, dtype=torch.int64).to(device, non_blocking=True)
