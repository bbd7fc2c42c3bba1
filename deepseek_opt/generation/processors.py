"""自己的模型生成时用的处理器与停止条件；写法同 transformers，不依赖它。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek_opt import ops


class MinNewTokens:
    """生成不到 count 个之前不许结束：结束符的分数为 −inf。width 为提示的长度。"""

    def __init__(self, width: int, count: int, eos: Sequence[int]):
        self.least, self.eos = width + count, list(eos)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] < self.least:
            scores = scores.clone()
            scores[:, self.eos] = -torch.inf
        return scores


class RepetitionPenalty:
    """已有的词元：正的分数除以 penalty，负的乘以它（CTRL，arXiv 1909.05858）；hidden [B, P] 处的填充不算。"""

    def __init__(self, penalty: float, hidden: Tensor | None):
        self.penalty, self.hidden = penalty, hidden

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows, size = scores.shape
        if self.hidden is not None:
            width = self.hidden.shape[1]
            input_ids = input_ids.clone()
            input_ids[:, :width].masked_fill_(self.hidden, size)
        seen = torch.zeros(rows, size + 1, dtype=torch.bool, device=scores.device)
        seen = seen.scatter_(1, input_ids, True)[:, :size]
        changed = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen, changed, scores)


class Warp:
    """温度、top-k、top-p、min-p 之后的对数概率。"""

    def __init__(self, options: dict[str, Any]):
        self.options = options

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return ops.sample_filter(scores, **self.options).log()


class StopStrings:
    """生成的文本里出现了 strings 之一就结束；tokenizer 有 ``decode(ids)``。"""

    def __init__(self, width: int, strings: Sequence[str], tokenizer: Any):
        self.width, self.strings, self.tokenizer = width, list(strings), tokenizer

    def __call__(self, input_ids: Tensor, scores: Any) -> list[bool]:
        texts = [self.tokenizer.decode(row[self.width :].tolist()) for row in input_ids]
        return [any(one in text for one in self.strings) for text in texts]
