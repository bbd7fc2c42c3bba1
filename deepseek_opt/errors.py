"""deepseek_opt 的异常。

所有异常都继承 :class:`DeepSeekOptError`，同时继承最接近的内置异常，
因此已有的 ``except ValueError`` 等写法照常有效。消息是一句中文：哪个参数、应为什么、实际是什么。

示例::

    from deepseek_opt.errors import DeepSeekOptError, InputError

    try:
        raise InputError.expected("latent", "三维张量 [B, S, r]", "二维张量 [4, 8]")
    except DeepSeekOptError as error:
        print(error)   # 参数 latent：应为三维张量 [B, S, r]，实际是二维张量 [4, 8]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

try:
    from torch import OutOfMemoryError
except ImportError:  # 没有 torch 时 doctor 也要能说明缺什么
    OutOfMemoryError = RuntimeError

_MISSING = object()
_MAX_REPR = 80


def describe(value: Any) -> str:
    """用一句中文描述一个值；张量只写形状、类型和设备，其余写截断到 80 字符的 repr。

    示例::

        describe("abc")            # "'abc'"
        describe(torch.ones(2, 3)) # "形状 [2, 3]、类型 torch.float32、设备 cpu 的张量"
    """
    if all(hasattr(value, name) for name in ("shape", "dtype", "device")):
        shape = list(value.shape)
        return f"形状 {shape}、类型 {value.dtype}、设备 {value.device} 的张量"
    try:
        text = repr(value)
    except (ValueError, TypeError, AttributeError, RuntimeError):
        # 描述错误的过程本身不能再抛错；例如位数过多的整数没有十进制写法。
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _MAX_REPR else text[: _MAX_REPR - 1] + "…"


def mixed_devices(name: str, found: Iterable[tuple[str, Any]]) -> str:
    """算子 name 的张量不在同一设备上的说明；found 为各张量的 (参数名, 设备)。"""
    where = "，".join(f"{argument} 在 {device}" for argument, device in found)
    return f"deepseek_opt：{name}：全部张量应在同一设备上，实际是 {where}。"


class DeepSeekOptError(Exception):
    """本库所有异常的基类。"""


@dataclass(frozen=True)
class ConfigProblem:
    """一处配置错误。

    属性：
        path: 点分路径，例如 ``mla.kv_lora_rank``；空串表示整个文件。
        message: 中文说明，写明应为什么。
        value: 出错的值；没有值时为 ``ConfigProblem.NO_VALUE``。
        line: 文件中的行号，从 1 开始；不知道时为 None。
    """

    path: str
    message: str
    value: Any = _MISSING
    line: int | None = None

    def __str__(self) -> str:
        place = f"第 {self.line} 行 " if self.line is not None else ""
        value = "" if self.value is _MISSING else f" = {describe(self.value)}"
        head = f"{place}{self.path}{value}".strip()
        return f"{head}：{self.message}" if head else self.message


ConfigProblem.NO_VALUE = _MISSING  # type: ignore[attr-defined]


class ConfigError(DeepSeekOptError, ValueError):
    """配置有错；一次列出全部错误。

    参数：
        message: 一句中文概括。
        problems: 每处错误，类型为 :class:`ConfigProblem`，逐条列在消息里。
        file: 配置文件路径；不是来自文件时为 None。
    """

    def __init__(
        self, message: str, problems: Iterable[ConfigProblem] = (), file: str | None = None
    ):
        self.summary = message
        self.problems = tuple(problems)
        self.file = file
        super().__init__(message, self.problems, file)

    def __str__(self) -> str:
        lines = [self.summary]
        lines += [f"  {i}. {problem}" for i, problem in enumerate(self.problems, 1)]
        return "\n".join(lines)


class UnsupportedError(DeepSeekOptError, NotImplementedError):
    """请求的功能、模型、数据类型或版本不受支持；消息说明原因和可行的替代办法。"""


class InputError(DeepSeekOptError, ValueError):
    """调用参数不合要求（形状、类型、设备、取值）；抛出时模型和缓存都没有被改动。"""

    @classmethod
    def expected(cls, argument: str, expected: str, got: Any) -> InputError:
        """按固定格式生成异常：参数名、应为、实际。

        参数：
            argument: 参数名。
            expected: 应为什么（中文短语）。
            got: 实际值；字符串原样写入，其他值用 :func:`describe` 描述。
        """
        actual = got if isinstance(got, str) else describe(got)
        return cls(f"参数 {argument}：应为{expected}，实际是{actual}")


class MemoryBudgetError(DeepSeekOptError, MemoryError):
    """在分配之前就能断定放不下；属性供程序读取，单位：字节、token。

    属性：
        required_bytes: 需要的字节数。
        budget_bytes: 允许的字节数。
        max_length: 放得下的最大长度（每行 token 数）。
    """

    def __init__(
        self,
        message: str,
        *,
        required_bytes: int | None = None,
        budget_bytes: int | None = None,
        max_length: int | None = None,
    ):
        super().__init__(message)
        self.required_bytes = required_bytes
        self.budget_bytes = budget_bytes
        self.max_length = max_length

    def __reduce__(self):
        # 默认的 pickle 只带位置参数；跨进程（DDP、DataLoader）传递时属性不能丢。
        return type(self), (str(self),), dict(self.__dict__)


class DeviceMemoryError(DeepSeekOptError, OutOfMemoryError):
    """设备的内存不够；抛出时缓存已退回调用之前（失败的是本库的层、基础模型的前向时），模型可以接着用。

    属性（单位：字节；不知道的为 None）：
        required_bytes: 这次要分配的。
        free_bytes: 设备上还空着的。
    """

    def __init__(
        self, message: str, *, required_bytes: int | None = None, free_bytes: int | None = None
    ):
        super().__init__(message)
        self.required_bytes = required_bytes
        self.free_bytes = free_bytes

    def __reduce__(self):
        return type(self), (str(self),), dict(self.__dict__)
