"""``deepseek-opt bench``：与 transformers 在同一次运行里比速度与内存。"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepseek_opt.errors import InputError

# 输出重定向到文件或日志时的表格宽度（列）。
_FILE_WIDTH = 150


def register(app: typer.Typer) -> None:
    """登记命令。"""
    app.command("bench", help="基准：与 transformers 同场比较速度与内存，给出占硬件上限的比例")(
        bench
    )


def bench(  # pylint: disable=too-many-arguments,too-many-positional-arguments
    suite: Annotated[
        str, typer.Argument(metavar="SUITE", help="套件：mla、moe、mtp、quant")
    ] = "mla",
    quick: Annotated[bool, typer.Option("--quick", help="轮数与长度减少，看个大概")] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="把读数、机器与版本写成 JSON")
    ] = None,
    isa: Annotated[
        str | None,
        typer.Option(
            "--isa", help="本库限用的指令集：scalar、avx2、avx512、avx512_vnni、avx512_bf16"
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="线程数")] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="只跑键名含有它的各项，可重复")
    ] = None,
    shape: Annotated[
        str,
        typer.Option(
            "--shape",
            help="形状：V2-Lite-3L、tiny；套件 moe 另有 13b-a1.3b（对 13B 稠密）、tiny-int4",
        ),
    ] = "V2-Lite-3L",
    strict: Annotated[
        bool, typer.Option("--strict", help="有一项没达到要求，退出码就为 1")
    ] = False,
) -> None:
    """运行一个套件，打印表格；退出码 0，--strict 时没有全部达标则为 1。"""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from deepseek_opt.benchmarks import runner, shapes

    if threads is not None and threads < 1:
        raise InputError.expected("--threads", "大于 0 的整数", threads)
    if shape not in shapes.SHAPES:
        raise InputError.expected("--shape", "、".join(shapes.SHAPES) + " 之一", shape)
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    columns = (
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as meter:
        task = meter.add_task("准备", total=None)

        def show(done: int, total: int, title: str) -> None:
            meter.update(task, completed=done, total=total, description=title)

        shown = 0

        def keep(so_far: runner.SuiteResult) -> None:
            nonlocal shown
            for row in so_far.rows[shown:]:
                meter.console.print(runner.row_line(row), markup=False, soft_wrap=True)
            shown = len(so_far.rows)
            if json_file is not None:
                so_far.write_json(json_file)

        result = runner.run_suite(
            suite,
            shape=shapes.SHAPES[shape],
            quick=quick,
            threads=threads,
            isa=isa,
            only=tuple(only or ()),
            progress=show,
            finished=keep,
        )
    runner.print_result(result, console)
    if json_file is not None:
        console.print(f"JSON：{json_file}", soft_wrap=True)
    if strict and result.failed:
        raise typer.Exit(1)
