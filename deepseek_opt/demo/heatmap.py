"""专家负载的热图：一行一层，一格一个专家，颜色是分到的词元与平均之比。SVG 自己画。"""

from __future__ import annotations

from html import escape

from deepseek_opt import ExpertStatistics
from deepseek_opt.demo.chart import FONT

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW, _LEGEND = 1080, 190, 190, 58, 34, 54
_PALE, _MIDDLE, _DARK = (239, 246, 255), (96, 165, 250), (30, 58, 138)  # 0、平均、两倍平均
_WIDE = 44  # 格子至少这么宽才写数字


def svg(loads: dict[str, ExpertStatistics]) -> str:
    """一张自含的 SVG；右侧是最忙的与平均之比、归一化的熵（1 为完全均衡）。"""
    height = _TOP + len(loads) * _ROW + _LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="各层专家的负载" font-family="{escape(FONT)}" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _heading(max((len(each.tokens_per_expert) for each in loads.values()), default=0)),
    ]
    for index, (name, found) in enumerate(loads.items()):
        parts.append(_layer(name, found, _TOP + index * _ROW))
    parts.append(_legend(_TOP + len(loads) * _ROW + 22))
    parts.append("</svg>")
    return "\n".join(parts)


def _heading(experts: int) -> str:
    right = _WIDTH - _RIGHT
    text = f'<text x="{_LEFT}" y="24" fill="#111827" font-size="14">每个专家分到的词元占比</text>'
    labels = ((right + 16, "最大/平均"), (right + 104, "熵"))
    text += "".join(f'<text x="{x}" y="46" fill="#6b7280">{label}</text>' for x, label in labels)
    width = (right - _LEFT) / max(1, experts)
    every = max(1, -(-24 // int(width or 1)))  # 编号之间至少 24 像素
    for expert in range(0, experts, every):
        x = _LEFT + (expert + 0.5) * width
        text += f'<text x="{x:.1f}" y="46" text-anchor="middle" fill="#6b7280">{expert}</text>'
    return text


def _layer(name: str, found: ExpertStatistics, top: int) -> str:
    counts, right = found.tokens_per_expert, _WIDTH - _RIGHT
    total, width = max(1, sum(counts)), (right - _LEFT) / len(counts)
    middle = top + _ROW / 2 + 4
    style = 'text-anchor="end" fill="#1f2937"'
    parts = [f'<text x="{_LEFT - 12}" y="{middle}" {style}>{escape(name)}</text>']
    for expert, count in enumerate(counts):
        share, x = count / total, _LEFT + expert * width
        load = share * len(counts)
        tip = escape(f"{name} 专家 {expert}：{count:,} 个词元，{share:.1%}，平均的 {load:.2f} 倍")
        parts.append(
            f'<rect x="{x:.2f}" y="{top + 2}" width="{max(width - 2, 0.5):.2f}" '
            f'height="{_ROW - 4}" rx="3" fill="{color(load)}"><title>{tip}</title></rect>'
        )
        if width >= _WIDE:
            ink = "#ffffff" if load > 1.25 else "#1f2937"
            parts.append(
                f'<text x="{x + width / 2 - 1:.1f}" y="{middle}" text-anchor="middle" '
                f'fill="{ink}" pointer-events="none">{share:.1%}</text>'
            )
    values = ((16, found.max_over_mean, ".2f"), (104, found.entropy, ".3f"))
    for offset, value, form in values:
        text = "—" if value is None else format(value, form)
        parts.append(f'<text x="{right + offset}" y="{middle}" fill="#1f2937">{text}</text>')
    return "".join(parts)


def color(load: float) -> str:
    """load 是与平均之比；两倍以上同色。"""
    start, end, at = (_PALE, _MIDDLE, load) if load < 1 else (_MIDDLE, _DARK, load - 1)
    mixed = (a + (b - a) * min(at, 1.0) for a, b in zip(start, end, strict=True))
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def _legend(top: int) -> str:
    marks = (
        (0.0, "没有词元"),
        (0.5, "平均的一半"),
        (1.0, "平均"),
        (1.5, "1.5 倍"),
        (2.0, "2 倍以上"),
    )
    parts = []
    for index, (load, label) in enumerate(marks):
        x = _LEFT + index * 118
        parts.append(
            f'<rect x="{x}" y="{top}" width="18" height="14" rx="3" fill="{color(load)}"/>'
            f'<text x="{x + 24}" y="{top + 12}" fill="#6b7280">{label}</text>'
        )
    return "".join(parts)
