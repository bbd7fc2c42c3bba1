"""训练批次：从 token 流取不重叠的窗口，可选在位置编号里留随机空隙。"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .architecture import MAX_LENGTH

# 取多少比例的行在位置编号里留空隙，让短窗口的训练也见到远距离的旋转角。
_GAP_SHARE = 0.25


class Batches:
    """无放回地遍历 token 流的窗口；每一遍的起点相位与顺序都重新随机。

    参数:
        stream: uint16 token 流。
        seed: 随机种子；续训时换一个，避免重复同样的顺序。
    """

    def __init__(self, stream: np.ndarray, seed: int):
        self.stream = stream
        self.rng = np.random.default_rng(seed)
        self.length = 0
        self.queue: list[int] = []

    def next(self, rows: int, length: int, gaps: bool) -> tuple[Tensor, Tensor, Tensor]:
        """返回 tokens [rows, length]、目标 [rows*length]、位置 [rows, length]（皆 int64）。"""
        if length != self.length or len(self.queue) < rows:
            self._refill(length)
        starts = [self.queue.pop() for _ in range(rows)]
        block = np.stack([self.stream[s : s + length + 1] for s in starts]).astype(np.int64)
        window = torch.from_numpy(block)
        positions = np.tile(np.arange(length), (rows, 1))
        if gaps:
            for row in np.flatnonzero(self.rng.random(rows) < _GAP_SHARE):
                positions[row] += self._offsets(length)
        tokens = window[:, :-1].contiguous()
        return tokens, window[:, 1:].reshape(-1), torch.from_numpy(positions)

    def _refill(self, length: int) -> None:
        self.length = length
        phase = int(self.rng.integers(length))
        starts = np.arange(phase, len(self.stream) - length - 1, length)
        self.queue = self.rng.permutation(starts).tolist()

    def _offsets(self, length: int) -> np.ndarray:
        """把窗口切成三段，段间跳过随机多的位置，总跨度不超过 MAX_LENGTH。"""
        offsets = np.zeros(length, dtype=np.int64)
        room = MAX_LENGTH - length
        for cut in self.rng.integers(1, length, size=2):
            skip = int(self.rng.integers(room + 1))
            offsets[cut:] += skip
            room -= skip
        return offsets
