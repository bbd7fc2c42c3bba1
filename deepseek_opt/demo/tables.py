"""演示的各张表：列名与单元格文字，终端与 HTML 共用。"""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_opt.benchmarks.probe import IMPLEMENTATIONS
from deepseek_opt.demo.compare import EAGER, OURS, SDPA, Accuracy, Comparison
from deepseek_opt.demo.experts import VARIANTS, ExpertStudy
from deepseek_opt.demo.lengths import LengthTable, Measurement

_MIB = 1 << 20


@dataclass(frozen=True)
class Table:
    """一张表；strong 为要强调的行号，groups 为每组第一行的行号（组间画线）。"""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()


def milliseconds(seconds: float) -> str:
    """毫秒，三位有效数字上下。"""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def accuracy_table(found: list[Accuracy]) -> Table:
    """留出文本的准确率。"""
    columns = ("类型", "词元", "transformers eager", "transformers SDPA", "本库", "相差（百分点）")
    rows = tuple(
        (
            entry.dtype,
            f"{entry.tokens:,}",
            *(f"{entry.values[name]:.3%}" for name in (EAGER, SDPA, OURS)),
            f"{abs(entry.drop) * 100:.3f}",
        )
        for entry in found
    )
    return Table("留出源码上的下一词元准确率", columns, rows)


def comparison_table(found: list[Comparison]) -> Table:
    """同一进程里的三种实现：首词元、每步、吞吐。"""
    columns = (
        "类型",
        "行数",
        "上下文",
        "首词元 ms（eager / SDPA / 本库）",
        "每步 ms（eager / SDPA / 本库）",
        "词元/秒（本库）",
        "对 SDPA",
        "词元相同",
    )
    rows = []
    for entry in found:
        runs = [entry.runs[name] for name in (EAGER, SDPA, OURS)]
        rows.append(
            (
                entry.dtype,
                str(entry.batch),
                str(entry.context),
                " / ".join(milliseconds(run.prefill_s) for run in runs),
                " / ".join(milliseconds(run.step_s) for run in runs),
                f"{runs[2].tokens_per_second:,.0f}",
                f"{runs[1].step_s / runs[2].step_s:.1f}x",
                f"{entry.matched:.1%}",
            )
        )
    return Table("同一进程：原版与优化后（随包小模型，真实源码）", columns, tuple(rows))


def expert_table(found: ExpertStudy) -> Table:
    """MoE 部分：各实现的权重、准确率、速度与内存。"""
    counts = list(found.readings["transformers"].seconds)
    columns = (
        "实现",
        "专家权重 MiB",
        "准确率",
        *(f"词元/秒，一次 {count} 个" for count in counts),
        f"{found.peak_tokens} 词元的内存峰值 MiB",
    )
    rows = []
    for name, reading in found.readings.items():
        speeds = []
        for count in counts:
            text = f"{count / reading.seconds[count]:,.0f}"
            times = "" if name == "transformers" else f"（{found.speedup(name, count):.1f}x）"
            speeds.append(text + times)
        weights, peak = f"{reading.weight_bytes / _MIB:.2f}", f"{reading.peak_bytes / _MIB:.1f}"
        rows.append((VARIANTS[name], weights, f"{reading.accuracy:.3%}", *speeds, peak))
    title = f"专家：全部 MoE 块（{found.dtype}；括号里是对 transformers 的倍数）"
    return Table(title, columns, tuple(rows), frozenset({1}))


def length_table(table: LengthTable) -> Table:
    """各长度、各实现的内存与延迟。"""
    columns = (
        "长度",
        "实现",
        "内存峰值 MiB",
        "本库少用",
        "缓存 MiB",
        "首词元 ms",
        "预填充 词元/秒",
        "每词元 ms",
        "解码 词元/秒",
    )
    rows, strong, groups = [], set(), set()
    previous = None
    for index, entry in enumerate(table.measurements):
        if entry.length != previous:
            groups.add(index)
            previous = entry.length
        if entry.implementation == OURS:
            strong.add(index)
        rows.append(_length_row(table, entry))
    title = f"长上下文（{table.dtype}，1 行；内存为实测峰值：缓存 + 激活，不含权重）"
    return Table(title, columns, tuple(rows), frozenset(strong), frozenset(groups))


def _length_row(table: LengthTable, entry: Measurement) -> tuple[str, ...]:
    label = IMPLEMENTATIONS[entry.implementation]
    reading = entry.reading
    if reading is None:
        return (str(entry.length), label, entry.note, *[""] * 6)
    saved = table.saving(entry.implementation, entry.length)
    decode = ("", "")
    if reading.decode_s is not None:
        decode = (milliseconds(reading.decode_s), f"{1 / reading.decode_s:,.1f}")
    own = entry.implementation == OURS
    return (
        str(entry.length),
        label,
        f"{reading.peak_bytes / _MIB:,.1f}",
        "" if own or saved is None else f"{saved:.1%}",
        f"{reading.cache_bytes / _MIB:,.2f}",
        milliseconds(reading.prefill_s),
        f"{reading.length / reading.prefill_s:,.0f}",
        *decode,
    )
