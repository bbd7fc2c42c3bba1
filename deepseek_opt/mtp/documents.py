"""打包的序列与填充：各位置属于哪个文档。"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_opt.errors import InputError

PADDING = -1


def document_runs(
    tokens: Tensor,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Tensor | None:
    """[B, T] 的文档号，填充处为 -1；每行都是一整个文档、没有填充时为 None。

    文档的分界：document_ids 变化处；没有给出时，position_ids 不再增加处（打包时每个文档从 0 重新编号）。
    不相邻的两段即使 document_ids 相同也是两个文档。

    示例
    ----
    >>> import torch
    >>> tokens = torch.zeros(1, 5, dtype=torch.long)
    >>> document_runs(tokens, torch.tensor([[0, 1, 2, 0, 1]]))
    tensor([[0, 0, 0, 1, 1]])
    """
    named = {"position_ids": position_ids, "document_ids": document_ids}
    for name, value in {**named, "attention_mask": attention_mask}.items():
        if value is not None and tuple(value.shape) not in ((1, tokens.shape[1]), tokens.shape):
            raise InputError.expected(name, f"形状 {list(tokens.shape)} 的张量", value)
    changes = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    if document_ids is not None:
        changes[:, 1:] = document_ids.expand_as(tokens).diff(dim=1) != 0
    elif position_ids is not None:
        changes[:, 1:] = position_ids.expand_as(tokens).diff(dim=1) <= 0
    if attention_mask is not None:
        kept = attention_mask.expand_as(tokens) != 0
        changes[:, 1:] |= kept.diff(dim=1)
        return (
            None if bool((kept.all() & ~changes.any())) else _numbered(changes).where(kept, PADDING)
        )
    return _numbered(changes) if bool(changes.any()) else None


def places(documents: Tensor) -> Tensor:
    """各位置在自己那一段里是第几个：[B, T]；段由相邻的相等文档号组成（填充也自成一段）。"""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents.diff(dim=1) != 0
    return index - index.where(first, 0).cummax(dim=1).values


def _numbered(changes: Tensor) -> Tensor:
    return changes.long().cumsum(dim=1)
