"""用 MTP 生成的测试共用的：小模型、会给出真词元的草稿、与原版 transformers 比较。"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor, nn

import deepseek_opt as dso
from deepseek_opt.generation import drafter, loop

from .mtp_models import VOCABULARY, make

FULL = {"mla": dso.MLAConfig(), "moe": dso.MOEConfig(), "dense": dso.DenseConfig()}
EOS = 5


def prompts(rows: int, width: int, seed: int) -> dict[str, Tensor]:
    """左填充、长短不一的提示。"""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, VOCABULARY, (rows, width), generator=generator)
    starts = torch.randint(0, width, (rows,), generator=generator)
    mask = (torch.arange(width) >= starts[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


@lru_cache(maxsize=None)
def generator_model(name: str, implementation: str = "sdpa") -> nn.Module:
    """装了随机 MTP、没有优化的小模型；各测试用完要还原。"""
    model = make(name)
    model.set_attn_implementation(implementation)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    dso.attach_mtp(model, config=dso.MTPConfig(depth=4), fresh=True)
    return model


@contextmanager
def optimized(model: nn.Module, full: bool = True, **config) -> Iterator[dso.OptimizationReport]:
    """块内是优化过的；每步固定起草 draft_length 个。"""
    if "draft_length" in config:
        config.setdefault("fixed_draft_length", True)
    profile = dso.OptimizationProfile(mtp=dso.MTPConfig(**config), **(FULL if full else {}))
    with dso.optimized(model, profile) as report:
        model.mtp.draft_statistics.reset()
        yield report


@contextmanager
def oracle(truth: Tensor, share: float, seed: int = 0) -> Iterator[None]:
    """草稿以 share 的概率换成真的词元（truth [B, N] 是逐个词元生成的结果），MTP 自己的计算照做。"""
    rng = random.Random(seed)
    real_draft, real_init = drafter.Drafter.draft, loop.Loop.__init__
    running: list[loop.Loop] = []

    def init(self: loop.Loop, plan: loop.Plan) -> None:
        real_init(self, plan)
        running[:] = [self]

    def draft(self: drafter.Drafter, length: int, pick=None) -> Tensor:
        found = real_draft(self, length, pick)
        rows = running[0].rows
        for r, b in enumerate(rows.active):
            for i in range(length):
                place = rows.counts[b] + i
                if place < truth.shape[1] and rng.random() < share:
                    found[r, i] = truth[b, place]
        return found

    loop.Loop.__init__, drafter.Drafter.draft = init, draft
    try:
        yield
    finally:
        loop.Loop.__init__, drafter.Drafter.draft = real_init, real_draft


def both(
    model: nn.Module,
    inputs: dict[str, Tensor],
    options: dict,
    *,
    full: bool = True,
    share: float = 0.75,
    seed: int = 0,
    **config,
) -> tuple[object, object]:
    """(原版 transformers 的结果, 用 MTP 的结果)；随机数发生器两边停在同一处，没有退回普通的路。"""
    torch.manual_seed(seed)
    plain = model.generate(**inputs, **options)
    after = torch.rand(1)
    sequences = plain if isinstance(plain, Tensor) else plain.sequences
    truth = sequences[:, inputs["input_ids"].shape[1] :]
    with optimized(model, full, **config) as report, oracle(truth, share, seed):
        torch.manual_seed(seed)
        fast = model.generate(**inputs, **options)
        assert torch.equal(after, torch.rand(1))
        assert not any(name == "generate" for name, _ in report.fallbacks), report.fallbacks
        assert model.mtp.draft_statistics.last is not None
    return plain, fast


class Kept:
    """记下收到的词元的 streamer。"""

    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        """一列词元，或开头的整个提示。"""
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        """结束。"""
        self.ended += 1
