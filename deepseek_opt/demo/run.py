"""按顺序跑完演示：对照、准确率、续写、各长度，最后写图、HTML 与 JSON。"""

from __future__ import annotations

import datetime
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepseek_opt import _native
from deepseek_opt.benchmarks.probe import IMPLEMENTATIONS
from deepseek_opt.benchmarks.runner import machine, versions
from deepseek_opt.demo import (
    chart,
    compare,
    data,
    drafting,
    experts,
    heatmap,
    lengths,
    page,
    tables,
)
from deepseek_opt.demo.compare import SDPA, Accuracy, Check, Comparison, Continuation, Variants
from deepseek_opt.demo.drafting import DraftStudy
from deepseek_opt.demo.experts import ExpertStudy
from deepseek_opt.demo.lengths import LengthTable
from deepseek_opt.demo.tables import Table
from deepseek_opt.errors import UnsupportedError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_COMPARE_LIMIT = 140.0  # 秒；此后不再开始新的对照（每种类型至少做一项），列为没有检查
_TIME_LIMIT = 95.0  # 秒；此后不再开始预计做不完的长度测量，其余约 60 秒留给同一进程的对照与专家


@dataclass(frozen=True)
class DemoOptions:
    """演示的规模；默认值在 2 核上 3 分钟内跑完。

    folder : HF 模型目录。output : 写报告的目录。threads : 线程数，默认 torch 现在的。
    full : 不限时间与内存，全部跑完。windows : 准确率用几段，每段 window 个词元。
    batches、contexts、steps : 对照的行数、上下文长度、生成的词元数。
    lengths : 内存与延迟的各长度。prompt、continuation : 续写的提示与续写长度（词元）。
    expert_tokens : MoE 部分计时的各种词元数，不超过 window。
    draft_rows、draft_prompt、draft_new : MTP 部分的行数、提示与生成的词元数。
    """

    folder: Path = data.MODEL_FOLDER
    output: Path = Path("deepseek_opt_demo")
    threads: int | None = None
    full: bool = False
    windows: int = 6
    window: int = 2048
    batches: tuple[int, ...] = (1, 8)
    contexts: tuple[int, ...] = (256, 2048)
    steps: int = 24
    lengths: tuple[int, ...] = lengths.LENGTHS
    prompt: int = 512
    continuation: int = 96
    expert_tokens: tuple[int, ...] = (1, 8, 512)
    draft_rows: int = 8
    draft_prompt: int = 256
    draft_new: int = 96

    @property
    def ticks(self) -> int:
        """进度条的总步数。"""
        compared = len(self.batches) * len(self.contexts) * 3
        measured = len(self.lengths) * len(IMPLEMENTATIONS) + len(experts.VARIANTS)
        return 2 + len(_DTYPES) * (compared + 1) + 1 + measured + len(_DTYPES)


@dataclass(frozen=True)
class DemoResult:
    """演示的结果；passed 为假时命令的退出码是 1。files 为写出的文件。"""

    options: DemoOptions
    seconds: float
    accuracies: list[Accuracy] = field(hash=False)
    comparisons: list[Comparison] = field(hash=False)
    continuation: Continuation
    table: LengthTable
    experts: ExpertStudy | None = None
    drafts: DraftStudy = field(default_factory=DraftStudy)
    skipped: list[Check] = field(default_factory=list, hash=False)
    files: list[Path] = field(default_factory=list, hash=False)

    @property
    def checks(self) -> list[Check]:
        """全部检查：准确率（含换了专家、量化之后）、fp32 的贪心词元、续写、8192 词元的内存。"""
        found = [entry.check() for entry in self.accuracies]
        found += self.experts.checks() if self.experts else []
        found += [entry.check() for entry in self.comparisons if entry.dtype == "float32"]
        found += self.drafts.checks()
        found += [*self.skipped, self.continuation.check()]
        return found + self.table.checks()

    @property
    def passed(self) -> bool:
        """全部检查通过。"""
        return all(check.passed is not False for check in self.checks)

    @property
    def tables(self) -> list[Table]:
        """要打印的表（检查另列）。"""
        found = [tables.length_table(self.table)]
        found += [tables.expert_table(self.experts)] if self.experts else []
        found += [self.drafts.table()] if self.drafts.runs else []
        comparisons = tables.comparison_table(self.comparisons)
        return [*found, comparisons, tables.accuracy_table(self.accuracies)]

    @property
    def charts(self) -> list[tuple[str, str]]:
        """(标题, SVG)。"""
        found = [("内存与延迟", chart.svg(self.table))]
        if self.experts:
            found.append(("各层专家的负载（留出源码）", heatmap.svg(self.experts.loads)))
        return found

    def headline(self) -> list[tuple[str, str]]:
        """(大字, 说明)：最醒目的几个数，都出自读数。"""
        found = []
        saved_at = {n: self.table.saving("standard_sdpa", n) for n in self.table.lengths}
        measured = [n for n, saved in saved_at.items() if saved is not None]
        judged = lengths.JUDGED
        length = judged if judged in measured else max(measured, default=None)
        if length is not None:
            label = f"{length} 词元的内存，对标准多头注意力（SDPA）"
            found.append((f"{-saved_at[length]:+.0%}", label))
        found += self._speedups()
        if self.experts:
            count = min(self.experts.readings["transformers"].seconds)
            label = f"MoE 部分，一次 {count} 个词元，对 transformers grouped_mm"
            found.append((f"{self.experts.speedup('none', count):.1f}x", label))
        if self.drafts.runs:
            run = next(entry for entry in reversed(self.drafts.runs) if entry.rows == 1)
            label = f"{run.rows} 行续写，用 MTP 对逐个词元（{run.dtype}，两边都已优化）"
            found.append((f"{run.speedup:.2f}x", label))
        worst = max((abs(a.drop) for a in self.accuracies), default=None)
        if worst is not None:
            found.append((f"{worst * 100:.2f}", "下一词元准确率最多相差（百分点）"))
        return found

    def _speedups(self) -> list[tuple[str, str]]:
        for length in reversed(self.table.lengths):
            theirs = self.table.find(SDPA, length)
            ours = self.table.find(compare.OURS, length)
            if not (theirs and ours and theirs.reading and ours.reading):
                continue
            first = theirs.reading.prefill_s / ours.reading.prefill_s
            cards = [(f"{first:.1f}x", f"首词元，{length} 词元，对 transformers SDPA")]
            if theirs.reading.decode_s and ours.reading.decode_s:
                later = theirs.reading.decode_s / ours.reading.decode_s
                cards.append(
                    (f"{later:.1f}x", f"每个新词元，已缓存 {length}，对 transformers SDPA")
                )
            return cards
        return []

    def to_dict(self) -> dict[str, Any]:
        """JSON 用：检查与全部读数。"""
        return {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "passed": self.passed,
            "seconds": round(self.seconds, 1),
            "machine": machine(),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "checks": [asdict(check) for check in self.checks],
            "accuracy": [asdict(entry) for entry in self.accuracies],
            "experts": None if self.experts is None else asdict(self.experts),
            "mtp": {"missing": self.drafts.missing, "runs": [asdict(r) for r in self.drafts.runs]},
            "comparisons": [_comparison_dict(entry) for entry in self.comparisons],
            "lengths": {
                "dtype": self.table.dtype,
                "measurements": [asdict(entry) for entry in self.table.measurements],
            },
        }


def _comparison_dict(entry: Comparison) -> dict[str, Any]:
    runs = {
        name: {"prefill_s": run.prefill_s, "step_s": run.step_s} for name, run in entry.runs.items()
    }
    shape = {"dtype": entry.dtype, "batch": entry.batch, "context": entry.context}
    return {**shape, "matched": entry.matched, "runs": runs}


Tick = Callable[[str], None]


def run_demo(options: DemoOptions, tick: Tick = lambda _: None) -> DemoResult:
    """跑完演示并写出文件。tick(说明) 每完成一步调用一次，共 options.ticks 次。

    抛出 UnsupportedError（没有 transformers、没有编译好的本地库）、InputError（模型目录不对）。
    """
    data.require_transformers()
    if not _native.load():
        raise UnsupportedError(_native.load_error())
    start = time.monotonic()
    deadline = None if options.full else start + _TIME_LIMIT
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with torch.inference_mode():
        tick("启动测量内存的子进程")
        table = _measure(options, deadline, tick)
        tick("读取模型与留出源码")
        tokenizer = data.load_tokenizer(options.folder)
        late = None if options.full else start + _COMPARE_LIMIT
        found = _compare_all(options, tokenizer, late, tick)
    seconds = time.monotonic() - start
    result = DemoResult(options, seconds, table=table, **found)
    result.files.extend(write_files(result))
    return result


def _compare_all(
    options: DemoOptions, tokenizer: Any, deadline: float | None, tick: Tick
) -> dict[str, Any]:
    """DemoResult 的 accuracies、comparisons、continuation、experts、drafts、skipped。"""
    stream = data.held_out_stream(tokenizer, options.windows * options.window)
    windows = torch.tensor(stream).view(options.windows, options.window)
    accuracies, comparisons, skipped, text, moe = [], [], [], None, None
    models: dict[str, Any] = {}
    for name, dtype in _DTYPES.items():
        model = models[name] = data.load_model(options.folder, dtype)
        variants = Variants(model)
        tick(f"{name}：留出源码上的准确率")
        accuracies.append(compare.accuracy(variants, windows, name))
        if text is None:
            tick("续写留出的源文件")
            text = _continue(options, variants, tokenizer)
        if name == _fast_dtype():
            before = accuracies[-1].values[SDPA]
            moe = experts.study(model, windows, before, options.expert_tokens, tick)
        for entry in _comparisons(options, variants, tokenizer, name, deadline, tick):
            (skipped if isinstance(entry, Check) else comparisons).append(entry)
    sizes = (options.draft_rows, options.draft_prompt, options.draft_new)
    drafts = drafting.study(models, tokenizer, *sizes, tick)
    return {
        "accuracies": accuracies,
        "comparisons": comparisons,
        "continuation": text,
        "experts": moe,
        "drafts": drafts,
        "skipped": skipped,
    }


def _continue(options: DemoOptions, variants: Variants, tokenizer: Any) -> Continuation:
    source = data.continuation_source()
    return compare.continuation(variants, tokenizer, source, options.prompt, options.continuation)


def _comparisons(
    options: DemoOptions,
    variants: Variants,
    tokenizer: Any,
    dtype: str,
    deadline: float | None,
    tick: Tick,
) -> Iterator[Comparison | Check]:
    """各情形的对照；时间不够的给出一项没有做的检查。"""
    for index, (batch, context) in enumerate(itertools.product(options.batches, options.contexts)):
        label = f"{dtype}：{batch} 行，上下文 {context}"
        if index and deadline is not None and time.monotonic() > deadline:
            for _ in range(3):
                tick(label)
            yield Check(
                f"{dtype} 贪心词元，{batch} 行，上下文 {context}", None, "时间不够，没有检查"
            )
            continue
        ids = data.prompts(tokenizer, batch, context)
        yield compare.compare(variants, ids, options.steps, dtype, partial(tick, label))


def _fast_dtype() -> str:
    """bf16 只在 CPU 有 bf16 指令时才是使用者会选的类型；没有时 torch 的 bf16 是软件模拟。"""
    return "bfloat16" if _native.isa() == "avx512_bf16" else "float32"


def _measure(options: DemoOptions, deadline: float | None, tick: Tick) -> LengthTable:
    dtype = _DTYPES[_fast_dtype()]
    config = _config(options.folder)
    planner = lengths.Planner(config, dtype, deadline)
    with ExitStack() as stack:
        probes = lengths.start_probes(stack, options.folder, dtype, torch.get_num_threads())
        return lengths.measure_lengths(probes, options.lengths, dtype, planner, tick)


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True)


def write_files(result: DemoResult) -> list[Path]:
    """写 report.html、chart.svg、experts.svg（有 MoE 时）、chart.png（有 matplotlib 时）、
    results.json，返回路径。"""
    folder = result.options.output
    folder.mkdir(parents=True, exist_ok=True)
    charts = result.charts
    html = page.render(
        passed=result.passed,
        headline=result.headline(),
        checks=result.checks,
        tables=result.tables,
        charts=charts,
        continuation=result.continuation,
        drafts=drafting.section(result.drafts),
        environment=environment(result),
        notes=notes(result),
    )
    document = json.dumps(result.to_dict(), ensure_ascii=False, indent=2)
    written = []
    pictures = zip(("chart.svg", "experts.svg"), charts, strict=False)
    named = [("report.html", html), *((name, svg) for name, (_, svg) in pictures)]
    for name, text in (*named, ("results.json", document)):
        (folder / name).write_text(text + "\n", encoding="utf-8")
        written.append(folder / name)
    if chart.write_png(result.table, folder / "chart.png"):
        written.append(folder / "chart.png")
    return written


def environment(result: DemoResult) -> list[tuple[str, str]]:
    """(项, 值)：机器类别与版本，不含主机名与路径。"""
    hardware = machine()
    return [
        ("日期", datetime.date.today().isoformat()),
        ("CPU", f"{hardware['cpu']}，{hardware['cores']} 核，{hardware['memory_gib']} GiB 内存"),
        ("指令集", f"{hardware['isa']}，线程 {torch.get_num_threads()}"),
        ("版本", "，".join(f"{name} {value}" for name, value in versions().items())),
        ("用时", f"{result.seconds:.0f} 秒"),
    ]


def notes(result: DemoResult) -> list[str]:
    """怎样测的，以及该怎样看。"""
    kinds = {m.reading.method for m in result.table.measurements if m.reading is not None}
    how = "内核记录的常驻内存峰值（VmHWM，每次测量前清零）"
    if "sampling" in kinds:
        how = "每毫秒采样一次的常驻内存（这个环境不能清零内核的峰值记录，可能漏掉极短的尖峰）"
    return [
        f"内存：每种实现一个独立子进程，读预填充期间{how}相对开始时的增量，即缓存加激活，不含权重。",
        "同样的输入跑两遍，内存取第二遍：第一遍里各库按矩阵形状生成并缓存代码，与实现无关。"
        f"eager 超过 {lengths.SLOW_REPEATED} 词元只跑一遍，读数多出这几十 MiB。",
        "标准多头注意力：同一个模型，把每层 MLA 换成同隐藏维、同头数、每头都缓存 K 与 V 的注意力，"
        "权重随机，只比内存与速度。eager 是逐步计算，SDPA 是 PyTorch 的融合实现。",
        "时间：首词元是一次预填充加一次取词；每词元是随后各步的中位数。各实现按长度轮流测，"
        "别的程序占用 CPU 会影响读数。",
        "专家：图与 MoE 部分的输入都来自原模型读留出源码；计时前冲掉缓存（真实模型的专家总是从内存来），"
        "各实现轮流，取最短。内存峰值是激活，不含权重。",
        "输入：正在运行的 Python 的标准库里，模型训练时留出的模块的源文件。",
        "未运行的格子：时间或内存不够，没有编造数字；deepseek-opt demo --full 会全部跑完。",
    ]
