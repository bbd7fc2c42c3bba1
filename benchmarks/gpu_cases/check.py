"""计时之前的核对：结果与 fp64 的参考比较，不对的不计时。"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# 相对误差（L2）的上限：几个舍入单位；最大的单个误差容许到最大值的 WORST 倍上限。
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
WORST = 5.0
PEER_SLACK = 3.0  # 对照的中间结果（得分）存成半精度，误差比融合的核大

Pairs = Iterable[tuple[str, Tensor, Tensor]]  # (名字, 结果, 参考)


class WrongResult(Exception):
    """算出的结果与参考不符。"""


def largest_error(pairs: Pairs, slack: float = 1.0) -> float:
    """各对里最大的相对误差；抛出 WrongResult：有一对不符。"""
    return max(compare(out, expected, name, slack) for name, out, expected in pairs)


def compare(out: Tensor, expected: Tensor, name: str = "结果", slack: float = 1.0) -> float:
    """相对 L2 误差；抛出 WrongResult：形状不同、超出上限（由 out 的 dtype 定）或不是有限数。"""
    if out.shape != expected.shape:
        raise WrongResult(f"{name} 的形状应为 {list(expected.shape)}，实际是 {list(out.shape)}")
    reference = expected.double()
    gap = out.double() - reference
    error = (gap.norm() / reference.norm().clamp_min(1e-30)).item()
    worst = (gap.abs().max() / reference.abs().max().clamp_min(1e-30)).item()
    limit = LIMITS[out.dtype] * slack
    # 写成“不满足就抛”：NaN 也抛。
    if not (error <= limit and worst <= WORST * limit):
        raise WrongResult(
            f"{name} 与参考不符：相对误差 {error:.3g}（上限 {limit:g}），"
            f"最大误差与最大值之比 {worst:.3g}（上限 {WORST * limit:g}）"
        )
    return error


def finite(out: Tensor, name: str = "结果") -> None:
    """抛出 WrongResult：有 NaN 或无穷。"""
    if not torch.isfinite(out).all():
        raise WrongResult(f"{name} 里有 NaN 或无穷")
