"""训练 transformers 模型时把 MTP 的损失加进 ``model(...).loss``：DDP、Trainer、普通循环都一样。"""

from __future__ import annotations

import inspect
import logging
from typing import Any

from torch import Tensor, nn

from deepseek_opt.errors import InputError
from deepseek_opt.mtp.attach import predictor_of
from deepseek_opt.mtp.loss import MTPLoss, mtp_loss

logger = logging.getLogger("deepseek_opt")

_INPUTS = ("input_ids", "labels", "attention_mask", "position_ids", "num_items_in_batch")


class MTPTraining:
    """``with`` 块内，训练模式下带 labels 的前向，其 loss 加上 MTP 的损失。

    主模型只算一次：隐藏状态取自输出头（或最后的归一化）的输入。eval 模式与没有 labels 的前向不受影响。

    参数
    ----
    model : 装了 MTP 的 transformers 模型。
    step : 从第几步起（λ 的切换用）；之后每个优化器步把 ``.step`` 加一。

    属性 last 是最近一次的 :class:`~deepseek_opt.mtp.MTPLoss`。

    示例
    ----
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from deepseek_opt import MTPTraining, attach_mtp
    >>> sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64)
    >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).train()
    >>> _ = attach_mtp(model, fresh=True)
    >>> tokens = torch.randint(64, (2, 8))
    >>> with MTPTraining(model) as training:
    ...     model(input_ids=tokens, labels=tokens).loss.backward()
    >>> len(training.last.losses), model.mtp.layers[0].eh_proj.weight.grad is None
    (1, False)
    """

    def __init__(self, model: nn.Module, step: int = 0):
        self.predictor = predictor_of(model)
        self.model = self.predictor.adapter.model
        self.step = step
        self.last: MTPLoss | None = None
        self._handles: list[Any] = []
        self._hidden: Tensor | None = None
        self._active = self._warned = False

    def start(self) -> MTPTraining:
        """装上钩子；``with`` 进入时自动调用。抛出 InputError：已经在用。"""
        if self._handles:
            raise InputError("这个 MTPTraining 已经在用")
        captured = self.predictor.adapter.captured
        self._handles = [
            self.model.register_forward_pre_hook(self._before),
            captured.register_forward_pre_hook(self._capture),
            self.model.register_forward_hook(self._after, with_kwargs=True),
        ]
        return self

    def stop(self) -> None:
        """取下钩子；``with`` 离开时自动调用。"""
        for handle in self._handles:
            handle.remove()
        self._handles, self._hidden, self._active = [], None, False

    def __enter__(self) -> MTPTraining:
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def _before(self, module: nn.Module, _args: tuple) -> None:
        self._active, self._hidden = module.training, None

    def _capture(self, _module: nn.Module, args: tuple) -> None:
        if self._active:
            self._hidden = args[0]

    def _after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        hidden, active = self._hidden, self._active
        self._active, self._hidden = False, None  # 下面算 MTP 时输出头的调用不算
        if not active:
            return None
        bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        given = {**bound.get("kwargs", {}), **bound}
        found = {name: given.get(name) for name in _INPUTS}
        if found["labels"] is None:
            if not self._warned:
                logger.warning("训练模式的前向没有 labels，MTP 的损失没有加上")
            self._warned = True
            return None
        self.last = self._loss(found, hidden, output)
        if isinstance(output, tuple):
            return (output[0] + self.last.loss, *output[1:])
        output.loss = output.loss + self.last.loss
        return output

    def _loss(self, found: dict[str, Any], hidden: Tensor | None, output: Any) -> MTPLoss:
        tokens = found["input_ids"]
        if tokens is None:
            raise InputError("MTP 的训练需要 input_ids（不能只给 inputs_embeds）")
        if hidden is None or hidden.shape[:2] != tokens.shape:
            raise InputError("MTP 的训练需要每个位置的隐藏状态：请不要给 logits_to_keep")
        return mtp_loss(
            self.predictor,
            tokens,
            hidden,
            found["labels"],
            logits=output[1] if isinstance(output, tuple) else output.logits,
            attention_mask=found["attention_mask"],
            position_ids=found["position_ids"],
            step=self.step,
            num_items=found["num_items_in_batch"],
        )
