"""一批序列：词元、各行已生成的个数、哪些行还在批里。"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_opt.errors import InputError


class Rows:
    """[B, P + N] 的词元缓冲；第 b 行的前 P 列是提示（照用户给的样子，含左填充），其后是生成的。

    各行每步接受的个数不同，``counts`` 记着已生成几个；草稿先写在已生成的之后，不接受的会被盖掉。
    结束的行离开 ``active``，缓冲仍按原来的行号。生成的词元先记在主机上，要用到 :attr:`tokens` 时才一起写进去：
    缓冲在设备上，逐步写就要逐步从主机送。

    参数
    ----
    prompt : [B, P] int64。visible : [B, P] bool，False 为填充；None 为没有填充。
    max_new : 每行至多生成几个。spare : 末尾多留几列给草稿。pad : 结束之后补的词元。
    """

    def __init__(
        self, prompt: Tensor, visible: Tensor | None, max_new: int, spare: int, pad: int | None
    ):
        rows, self.width = prompt.shape
        if not rows or not self.width:
            raise InputError.expected("input_ids", "至少一行、每行至少一个词元", prompt)
        if visible is not None and not bool(visible.any(1).all()):
            row = int((~visible.any(1)).nonzero()[0])
            raise InputError(f"参数 attention_mask：第 {row} 行全是填充，没有可以续写的词元")
        self.visible, self.max_new, self.pad = visible, max_new, pad
        shape = (rows, self.width + max_new + spare)
        self._tokens = prompt.new_full(shape, 0 if pad is None else pad)
        self._tokens[:, : self.width] = prompt
        self._unwritten: tuple[list[int], list[int]] = ([], [])  # 还没有写进去的：(位置, 词元)
        self._generated: list[list[int]] = [[] for _ in range(rows)]
        self._drafted: list[list[bool]] = [[] for _ in range(rows)]
        self.counts = [0] * rows
        self.active = list(range(rows))

    @property
    def tokens(self) -> Tensor:
        """[B, P + N]，生成的都已写好。"""
        places, values = self._unwritten
        if places:
            self._unwritten = ([], [])
            both = torch.tensor((places, values)).to(self._tokens.device)
            self._tokens.view(-1)[both[0]] = both[1]
        return self._tokens

    @property
    def device(self) -> torch.device:
        """所在的设备。"""
        return self._tokens.device

    def packed(self) -> tuple[Tensor, list[int]]:
        """(提示 [B, 最长], 各行长度)：去掉填充，各行靠左，短的后面是填充的词元。"""
        prompt = self.tokens[:, : self.width]
        if self.visible is None:
            return prompt, [self.width] * len(self.counts)
        lengths = self.visible.sum(1).tolist()
        order = (~self.visible).to(torch.uint8).argsort(dim=1, stable=True)
        return prompt.gather(1, order)[:, : max(lengths)], lengths

    def room(self) -> int:
        """批里的行还能生成的个数的最大值。"""
        return self.max_new - min(self.counts[b] for b in self.active)

    def lengths(self) -> list[int]:
        """批里各行在缓冲里的长度（含填充）。"""
        return [self.width + self.counts[b] for b in self.active]

    def place(self, drafts: Tensor) -> None:
        """把草稿 [R, D] 写在批里各行已生成的之后，处理器要看。"""
        begins = torch.tensor(self._flat_begins(), device=drafts.device)
        places = begins[:, None] + torch.arange(drafts.shape[1], device=drafts.device)
        self.tokens.view(-1)[places.flatten()] = drafts.flatten()

    def commit(self, fresh: Sequence[Sequence[int]], drafted: Sequence[int]) -> None:
        """批里各行接着生成 fresh，各自的前 drafted 个来自草稿。"""
        places, values = self._unwritten
        for b, begin, tokens, count in zip(
            self.active, self._flat_begins(), fresh, drafted, strict=True
        ):
            places += range(begin, begin + len(tokens))
            values += tokens
            self._generated[b] += tokens
            self._drafted[b] += [True] * count + [False] * (len(tokens) - count)
            self.counts[b] += len(tokens)

    def leave(self, kept: Sequence[int]) -> None:
        """批里只留下 kept（批里的序号）。"""
        self.active = [self.active[i] for i in kept]

    def sequences(self, length: int) -> Tensor:
        """[B, P + length]；不够长的行补 pad。"""
        out = self.tokens[:, : self.width + length].clone()
        for b, count in enumerate(self.counts):
            if count < length:
                out[b, self.width + count :] = 0 if self.pad is None else self.pad
        return out

    def columns(self, begin: int, end: int) -> list[Tensor]:
        """第 begin 到 end 个生成的词元，各 [B]，在主机上（不等设备）；不够长的行是 pad。"""
        pad = 0 if self.pad is None else self.pad
        return [
            torch.tensor(
                [
                    own[i] if i < count else pad
                    for own, count in zip(self._generated, self.counts, strict=True)
                ]
            )
            for i in range(begin, end)
        ]

    def drafted(self, length: int) -> Tensor:
        """[B, length] bool：哪些词元来自草稿。"""
        padded = [(row + [False] * length)[:length] for row in self._drafted]
        return torch.tensor(padded, dtype=torch.bool).reshape(len(padded), length)

    def _flat_begins(self) -> list[int]:
        wide = self._tokens.shape[1]
        return [b * wide + self.width + self.counts[b] for b in self.active]
