"""MTP 训练时各深度的损失与接受率：在设备上累加，读取时才取回。"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PredictionStatistics:
    """各深度的损失之和、词元数、与主模型一致的个数；``reset()`` 清零。

    示例
    ----
    >>> import torch
    >>> found = PredictionStatistics()
    >>> found.add(1, torch.tensor(6.0), torch.tensor(3), torch.tensor(2))
    >>> found.losses, [round(rate, 2) for rate in found.acceptance]
    ((2.0,), [0.67])
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def add(self, depth: int, loss: Tensor, tokens: Tensor, accepted: Tensor | None) -> None:
        """加上一次：depth 从 1 起；loss 为各词元之和；accepted 为 None 表示没有主模型的输出可比。"""
        while len(self._sums) < depth:
            self._sums.append(torch.zeros(4, dtype=torch.float64, device=loss.device))
        same = torch.zeros_like(tokens) if accepted is None else accepted
        compared = torch.zeros_like(tokens) if accepted is None else tokens
        entry = torch.stack([v.detach().double() for v in (loss, tokens, same, compared)])
        self._sums[depth - 1] += entry.to(self._sums[depth - 1].device)

    def reset(self) -> None:
        """清零。"""
        self._sums = []

    @property
    def losses(self) -> tuple[float, ...]:
        """各深度每词元的平均损失；没有词元的深度为 nan。"""
        return tuple(float(s[0] / s[1]) for s in self._sums)

    @property
    def acceptance(self) -> tuple[float, ...]:
        """各深度的贪心预测与主模型对同一位置的贪心预测相同的比例；没有可比的为 nan。"""
        return tuple(float(s[2] / s[3]) for s in self._sums)


def prediction_metrics(model: nn.Module) -> dict[str, tuple[float, ...] | None]:
    """model 里的 MTP 模块累计的指标；没有 MTP 或还没有训练过的为 None。"""
    for module in model.modules():
        found = getattr(module, "statistics", None)
        if isinstance(found, PredictionStatistics) and found.losses:
            return {
                "mtp_loss_per_depth": found.losses,
                "mtp_acceptance_per_depth": found.acceptance,
            }
    return {"mtp_loss_per_depth": None, "mtp_acceptance_per_depth": None}
