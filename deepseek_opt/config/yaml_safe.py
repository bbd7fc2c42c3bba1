"""加固的 YAML：按 YAML 1.2 的常识解释标量，查出重复的键，不接受标签和别名。

PyYAML 默认按 YAML 1.1：``1e-4`` 是字符串、``no`` 是 False、``010`` 是 8、``1:30`` 是 90，
重复的键后者悄悄覆盖前者。
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

Path = tuple[str, ...]
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + name for name in ("map", "seq", "str", "int", "float", "bool", "null")}

_RESOLVERS = (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", "tTfF"),
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?",
        "-+.0123456789",
    ),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
)


class YamlProblem(Exception):
    """YAML 语法错或不接受的写法；line 从 1 开始。"""

    def __init__(self, message: str, line: int | None):
        super().__init__(message)
        self.message = message
        self.line = line


class _Loader(yaml.SafeLoader):  # pylint: disable=too-many-ancestors
    """SafeLoader，换用 YAML 1.2 的标量规则，拒绝别名。"""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            # 别名能让几行文件展开成天文数字个节点。
            line = self.peek_event().start_mark.line + 1
            raise YamlProblem("不支持别名（*名字），请把值直接写出来", line)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):  # pylint: disable=too-many-ancestors
    """SafeDumper；YAML 1.1 或 1.2 任一规则下会被误读的字符串都加引号。"""

    yaml_implicit_resolvers: ClassVar[dict] = {
        key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data):
        return True

    def represent_str(self, data):
        # 单引号写法会把 \x85 等换行符折成空格；双引号写法把它们转义。
        style = None if data.isprintable() else '"'
        return self.represent_scalar(_TAG + "str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)
for _name, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), list(_first))


def load(text: str) -> tuple[Any, dict[Path, int], list[tuple[Path, int, int]]]:
    """解析一份 YAML。

    返回：
        (数据, 路径 → 行号, 重复的键 [(路径, 第一次的行号, 再次的行号)])。

    抛出：
        YamlProblem: 语法错、标签、别名、非字符串的键、多个文档。
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, {}, []
        lines: dict[Path, int] = {}
        repeated: list[tuple[Path, int, int]] = []
        _walk(node, (), lines, repeated)
        return loader.construct_document(node), lines, repeated
    except yaml.YAMLError as error:
        raise _syntax_problem(error) from None
    except ValueError:
        raise YamlProblem("整数位数过多", None) from None
    finally:
        if loader is not None:
            loader.dispose()


def dump(data: dict[str, Any]) -> str:
    """写成 YAML 文本，保持字段顺序，中文原样。"""
    return yaml.dump(
        data, Dumper=_Dumper, allow_unicode=True, sort_keys=False, default_flow_style=False
    )


def _walk(
    node: yaml.Node, path: Path, lines: dict[Path, int], repeated: list[tuple[Path, int, int]]
) -> None:
    """检查标签，记录每个键的行号和重复的键。"""
    line = node.start_mark.line + 1
    if node.tag not in _PLAIN_TAGS:
        raise YamlProblem(f"不支持标签 {node.tag.replace(_TAG, '!!')}，请只写普通的值", line)
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _walk(item, path, lines, repeated)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if key.tag != _TAG + "str":
            raise YamlProblem("字段名应为字符串", line)
        here = (*path, key.value)
        if key.value in seen:
            repeated.append((here, seen[key.value], line))
        seen.setdefault(key.value, line)
        lines[here] = line
        _walk(value, here, lines, repeated)


def _syntax_problem(error: yaml.YAMLError) -> YamlProblem:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    line = mark.line + 1 if mark is not None else None
    if isinstance(error, yaml.composer.ComposerError):
        return YamlProblem("只能有一个文档（多余的 ---）", line)
    column = f"第 {mark.column + 1} 列附近" if mark is not None else ""
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "无法解析"
    return YamlProblem(f"{column}不是合法的 YAML（{reason}）", line)
