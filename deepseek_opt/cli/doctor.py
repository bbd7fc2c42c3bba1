"""``deepseek-opt doctor``：这台机器上有什么、缺什么、怎样更快。"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from deepseek_opt.cli.checks import Check, collect
from deepseek_opt.cli.expert_cost import expert_checks

_MARKS = {"ok": "✓", "warn": "!", "bad": "✗"}
_STYLES = {"ok": "green", "warn": "yellow", "bad": "red"}


def register(app: typer.Typer) -> None:
    """登记命令。"""
    app.command("doctor", help="检查环境：有什么、缺什么、用的哪种指令集、怎样更快")(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="输出 JSON")] = False,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="模型目录：另外列出它的专家各种量化占多少内存（不读权重）"),
    ] = None,
) -> None:
    """检查环境；可用时退出码为 0，否则为 1。"""
    checks = collect()
    if model is not None:
        checks += expert_checks(model)
    usable = all(check.status != "bad" for check in checks)
    if as_json:
        document = {"usable": usable, "checks": [check.as_dict() for check in checks]}
        typer.echo(json.dumps(document, ensure_ascii=False, indent=2))
    else:
        _print(checks, usable)
    raise typer.Exit(0 if usable else 1)


def _print(checks: list[Check], usable: bool) -> None:
    console = Console()
    if console.is_terminal:
        console.print(_table(checks))
    else:
        typer.echo(plain(checks))
    typer.echo("结论：可以使用。" if usable else "结论：还不能使用，请先解决标为 ✗ 的各项。")


def _table(checks: list[Check]) -> Table:
    table = Table("", "项目", "情况", "建议", title="deepseek-opt 环境检查")
    group = None
    for check in checks:
        if check.group != group:
            if group is not None:
                table.add_section()
            group = check.group
            table.add_row("", f"[bold]{group}[/bold]", "", "")
        mark = f"[{_STYLES[check.status]}]{_MARKS[check.status]}[/]"
        table.add_row(mark, check.name, _escape(check.value), _escape(check.hint))
    return table


def _escape(text: str) -> str:
    # 方括号在 rich 里是样式标记；pip 的 pkg[extra] 写法必须原样显示。
    return text.replace("[", r"\[")


def plain(checks: list[Check]) -> str:
    """不带样式的文本，供重定向到文件或日志。"""
    lines: list[str] = []
    group = None
    for check in checks:
        if check.group != group:
            group = check.group
            lines.append(f"[{group}]")
        lines.append(f"  {_MARKS[check.status]} {check.name}：{check.value}")
        if check.hint:
            lines.append(f"      建议：{check.hint}")
    return "\n".join(lines)
