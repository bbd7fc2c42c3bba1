"""把 pydantic 的错误翻成中文，并合成一个列出全部错误的 :class:`ConfigError`。"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from deepseek_opt.errors import ConfigError, ConfigProblem, describe

CONFLICT = "deepseek_opt_conflict"
EXPECTED = "deepseek_opt_expected"

Lines = Mapping[tuple[str, ...], int]

# 严格模式下各字段类型会产生的错误；{名} 取自 pydantic 给的上下文。
_TEMPLATES = {
    "int_type": "应为整数",
    "int_from_float": "应为整数",
    "int_parsing": "应为整数",
    "int_parsing_size": "整数位数过多",
    "float_type": "应为数字",
    "float_parsing": "应为数字",
    "finite_number": "应为有限的数字，不能是无穷大或 NaN",
    "bool_type": "应为 true 或 false",
    "bool_parsing": "应为 true 或 false",
    "string_type": "应为字符串",
    "string_unicode": "应为合法的 Unicode 字符串",
    "string_too_short": "应为至少 {min_length} 个字符的字符串",
    "string_too_long": "应为至多 {max_length} 个字符的字符串",
    "greater_than": "应大于 {gt}",
    "greater_than_equal": "应大于或等于 {ge}",
    "less_than": "应小于 {lt}",
    "less_than_equal": "应小于或等于 {le}",
    "multiple_of": "应为 {multiple_of} 的倍数",
    "tuple_type": "应为列表",
    "list_type": "应为列表",
    "too_short": "应至少有 {min_length} 项，实际 {actual_length} 项",
    "too_long": "应至多有 {max_length} 项，实际 {actual_length} 项",
    "dict_type": "应为一组“字段: 值”",
    "model_type": "应为一组“字段: 值”；按模型原样启用请写 {{}}",
    "model_attributes_type": "应为一组“字段: 值”；按模型原样启用请写 {{}}",
    "missing": "缺少这个字段",
    "invalid_key": "字段名应为字符串",
    "recursion_loop": "不能引用自身",
    "json_invalid": "不是合法的 JSON",
    "json_type": "JSON 应为字符串",
    EXPECTED: "{message}",
}

_YES_NO = {"yes", "no", "on", "off", "y", "n", "true", "false"}


def dotted(loc: Iterable[Any]) -> str:
    """('mtp', 'loss_weights', 1) -> 'mtp.loss_weights[1]'。"""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else str(part)
    return text


def line_of(loc: Iterable[Any], lines: Lines | None) -> int | None:
    """路径对应的行号；路径本身没有记录时取最近的上级。"""
    path = tuple(part for part in loc if isinstance(part, str))
    while lines and path:
        if path in lines:
            return lines[path]
        path = path[:-1]
    return None


def suggest(word: str, choices: Iterable[str]) -> str | None:
    """最像 word 的一个候选；都不像时为 None。"""
    found = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown_field(name: str, model: type[BaseModel]) -> str:
    """未知字段的说明，带“是不是想写”。"""
    close = suggest(name, model.model_fields)
    if close:
        return f"没有这个字段；是不是想写 {close}？"
    return "没有这个字段；可用字段：" + "、".join(model.model_fields)


def _model_at(model: type[BaseModel], loc: tuple[Any, ...]) -> type[BaseModel]:
    """沿路径找到未知字段所在的配置类。"""
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        nested = _nested_model(field.annotation) if field else None
        if nested is None:
            break
        model = nested
    return model


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _literal_message(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    field = _model_at(model, error["loc"]).model_fields.get(str(error["loc"][-1]))
    choices = _literal_choices(field.annotation) if field else []
    text = "应为 " + "、".join(choices) + " 之一" if choices else "不在允许的取值里"
    close = suggest(error["input"], choices) if isinstance(error["input"], str) else None
    return f"{text}；是不是想写 {close}？" if close else text


def _literal_choices(annotation: Any) -> list[str]:
    args = getattr(annotation, "__args__", ())
    found = [str(a) for a in args if isinstance(a, (str, int)) and not isinstance(a, type)]
    for arg in args:
        found += _literal_choices(arg) if not isinstance(arg, (str, int)) else []
    return found


def _type_hint(error: Mapping[str, Any]) -> str:
    """常见笔误的提示：加了引号的数字、yes/no。"""
    value = error["input"]
    if not isinstance(value, str):
        return ""
    if error["type"].startswith("bool") and value.lower() in _YES_NO:
        return "（yes/no/on/off 和带引号的文字不会当作真假值）"
    if error["type"].startswith(("int", "float")) and value.strip():
        try:
            float(value)
        except ValueError:
            return ""
        return "（数字不要加引号）"
    return ""


def _message(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        return unknown_field(str(error["loc"][-1]), _model_at(model, error["loc"]))
    if kind == "literal_error":
        return _literal_message(error, model)
    template = _TEMPLATES.get(kind)
    if template is None:
        return f"值不合要求（{kind}）"
    context = {key: _plain(value) for key, value in error.get("ctx", {}).items()}
    return template.format(**context) + _type_hint(error)


def _plain(value: Any) -> Any:
    """0.0 写成 0：下界是整数时不必带小数点。"""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def problems_from(
    error: ValidationError, model: type[BaseModel], lines: Lines | None = None
) -> list[tuple[ConfigProblem, frozenset[tuple[Any, ...]]]]:
    """每处错误，以及它牵涉到的字段路径（用于剔除由别的错误引起的假冲突）。"""
    found = []
    for item in error.errors(include_url=False):
        loc = tuple(item["loc"])
        if item["type"] == CONFLICT:
            for conflict in item["ctx"]["conflicts"]:
                where = (*loc, conflict.fields[0])
                problem = ConfigProblem(
                    dotted(where), conflict.message, conflict.value, line_of(where, lines)
                )
                found.append((problem, frozenset((*loc, name) for name in conflict.fields)))
            continue
        value = ConfigProblem.NO_VALUE if item["type"] == "missing" else item["input"]
        problem = ConfigProblem(dotted(loc), _message(item, model), value, line_of(loc, lines))
        found.append((problem, frozenset({loc})))
    return found


def make_error(
    problems: Iterable[ConfigProblem], what: str, file: str | None = None
) -> ConfigError:
    """合成 ConfigError；what 是配置的名字，file 是来源文件。"""
    ordered = sorted(problems, key=lambda p: (p.line is None, p.line or 0))
    place = f"配置文件 {file}" if file else what
    return ConfigError(f"{place} 有 {len(ordered)} 处错误：", ordered, file)


def type_name(value: Any) -> str:
    """值的中文类型名，用于“顶层应为…，实际是…”。"""
    names = {dict: "映射", list: "列表", str: "字符串", bool: "真假值", int: "整数", float: "小数"}
    return "空" if value is None else names.get(type(value), describe(value))
