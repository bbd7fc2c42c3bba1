"""各配置类的共同部分：一次列出全部错误、动态修改、变更通知。"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from deepseek_opt.config.messages import (
    CONFLICT,
    Lines,
    dotted,
    make_error,
    problems_from,
    unknown_field,
)
from deepseek_opt.errors import ConfigError, ConfigProblem

# 全进程共用一个计数：替换掉整个子配置时，新的修订号也一定更大。
_revisions = itertools.count(1)


@dataclass(frozen=True)
class Conflict:
    """几个字段合起来不成立。

    属性：
        fields: 牵涉的字段名，第一个是报错时写出的字段。
        message: 中文说明。
        value: 第一个字段的值。
    """

    fields: tuple[str, ...]
    message: str
    value: Any


class ConfigBase(BaseModel):
    """配置的基类：未知字段报错、严格类型、赋值即校验。

    修改方式：``config.field = value`` 或 ``config.update(a=1, b=2)``（一起校验，要么全部生效要么不变）。
    每次成功修改都会使 :attr:`revision` 变大。``live_fields`` 里的字段改动在模型的下一次调用生效；
    ``frozen_fields`` 里的字段决定了层的结构，改动后由 :meth:`require_live` 报出原因。
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        validate_assignment=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    live_fields: ClassVar[frozenset[str]] = frozenset()
    frozen_fields: ClassVar[frozenset[str]] = frozenset()
    frozen_reason: ClassVar[str] = "需要重新构造，请用 switch(model, profile)"

    _revision: int = PrivateAttr(default_factory=lambda: next(_revisions))

    def __init__(self, **data: Any):
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _full_error(type(self), data, error) from None

    # 告诉 pydantic 这里没有自定义构造逻辑：嵌套配置仍走它自己的校验，错误才能汇总到最外层。
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.frozen_fields = frozenset(cls.model_fields) - cls.live_fields

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterable[Conflict]:
        """字段之间的矛盾；values 是“字段名 → 值”，未给出的为 None。子类覆盖。"""
        del values
        return ()

    @model_validator(mode="after")
    def _check_conflicts(self) -> ConfigBase:
        found = list(self.conflicts(self.__dict__))
        if found:
            raise PydanticCustomError(CONFLICT, "conflict", {"conflicts": found})
        return self

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any):
        """从字典校验；出错时抛出列出全部错误的 ConfigError。"""
        try:
            return super().model_validate(obj, **kwargs)
        except ValidationError as error:
            raise _full_error(cls, obj, error) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **kwargs: Any):
        """从 JSON 文本校验；出错时抛出列出全部错误的 ConfigError。"""
        try:
            return super().model_validate_json(json_data, **kwargs)
        except ValidationError as error:
            raise _full_error(cls, None, error) from None

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self.update(**{name: value})

    def update(self, **changes: Any) -> None:
        """同时修改几个字段；任何一处不对就抛 ConfigError，且什么都不变。

        示例::

            config = MLAConfig(num_attention_heads=16, kv_lora_rank=512)
            config.update(kv_lora_rank=256, cache_dtype="int8")
        """
        unknown = [name for name in changes if name not in type(self).model_fields]
        if unknown:
            problems = [
                ConfigProblem(name, unknown_field(name, type(self)), changes[name])
                for name in unknown
            ]
            raise make_error(problems, type(self).__name__)
        checked = type(self)(**{**self.__dict__, **changes})
        self.__dict__.update({name: checked.__dict__[name] for name in changes})
        self.__pydantic_fields_set__.update(changes)
        self._revision = next(_revisions)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False):
        """复制；与 pydantic 默认不同，update 里的值同样经过校验。"""
        result = copy.deepcopy(self) if deep else copy.copy(self)
        if update:
            result.update(**update)
        return result

    def __eq__(self, other: object) -> bool:
        # 修订号不参与比较：内容相同就是相同的配置。
        return type(self) is type(other) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    @property
    def revision(self) -> int:
        """修订号；每次成功修改后变大。持有者只需比较它是否变化。"""
        # 每层每次调用都要读：绕开 pydantic 对私有属性的逐级查找
        return self.__pydantic_private__["_revision"]

    def snapshot(self) -> dict[str, Any]:
        """当前各字段的值，供 :meth:`changed_since` 和 :meth:`require_live` 比较。"""
        return dict(self.__dict__)

    def changed_since(self, snapshot: Mapping[str, Any]) -> frozenset[str]:
        """相对快照变化了的字段名。"""
        return frozenset(k for k, v in self.__dict__.items() if snapshot.get(k) != v)

    def require_live(self, snapshot: Mapping[str, Any]) -> frozenset[str]:
        """返回变化了的字段名；若其中有不能在运行中的模型上修改的字段，抛 ConfigError 并说明原因。

        示例::

            before = config.snapshot()
            config.cache_dtype = "int8"
            config.require_live(before)      # frozenset({"cache_dtype"})
            config.kv_lora_rank = 256
            config.require_live(before)      # ConfigError：…
        """
        changed = self.changed_since(snapshot)
        problems = [
            ConfigProblem(
                name,
                f"不能在已优化的模型上修改（原值 {snapshot.get(name)!r}）：{self.frozen_reason}",
                getattr(self, name),
            )
            for name in sorted(changed & self.frozen_fields)
        ]
        if problems:
            raise make_error(problems, type(self).__name__)
        return changed

    def check_against(self, actual: Mapping[str, Any], where: str = "") -> None:
        """把配置里给出的值与模型的实际值核对；不一致时抛 ConfigError，列出每一处。

        参数：
            actual: “字段名 → 模型的实际值”；配置中为 None 的字段不核对。
            where: 模块路径，写进消息。
        """
        problems = [
            ConfigProblem(
                name, f"与模型{where and ' ' + where} 不符：模型的实际值是 {value!r}", given
            )
            for name, value in actual.items()
            if (given := getattr(self, name)) is not None and given != value
        ]
        if problems:
            raise make_error(problems, type(self).__name__)

    def to_dict(self) -> dict[str, Any]:
        """只含非默认值的普通字典（可写入 YAML、JSON、TOML）；空的子配置保留为 {}。"""
        result = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, ConfigBase):
                result[name] = value.to_dict()
            elif value != field.default:
                result[name] = list(value) if isinstance(value, tuple) else value
        return result


def validate(
    model: type[ConfigBase],
    data: Any,
    *,
    file: str | None = None,
    lines: Lines | None = None,
    found: Iterable[ConfigProblem] = (),
) -> ConfigBase:
    """校验一份（来自文件的）数据；found 是读文件时已发现的错误，与校验错误一起报出。"""
    found = list(found)
    try:
        # 绕过 ConfigBase.model_validate：这里要的是带行号、带文件名的消息。
        result = model.__pydantic_validator__.validate_python(data)
    except ValidationError as error:
        raise _full_error(model, data, error, file=file, lines=lines, found=found) from None
    if found:
        raise make_error(found, model.__name__, file)
    return result


def _full_error(  # pylint: disable=too-many-arguments
    model: type[ConfigBase],
    data: Any,
    error: ValidationError,
    *,
    file: str | None = None,
    lines: Lines | None = None,
    found: Iterable[ConfigProblem] = (),
) -> ConfigError:
    """汇总全部错误。

    pydantic 只在所有字段都合法时才检查字段之间的矛盾；为了一次列出全部错误，
    去掉不合法的字段再校验一遍，补上与它们无关的矛盾。
    """
    first = problems_from(error, model, lines)
    problems = [problem for problem, _ in first]
    bad = {
        tuple(item["loc"]) for item in error.errors(include_url=False) if item["type"] != CONFLICT
    }
    if bad and isinstance(data, Mapping):
        try:
            model.__pydantic_validator__.validate_python(_without(data, bad))
        except ValidationError as again:
            seen = {(problem.path, problem.message) for problem in problems}
            problems += [
                problem
                for problem, fields in problems_from(again, model, lines)
                if (problem.path, problem.message) not in seen and not _touches(fields, bad)
            ]
    return make_error([*found, *problems], model.__name__, file)


def _touches(fields: Iterable[tuple[Any, ...]], bad: Iterable[tuple[Any, ...]]) -> bool:
    return any(loc[: len(field)] == field for field in fields for loc in bad)


def _without(data: Mapping[str, Any], bad: Iterable[tuple[Any, ...]]) -> dict[str, Any]:
    """去掉出错的字段；列表里有一项错，就去掉整个列表。"""
    heads = {loc[0] for loc in bad if len(loc) == 1 or not isinstance(data[loc[0]], Mapping)}
    nested: dict[Any, set[tuple[Any, ...]]] = {}
    for loc in bad:
        if loc[0] not in heads:
            nested.setdefault(loc[0], set()).add(loc[1:])
    return {
        key: _without(value, nested[key]) if key in nested else value
        for key, value in data.items()
        if key not in heads
    }


__all__ = ["ConfigBase", "Conflict", "dotted", "validate"]
