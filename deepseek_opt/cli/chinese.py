"""命令行框架自带文字的中文：用法错误、帮助里的标题。"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import typer

# typer 新旧版本的异常基类所在位置不同（独立的 click 或内置的一份），从继承链上取。
USAGE_ERROR = [c for c in typer.BadParameter.__mro__ if hasattr(c, "format_message")][-1]

_TITLES = {
    "ARGUMENTS_PANEL_TITLE": "参数",
    "OPTIONS_PANEL_TITLE": "选项",
    "COMMANDS_PANEL_TITLE": "命令",
    "ERRORS_PANEL_TITLE": "错误",
    "ARGUMENT_REQUIRED": "[必需]",
    "REQUIRED_LONG_STRING": "[必需]",
    "DEFAULT_STRING": "[默认：{}]",
}


def localize_panels() -> None:
    """帮助里各栏的标题换成中文；只影响当前的命令行进程。"""
    from typer import rich_utils

    for name, text in _TITLES.items():
        if hasattr(rich_utils, name):
            setattr(rich_utils, name, text)


def localize_help(option):
    """--help 的说明换成中文。"""
    if option is not None:
        option.help = "显示帮助并退出"
    return option


def localize(command):
    """一个命令及其子命令的 --help 换成中文，返回该命令。"""
    original = command.get_help_option
    command.get_help_option = lambda ctx: localize_help(original(ctx))
    for child in getattr(command, "commands", {}).values():
        localize(child)
    return command


def unknown_command(name: str, choices: Iterable[str]) -> str:
    """没有这个命令时的说明。"""
    choices = list(choices)
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f"是不是想写 {close[0]}？" if close else ""
    return f"没有命令 {name}；{hint}可用的命令：{'、'.join(choices)}"


def usage_message(error: Exception) -> str:
    """用法错误的中文说明；框架没有提供足够信息时保留原文。"""
    kind = type(error).__name__
    param = getattr(error, "param", None)
    names = " / ".join([*getattr(param, "opts", ())]) if param is not None else ""
    if kind == "NoSuchOption":
        close = [c for c in (getattr(error, "possibilities", None) or ()) if c]
        hint = f"；是不是想写 {'、'.join(close)}？" if close else ""
        return f"没有选项 {error.option_name}{hint}"
    if kind == "MissingParameter":
        metavar = (getattr(param, "metavar", None) or getattr(param, "name", "") or "").upper()
        label = names if names.startswith("-") else metavar
        return f"缺少参数 {label}"
    if kind == "BadParameter":
        reason = "应为整数" if "integer" in error.message else error.message
        return f"参数 {names} 的值不对：{reason}" if names else reason
    if kind == "BadOptionUsage":
        return f"选项 {error.option_name} 缺少值"
    return error.format_message()
