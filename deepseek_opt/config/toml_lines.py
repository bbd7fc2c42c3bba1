"""TOML 各字段的行号：标准库 tomllib 不提供，这里按行扫描，只用于错误消息。"""

from __future__ import annotations

import re

Path = tuple[str, ...]
_PART = r"""(?:[A-Za-z0-9_-]+|"[^"\\]*"|'[^']*')"""
_NAME = rf"\s*({_PART}(?:\s*\.\s*{_PART})*)\s*"
_TABLE = re.compile(rf"^\s*\[{_NAME}\]")
_KEY = re.compile(rf"^{_NAME}=")


def scan(text: str) -> tuple[dict[Path, int], list[tuple[Path, int, int]]]:
    """返回 (路径 → 行号, 重复的键 [(路径, 第一次的行号, 再次的行号)])。

    只认行首的 ``[表]`` 和 ``键 =``；多行字符串里形似的内容可能被误认，
    因此结果只用来给错误补行号，不用来判断对错。
    """
    lines: dict[Path, int] = {}
    repeated: list[tuple[Path, int, int]] = []
    table: Path = ()
    for number, line in enumerate(text.splitlines(), 1):
        if match := _TABLE.match(line):
            table = path = _split(match[1])
        elif match := _KEY.match(line):
            path = (*table, *_split(match[1]))
        else:
            continue
        if path in lines:
            repeated.append((path, lines[path], number))
        lines.setdefault(path, number)
    return lines, repeated


def _split(name: str) -> Path:
    return tuple(part.strip("\"'") for part in re.findall(_PART, name))
