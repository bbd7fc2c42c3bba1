"""没有 MTP 的主模型：循环里代替 TokenPredictor 的那一部分，从不起草。"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from deepseek_opt.generation.adaptive import DraftLength
from deepseek_opt.integrations.patch import is_taken
from deepseek_opt.metrics.prediction import DraftStatistics
from deepseek_opt.mtp.hf import HFAdapter


class PlainAdapter(HFAdapter):
    """只有主模型一侧的接口：不照着最后一层建 MTP 层，所以也不核对它。"""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._parts = _parts_of(model)

    def is_current(self) -> bool:
        """模型的各部分是不是还是建立时的那些。"""
        now = _parts_of(self.model)
        return len(now) == len(self._parts) and all(
            a is b for a, b in zip(now, self._parts, strict=True)
        )

    def blocks(self) -> list[nn.Module]:
        return []

    def _require_template(self) -> None:
        pass

    def _pairs(self, tokens: Tensor, seen: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            "词嵌入": (self.embedding(tokens), seen["embedded"]),
            "输出头": (self.head(seen["hidden"]), seen["logits"]),
        }


def altered(model: Any) -> str | None:
    """循环直接调用、因而会绕过的改动（钩子、改写的 forward、LoRA 等）；没有则为 None。"""
    decoder, embedding, head, *_, rotary = _parts_of(model)
    if _has_any_global_hook():
        return "有全局的模块钩子"
    if any(part is not None and is_taken(part) for part in (decoder, rotary)):
        return "基础模型或旋转模块上有钩子，或 forward 被改写"
    for part, kind, name in ((head, nn.Linear, "输出头"), (embedding, nn.Embedding, "词嵌入")):
        if not isinstance(part, kind) or type(part).forward is not kind.forward or is_taken(part):
            return f"{name}不是普通的 nn.{kind.__name__}，或有钩子"
    return None


def _parts_of(model: Any) -> tuple[Any, ...]:
    decoder = model.get_decoder()
    return (
        decoder,
        model.get_input_embeddings(),
        model.get_output_embeddings(),
        *(getattr(decoder, name, None) for name in ("layers", "norm", "rotary_emb")),
    )


class PlainPredictor:
    """:class:`~deepseek_opt.TokenPredictor` 里循环要用的那些；没有 MTP 层。"""

    layers: tuple = ()
    draft_vocabulary = None

    def __init__(self, model: nn.Module):
        self.adapter = PlainAdapter(model)
        self.draft_statistics = DraftStatistics()
        self.length = DraftLength(0, fixed=True)
