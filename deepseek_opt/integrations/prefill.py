"""基础模型的分块预填充：长输入分几段依次送入，激活的峰值只随段长、不随输入长度增长。

因果模型里前一段不看后一段，潜变量留在缓存里，所以结果与一次送入相同。只在不求导时分块；
不能分块的调用（要隐藏状态、注意力权重、4 维掩码、打包序列等）原样交给原 forward。
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek_opt.cache_rows import CachePoint
from deepseek_opt.device_memory import shortage
from deepseek_opt.errors import DeviceMemoryError
from deepseek_opt.integrations.patch import Patch

# 自动分块时每段的词元数（各行之和）：矩阵乘法在此长度已到峰值，再长只增加内存。
AUTO_TOKENS = 2048
_MIN_ROW = 64
_ALLOWED = frozenset(
    {
        "input_ids",
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "use_cache",
        "output_hidden_states",
        "output_attentions",
        "output_router_logits",
        "return_dict",
    }
)
_RECORDS = ("output_hidden_states", "output_attentions", "output_router_logits")


class PrefillPatch(Patch):
    """基础模型（直接含有各层的 PreTrainedModel）的 forward。"""

    kind = "prefill"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs.update(zip(self.__signature__.parameters, args, strict=False))
        point = CachePoint(kwargs.get("past_key_values"))
        try:
            return self._forward(kwargs)
        except BaseException as error:  # 连同 Ctrl-C：写了一部分层的缓存之后接着用，结果是错的
            held = point.nbytes
            point.restore()
            better = self._explained(error, held, _source(kwargs))
            if better is None:
                raise
            raise better from error

    def _explained(self, error: BaseException, held: int, source: Any) -> DeviceMemoryError | None:
        """内存不够时说明是哪个前向；已经说明了的、别的错误为 None。"""
        if not isinstance(source, Tensor):
            return None
        what = (
            f"{self.name or type(self.module).__name__} 的前向，输入 {list(source.shape)}，"
            f"缓存 {held} 字节，已退回调用之前"
        )
        return shortage(what, source.device, error)

    def _forward(self, kwargs: dict[str, Any]) -> Any:
        source = _source(kwargs)
        if torch.is_grad_enabled() or not isinstance(source, Tensor) or source.dim() < 2:
            return self.call_original(**kwargs)
        if source.shape[1] <= _MIN_ROW:
            return self.call_original(**kwargs)
        self.runtime.refresh()
        batch, steps = source.shape[:2]
        past = _past(kwargs.get("past_key_values"))
        chunk = self._chunk(batch, steps, past, source)
        if chunk >= steps or not self._can_split(kwargs, batch, steps, past):
            return self.call_original(**kwargs)
        return self._in_chunks(kwargs, steps, past, chunk)

    def _chunk(self, batch: int, steps: int, past: int, source: Tensor) -> int:
        """每段每行的词元数；放不进内存预算时抛出 MemoryBudgetError。"""
        runtime = self.runtime
        if runtime.chunk_size is not None:
            chunk = runtime.chunk_size
        elif batch * steps >= 2 * AUTO_TOKENS:
            chunk = max(_MIN_ROW, AUTO_TOKENS // batch)
        else:
            chunk = steps
        if runtime.memory_budget is not None:
            from deepseek_opt.memory import plan_prefill

            budget, profile = runtime.memory_budget, runtime.profile
            dtype = source.dtype if source.is_floating_point() else None
            fits = plan_prefill(
                self.module, batch, past + steps, budget, dtype=dtype, profile=profile
            )
            chunk = min(chunk, fits)
        return chunk

    def _can_split(self, kwargs: dict[str, Any], batch: int, steps: int, past: int) -> bool:
        config = self.module.config
        if any(kwargs.get(name) or getattr(config, name, False) for name in _RECORDS):
            return False
        if any(value is not None for name, value in kwargs.items() if name not in _ALLOWED):
            return False
        if kwargs.get("return_dict") is False or getattr(config, "return_dict", True) is False:
            return False
        if getattr(config, "is_causal", True) is False:
            return False
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and (
            not isinstance(mask, Tensor) or mask.shape != (batch, past + steps)
        ):
            return False
        if positions is None:
            return True
        if positions.dim() != 2 or positions.shape[1] != steps:
            return False
        # transformers 由不连续的 position_ids 认出打包序列；打包时各段互不可见，不能分块
        packed = mask is None and kwargs.get("past_key_values") is None
        return not packed or bool((positions.diff(dim=-1) == 1).all())

    def _in_chunks(self, kwargs: dict[str, Any], steps: int, past: int, chunk: int) -> Any:
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        keep = kwargs.get("use_cache", getattr(self.module.config, "use_cache", False))
        if kwargs.get("past_key_values") is None:
            from transformers import DynamicCache

            kwargs["past_key_values"] = DynamicCache(config=self.module.config)
        else:
            keep = True
        kwargs["use_cache"] = True
        hidden, out = None, None
        for start in range(0, steps, chunk):
            stop = min(start + chunk, steps)
            out = self.call_original(**_slice(kwargs, start, stop, past))
            part = out["last_hidden_state"]
            if hidden is None:
                hidden = part.new_empty(part.shape[0], steps, part.shape[2])
            hidden[:, start:stop] = part
            del part
        out["last_hidden_state"] = hidden
        if not keep:
            out["past_key_values"] = None
        return out


def _source(kwargs: dict[str, Any]) -> Any:
    source = kwargs.get("inputs_embeds")
    return kwargs.get("input_ids") if source is None else source


def _past(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


def _slice(kwargs: dict[str, Any], start: int, stop: int, past: int) -> dict[str, Any]:
    part = dict(kwargs)
    for name in ("input_ids", "inputs_embeds", "position_ids"):
        if name in part:
            part[name] = part[name][:, start:stop]
    if "attention_mask" in part:
        part["attention_mask"] = part["attention_mask"][:, : past + stop]
    return part
