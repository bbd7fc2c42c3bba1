"""各配置共用的字段类型；上限只为保证下标乘积不超出 int64，并拦住明显的笔误。"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from deepseek_opt.config.messages import EXPECTED

_MAX_DIM = 1 << 20
_MAX_TOKENS = 1 << 40
_MAX_BYTES = (1 << 63) - 1

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000 ** (i + 1) for i, p in enumerate("KMGTP")},
    **{f"{p}IB": 1024 ** (i + 1) for i, p in enumerate("KMGTP")},
}
_SIZE = re.compile(r"\s*([0-9]{1,20}(?:\.[0-9]{1,12})?)\s*([A-Za-z]*)\s*")

Count = Annotated[int, Field(ge=1, le=_MAX_DIM)]
CountOrZero = Annotated[int, Field(ge=0, le=_MAX_DIM)]
Tokens = Annotated[int, Field(ge=1, le=_MAX_TOKENS)]
Weight = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


def expected(message: str) -> PydanticCustomError:
    """字段级校验失败；message 是中文说明。"""
    return PydanticCustomError(EXPECTED, "{message}", {"message": message})


def parse_bytes(value: Any) -> Any:
    """把 ``"2GB"``、``"512MiB"``、``"1.5GiB"`` 换算成字节数；不是字符串时原样返回。

    GB、MB 等按 1000 进位，GiB、MiB 等按 1024 进位，不区分大小写；``"2G"`` 含义不清，不接受。

    示例::

        parse_bytes("2GB")      # 2000000000
        parse_bytes("512MiB")   # 536870912
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    scale = _UNITS.get(match[2].upper()) if match else None
    if scale is None:
        raise expected(
            "应为字节数，或带单位的字符串，例如 2GB（1000 进位）、512MiB（1024 进位）；"
            "单位可用 B、KB/KiB、MB/MiB、GB/GiB、TB/TiB"
        )
    return int(Fraction(match[1]) * scale)


def format_bytes(count: int) -> str:
    """字节数的可读写法，例如 536870912 -> '512.0 MiB'。"""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def _as_tuple(value: Any) -> Any:
    # 内部用元组：列表可以就地修改，会绕过校验和变更通知。
    return tuple(value) if isinstance(value, list) else value


def tuple_from_list(item: Callable[..., Any] | Any, max_length: int) -> Any:
    """接受列表或元组、内部保存为元组的字段类型。"""
    return Annotated[
        tuple[item, ...], Field(min_length=1, max_length=max_length), BeforeValidator(_as_tuple)
    ]


ByteSize = Annotated[int, Field(ge=1, le=_MAX_BYTES), BeforeValidator(parse_bytes)]
