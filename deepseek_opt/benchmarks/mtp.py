"""MTP 的基准：``deepseek-opt bench mtp``，随包模型续写留出的标准库源码（不是随机词元），旁边总有结果是否相同。"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from deepseek_opt.benchmarks import mtp_counts, mtp_models, timing
from deepseek_opt.benchmarks.cases import Case, Env, Row, register_suite, speed_row
from deepseek_opt.benchmarks.mtp_training import TrainCase
from deepseek_opt.config import MTPConfig
from deepseek_opt.generation.adaptive import DraftLength
from deepseek_opt.generation.plan import keep_length

_BF16, _FP32 = torch.bfloat16, torch.float32
_PLAIN, _HF, _USE_MTP = "本库逐词元", "transformers 逐词元", "transformers use_mtp"
_LOOP = "本库同一循环，不起草"
_NOT_SLOWER = 0.97
_ACCEPTANCE = (80.0, 60.0, 45.0, 35.0)


def _new(env: Env) -> int:
    return 24 if env.quick else mtp_models.NEW


class _Never(DraftLength):
    """从不起草：同一个循环的对照。"""

    def choose(self, *_: Any) -> int:  # pylint: disable=arguments-differ
        return 0


def _peer(name: str, model: Any, dtype: torch.dtype) -> Callable[..., Any]:
    """对照：f(ids, new) -> 生成的词元。"""
    if name == _PLAIN:
        fast = mtp_models.optimized(model, None)
        return lambda ids, new: mtp_models.run(fast, ids, new)
    if name == _LOOP:
        still = mtp_models.optimized(model, MTPConfig())
        keep_length(still.mtp, _Never())
        return lambda ids, new: mtp_models.run(still, ids, new)
    if name == _USE_MTP:
        hub = mtp_models.for_use_mtp(dtype)
        return lambda ids, new: mtp_models.run(hub, ids, new, use_mtp=True)
    plain = mtp_models.original(dtype)
    return lambda ids, new: mtp_models.run(plain, ids, new)


@dataclass(frozen=True)
class GenerateCase(Case):
    """同样的提示、同样多的词元，用 MTP 与对照各生成一遍的用时；预填充也在内。"""

    key: str
    title: str
    rows: int
    peer_name: str = _PLAIN
    drafts: int = 8
    dtype: torch.dtype = _BF16
    target: float | None = None
    wide: bool = False
    share: float = 1.5

    def run(self, env: Env) -> list[Row]:
        source = mtp_models.widened if self.wide else mtp_models.original
        model = source(self.dtype)
        ids, new = mtp_models.prompts(self.rows), _new(env)
        fast = mtp_models.optimized(model, MTPConfig(draft_length=self.drafts))
        peer = _peer(self.peer_name, model, self.dtype)
        found: dict[str, Any] = {}

        def ours() -> None:
            fast.mtp.draft_statistics.reset()
            found["ours"] = mtp_models.run(fast, ids, new)

        def theirs() -> None:
            found["peer"] = peer(ids, new)

        for _ in range(1 if env.quick else 3):  # 先量出用时与接受率，选定起草几个
            ours()
        with timing.fresh_read(env.roofline(), env.quick) as roofline:
            peer_times, times = timing.interleaved(
                theirs, ours, rounds=env.rounds, seconds=env.seconds * self.share, evict=False
            )
        drafts = fast.mtp.draft_statistics
        floor = mtp_counts.floor_seconds(fast, ids, drafts, roofline[0])
        details = {
            "equal_tokens": float((found["ours"] == found["peer"]).float().mean()),
            "acceptance_per_depth": [round(a, 4) for a in drafts.acceptance],
            "tokens_per_step": round(drafts.tokens_per_step, 3),
            "tokens_per_second": self.rows * new / times.best,
            "peer_tokens_per_second": self.rows * new / peer_times.best,
            "ours_median_ms": times.median * 1e3,
            "peer_median_ms": peer_times.median * 1e3,
            "read_gbps": roofline[0].read_gbps,
        }
        note = f"{drafts.tokens_per_step:.2f} 词元/步，相同 {details['equal_tokens']:.1%}"
        args = (self, self.peer_name, peer_times, times)
        return [speed_row(*args, floor=floor, note=note, details=details)]


@dataclass(frozen=True)
class ExactCase(Case):
    """fp32 贪心，与原版 transformers 逐个词元比较：相同的比例。"""

    key: str
    title: str
    rows: int

    def run(self, env: Env) -> list[Row]:
        ids, new = mtp_models.prompts(self.rows), _new(env)
        model = mtp_models.original(_FP32)
        wanted = mtp_models.run(model, ids, new)
        shares = []
        for drafts in (2, 8) if env.quick else range(1, 9):
            config = MTPConfig(draft_length=drafts, fixed_draft_length=True)
            got = mtp_models.run(mtp_models.optimized(model, config), ids, new)
            shares.append(float((got == wanted).float().mean()))
        details = {"share_per_draft_length": shares, "tokens": self.rows * new}
        values = (100.0, 100 * min(shares))
        return [Row(self.key, self.title, "accuracy", "%", _HF, *values, 0.0, details=details)]


@dataclass(frozen=True)
class AcceptanceCase(Case):
    """每步起草四个，前 k 个都被接受的比例；留出源码的续写，fp32 贪心。"""

    key: str
    title: str

    def run(self, env: Env) -> list[Row]:
        ids, new = mtp_models.prompts(4 if env.quick else 32), _new(env)
        config = MTPConfig(draft_length=4, fixed_draft_length=True)
        fast = mtp_models.optimized(mtp_models.original(_FP32), config)
        mtp_models.run(fast, ids, new)
        found = fast.mtp.draft_statistics
        details = {"drafts": found.num_drafts, "tokens_per_step": found.tokens_per_step}
        return [
            Row(
                f"{self.key}.{k}",
                f"{self.title}，前 {k} 个",
                "accuracy",
                "%",
                "要求",
                wanted,
                100 * rate,
                0.0,
                details=details,
            )
            for k, (wanted, rate) in enumerate(zip(_ACCEPTANCE, found.acceptance, strict=True), 1)
        ]


def _headlines() -> list[Case]:
    cases: list[Case] = [
        GenerateCase("mtp.b8", "8 行，至多 4 个草稿", 8, _PLAIN, 4, target=1 / 0.75),
        GenerateCase("mtp.b8.hf", "8 行，至多 4 个草稿", 8, _HF, 4, target=5.0),
        GenerateCase("mtp.b8.loop", "8 行，至多 4 个草稿", 8, _LOOP, 4),
        GenerateCase("mtp.b1.loop", "1 行", 1, _LOOP, 8),
        GenerateCase("mtp.b1.use_mtp", "1 行", 1, _USE_MTP, 8, target=3.0),
        GenerateCase("mtp.b1.hf", "1 行", 1, _HF, 8, target=5.0),
        GenerateCase("mtp.fp32.b8", "8 行，至多 4 个草稿，fp32", 8, _PLAIN, 4, _FP32),
        GenerateCase("mtp.fp32.b8.hf", "8 行，至多 4 个草稿，fp32", 8, _HF, 4, _FP32),
        GenerateCase("mtp.fp32.b1.use_mtp", "1 行，fp32", 1, _USE_MTP, 8, _FP32),
    ]
    return cases


def _build(_env: Env) -> list[Case]:
    cases = _headlines()
    cases.append(AcceptanceCase("mtp.acceptance", "随包模型的接受率"))
    cases += [
        ExactCase(f"mtp.exact.b{n}", f"逐个词元相同，{n} 行，起草 1 到 8 个", n) for n in (1, 8, 32)
    ]
    cases += [
        GenerateCase(
            f"mtp.table.b{rows}.d{drafts}",
            f"{rows} 行，至多 {drafts} 个草稿",
            rows,
            drafts=drafts,
            target=_NOT_SLOWER,
            share=0.4,
        )
        for rows, drafts in itertools.product((1, 4, 16, 32), range(1, 9))
    ]
    cases += [
        GenerateCase(f"mtp.wide.b{n}", f"加宽的模型，{n} 行", n, wide=True) for n in (1, 2, 4, 8)
    ]
    cases.append(TrainCase("mtp.train.shipped", "训练一步加深度 1 的 MTP，随包模型", None, 0.8))
    cases.append(TrainCase("mtp.train.24", "同上，24 层、隐藏宽 512", 24, 0.8))
    return cases


register_suite("mtp", "MTP", _build, model="随包的 stdlib_model")
