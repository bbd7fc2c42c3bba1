"""``deepseek-opt presets``：列出预设，或把一份预设写成配置文件。"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from deepseek_opt.config import OptimizationProfile


def register(app: typer.Typer) -> None:
    """登记命令。"""
    app.command("presets", help="列出预设配置；给出名字时显示它的 YAML")(presets)


def presets(
    name: Annotated[
        str | None, typer.Argument(metavar="[名字]", help="预设的名字；省略则列出全部")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="写入文件（.yaml、.json、.toml），需同时给出名字"),
    ] = None,
) -> None:
    """列出预设，或显示、保存其中一份。"""
    if name is None:
        if output is not None:
            raise typer.BadParameter("--output 需要同时给出预设的名字")
        _list()
        return
    profile = OptimizationProfile.preset(name)
    if output is None:
        typer.echo(profile.to_yaml(), nl=False)
    else:
        typer.echo(f"已写入 {profile.to_file(output)}")


def _list() -> None:
    console = Console()
    described = OptimizationProfile.presets()
    if not console.is_terminal:
        for name, description in described.items():
            typer.echo(f"{name}\t{description}")
        return
    table = Table("名字", "说明", title="预设配置")
    for name, description in described.items():
        table.add_row(name, description)
    console.print(table)
    typer.echo("查看：deepseek-opt presets 名字　　保存：deepseek-opt presets 名字 -o profile.yaml")
