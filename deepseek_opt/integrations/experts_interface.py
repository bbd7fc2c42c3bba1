"""在 transformers 的 ExpertsInterface 里登记名为 ``deepseek_opt`` 的实现。

登记之后 ``model.set_experts_implementation("deepseek_opt")`` 即可用，不经过 ``optimize``；算法与
:class:`~.experts.ExpertsPatch` 是同一份。不能由本库计算的模块交给它自己的 eager 实现，第一次记一条警告。
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt.errors import UnsupportedError
from deepseek_opt.integrations import experts

NAME = "deepseek_opt"

logger = logging.getLogger("deepseek_opt")
_layouts: weakref.WeakKeyDictionary[nn.Module, tuple] = weakref.WeakKeyDictionary()
_warned: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def register() -> None:
    """登记；重复登记没有影响。抛出 UnsupportedError：transformers 没有 experts 接口。"""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise UnsupportedError("这个版本的 transformers 没有 ExpertsInterface；请升级") from error
    if NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """接口要求的签名：self 是 Experts 实例。"""
    layout, reason = _layout(self)
    reason = reason or _refusal(self, hidden_states)
    if reason is None:
        return experts.compute(self, layout, hidden_states, top_k_index, top_k_weights)
    _warn(self, reason)
    return experts.original_forward(self)(self, hidden_states, top_k_index, top_k_weights)


def _refusal(module: nn.Module, hidden: Tensor) -> str | None:
    return experts.input_reason(hidden) or experts.state_reason(module, hidden)


@torch.compiler.disable
def _layout(module: nn.Module) -> tuple[Any, str | None]:
    """每个实例只核对一次；激活换了就重新核对。"""
    key = (module.act_fn if hasattr(module, "act_fn") else None, type(module))
    found = _layouts.get(module)
    if found is None or found[0] != key:
        found = (key, experts.layout_of(module))
        _layouts[module] = found
    return found[1]


@torch.compiler.disable
def _warn(module: nn.Module, reason: str) -> None:
    seen = _warned.setdefault(module, set())
    if reason not in seen:
        seen.add(reason)
        logger.warning("%s 由原实现计算：%s", type(module).__name__, reason)
