"""命令 ``deepseek-opt``。

每个子命令是本目录下的一个模块，提供 ``register(app: typer.Typer) -> None``，在里面用
``@app.command("名字")`` 登记自己；模块在被用到时才导入，因此缺少某个可选依赖只影响用到它的命令。

示例::

    deepseek-opt doctor
    deepseek-opt presets low_memory --output profile.yaml
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.core import TyperGroup

from deepseek_opt.cli import chinese
from deepseek_opt.errors import DeepSeekOptError, UnsupportedError

# 子命令的模块名，按帮助里的顺序；尚未安装的模块不会列出。
COMMANDS = ("demo", "doctor", "bench", "verify", "presets")
_INTERRUPTED = 130


def _exists(name: str) -> bool:
    return importlib.util.find_spec(f"{__name__}.{name}") is not None


def _unavailable(name: str, reason: str) -> typer.Typer:
    """依赖缺失的命令：仍列在帮助里，运行时说明缺什么。"""
    broken = typer.Typer()

    @broken.command(
        name,
        help=f"（不可用：{reason}）",
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    def _run() -> None:
        raise UnsupportedError(f"命令 {name} 用不了：{reason}")

    return broken


def _load(name: str):
    """导入一个子命令模块，返回其 click 命令。"""
    commands = typer.Typer()
    try:
        importlib.import_module(f"{__name__}.{name}").register(commands)
    except ImportError as error:
        missing = getattr(error, "name", None) or str(error)
        commands = _unavailable(name, f"缺少 {missing}，请先安装")
    # 有回调的 Typer 总是变成命令组，这样不论登记了一个还是几个命令都能按名字取。
    commands.callback()(lambda: None)
    return chinese.localize(typer.main.get_command(commands).commands[name])


class LazyGroup(TyperGroup):
    """按名字导入子命令的命令组。"""

    def list_commands(self, ctx):
        del ctx
        return [name for name in COMMANDS if _exists(name)]

    def get_command(self, ctx, cmd_name):
        if cmd_name not in self.commands and cmd_name in self.list_commands(ctx):
            self.commands[cmd_name] = _load(cmd_name)
        return self.commands.get(cmd_name)

    def resolve_command(self, ctx, args):
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            ctx.fail(chinese.unknown_command(name, self.list_commands(ctx)))
        return super().resolve_command(ctx, args)

    def get_help_option(self, ctx):
        return chinese.localize_help(super().get_help_option(ctx))


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="把 DeepSeek 的 MLA、MTP、MoE 技术带进已有的 Transformer。",
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="显示版本并退出")] = False,
) -> None:
    if version:
        from deepseek_opt import __version__

        typer.echo(f"deepseek-opt {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(args: Sequence[str] | None = None) -> int:
    """运行命令行，返回退出码；0 成功，1 失败，2 用法错误，130 被中断。"""
    chinese.localize_panels()
    try:
        result = app(
            args=None if args is None else list(args),
            standalone_mode=False,
            prog_name="deepseek-opt",
        )
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("已中断。", err=True)
        return _INTERRUPTED
    except DeepSeekOptError as error:
        typer.echo(f"错误：{error}", err=True)
        return 1
    except chinese.USAGE_ERROR as error:
        typer.echo(f"用法错误：{chinese.usage_message(error)}", err=True)
        typer.echo("运行 deepseek-opt --help 查看用法。", err=True)
        return 2
    if result == _INTERRUPTED:  # 较新的 typer 自己接住 Ctrl-C，只留下退出码
        typer.echo("已中断。", err=True)
    return result if isinstance(result, int) else 0


def main() -> None:
    """``deepseek-opt`` 的入口。"""
    sys.exit(run())
