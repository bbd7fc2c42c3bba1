"""执行一个本地算子；失败时换成说得清的异常：张量不在同一设备上、内存不够、没有核。前向与反向都经过这里。"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek_opt import _native, log
from deepseek_opt.device_memory import is_out_of_memory, out_of_memory, shapes_of
from deepseek_opt.errors import InputError, UnsupportedError, mixed_devices

# 张量在设备上时这些参数仍可以在 CPU 上：绑定核对之后再送到设备。
_ON_HOST = {
    "mla_cache_write": ("offsets",),
    "mla_layer_decode": ("offsets", "spans"),
    "mla_decode": ("spans", "block_table"),
}
_SPANS = ("spans",)


def call(name: str, op: Any, args: Sequence[Any]) -> Any:
    """op(*args)，op 是算子 name；DEBUG 日志记下。

    失败时抛出 InputError：张量不在同一设备上；DeviceMemoryError：设备的内存不够；UnsupportedError：张量所在的设备没有
    核。其余的错误不变。
    """
    try:
        if log.debugging():
            return log.timed(name, _native.isa(), op, args)
        return op(*args)
    except (RuntimeError, ValueError, MemoryError) as error:
        better = _explained(name, args, error)
        if better is None:
            raise
        raise better from error


def _explained(name: str, args: Sequence[Any], error: Exception) -> Exception | None:
    """算子 name 失败的真正原因；error 已经说得清的为 None。"""
    mixed = mixed_places(name, args)
    if mixed is not None:
        return mixed
    device = next((device for _, device in _places(name, args)), None)
    if device is not None and is_out_of_memory(error, device):
        return out_of_memory(f"算子 {name}，张量的形状 {shapes_of(args)}", device, error)
    if isinstance(error, NotImplementedError):
        return UnsupportedError(f"{name}：这些张量在 {device} 上，没有对应的核。")
    return None


def mixed_places(name: str, args: Sequence[Any]) -> InputError | None:
    """各张量不在同一设备上的错误；都在一处为 None。"""
    places = list(_places(name, args))
    if len({device for _, device in places}) <= 1:
        return None
    return InputError(mixed_devices(name, places))


@functools.cache
def argument_names(name: str) -> tuple[str, ...]:
    """算子 name 的各参数。"""
    schema = getattr(torch.ops.deepseek_opt, name).default._schema
    return tuple(argument.name for argument in schema.arguments)


def _places(name: str, args: Sequence[Any]) -> Iterator[tuple[str, torch.device]]:
    """(参数名, 设备)；列表里同一设备的只给第一个。可以在 CPU 上、也在 CPU 上的不算。"""
    loose = _ON_HOST.get(name, _SPANS)
    for argument, value in zip(argument_names(name), args, strict=False):
        if isinstance(value, Tensor):
            if not (argument in loose and value.is_cpu):
                yield argument, value.device
        elif isinstance(value, (list, tuple)):
            found: dict[torch.device, int] = {}
            for index, one in enumerate(value):
                if isinstance(one, Tensor):
                    found.setdefault(one.device, index)
            yield from ((f"{argument}[{index}]", device) for device, index in found.items())
