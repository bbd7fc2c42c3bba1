"""没有 MTP 的主模型：循环里代替 TokenPredictor 的那一部分，从不起草。"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deepseek_opt.generation.adaptive import DraftLength
from deepseek_opt.metrics.prediction import DraftStatistics
from deepseek_opt.mtp.hf import HFAdapter


class PlainAdapter(HFAdapter):
    """只有主模型一侧的接口：不照着最后一层建 MTP 层，所以也不核对它。"""

    def blocks(self) -> list[nn.Module]:
        return []

    def _require_template(self) -> None:
        pass

    def _pairs(self, tokens: Tensor, seen: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            "词嵌入": (self.embedding(tokens), seen["embedded"]),
            "输出头": (self.head(seen["hidden"]), seen["logits"]),
        }


class PlainPredictor:
    """:class:`~deepseek_opt.TokenPredictor` 里循环要用的那些；没有 MTP 层。"""

    layers: tuple = ()
    draft_vocabulary = None

    def __init__(self, model: nn.Module):
        self.adapter = PlainAdapter(model)
        self.draft_statistics = DraftStatistics()
        self.length = DraftLength(0, fixed=True)
