"""MTP 的统计：训练时各深度的损失与接受率（在设备上累加，读取时才取回），生成时起草与接受的个数。"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


class DraftStatistics:
    """生成时的起草：从上次 ``reset()`` 起累计。

    属性：
        num_drafts: 起草过的（行，步）数。num_draft_tokens: 起草的词元数。
        num_accepted_tokens: 接受的词元数。steps: 全部（行，步）数，含没有起草的。
        last: 最近一次生成的 [B, 生成数] bool，哪些词元来自草稿；还没有生成过为 None。

    示例
    ----
    >>> found = DraftStatistics()
    >>> found.add(2, [2, 0])
    >>> found.acceptance, found.tokens_per_step
    ((0.5, 0.5), 2.0)
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """清零。"""
        self.last: Tensor | None = None
        self.steps = self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        self._drafted: list[int] = []
        self._accepted: list[int] = []

    def add(self, drafts: int, accepted: Sequence[int]) -> None:
        """一步：各行起草 drafts 个、接受 accepted 个。"""
        self.steps += len(accepted)
        self.num_accepted_tokens += sum(accepted)
        if not drafts:
            return
        self.num_drafts += len(accepted)
        self.num_draft_tokens += drafts * len(accepted)
        while len(self._drafted) < drafts:
            self._drafted.append(0)
            self._accepted.append(0)
        for depth in range(drafts):
            self._drafted[depth] += len(accepted)
            self._accepted[depth] += sum(count > depth for count in accepted)

    @property
    def acceptance(self) -> tuple[float, ...]:
        """起草到第 k 个时，前 k 个都被接受的比例。"""
        return tuple(a / d for a, d in zip(self._accepted, self._drafted, strict=True))

    @property
    def tokens_per_step(self) -> float:
        """每行每步得到的词元数；还没有生成过为 nan。"""
        return 1 + self.num_accepted_tokens / self.steps if self.steps else float("nan")


def prediction_metrics(model: nn.Module) -> dict[str, Any]:
    """model 里的 MTP 模块累计的指标；没有的项不给出。"""
    found: dict[str, Any] = {}
    for module in model.modules():
        trained = getattr(module, "statistics", None)
        if isinstance(trained, PredictionStatistics) and trained.losses:
            found["mtp_loss_per_depth"] = trained.losses
            found["mtp_acceptance_per_depth"] = trained.acceptance
        drafts = getattr(module, "draft_statistics", None)
        if isinstance(drafts, DraftStatistics) and drafts.steps:
            found["spec_decode_num_drafts"] = drafts.num_drafts
            found["spec_decode_num_draft_tokens"] = drafts.num_draft_tokens
            found["spec_decode_num_accepted_tokens"] = drafts.num_accepted_tokens
            found["spec_decode_acceptance_per_depth"] = drafts.acceptance or None
            found["spec_decode_tokens_per_step"] = drafts.tokens_per_step
    return found
