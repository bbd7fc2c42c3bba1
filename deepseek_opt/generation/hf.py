"""transformers 的 ``model.generate``：能用 MTP 的由本库的循环生成，不能的照旧，原因记在报告里。没有 MTP 的见 hf_plain.py。

generate() 从 ``type(self)`` 上找解码的方法，所以在实例上换不掉；这里让它在一个替身上运行：替身的类继承原来的类，
只换了 ``_sample``，与原模型共用同一个 ``__dict__``。准备输入、处理器、停止条件等都还是 transformers 自己的代码。
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt.config import MTPConfig
from deepseek_opt.generation.adaptive import MAX_DRAFTS, DraftLength
from deepseek_opt.generation.collect import Collected
from deepseek_opt.generation.graphs import forget
from deepseek_opt.generation.loop import Loop, Plan
from deepseek_opt.generation.plan import draft_length, make_chooser, missing_kernels
from deepseek_opt.generation.rows import Rows
from deepseek_opt.generation.scores import Scores
from deepseek_opt.generation.stopping import Stopping
from deepseek_opt.integrations.patch import Patch
from deepseek_opt.integrations.runtime import Runtime
from deepseek_opt.metrics.collector import ATTRIBUTE
from deepseek_opt.mtp.predictor import TokenPredictor

NAME = "generate"
# 有自己的状态、按调用次数前进，或要另外跑模型的处理器：多看几个草稿就乱了。
_STATEFUL = frozenset(
    {
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",
        "ClassifierFreeGuidanceLogitsProcessor",
        "SynthIDTextWatermarkLogitsProcessor",
        "WhisperTimeStampLogitsProcessor",
        "WhisperNoSpeechDetection",
    }
)
_INPUTS = frozenset(
    {
        "attention_mask",
        "position_ids",
        "past_key_values",
        "use_cache",
        "logits_to_keep",
        "tokenizer",
    }
)
_MODES = {
    "_beam_search": "束搜索（num_beams > 1）",
    "_assisted_decoding": "辅助解码（assistant_model、prompt_lookup 等）",
}


class GeneratePatch(Patch):
    """一个 transformers 模型的 generate。"""

    kind = "mtp"
    attribute = NAME

    def __init__(self, module: Any, runtime: Runtime, name: str, predictor: TokenPredictor | None):
        super().__init__(module, runtime, name)
        self.predictor = predictor

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop("use_mtp", None)
        config = kwargs.get("generation_config")
        if wanted is False:
            return self.call_original(*args, **kwargs)
        if wanted or getattr(config, "use_mtp", False):
            kwargs["use_mtp"] = False  # 不用 transformers 自己的那一套
        reason = self._refusal(kwargs)
        if reason is not None:
            self.decline(reason)
            return self.call_original(*args, **kwargs)
        return type(self.module).generate(stand_in(self.module), *args, **kwargs)

    def decline(self, reason: str) -> None:
        """记下这一次由 transformers 自己的代码生成。"""
        self.runtime.count(NAME, f"没有用 MTP：{reason}")

    @property
    def config(self) -> MTPConfig:
        """怎样起草、接受。"""
        return self.runtime.profile.mtp

    @property
    def length(self) -> DraftLength:
        """每步起草几个。"""
        return draft_length(self.predictor, self.config)

    def unprepared(self, rows: int, visible: Tensor | None, returns: bool) -> str | None:
        """rows 行、填充与返回值这样时不能用的原因；在建立 Plan 之前问。"""
        del rows, visible, returns

    def unfit(self, plan: Plan) -> str | None:
        """这一次生成不能用的原因；在 ``adapter.generating()`` 的块内问。"""
        del plan

    def _refusal(self, kwargs: dict[str, Any]) -> str | None:
        model = self.module
        if self.original is not None:
            return "generate 已被别的库在实例上改写"
        if kwargs.get("custom_generate") is not None:
            return "给了 custom_generate"
        if "forward" in model.__dict__ or hasattr(model, "_hf_hook"):
            return "模型的 forward 被别的库改写"
        collector = model.__dict__.get(ATTRIBUTE)
        hooks = (*model._forward_hooks.values(), *model._forward_pre_hooks.values())
        if any(getattr(hook, "__self__", None) is not collector for hook in hooks):
            return "模型上挂着前向钩子，逐步的前向要经过它"
        if model.training and any(_drops(module) for module in model.modules()):
            return "训练模式，有 dropout：每次前向都不同"
        return self._unready()

    def _unready(self) -> str | None:
        """核或主模型的接口不能用的原因。"""
        if not self.predictor.adapter.is_current():
            return "主模型的某一部分（输出头、嵌入、各层……）装上 MTP 之后被换掉了"
        return missing_kernels(self.predictor)

    def remove(self) -> None:
        """取下，不再留着录好的。"""
        super().remove()
        if self.predictor is not None:
            forget(self.predictor)


def _drops(module: nn.Module) -> bool:
    """训练模式下会随机丢弃。"""
    rate = module.p if isinstance(module, nn.Dropout) else module.__dict__.get("attention_dropout")
    return module.training and isinstance(rate, float) and rate > 0


def make_plan(
    patch: GeneratePatch,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any,
    visible: Tensor | None,
) -> Plan:
    """``_sample`` 的参数换成循环要的；visible [B, P] bool，没有填充为 None。"""
    eos, limit, criteria = _stops(stopping_criteria)
    pad = generation_config._pad_token_tensor
    new = limit - input_ids.shape[1]
    rows = Rows(input_ids, visible, new, MAX_DRAFTS, None if pad is None else int(pad))
    returns = generation_config.return_dict_in_generate
    collected = Collected(
        bool(returns and generation_config.output_scores),
        bool(returns and generation_config.output_logits),
    )
    sample = generation_config.do_sample
    fuse = sample and collected.scores is None  # 要返回处理过的分数时不能合
    scores = Scores.fused(logits_processor) if fuse else Scores(logits_processor)
    return Plan(
        predictor=patch.predictor,
        rows=rows,
        chooser=make_chooser(rows, patch.config, scores, sample, patch.predictor),
        stopping=Stopping(eos, criteria),
        length=patch.length,
        streamer=streamer,
        collected=collected,
        collector=patch.module.__dict__.get(ATTRIBUTE),
        graphs=patch.runtime.cuda_graphs,
        hands_out=bool(returns and len(input_ids) == 1 and visible is None),
    )


def run_plan(plan: Plan, returns: bool) -> Any:
    """生成；返回值与 ``_sample`` 相同，returns 为 return_dict_in_generate。"""
    loop = Loop(plan)
    length = loop.run()
    sequences = plan.rows.sequences(length)
    if not returns:
        return sequences
    from transformers.generation import GenerateDecoderOnlyOutput

    found_scores, found_logits = plan.collected.tuples(length)
    return GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=found_scores,
        logits=found_logits,
        past_key_values=_cache_of(loop, sequences),
    )


def _cache_of(loop: Loop, sequences: Tensor) -> Any:
    """生成之后的缓存：只有一行、没有填充时可以接着用（最后一个词元还不在里面），否则为 None。"""
    if len(sequences) > 1 or loop.rows.visible is not None:
        return None
    return loop.cache_of_one(sequences.shape[1] - 1)


def _stops(stopping_criteria: Any) -> tuple[list[int], int, list[Any]]:
    """(结束符, 总长上限, 其余的条件)。"""
    eos, limits, others = [], [], []
    for criterion in stopping_criteria:
        kind = type(criterion).__name__
        if kind == "EosTokenCriteria":
            eos += torch.as_tensor(criterion.eos_token_id).flatten().tolist()
        elif kind == "MaxLengthCriteria":
            limits.append(criterion.max_length)
        else:
            others.append(criterion)
    return eos, min(limits), others


def _why_not(
    input_ids: Tensor,
    processors: Any,
    criteria: Any,
    config: Any,
    kwargs: Any,
) -> str | None:
    """这一次不能由循环生成的原因。"""
    stateful = [type(p).__name__ for p in processors if type(p).__name__ in _STATEFUL]
    extra = sorted(k for k, v in kwargs.items() if v is not None and k not in _INPUTS)
    cache = kwargs.get("past_key_values")
    wants = config.return_dict_in_generate and (
        config.output_attentions or config.output_hidden_states
    )
    limits = [c.max_length for c in criteria if type(c).__name__ == "MaxLengthCriteria"]
    checks = (
        (stateful, f"处理器 {'、'.join(stateful)} 有自己的状态"),
        (extra, f"不认得的输入 {'、'.join(extra)}"),
        (wants, "要返回 attentions 或 hidden_states"),
        (not kwargs.get("use_cache"), "use_cache=False"),
        (config.cache_implementation not in (None, "dynamic"), "指定了 cache_implementation"),
        (config.prefill_chunk_size is not None, "指定了 prefill_chunk_size"),
        (getattr(cache, "_is_user_defined", False), "给了 past_key_values"),
        (cache is not None and cache.get_seq_length(), "past_key_values 里已有内容"),
        (not limits or min(limits) <= input_ids.shape[1], "没有长度上限，或已到上限"),
        (_odd_positions(kwargs, input_ids), "给了不连续的 position_ids"),
        (getattr(config, "is_assistant", False), "这个模型正在给别的模型起草"),
    )
    return next((reason for wrong, reason in checks if wrong), None)


def _odd_positions(kwargs: dict[str, Any], input_ids: Tensor) -> bool:
    """position_ids 不是“各行去掉填充之后从 0 起连续”。"""
    given, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if given is None:
        return False
    visible = torch.ones_like(input_ids) if mask is None else mask
    if given.shape[-2:] != visible.shape and given.shape[-2:] != (1, visible.shape[1]):
        return True
    wanted = visible.long().cumsum(1) - 1
    return bool(((given != wanted) & (visible != 0)).any())


# ---- 替身 ----


def _sample(
    self: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    patch: GeneratePatch = self.__dict__[NAME]
    model, returns = patch.module, bool(generation_config.return_dict_in_generate)
    mask = model_kwargs.get("attention_mask")
    visible = None if mask is None or bool((mask != 0).all()) else mask != 0
    reason = "synced_gpus" if synced_gpus else None
    reason = reason or _why_not(
        input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs
    )
    reason = reason or patch.unprepared(len(input_ids), visible, returns)
    if reason is None:
        given = (input_ids, logits_processor, stopping_criteria, generation_config, streamer)
        plan = make_plan(patch, *given, visible)
        with patch.predictor.adapter.generating():
            reason = patch.unfit(plan)
            if reason is None:
                return run_plan(plan, returns)
    patch.decline(reason)
    return type(model)._sample(
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=synced_gpus,
        streamer=streamer,
        **model_kwargs,
    )


def _declining(name: str) -> Any:
    """同名的原方法，先记下没有用 MTP。"""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        patch: GeneratePatch = self.__dict__[NAME]
        patch.decline(_MODES[name])
        return getattr(type(patch.module), name)(patch.module, *args, **kwargs)

    return method


@lru_cache(maxsize=None)
def _stand_in_class(cls: type) -> type:
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    body |= {name: _declining(name) for name in _MODES if hasattr(cls, name)}
    return type(cls)(cls.__name__, (cls,), {**body, "_sample": _sample})


def stand_in(model: Any) -> Any:
    """与 model 共用 ``__dict__`` 的替身。"""
    other = object.__new__(_stand_in_class(type(model)))
    object.__setattr__(other, "__dict__", model.__dict__)
    return other
