"""由配置定下怎样选词元、起草几个；transformers 与自己的模型共用。"""

from __future__ import annotations

from typing import Any

import torch

from deepseek_opt import ops
from deepseek_opt.generation.adaptive import MAX_DRAFTS, DraftLength
from deepseek_opt.generation.choose import Greedy, Sampled
from deepseek_opt.generation.lossy import Lossy
from deepseek_opt.generation.rows import Rows
from deepseek_opt.generation.scores import Scores
from deepseek_opt.mtp.predictor import TokenPredictor

LOSSLESS = "lossless"
_LENGTH = "_draft_length"


def missing_kernels(predictor: TokenPredictor) -> str | None:
    """模型所在的设备上不能由循环生成的原因；能则为 None。"""
    return ops.missing(predictor.adapter.embedding.weight, "mtp_verify_greedy", "sample_filter")


def make_chooser(
    rows: Rows,
    config: Any,
    scores: Scores,
    sample: bool,
    predictor: TokenPredictor,
    generator: torch.Generator | None = None,
) -> Any:
    """怎样选词元；config 为 MTPConfig。"""
    chooser = (
        Sampled(scores, rows, predictor, generator) if sample else Greedy(scores, rows, predictor)
    )
    rule = config.acceptance or LOSSLESS
    return chooser if rule == LOSSLESS else Lossy(chooser, rule, config.acceptance_threshold)


def draft_length(predictor: TokenPredictor, config: Any) -> DraftLength:
    """每步起草几个；读数随 predictor 保留，下一次生成接着用。"""
    wanted = config.draft_length if isinstance(config.draft_length, int) else MAX_DRAFTS
    if predictor.config.shared_layers is False:
        wanted = min(wanted, len(predictor.layers))
    fixed = bool(config.fixed_draft_length)
    kept = predictor.__dict__.get(_LENGTH)
    if kept is None or (kept.longest, kept.fixed) != (wanted, fixed):
        kept = DraftLength(wanted, fixed)
        keep_length(predictor, kept)
    return kept


def keep_length(predictor: TokenPredictor, length: DraftLength) -> None:
    """之后的生成用 length。"""
    predictor.__dict__[_LENGTH] = length
