"""有损的接受规则：多接受一些草稿，输出不再与逐个词元的相同；名字都以 lossy_ 开头，要用户自己选。"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek_opt.generation.choose import Verified
from deepseek_opt.generation.drafter import real

DEFAULT_THRESHOLD = 0.3


class Lossy:
    """包在无损的规则外面：无损的先定下，没有接受的草稿再按概率放行。

    ``lossy_typical``：p(x) ≥ min(ε, √ε · exp(−H(p)))（Medusa，arXiv 2401.10774）。
    ``lossy_relaxed``：p(x) ≥ ε · max p。ε 为 acceptance_threshold，缺省 0.3。
    p 是主模型在这个位置的概率（采样时已做过温度、top-p 等）。放行的草稿之后照无损的规则继续。
    """

    def __init__(self, chooser: Any, rule: str, threshold: float | None):
        self.chooser, self.rule = chooser, rule
        self.threshold = DEFAULT_THRESHOLD if threshold is None else threshold
        self.scores = chooser.scores
        self.limit, self.pick, self.finish = chooser.limit, chooser.pick, chooser.finish
        self.drafted, self.settle, self.prepare = chooser.drafted, chooser.settle, chooser.prepare

    @property
    def key(self) -> tuple:
        """同 :class:`~deepseek_opt.generation.choose.Greedy`。"""
        return (type(self), self.rule, self.threshold, self.chooser.key)

    @property
    def on_device(self) -> bool:
        """选词元是否只是设备上的计算。"""
        return self.chooser.on_device

    def verify(self, logits: Tensor, drafts: Tensor) -> Verified:
        """同无损的规则，接受得多一些。"""
        exact = self.chooser.verify(logits, drafts)
        if not drafts.shape[1]:
            return exact
        probs = self.chooser.scores.probabilities(exact.scores, self.chooser.rows)
        own = probs[:, :-1].gather(2, real(drafts)[..., None])[..., 0]
        passed = own >= self._least(probs[:, :-1])
        steps = torch.arange(drafts.shape[1], device=drafts.device)
        passed |= steps < exact.accepted[:, None]
        accepted = passed.cumprod(1).sum(1)
        races = exact.races[torch.arange(len(accepted), device=drafts.device), accepted]
        # 出了错的（负的）留着：读回来的地方报错
        following = torch.where(exact.following < 0, exact.following, races.argmax(-1))
        return exact._replace(accepted=accepted, following=following)

    def _least(self, probs: Tensor) -> Tensor:
        """各位置放行的最小概率。"""
        if self.rule == "lossy_relaxed":
            return self.threshold * probs.amax(-1)
        entropy = -(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(-1)
        return (self.threshold**0.5 * torch.exp(-entropy)).clamp_max(self.threshold)
