"""把 transformers 的 logits 处理器用到各行长度不同的一批上：按长度分组，逐组调用。

处理器要的是同样长的 [B, L] 与 [B, V]。一步里第 r 行第 i 个位置的长度是 n_r + i；长度相同的放进同一次调用，
其余的行照样占着自己的行号（内容没有意义，结果不用），所以按行号区分的处理器也照常。末尾的重复惩罚、温度、
top-k、top-p、min-p 由融合的算子一次算完。
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek_opt import ops
from deepseek_opt.generation.rows import Rows

# 融合算子认得的，按它的次序：类名 -> (属性, 算子的参数)。
_FUSED = (
    ("RepetitionPenaltyLogitsProcessor", "penalty", "repetition_penalty"),
    ("TemperatureLogitsWarper", "temperature", "temperature"),
    ("TopKLogitsWarper", "top_k", "top_k"),
    ("TopPLogitsWarper", "top_p", "top_p"),
    ("MinPLogitsWarper", "min_p", "min_p"),
)

Processor = Callable[[Tensor, Tensor], Tensor]


class Scores:
    """一次生成的处理。

    参数
    ----
    processors : ``processor(input_ids [B, L], scores [B, V]) -> [B, V]``，按长度分组，依次调用。
    options : 在它们之后的 sample_filter 的参数，只用于采样。
    uncounted : 重复惩罚不算各行的前几个词元（填充）：[B] 张量、整数或 None。
    """

    def __init__(
        self,
        processors: Sequence[Processor],
        options: dict[str, Any] | None = None,
        uncounted: Any = None,
    ):
        self.general, self.options, self.uncounted = list(processors), options or {}, uncounted

    @classmethod
    def fused(cls, processors: Sequence[Processor]) -> Scores:
        """transformers 的一列处理器，末尾认得的改由 sample_filter 做。"""
        return cls(*_split(list(processors)))

    @property
    def reads_tokens(self) -> bool:
        """是否要看已有的词元与草稿。"""
        return bool(self.general) or "repetition_penalty" in self.options

    def process(self, logits: Tensor, rows: Rows) -> Tensor:
        """logits [R, P, V] -> 处理过的 fp32（没有处理器时原样）；草稿须已由 rows.place 写好。"""
        if not self.general:
            return logits
        out = logits.float()
        if out is logits:
            out = logits.clone()
        lengths = rows.lengths()
        positions = range(logits.shape[1])
        places: dict[int, list[tuple[int, int]]] = {}
        for r, length in enumerate(lengths):
            for i in positions:
                places.setdefault(length + i, []).append((r, i))
        for length in sorted(places):
            where = places[length]
            found = out.new_zeros(len(rows.counts), out.shape[2])
            ids = rows.tokens[:, :length].contiguous()
            for r, i in where:
                found[rows.active[r]] = out[r, i]
            for processor in self.general:
                found = processor(ids, found)
            for r, i in where:
                out[r, i] = found[rows.active[r]]
        return out

    def probabilities(self, scores: Tensor, rows: Rows) -> Tensor:
        """处理过的 [R, P, V] -> 采样用的概率 fp32。"""
        options = self._options(scores.shape[-1])
        token_ids = token_len = None
        if options.get("repetition_penalty", 1.0) != 1.0:
            token_ids = self._counted(rows)
            steps = torch.arange(scores.shape[1], device=scores.device)
            token_len = torch.tensor(rows.lengths(), device=scores.device)[:, None] + steps
        return ops.sample_filter(scores, token_ids, token_len, **options)

    def draft_probabilities(self, logits: Tensor) -> Tensor:
        """MTP 的 logits [R, V] -> 起草用的概率：同样的温度等，不做重复惩罚。"""
        options = self._options(logits.shape[-1])
        options.pop("repetition_penalty", None)
        return ops.sample_filter(logits, **options)

    def _options(self, vocabulary: int) -> dict[str, Any]:
        """sample_filter 的参数；top_k 不超过词表（transformers 的约定）。"""
        options = dict(self.options)
        if "top_k" in options:
            options["top_k"] = min(options["top_k"], vocabulary)
        return options

    def _counted(self, rows: Rows) -> Tensor:
        """批里各行的词元，不算的换成 -1。"""
        active = torch.tensor(rows.active, device=rows.tokens.device)
        found = rows.tokens[active]
        if self.uncounted is None:
            return found
        begin = self.uncounted
        if isinstance(begin, Tensor):
            begin = begin.to(found.device)[active][:, None]
        return found.masked_fill(torch.arange(found.shape[1], device=found.device) < begin, -1)


def _split(processors: list[Processor]) -> tuple[list[Processor], dict[str, Any], Any]:
    """从末尾起认出融合算子能做的：(其余的, 算子的参数, 重复惩罚不算的)。"""
    options: dict[str, Any] = {}
    uncounted = None
    place = len(_FUSED)
    rest = list(processors)
    while rest:
        found = _fused(rest[-1])
        if found is None or found[0] >= place:
            break
        place, name, value = found
        options[name] = value
        uncounted = getattr(rest.pop(), "prompt_ignore_length", uncounted)
    return rest, options, uncounted


def _fused(processor: Processor) -> tuple[int, str, Any] | None:
    kind = type(processor)
    if kind.__module__ != "transformers.generation.logits_process":
        return None
    for place, (name, attribute, option) in enumerate(_FUSED):
        if kind.__name__ == name:
            if not _plain(processor):
                return None
            return place, option, getattr(processor, attribute)
    return None


def _plain(processor: Any) -> bool:
    """没有改动融合算子不认得的选项（去掉的词元的分数、至少保留几个）。"""
    if getattr(processor, "filter_value", -float("inf")) != -float("inf"):
        return False
    return getattr(processor, "min_tokens_to_keep", 1) == 1
