"""图：各长度的内存峰值、首词元时间、每个新词元的时间。SVG 自己画，文字由浏览器渲染，中文不缺字。"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from deepseek_opt.benchmarks.probe import IMPLEMENTATIONS, ProbeReading
from deepseek_opt.demo.lengths import LengthTable

#: 实现 -> (颜色, 线宽, 虚线)。
STYLES = {
    "standard_eager": ("#1d4ed8", 1.8, "5 4"),
    "standard_sdpa": ("#60a5fa", 1.8, ""),
    "transformers_eager": ("#9a3412", 1.8, "5 4"),
    "transformers_sdpa": ("#f59e0b", 1.8, ""),
    "optimized": ("#047857", 3.2, ""),
}
FONT = "'Noto Sans CJK SC','PingFang SC','Microsoft YaHei','WenQuanYi Micro Hei',sans-serif"
_CJK = ("Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei",
        "PingFang SC", "Microsoft YaHei", "SimHei", "Noto Sans SC")  # fmt: skip
_WIDTH, _HEIGHT, _TOP, _LEFT, _GAP, _PLOT_W, _PLOT_H = 1080, 400, 92, 62, 76, 276, 236


@dataclass(frozen=True)
class Panel:
    """一幅小图：title、english 为标题；value 从读数取值，没有为 None。"""

    title: str
    english: str
    value: Callable[[ProbeReading], float | None]


PANELS = (
    Panel(
        "内存峰值（MiB，不含权重）", "peak memory (MiB, no weights)", lambda r: r.peak_bytes / 2**20
    ),
    Panel("首词元时间（秒）", "time to first token (s)", lambda r: r.prefill_s),
    Panel(
        "每个新词元的时间（毫秒）",
        "time per new token (ms)",
        lambda r: None if r.decode_s is None else r.decode_s * 1e3,
    ),
)

Points = dict[str, list[tuple[int, float]]]


def points(table: LengthTable, panel: Panel) -> Points:
    """实现 -> [(长度, 值)]，只含有读数且为正的。"""
    found: Points = {name: [] for name in IMPLEMENTATIONS}
    for entry in table.measurements:
        value = None if entry.reading is None else panel.value(entry.reading)
        if value is not None and value > 0:
            found[entry.implementation].append((entry.length, value))
    return found


def _ticks(low: float, high: float) -> list[float]:
    """对数轴上覆盖 [low, high] 的刻度：1、3 乘 10 的幂。"""
    first = math.floor(math.log10(low))
    last = math.ceil(math.log10(high))
    every = [m * 10.0**e for e in range(first, last + 1) for m in (1, 3)]
    below = [t for t in every if t <= low * 1.001]
    above = [t for t in every if t >= high * 0.999]
    inside = [t for t in every if low < t < high]
    return sorted({*below[-1:], *inside, *above[:1]})


def _label(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def svg(table: LengthTable) -> str:
    """一张自含的 SVG（三幅小图、图例、悬停可见数值）。"""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="内存与延迟" font-family="{escape(FONT)}" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _legend(),
    ]
    for index, panel in enumerate(PANELS):
        left = _LEFT + index * (_PLOT_W + _GAP)
        parts.append(_panel(panel, points(table, panel), table.lengths, left))
    parts.append("</svg>")
    return "\n".join(parts)


def _line_style(name: str) -> str:
    color, width, dash = STYLES[name]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'stroke="{color}" stroke-width="{width}"{dashed}'


def _legend() -> str:
    parts, x = [], _LEFT
    for name, label in IMPLEMENTATIONS.items():
        weight = "bold" if name == "optimized" else "normal"
        parts.append(f'<line x1="{x}" x2="{x + 26}" y1="26" y2="26" {_line_style(name)}/>')
        style = f'fill="#1f2937" font-weight="{weight}"'
        parts.append(f'<text x="{x + 32}" y="30" {style}>{escape(label)}</text>')
        x += 60 + sum(13 if ord(c) > 255 else 7 for c in label)
    return "".join(parts)


def _panel(panel: Panel, series: Points, lengths: list[int], left: int) -> str:
    bottom = _TOP + _PLOT_H
    heading = escape(panel.title)
    title = f'<text x="{left}" y="{_TOP - 16}" fill="#111827" font-size="14">{heading}</text>'
    values = [value for line in series.values() for _, value in line]
    if not values:
        return title
    ticks = _ticks(min(values), max(values))
    low, high = math.log(ticks[0]), math.log(max(ticks[-1], ticks[0] * 1.01))
    steps = max(1, len(lengths) - 1)
    column = {length: left + i * _PLOT_W / steps for i, length in enumerate(lengths)}

    def y(value: float) -> float:
        return bottom - (math.log(value) - low) / (high - low) * _PLOT_H

    parts = [title]
    for tick in ticks:
        parts.append(
            f'<line x1="{left}" x2="{left + _PLOT_W}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
            f'stroke="#e5e7eb"/><text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end" '
            f'fill="#6b7280">{_label(tick)}</text>'
        )
    for length in lengths:
        parts.append(
            f'<text x="{column[length]:.1f}" y="{bottom + 20}" text-anchor="middle" '
            f'fill="#6b7280">{length}</text>'
        )
    for name, line in series.items():
        parts += _series(name, [(column[x], y(v), x, v) for x, v in line])
    parts.append(
        f'<text x="{left + _PLOT_W / 2}" y="{bottom + 42}" text-anchor="middle" fill="#6b7280">'
        "上下文长度（词元，对数轴）</text>"
    )
    return "\n".join(parts)


def _series(name: str, line: list[tuple[float, float, int, float]]) -> list[str]:
    if not line:
        return []
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in line)
    parts = [f'<polyline points="{path}" fill="none" {_line_style(name)}/>']
    color = STYLES[name][0]
    for x, y, length, value in line:
        tip = escape(f"{IMPLEMENTATIONS[name]}，{length} 词元：{value:,.3g}")
        dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{color}">'
        parts.append(f"{dot}<title>{tip}</title></circle>")
    return parts


_ENGLISH = {
    "standard_eager": "standard MHA (eager)",
    "standard_sdpa": "standard MHA (SDPA)",
    "transformers_eager": "transformers MLA (eager)",
    "transformers_sdpa": "transformers MLA (SDPA)",
    "optimized": "deepseek_opt",
}


def chinese_font() -> str | None:
    """matplotlib 能用的中文字体的名字；没有为 None。"""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in _CJK if name in installed), None)


def write_png(table: LengthTable, path: Path) -> bool:
    """用 matplotlib 画同样的图；没有 matplotlib 返回 False。没有中文字体时标签用英文。"""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return False
    chinese = chinese_font()
    labels = IMPLEMENTATIONS if chinese else _ENGLISH
    with matplotlib.rc_context({"font.family": [chinese] if chinese else ["sans-serif"]}):
        figure = Figure(figsize=(13.5, 4.6), dpi=110, layout="constrained")
        axes = figure.subplots(1, len(PANELS))
        for axis, panel in zip(axes, PANELS, strict=True):
            for name, line in points(table, panel).items():
                if line:
                    color, width, dash = STYLES[name]
                    x, y = zip(*line, strict=True)
                    style = "--" if dash else "-"
                    axis.plot(x, y, style, color=color, lw=width, marker="o", label=labels[name])
            axis.set(title=panel.title if chinese else panel.english, xscale="log", yscale="log")
            axis.set_xticks(table.lengths, [str(n) for n in table.lengths])
            values = [y for line in points(table, panel).values() for _, y in line]
            if values:
                ticks = _ticks(min(values), max(values))
                axis.set_yticks(ticks, [_label(t) for t in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
        figure.savefig(path)
    return True
