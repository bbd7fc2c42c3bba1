"""同一进程里：transformers 的 eager、SDPA 与优化后的模型，在同样的真实输入上对照。

三者共用一份权重；优化后的是实例副本，原来的模型始终没有改动。
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from deepseek_opt import OptimizationProfile, optimize
from deepseek_opt.benchmarks.shapes import twin

EAGER, SDPA, OURS = "transformers_eager", "transformers_sdpa", "optimized"
ACCURACY_LIMIT = 0.005  # 规范：精度下降不超过 0.5 %（百分点）


@dataclass(frozen=True)
class Check:
    """一项检查：passed 为 False 时演示失败，None 为没有条件检查；detail 写明数值或原因。"""

    name: str
    passed: bool | None
    detail: str

    @property
    def mark(self) -> str:
        """✓、✗，或 –（没有检查）。"""
        return {True: "✓", False: "✗", None: "–"}[self.passed]


class Variants:
    """一个模型的三种跑法。run(name) 返回可以调用的模型。"""

    def __init__(self, model: Any, preset: str = "fast_decode"):
        self._original = model
        self._optimized = twin(model)
        self.report = optimize(self._optimized, OptimizationProfile.preset(preset))

    def model(self, name: str) -> Any:
        """name 为 EAGER、SDPA 或 OURS。"""
        if name == OURS:
            return self._optimized
        self._original.set_attn_implementation("eager" if name == EAGER else "sdpa")
        return self._original


@dataclass(frozen=True)
class Accuracy:
    """留出文本上下一词元的准确率（0 到 1）：按实现的键名；tokens 为预测的词元数。"""

    dtype: str
    tokens: int
    values: dict[str, float] = field(hash=False)

    @property
    def drop(self) -> float:
        """优化后比原版（eager）低多少；为负即更高。"""
        return self.values[EAGER] - self.values[OURS]

    def check(self) -> Check:
        """两者相差不超过 0.5 个百分点。"""
        passed = abs(self.drop) <= ACCURACY_LIMIT
        before, after = self.values[EAGER], self.values[OURS]
        detail = (
            f"原版 {before:.3%}，优化后 {after:.3%}，相差 {abs(self.drop) * 100:.3f} 个百分点"
            f"（{self.tokens} 个词元，限 {ACCURACY_LIMIT * 100:.1f}）"
        )
        return Check(f"{self.dtype} 下一词元准确率", passed, detail)


def accuracy(variants: Variants, windows: torch.Tensor, dtype: str) -> Accuracy:
    """windows [N, T]：每行一段留出源码，段间不带上下文。"""
    values = {name: score(variants.model(name), windows)[0] for name in (EAGER, SDPA, OURS)}
    return Accuracy(dtype, windows.shape[0] * (windows.shape[1] - 1), values)


def score(model: Any, windows: torch.Tensor) -> tuple[float, float]:
    """windows [N, T] 上下一词元的 (准确率, 交叉熵)。"""
    right, loss = 0, 0.0
    for row in windows:
        logits, wanted = model(row[None]).logits[0, :-1], row[1:]
        right += int((logits.argmax(-1) == wanted).sum())
        loss += float(F.cross_entropy(logits.float(), wanted, reduction="sum"))
    count = windows.shape[0] * (windows.shape[1] - 1)
    return right / count, loss / count


@dataclass(frozen=True)
class Generation:
    """一次贪心生成：prefill_s 为首个词元的时间，step_s 为其后每步的中位数（秒），tokens [B, n]。"""

    prefill_s: float
    step_s: float
    tokens: torch.Tensor = field(hash=False)
    margins: torch.Tensor = field(hash=False)

    @property
    def tokens_per_second(self) -> float:
        """解码阶段每秒生成的词元数（各行之和）。"""
        return self.tokens.shape[0] / self.step_s


def greedy(model: Any, ids: torch.Tensor, steps: int) -> Generation:
    """像使用者那样：DynamicCache，一次预填充，然后每步一个词元。margins 为前两名 logits 的差。"""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    tokens, margins, times = [], [], []
    current = ids
    for _ in range(steps):
        start = time.perf_counter()
        logits = model(current, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        current = logits.argmax(-1, keepdim=True)
        times.append(time.perf_counter() - start)
        best = logits.float().topk(2, -1).values
        tokens.append(current)
        margins.append(best[:, :1] - best[:, 1:])
    later = sorted(times[1:]) or times
    middle = later[len(later) // 2]
    return Generation(times[0], middle, torch.cat(tokens, 1), torch.cat(margins, 1))


@dataclass(frozen=True)
class Comparison:
    """一种情形（dtype、行数、上下文）三种实现的生成。"""

    dtype: str
    batch: int
    context: int
    runs: dict[str, Generation] = field(hash=False)

    @property
    def matched(self) -> float:
        """与原版（eager）逐位相同的词元比例。"""
        return float((self.runs[OURS].tokens == self.runs[EAGER].tokens).float().mean())

    def check(self) -> Check:
        """贪心词元与原版完全相同（fp32 时要求）。"""
        ours, original = self.runs[OURS], self.runs[EAGER]
        name = f"{self.dtype} 贪心词元，{self.batch} 行，上下文 {self.context}"
        different = ours.tokens != original.tokens
        if not different.any():
            return Check(name, True, f"{original.tokens.numel()} 个词元完全相同")
        row, step = different.nonzero()[0].tolist()
        gap = float(original.margins[row, step])
        detail = f"{self.matched:.1%} 相同；第 {row} 行从第 {step} 个起不同，原版那里前两名只差 {gap:.2e}"
        return Check(name, False, detail)


def compare(
    variants: Variants, ids: torch.Tensor, steps: int, dtype: str, tick: Callable[[], None]
) -> Comparison:
    """ids [B, T]：三种实现依次生成 steps 个词元。"""
    runs = {}
    for name in (EAGER, SDPA, OURS):
        runs[name] = greedy(variants.model(name), ids, steps)
        tick()
    return Comparison(dtype, ids.shape[0], ids.shape[1], runs)


@dataclass(frozen=True)
class Continuation:
    """一段留出源码的续写：prompt 为末尾的一截，original、optimized 为两边的续写。"""

    name: str
    prompt: str
    original: str
    optimized: str

    def check(self) -> Check:
        """generate() 的结果逐字相同。"""
        same = self.original == self.optimized
        detail = f"{self.name} 的续写，{len(self.original)} 个字符"
        return Check("generate() 续写", same, detail + ("，逐字相同" if same else "，两边不同"))


def cut_after_def(text: str) -> str:
    """截到后半部分第一个函数的 def 行末；没有就截到一半。"""
    found = re.compile(r"^ *def .*:\n", re.MULTILINE).search(text, len(text) // 2)
    return text[: found.end()] if found else text[: len(text) // 2]


def continuation(
    variants: Variants, tokenizer: Any, source: tuple[str, str], length: int, steps: int
) -> Continuation:
    """source 为 (名字, 全文)：从中间一个函数的 def 行处截断，取之前 length 个词元，用 generate()
    贪心续写 steps 个。"""
    name, text = source
    ids = torch.tensor(tokenizer(cut_after_def(text))["input_ids"][-length:])[None]
    settings = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False}
    texts = {}
    for variant in (EAGER, OURS):
        out = variants.model(variant).generate(ids, attention_mask=torch.ones_like(ids), **settings)
        texts[variant] = tokenizer.decode(out[0, ids.shape[1] :])
    tail = tokenizer.decode(ids[0]).splitlines(keepends=True)[-12:]
    return Continuation(name, "".join(tail), texts[EAGER], texts[OURS])
