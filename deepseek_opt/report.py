"""优化报告与核对报告：终端里是 rich 表格，笔记本里是 HTML，程序里是字典。"""

from __future__ import annotations

import html
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

_PARTS = {"mla": "MLA 注意力", "dense": "稠密层", "mtp": "MTP", "moe": "MoE"}


@dataclass(frozen=True)
class ReportEntry:
    """一个模块的处理结果。

    属性：
        name: 模块在模型中的路径；整个部分缺失时为空串。
        part: 属于配置的哪一部分：mla、dense、mtp、moe。
        kind: 模块的类名或用途。
        replaced: 是否已替换。
        reason: 没有替换的原因（中文）；已替换时为说明，可以为空。
        required: 没有替换时，是否算作没有做到用户的要求（strict=True 时报错）。
        native: 本来就是本库的层，不必替换。
    """

    name: str
    part: str
    kind: str
    replaced: bool
    reason: str = ""
    required: bool = False
    native: bool = False


@dataclass
class OptimizationReport:
    """``optimize`` 的结果：每个模块替换了没有、为什么；以及运行中的回退次数。

    示例::

        report = deepseek_opt.optimize(model, profile)
        print(report)              # 表格
        report.replaced            # 已替换的 ReportEntry
        report.fallbacks           # {(模块, 原因): 次数}，随运行更新
    """

    model: str
    entries: list[ReportEntry] = field(default_factory=list)
    fallbacks: Mapping[tuple[str, str], int] = field(default_factory=Counter)

    @property
    def replaced(self) -> list[ReportEntry]:
        """已替换的模块。"""
        return [entry for entry in self.entries if entry.replaced]

    @property
    def skipped(self) -> list[ReportEntry]:
        """没有替换的模块，带原因。"""
        return [entry for entry in self.entries if not entry.replaced]

    @property
    def unmet(self) -> list[ReportEntry]:
        """用户要求了、但没有做到的。"""
        return [entry for entry in self.entries if not entry.replaced and entry.required]

    def to_dict(self) -> dict[str, Any]:
        """可以直接写成 JSON 的字典。"""
        return {
            "model": self.model,
            "replaced": [asdict(entry) for entry in self.replaced],
            "skipped": [asdict(entry) for entry in self.skipped],
            "fallbacks": [
                {"name": name, "reason": reason, "count": count}
                for (name, reason), count in sorted(self.fallbacks.items())
            ],
        }

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        rows: Counter[tuple[str, str, str, str]] = Counter()
        names: dict[tuple[str, str, str, str], list[str]] = {}
        for entry in self.entries:
            key = (
                _PARTS.get(entry.part, entry.part),
                entry.kind,
                "已替换" if entry.replaced else "未替换",
                entry.reason,
            )
            rows[key] += 1
            names.setdefault(key, []).append(entry.name)
        body = [
            [part, kind, str(count), state, _span(names[part, kind, state, reason]), reason]
            for (part, kind, state, reason), count in rows.items()
        ]
        tables = [(f"{self.model} 的优化", ["部分", "模块", "个数", "结果", "位置", "说明"], body)]
        if self.fallbacks:
            slow = [[name, reason, str(n)] for (name, reason), n in sorted(self.fallbacks.items())]
            tables.append(("由原实现计算的次数", ["模块", "原因", "次数"], slow))
        return tables

    def render(self, width: int | None = None) -> str:
        """终端用的表格文本；width 为列数，默认 120。"""
        return render_tables(self._tables(), width)

    __str__ = render

    def _repr_html_(self) -> str:
        return html_tables(self._tables())


def _span(names: Sequence[str]) -> str:
    """一组模块路径的简写：首个与末个。"""
    shown = [name for name in names if name]
    if len(shown) <= 1:
        return shown[0] if shown else ""
    return f"{shown[0]} … {shown[-1]}"


def render_tables(
    tables: Sequence[tuple[str, list[str], list[list[str]]]], width: int | None = None
) -> str:
    """(标题, 列名, 行) -> 终端文本。"""
    from rich.console import Console
    from rich.table import Table

    stream = io.StringIO()
    console = Console(file=stream, width=width or 120, highlight=False)
    for title, columns, rows in tables:
        table = Table(title=title, title_justify="left", show_lines=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(cell.replace("[", "\\[") for cell in row))
        console.print(table)
    return stream.getvalue().rstrip("\n")


def html_tables(tables: Sequence[tuple[str, list[str], list[list[str]]]]) -> str:
    """(标题, 列名, 行) -> HTML。"""
    parts = []
    for title, columns, rows in tables:
        head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        parts.append(
            f"<table><caption>{html.escape(title)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )
    return "\n".join(parts)


@dataclass(frozen=True)
class LayerError:
    """一层的误差：最大、平均绝对误差，以及原输出的均方根（判断误差大小用）。"""

    name: str
    max_error: float
    mean_error: float
    scale: float


@dataclass(frozen=True)
class VerificationReport:
    """``verify`` 的结果：原实现与优化后逐项对照。

    示例::

        checked = deepseek_opt.verify(model, inputs)
        print(checked)             # 表格；笔记本里是 HTML
        checked.passed             # 是否通过；checked.failures 为原因
        checked.layers[0].max_error

    属性：
        model、dtype、tokens: 模型类名、参数类型、参与比较的位置数。
        max_error、mean_error、scale: logits 的最大、平均绝对误差与均方根。
        agreement: 两者下一个词元（argmax）一致的比例。
        original_accuracy、optimized_accuracy: 各自的下一词元准确率；不到两个词元时为 None。
        greedy_equal: 贪心生成的词元完全一致；没有生成时为 None。
        greedy_matched、greedy_total: 一致的前缀长度之和、生成的词元总数。
        layers: 每层隐藏状态（或每个替换模块的输出）的误差。
        replaced、fallbacks: 替换的模块数；核对过程中由原实现计算的 {(模块, 原因): 次数}。
        quantization: 专家怎样量化；没有量化为 None。
        error_limit、accuracy_limit: 所用的上限：误差与 logits 均方根之比（fp32 看最大误差，其余看平均）；准确率下降。
        failures: 没有通过的原因；为空即通过。
    """

    model: str
    dtype: str
    tokens: int
    max_error: float
    mean_error: float
    scale: float
    agreement: float
    original_accuracy: float | None
    optimized_accuracy: float | None
    greedy_equal: bool | None
    greedy_matched: int
    greedy_total: int
    layers: tuple[LayerError, ...]
    replaced: int
    fallbacks: Mapping[tuple[str, str], int]
    quantization: str | None
    error_limit: float
    accuracy_limit: float | None
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """是否通过。"""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """可以直接写成 JSON 的字典。"""
        data = asdict(self)
        data["passed"] = self.passed
        data["fallbacks"] = [
            {"name": name, "reason": reason, "count": n}
            for (name, reason), n in self.fallbacks.items()
        ]
        return data

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        rows = [
            ["参与比较的位置", str(self.tokens)],
            ["替换的模块", str(self.replaced)],
            ["logits 最大误差", f"{self.max_error:.3e}"],
            ["logits 平均误差", f"{self.mean_error:.3e}（logits 均方根 {self.scale:.3g}）"],
            ["下一词元一致", f"{self.agreement:.4%}"],
        ]
        if self.original_accuracy is not None:
            accuracy = f"{self.original_accuracy:.4%} → {self.optimized_accuracy:.4%}"
            rows.append(["下一词元准确率（原 → 优化）", accuracy])
        if self.quantization is not None:
            allowed = f"平均误差 ≤ 均方根的 {self.error_limit:.0%}"
            if self.accuracy_limit is not None:
                allowed += f"，准确率下降 ≤ {self.accuracy_limit:.2%}"
            rows.append([f"上限（专家 {self.quantization}）", allowed])
        if self.greedy_equal is not None:
            state = "完全一致" if self.greedy_equal else "不一致"
            rows.append(
                ["贪心生成", f"{state}（{self.greedy_matched}/{self.greedy_total} 个词元）"]
            )
        verdict = "通过" if self.passed else "未通过：" + "；".join(self.failures)
        rows.append(["结论", verdict])
        tables = [(f"{self.model}（{self.dtype}）核对", ["项目", "结果"], rows)]
        if self.layers:
            body = [
                [x.name, f"{x.max_error:.3e}", f"{x.mean_error:.3e}", f"{x.scale:.3g}"]
                for x in self.layers
            ]
            tables.append(("逐层误差", ["层", "最大", "平均", "均方根"], body))
        if self.fallbacks:
            slow = [[name, reason, str(n)] for (name, reason), n in sorted(self.fallbacks.items())]
            tables.append(("由原实现计算的次数", ["模块", "原因", "次数"], slow))
        return tables

    def render(self, width: int | None = None) -> str:
        """终端用的表格文本；width 为列数，默认 120。"""
        return render_tables(self._tables(), width)

    __str__ = render

    def _repr_html_(self) -> str:
        return html_tables(self._tables())
