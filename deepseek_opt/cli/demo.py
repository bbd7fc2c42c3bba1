"""``deepseek-opt demo``：随包小模型上的完整演示，几分钟内写出报告。"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from deepseek_opt.errors import InputError

# 输出重定向到文件或日志时的表格宽度（列）。
_FILE_WIDTH = 150


def register(app: typer.Typer) -> None:
    """登记命令。"""
    app.command("demo", help="演示：在随包小模型与真实源码上核对结果、比较内存与速度，写出报告")(
        demo
    )


def demo(
    output: Annotated[Path, typer.Option("--output", help="写报告的目录")] = Path(
        "deepseek_opt_demo"
    ),
    model: Annotated[
        Path | None, typer.Option("--model", help="换一个 HF 格式的模型目录（默认随包的）")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="线程数")] = None,
    full: Annotated[bool, typer.Option("--full", help="不限时间与内存，全部跑完")] = False,
) -> None:
    """跑完演示；全部检查通过时退出码为 0，否则为 1。"""
    if threads is not None and threads < 1:
        raise InputError.expected("--threads", "大于 0 的整数", threads)
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    columns = (
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as meter:
        task = meter.add_task("导入 torch 与 transformers", total=None)
        from deepseek_opt.demo import DemoOptions, data, run_demo

        folder = data.MODEL_FOLDER if model is None else model
        options = DemoOptions(folder=folder, output=output, threads=threads, full=full)
        meter.update(task, total=options.ticks)

        def tick(text: str) -> None:
            meter.update(task, advance=1, description=text)

        result = run_demo(options, tick)
        meter.update(task, completed=options.ticks, description="完成")
    print_result(result, console)
    raise typer.Exit(0 if result.passed else 1)


def print_result(result: Any, console: Any) -> None:
    """打印表格、续写、检查与文件的位置。"""
    from rich.markup import escape
    from rich.table import Table

    for table in result.tables:
        shown = Table(title=table.title, title_justify="left")
        for index, name in enumerate(table.columns):
            shown.add_column(escape(name), justify="left" if index < 2 else "right")
        for index, row in enumerate(table.rows):
            if index in table.groups and index:
                shown.add_section()
            style = "bold green" if index in table.strong else None
            shown.add_row(*(escape(cell) for cell in row), style=style)
        console.print(shown)
    found = result.continuation
    console.print(f"续写留出的 {found.name}（fp32，贪心；暗色是提示，绿色是模型写的）")
    console.print(f"[dim]{escape(found.prompt)}[/][green]{escape(found.optimized)}[/]")
    console.print()
    for check in result.checks:
        style = {True: "green", False: "bold red", None: "yellow"}[check.passed]
        color = "red" if check.passed is False else ""
        text = f"{escape(check.name)}：{escape(check.detail)}"
        console.print(f"[{style}]{check.mark}[/] {text}", style=color)
    verdict = "[bold green]全部检查通过[/]" if result.passed else "[bold red]有检查没有通过[/]"
    console.print(f"{verdict}，用时 {result.seconds:.0f} 秒。报告：")
    for path in result.files:
        console.print(f"  {escape(str(path.resolve()))}", soft_wrap=True)
