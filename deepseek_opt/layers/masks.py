"""识别 nn.MultiheadAttention 用户传来的掩码：因果、无遮挡、填充；其余说明原因后拒绝。"""

from __future__ import annotations

import weakref
from typing import Literal

import torch
from torch import Tensor

from deepseek_opt.errors import InputError, UnsupportedError

Kind = Literal["full", "causal"]

# 最近认过的一张掩码：同一次前向里各层收到的是同一个张量，不必每层都比较一遍 L x S。
_last: tuple[weakref.ref, int, tuple[int, int], Kind] | None = None


def attention_kind(attn_mask: Tensor | None, is_causal: bool, q_len: int, kv_len: int) -> Kind:
    """attn_mask 是无遮挡（``"full"``）还是因果（``"causal"``，右下对齐）。

    参数：attn_mask 为 None、[L, S] 或 [N * heads, L, S]，bool（True 为遮挡）或浮点（0 与 -inf）。
    抛出 :class:`UnsupportedError`：掩码是别的样子。
    """
    if attn_mask is None:
        if is_causal and q_len > kv_len:
            raise InputError(f"因果注意力要求 L <= S，得到 L = {q_len}、S = {kv_len}")
        return "causal" if is_causal else "full"
    if attn_mask.dim() not in (2, 3) or tuple(attn_mask.shape[-2:]) != (q_len, kv_len):
        raise InputError(
            f"attn_mask 应为 [{q_len}, {kv_len}] 或 [N * heads, {q_len}, {kv_len}]，"
            f"得到 {tuple(attn_mask.shape)}"
        )
    if torch.compiler.is_compiling():  # 编译时看不到掩码的内容，只能相信调用者的声明
        if is_causal:
            return "causal"
        raise UnsupportedError("torch.compile 中无法辨认 attn_mask 的内容：因果请传 is_causal=True")
    return _remembered(attn_mask, q_len, kv_len)


def _remembered(attn_mask: Tensor, q_len: int, kv_len: int) -> Kind:
    global _last  # pylint: disable=global-statement
    last, version = _last, _version(attn_mask)
    if last is not None and last[0]() is attn_mask and last[1:3] == (version, (q_len, kv_len)):
        return last[3]
    kind = _recognise(attn_mask, q_len, kv_len)
    _last = None if version < 0 else (weakref.ref(attn_mask), version, (q_len, kv_len), kind)
    return kind


def _version(mask: Tensor) -> int:
    """inference 张量没有版本号：返回 -1，不记忆。"""
    return -1 if mask.is_inference() else mask._version


def _recognise(attn_mask: Tensor, q_len: int, kv_len: int) -> Kind:
    hidden = hidden_positions(attn_mask, "attn_mask")
    if not bool(hidden.any()):
        return "full"
    future = torch.ones(q_len, kv_len, dtype=torch.bool, device=hidden.device)
    future = future.triu(1 + kv_len - q_len)
    if q_len <= kv_len and bool((hidden == future).all()):
        return "causal"
    raise UnsupportedError(
        "attn_mask 既不是全零也不是（右下对齐的）因果掩码；MLA 的核从不生成 L x S 的分数矩阵，"
        "不支持任意掩码。按词元遮挡请用 key_padding_mask"
    )


def hidden_positions(mask: Tensor, name: str) -> Tensor:
    """掩码 -> bool（True 为遮挡）。浮点掩码只接受 0 与 -inf（或该类型的最小有限值）。"""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise InputError(f"{name} 应为 bool 或浮点，得到 {mask.dtype}")
    hidden = mask <= torch.finfo(mask.dtype).min
    if torch.compiler.is_compiling():
        return hidden
    if not bool((hidden | (mask == 0)).all()):
        raise UnsupportedError(f"{name} 含有 0 与 -inf 以外的数：不支持在分数上加偏置")
    return hidden
