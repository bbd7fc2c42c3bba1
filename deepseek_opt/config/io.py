"""读写配置文件：YAML、JSON、TOML。只解析数据，不执行任何代码。"""

from __future__ import annotations

import json
import os
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek_opt.config import toml_lines, yaml_safe
from deepseek_opt.config.messages import dotted, make_error, type_name
from deepseek_opt.errors import ConfigError, ConfigProblem

# 配置文件只有几十行；更大的多半是选错了文件（例如权重）。
MAX_FILE_BYTES = 1 << 20

_HEADER = "# deepseek_opt 优化配置；字段说明见 docs/配置.md\n"


@dataclass
class Document:
    """读到的一份文件。

    属性：
        data: 顶层映射。
        lines: 路径 → 行号（从 1 开始）；不知道行号的路径不在其中。
        problems: 已发现、但不妨碍继续检查的错误（重复的键）。
    """

    data: dict[str, Any]
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)
    problems: list[ConfigProblem] = field(default_factory=list)


def read(path: str | Path) -> Document:
    """按后缀解析文件；文件读不了、语法错时抛 ConfigError。"""
    path = Path(path)
    parse, _ = _format(path)
    text = _read_text(path)
    try:
        document = parse(text, str(path))
    except RecursionError:
        raise _file_error(path, "嵌套过深") from None
    if not isinstance(document.data, dict):
        got = type_name(document.data)
        hint = "；什么都不优化请写 {}" if document.data is None else ""
        raise _file_error(path, f"顶层应为一组“字段: 值”，实际是{got}{hint}")
    return document


def write(path: str | Path, data: dict[str, Any]) -> Path:
    """按后缀写文件；先写同目录的临时文件再改名。"""
    path = Path(path)
    _, dump = _format(path)
    text = dump(data)
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(text.encode())
        # mkstemp 建的文件只有本人可读；换成普通新文件的权限。
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise _file_error(path, f"写不了：{error.strerror}") from error
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _format(path: Path) -> tuple[Callable[[str, str], Document], Callable[[dict], str]]:
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        got = f"实际是 {suffix}" if suffix else "实际没有后缀"
        raise _file_error(path, f"后缀应为 {'、'.join(_FORMATS)} 之一，{got}")
    return _FORMATS[suffix]


def _file_error(path: str | Path, message: str, line: int | None = None) -> ConfigError:
    place = f"第 {line} 行，" if line is not None else ""
    return ConfigError(f"配置文件 {path}：{place}{message}", file=str(path))


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise _file_error(path, "文件不存在") from None
    except IsADirectoryError:
        raise _file_error(path, "这是目录，不是文件") from None
    except OSError as error:
        raise _file_error(path, f"读不了：{error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise _file_error(path, "超过 1 MiB，不像是配置文件")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise _file_error(path, "不是 UTF-8 编码", line) from None


def _duplicates(found: list[tuple[tuple[str, ...], int, int]]) -> list[ConfigProblem]:
    return [
        ConfigProblem(
            dotted(path), f"重复：第 {first} 行和第 {second} 行都写了这个字段", line=second
        )
        for path, first, second in found
    ]


def _parse_yaml(text: str, path: str) -> Document:
    try:
        data, lines, repeated = yaml_safe.load(text)
    except yaml_safe.YamlProblem as error:
        raise _file_error(path, error.message, error.line) from None
    return Document(data, lines, _duplicates(repeated))


def _parse_json(text: str, path: str) -> Document:
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in items:
            if key in result:
                repeated.append(key)
            result[key] = value
        return result

    try:
        data = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        message = f"第 {error.colno} 列附近不是合法的 JSON（{error.msg}）"
        raise _file_error(path, message, error.lineno) from None
    except ValueError:
        raise _file_error(path, "整数位数过多") from None
    try:
        # JSON 几乎是 YAML 的子集：借它取行号。取不到（例如罕见的转义）就不写行号。
        _, lines, places = yaml_safe.load(text.replace("\t", " "))
        problems = _duplicates(places)
    except yaml_safe.YamlProblem:
        lines, problems = {}, []
    if repeated and not problems:
        problems = [ConfigProblem(key, "重复的字段") for key in repeated]
    return Document(data, lines, problems)


def _parse_toml(text: str, path: str) -> Document:
    lines, repeated = toml_lines.scan(text)
    try:
        return Document(tomllib.loads(text), lines)
    except tomllib.TOMLDecodeError as error:
        if repeated:
            raise make_error(_duplicates(repeated), "TOML", path) from None
        raise _file_error(path, f"不是合法的 TOML（{error}）") from None
    except ValueError:
        raise _file_error(path, "整数位数过多") from None


def _dump_json(data: dict[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, indent=2) + "\n"


def _dump_toml(data: dict[str, Any]) -> str:
    try:
        import tomli_w
    except ImportError:
        raise ConfigError(
            "写 TOML 需要 tomli-w：请运行 pip install tomli-w，或改用 .yaml、.json 后缀"
        ) from None
    return _HEADER + tomli_w.dumps(data)


def _dump_yaml(data: dict[str, Any]) -> str:
    return _HEADER + yaml_safe.dump(data)


_FORMATS = {
    ".yaml": (_parse_yaml, _dump_yaml),
    ".yml": (_parse_yaml, _dump_yaml),
    ".json": (_parse_json, _dump_json),
    ".toml": (_parse_toml, _dump_toml),
}
