"""HTML 报告：一个文件，样式与图都在里面，不引用任何外部资源。"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from deepseek_opt.demo.compare import Check, Continuation
from deepseek_opt.demo.tables import Table

_STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1f2937; --soft: #6b7280; --line: #e5e7eb;
  --card: #f9fafb; --good: #047857; --bad: #b91c1c; --mark: #ecfdf5; }
@media (prefers-color-scheme: dark) { :root { --bg: #111827; --fg: #e5e7eb; --soft: #9ca3af;
  --line: #374151; --card: #1f2937; --good: #34d399; --bad: #f87171; --mark: #064e3b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 32px 20px 64px; max-width: 1160px; background: var(--bg);
  color: var(--fg); font: 15px/1.65 'Noto Sans CJK SC','PingFang SC','Microsoft YaHei',
  'WenQuanYi Micro Hei',system-ui,sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 40px 0 10px; }
p.note { color: var(--soft); margin: 6px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 14px;
  margin: 24px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; }
.card b { display: block; font-size: 26px; line-height: 1.3; color: var(--good); }
.scroll { overflow-x: auto; } .chart { background: #fff; border-radius: 10px; padding: 6px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 6px 10px; text-align: right; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
.text th, .text td { text-align: left; white-space: normal; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
tr.strong td { background: var(--mark); font-weight: 600; }
tr.group td { border-top: 2px solid var(--line); }
.ok { color: var(--good); } .fail { color: var(--bad); font-weight: 700; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px;
  overflow-x: auto; font: 13px/1.5 ui-monospace,'SFMono-Regular',Consolas,monospace; }
pre .new { color: var(--good); }
pre.drafts { white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { color: var(--soft); } .draft { background: var(--mark); color: var(--good); }
.main { color: var(--fg); font-weight: 600; } .legend span { padding: 1px 6px; }
"""


def render(
    *,
    passed: bool,
    headline: Sequence[tuple[str, str]],
    checks: Sequence[Check],
    tables: Sequence[Table],
    charts: Sequence[tuple[str, str]],
    continuation: Continuation,
    environment: Sequence[tuple[str, str]],
    notes: Sequence[str],
    drafts: str = "",
) -> str:
    """整页 HTML。headline 为 (大字, 说明)；charts 为 (标题, SVG)；drafts 是 MTP 一节的 HTML；
    environment 为 (项, 值)。"""
    verdict = "全部检查通过" if passed else "有检查没有通过"
    kind = "ok" if passed else "fail"
    cards = "".join(
        f'<div class="card"><b>{escape(big)}</b>{escape(small)}</div>' for big, small in headline
    )
    pictures = "".join(
        f'<h2>{escape(title)}</h2><div class="chart">{svg}</div>\n' for title, svg in charts
    )
    body = "".join(f"<h2>{escape(t.title)}</h2>{_table(t)}" for t in tables)
    about = "".join(f'<p class="note">{escape(line)}</p>' for line in notes)
    return (
        '<!DOCTYPE html>\n<html lang="zh-CN">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>deepseek_opt 演示报告</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>deepseek_opt 演示报告</h1>\n<p class="{kind}">{verdict}</p>\n'
        f'<div class="cards">{cards}</div>\n'
        f"<h2>检查</h2>{_checks(checks)}\n"
        f"{pictures}{body}\n"
        f"{_continuation(continuation)}\n{drafts}\n"
        f"<h2>环境</h2>{_environment(environment)}\n<h2>怎样测的</h2>{about}\n"
        "</body>\n</html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.columns)
    rows = []
    for index, row in enumerate(table.rows):
        classes = []
        if index in table.strong:
            classes.append("strong")
        if index in table.groups:
            classes.append("group")
        label = f' class="{" ".join(classes)}"' if classes else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        rows.append(f"<tr{label}>{cells}</tr>")
    body = "\n".join(rows)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def _class(passed: bool | None) -> str:
    return {True: "ok", False: "fail", None: ""}[passed]


def _checks(checks: Sequence[Check]) -> str:
    rows = "".join(
        f'<tr><td class="{_class(c.passed)}">{c.mark}</td>'
        f"<td>{escape(c.name)}</td><td>{escape(c.detail)}</td></tr>"
        for c in checks
    )
    return f'<table class="text"><tbody>{rows}</tbody></table>'


def _environment(items: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in items)
    return f'<table class="text"><tbody>{rows}</tbody></table>'


def _continuation(found: Continuation) -> str:
    same = found.original == found.optimized
    parts = [
        f"<h2>续写留出的 {escape(found.name)}</h2>",
        '<p class="note">贪心，fp32；绿色为模型写的。模型只有几百万参数：看的是原版与优化后一字不差，'
        "不是代码对不对。</p>",
        f'<pre>{escape(found.prompt)}<span class="new">{escape(found.optimized)}</span></pre>',
    ]
    if same:
        parts.append('<p class="ok">原版与优化后逐字相同。</p>')
    else:
        parts.append('<p class="fail">两边不同，原版的续写：</p>')
        parts.append(f"<pre>{escape(found.original)}</pre>")
    return "".join(parts)
