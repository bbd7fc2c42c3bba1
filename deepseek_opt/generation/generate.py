"""``deepseek_opt.generate``：装了 MTP 的任何模型，一步生成几个词元。"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt.config import MTPConfig
from deepseek_opt.errors import InputError, UnsupportedError
from deepseek_opt.generation.adaptive import MAX_DRAFTS
from deepseek_opt.generation.collect import Collected
from deepseek_opt.generation.loop import Loop, Plan
from deepseek_opt.generation.plan import draft_length, make_chooser, missing_kernels
from deepseek_opt.generation.processors import MinNewTokens, RepetitionPenalty, StopStrings, Warp
from deepseek_opt.generation.rows import Rows
from deepseek_opt.generation.scores import Processor, Scores
from deepseek_opt.generation.stopping import Criterion, Stopping
from deepseek_opt.metrics.collector import ATTRIBUTE
from deepseek_opt.mtp.attach import predictor_of


@dataclass
class GenerationOutput:
    """``generate(..., return_dict_in_generate=True)`` 的结果。

    属性：
        sequences: [B, P + 生成数] int64，先结束的行后面是 pad_token_id。
        drafted: [B, 生成数] bool，哪些词元来自被接受的草稿。
        scores、logits: 每个生成的词元一张 [B, V]，处理过的与原始的；没有要求时为 None。

    示例::

        out = deepseek_opt.generate(model, ids, return_dict_in_generate=True, output_scores=True)
        print(f"{out.drafted.float().mean():.0%} 的词元来自草稿", out.scores[0].shape)
    """

    sequences: Tensor
    drafted: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class _Sampling:
    """采样的参数；options 里只留起作用的。"""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float

    def checked(self) -> _Sampling:
        """自己；越界的报错。"""
        for name, wanted, good in (
            ("temperature", "正数", self.temperature > 0),
            ("top_k", "非负整数", isinstance(self.top_k, int) and self.top_k >= 0),
            ("top_p", "(0, 1] 内的数", 0 < self.top_p <= 1),
            ("min_p", "[0, 1] 内的数", 0 <= self.min_p <= 1),
            ("repetition_penalty", "正数", self.repetition_penalty > 0),
        ):
            value = getattr(self, name)
            if not good or not math.isfinite(value):
                raise InputError.expected(name, wanted, value)
        return self

    def processors(
        self, rows: Rows, least: int, eos: Sequence[int], given: Sequence[Processor]
    ) -> list[Processor]:
        """在温度等之前的处理器；次序同 transformers。"""
        found: list[Processor] = []
        if self.repetition_penalty != 1.0:
            hidden = None if rows.visible is None else ~rows.visible
            found.append(RepetitionPenalty(self.repetition_penalty, hidden))
        if least and eos:
            found.append(MinNewTokens(rows.width, least, eos))
        return [*found, *given]

    def options(self) -> dict[str, Any]:
        """sample_filter 的参数（不含重复惩罚）。"""
        neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        return {k: getattr(self, k) for k, v in neutral.items() if getattr(self, k) != v}


def generate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 20,
    min_new_tokens: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    generator: torch.Generator | None = None,
    num_return_sequences: int = 1,
    logits_processor: Sequence[Processor] = (),
    stopping_criteria: Sequence[Criterion] = (),
    streamer: Any = None,
    return_dict_in_generate: bool = False,
    output_scores: bool = False,
    output_logits: bool = False,
    config: MTPConfig | None = None,
) -> Tensor | GenerationOutput:
    """用 MTP 续写：结果与逐个词元生成的相同，一步得到几个词元；各行接受的个数可以不同。

    参数的意义同 transformers 的 ``generate``，所以两边可以换着用。transformers 的模型在 optimize 之后直接用
    ``model.generate`` 即可；这个函数是给自己的 nn.Module 的（MTPAdapter 要写 ``run_model``、
    ``make_model_cache``、``run_layer``、``make_cache``）。

    参数
    ----
    model : 用 :func:`deepseek_opt.attach_mtp` 装了 MTP 的模型。
    input_ids : [B, P] int64 提示。attention_mask : [B, P]，0 为填充（左、右、中间都可以）。
    max_new_tokens, min_new_tokens : 至多、至少生成几个。
    eos_token_id : 结束符，一个或几个。pad_token_id : 先结束的行后面补的，缺省为第一个结束符。
    stop_strings : 出现在生成的文本里就结束；要给出 tokenizer（有 ``decode``）。
    do_sample : True 为采样，按 temperature、top_k、top_p、min_p、repetition_penalty；generator 为随机数发生器，
        缺省用全局的。同一种子的结果与起草几个、线程数都无关。
    num_return_sequences : 每个提示生成几份，结果 [B · 份数, ...]，同一提示的相邻。
    logits_processor : ``f(input_ids [B, L], scores [B, V]) -> [B, V]`` 的列表；不应依赖被调用的次数。
    stopping_criteria : ``f(input_ids [B, L], scores) -> [B] bool`` 的列表。
    streamer : 有 ``put(tokens [B])`` 与 ``end()``。
    config : draft_length、acceptance 等，缺省用 attach_mtp 时的。

    返回 [B, P + 生成数] int64，或 :class:`GenerationOutput`。抛出 InputError：参数不对、空的提示、全是填充的行、
    词元不在词表之内、generator 在别的设备上；ValueError：logits 里有 NaN（指出行与位置）；UnsupportedError：
    adapter 缺少生成要用的方法，或模型所在的设备上没有要用的核。

    来源：无损的核对见 Leviathan 等（arXiv 2211.17192）；一个 MTP 层反复起草见 DeepSeek-V3（arXiv 2412.19437）。

    示例
    ----
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from deepseek_opt import MTPConfig, attach_mtp, generate
    >>> sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64)
    >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes)).eval()
    >>> _ = attach_mtp(model, config=MTPConfig(draft_length=3), fresh=True)
    >>> out = generate(model, torch.tensor([[5, 6, 7]]), max_new_tokens=8)
    >>> out.shape
    torch.Size([1, 11])
    """
    predictor = predictor_of(model)
    reason = missing_kernels(predictor)
    if reason is not None:
        raise UnsupportedError(f"不能用 MTP 生成：{reason}")
    config = predictor.config if config is None else config
    if not isinstance(config, MTPConfig):
        raise InputError.expected("config", " MTPConfig", config)
    counts = {
        "max_new_tokens": (max_new_tokens, 1),
        "min_new_tokens": (min_new_tokens, 0),
        "num_return_sequences": (num_return_sequences, 1),
    }
    _check(input_ids, attention_mask, predictor.adapter.device, counts, generator)
    eos = _eos_list(eos_token_id)
    pad = pad_token_id if pad_token_id is not None or not eos else eos[0]
    rows = _rows(input_ids, attention_mask, num_return_sequences, max_new_tokens, pad)
    sampling = _Sampling(temperature, top_k, top_p, min_p, repetition_penalty).checked()
    processors = sampling.processors(rows, min_new_tokens, eos, logits_processor)
    options = sampling.options() if do_sample else {}
    if output_scores and options:
        processors, options = [*processors, Warp(options)], {}
    criteria = [*stopping_criteria, *_stop_strings(rows.width, stop_strings, tokenizer)]
    plan = Plan(
        predictor=predictor,
        rows=rows,
        chooser=make_chooser(
            rows, config, Scores(processors, options), do_sample, predictor, generator
        ),
        stopping=Stopping(eos, criteria),
        length=draft_length(predictor, config),
        streamer=streamer,
        collected=Collected(output_scores, output_logits),
        collector=model.__dict__.get(ATTRIBUTE),
    )
    length = Loop(plan).run()
    sequences = rows.sequences(length)
    if not return_dict_in_generate:
        return sequences
    return GenerationOutput(sequences, rows.drafted(length), *plan.collected.tuples(length))


# ---- 内部 ----


def _rows(
    input_ids: Tensor, mask: Tensor | None, repeats: int, max_new: int, pad: int | None
) -> Rows:
    visible = None if mask is None else mask != 0
    if repeats > 1:
        input_ids = input_ids.repeat_interleave(repeats, 0)
        visible = None if visible is None else visible.repeat_interleave(repeats, 0)
    return Rows(input_ids, visible, max_new, MAX_DRAFTS, pad)


def _stop_strings(width: int, given: Any, tokenizer: Any) -> list[Criterion]:
    if given is None:
        return []
    if tokenizer is None:
        raise InputError("参数 tokenizer：给了 stop_strings 时应给出（有 decode 方法）")
    return [StopStrings(width, [given] if isinstance(given, str) else given, tokenizer)]


def _check(
    input_ids: Any,
    attention_mask: Any,
    device: torch.device,
    counts: dict[str, tuple[Any, int]],
    generator: torch.Generator | None,
) -> None:
    _check_ids(input_ids, attention_mask, device)
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError.expected(name, f"不小于 {least} 的整数", value)
    if generator is not None and generator.device.type != device.type:
        raise InputError.expected("generator", f"设备 {device} 上的", f"{generator.device} 上的")


def _check_ids(input_ids: Any, attention_mask: Any, device: torch.device) -> None:
    whole = isinstance(input_ids, Tensor) and input_ids.dtype == torch.int64
    if not whole or input_ids.dim() != 2 or not input_ids.numel():
        raise InputError.expected("input_ids", "非空的 int64 张量 [B, P]", input_ids)
    if input_ids.device != device:
        raise InputError.expected("input_ids", f"设备 {device} 上的张量", input_ids)
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        shape = list(input_ids.shape)
        raise InputError.expected("attention_mask", f"形状 {shape} 的张量", attention_mask)


def _eos_list(eos: Any) -> list[int]:
    if eos is None:
        return []
    found = [eos] if isinstance(eos, int) else list(eos)
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in found):
        raise InputError.expected("eos_token_id", "整数或整数的列表", eos)
    return found
