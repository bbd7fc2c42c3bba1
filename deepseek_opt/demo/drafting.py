"""演示的 MTP 部分：一批留出的提示，用与不用 MTP 各续写一遍；哪些词元来自草稿。"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import torch

from deepseek_opt import (
    DenseConfig,
    MLAConfig,
    MOEConfig,
    MTPConfig,
    OptimizationProfile,
    optimize,
)
from deepseek_opt.benchmarks.shapes import twin
from deepseek_opt.demo import data
from deepseek_opt.demo.compare import Check
from deepseek_opt.demo.tables import Table

DRAFTS = 4
_ROUNDS = 3

Tick = Callable[[str], None]


@dataclass(frozen=True)
class DraftRun:
    """一种类型的读数：一批 rows 行各生成 new 个词元。

    seconds : “plain”（优化过、逐个词元）与“mtp”（起草几个由实测选）的用时。
    tokens_per_step : 后者每行每步得到的词元数；批大而运算受限时自动不起草，就是 1。
    matched : 相同的词元的比例，每步固定起草 DRAFTS 个的也要相同。
    acceptance : 固定起草 DRAFTS 个时，前 k 个都被接受的比例。
    """

    dtype: str
    rows: int
    new: int
    seconds: dict[str, float]
    matched: float
    acceptance: tuple[float, ...]
    tokens_per_step: float

    @property
    def speedup(self) -> float:
        """逐个词元的用时 / 用 MTP 的。"""
        return self.seconds["plain"] / self.seconds["mtp"]


@dataclass(frozen=True)
class DraftStudy:
    """MTP 部分的结果；missing 是没有 MTP 层等不能测的原因，那时其余为空。

    pieces : 第一行的续写，(文本, 种类)；种类为 prompt、draft（来自草稿）、main（主模型自己算的）。
    """

    runs: tuple[DraftRun, ...] = ()
    pieces: tuple[tuple[str, str], ...] = ()
    missing: str = ""

    def checks(self) -> list[Check]:
        """fp32 的词元应与逐个词元生成的完全相同。"""
        if self.missing:
            return [Check("MTP：与逐个词元生成的相同", None, self.missing)]
        return [
            Check(
                f"MTP：{run.dtype}，{run.rows} 行各 {run.new} 个词元与逐个词元生成的相同",
                run.matched == 1.0,
                f"{run.matched:.1%} 相同，每步 {run.tokens_per_step:.2f} 个词元",
            )
            for run in self.runs
            if run.dtype == "float32"
        ]

    def table(self) -> Table:
        """各类型一行。"""
        columns = ("类型", "行数", "逐个词元 词元/秒", "MTP 词元/秒", "倍数")
        columns += ("每步词元", f"接受率（前 1 到 {DRAFTS} 个）", "词元相同")
        rows = tuple(
            (
                run.dtype,
                str(run.rows),
                *(f"{run.rows * run.new / run.seconds[n]:,.0f}" for n in ("plain", "mtp")),
                f"{run.speedup:.2f}x",
                f"{run.tokens_per_step:.2f}",
                " / ".join(f"{rate:.0%}" for rate in run.acceptance),
                f"{run.matched:.1%}",
            )
            for run in self.runs
        )
        title = "MTP：一步生成几个词元（留出的源码，贪心；两边都已优化）"
        return Table(title, columns, rows)


def study(
    models: dict[str, Any], tokenizer: Any, rows: int, prompt: int, new: int, tick: Tick
) -> DraftStudy:
    """models 是 类型 -> 原模型（不改动）；抛出的错误如实抛出，没有 MTP 层的写明原因。"""
    ids = data.prompts(tokenizer, rows, prompt)
    runs, pieces, missing = [], (), ""
    for dtype, model in models.items():
        tick(f"{dtype}：MTP")
        if runs is None:
            continue
        drafting = _optimized(model, MTPConfig(draft_length=DRAFTS))
        entry = next(e for e in drafting[1].entries if e.part == "mtp")
        if not entry.replaced:
            missing, runs = entry.reason, None
            continue
        plain = _optimized(model, None)[0]
        fixed = _optimized(model, MTPConfig(draft_length=DRAFTS, fixed_draft_length=True))[0]
        always = _generate(fixed, ids, new)
        if not pieces:
            drafted = fixed.mtp.draft_statistics.last[0]
            pieces = _pieces(tokenizer, always[0].tolist(), prompt, drafted.tolist())
        acceptance = fixed.mtp.draft_statistics.acceptance
        for count in sorted({1, rows}):
            part, wanted = ids[:count], always[:count]
            runs.append(_run(dtype, (plain, drafting[0]), part, wanted, new, acceptance))
    return DraftStudy(tuple(runs or ()), pieces, missing)


def _optimized(model: Any, mtp: MTPConfig | None) -> tuple[Any, Any]:
    copied = twin(model)
    copied.generation_config.eos_token_id = None  # 各行都生成满，两边做的一样多
    profile = OptimizationProfile(mla=MLAConfig(), moe=MOEConfig(), dense=DenseConfig(), mtp=mtp)
    return copied, optimize(copied, profile)


def _generate(model: Any, ids: torch.Tensor, new: int) -> torch.Tensor:
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, **options)


def _run(
    dtype: str,
    models: tuple[Any, Any],
    ids: torch.Tensor,
    always: torch.Tensor,
    new: int,
    acceptance: tuple[float, ...],
) -> DraftRun:
    """models 是（逐个词元的, 用 MTP 的），轮流各几遍，取最短；always 是固定起草时的结果。"""
    outputs: dict[str, torch.Tensor] = {}
    seconds: dict[str, float] = {}
    for _ in range(_ROUNDS):
        for name, model in zip(("plain", "mtp"), models, strict=True):
            if name == "mtp":
                model.mtp.draft_statistics.reset()
            start = time.perf_counter()
            outputs[name] = _generate(model, ids, new)
            took = time.perf_counter() - start
            seconds[name] = min(seconds.get(name, took), took)
    same = (outputs["plain"] == outputs["mtp"]) & (outputs["plain"] == always)
    matched = float(same[:, ids.shape[1] :].float().mean())
    steps = models[1].mtp.draft_statistics.tokens_per_step
    return DraftRun(dtype, len(ids), new, seconds, matched, acceptance, steps)


def _pieces(
    tokenizer: Any, ids: list[int], prompt: int, drafted: list[bool]
) -> tuple[tuple[str, str], ...]:
    """相邻的同种词元合成一段再解码（一个字的几个字节可能分在几个词元里）。"""
    kinds = ["prompt"] * prompt + ["draft" if one else "main" for one in drafted]
    found: list[tuple[list[int], str]] = []
    for token, kind in zip(ids, kinds, strict=True):
        if found and found[-1][1] == kind:
            found[-1][0].append(token)
        else:
            found.append(([token], kind))
    return tuple((tokenizer.decode(group), kind) for group, kind in found)


def section(found: DraftStudy) -> str:
    """报告里的一节：续写的文本，按来源着色。"""
    if not found.pieces:
        return ""
    text = "".join(f'<span class="{kind}">{escape(piece)}</span>' for piece, kind in found.pieces)
    legend = "".join(
        f'<span class="{kind}">{label}</span>　'
        for kind, label in (
            ("prompt", "提示"),
            ("draft", "来自草稿，主模型核对过"),
            ("main", "主模型自己算的"),
        )
    )
    return (
        "<h2>哪些词元来自草稿</h2>"
        '<p class="note">MTP 起草后面几个词元，主模型一次前向核对；接受的与主模型自己会选的完全相同。</p>'
        f'<p class="legend">{legend}</p><pre class="drafts">{text}</pre>'
    )
