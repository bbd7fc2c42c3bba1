"""实例补丁的公共部分：把可调用对象放到 ``module.forward``（或别的方法），恢复时取下，别的什么都不动。"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from deepseek_opt.errors import UnsupportedError
from deepseek_opt.integrations.projections import is_hooked
from deepseek_opt.integrations.runtime import Runtime


class Patch:
    """一个模块实例的新方法，缺省是 forward。

    深拷贝（或 pickle）模型时补丁随之复制，副本里的 ``module`` 指向副本的模块。
    """

    kind = ""
    attribute = "forward"

    def __init__(self, module: nn.Module, runtime: Runtime, name: str):
        self.module = module
        self.runtime = runtime
        self.name = name
        self.original = module.__dict__.get(self.attribute)  # 实例上原有的；通常没有

    @property
    def __signature__(self) -> inspect.Signature:
        """原方法的签名（不含 self）：transformers 等会查看它。"""
        if self.original is not None:
            return inspect.signature(self.original)
        signature = inspect.signature(getattr(type(self.module), self.attribute))
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def install(self) -> None:
        """换上。"""
        self.module.__dict__[self.attribute] = self

    def remove(self) -> None:
        """取下，实例属性回到原样。"""
        if self.original is None:
            self.module.__dict__.pop(self.attribute, None)
        else:
            self.module.__dict__[self.attribute] = self.original

    def call_original(self, *args: Any, **kwargs: Any) -> Any:
        """原方法。"""
        if self.original is not None:
            return self.original(*args, **kwargs)
        return getattr(type(self.module), self.attribute)(self.module, *args, **kwargs)


class QuantizablePatch(Patch):
    """可以用量化专家的补丁；``store`` 为 :class:`~.quantized.ExpertStore`，没有量化时为 None。"""

    store: Any = None

    def give_way(self, reason: str) -> None:
        """这次改由原实现计算：记数；原权重已释放时抛出 UnsupportedError。"""
        if self.store is not None and self.store.released:
            raise UnsupportedError(
                f"{self.name or type(self.module).__name__} 不能由量化的专家计算（{reason}），"
                "而原权重已经释放；可用 restore(model, dequantize=True) 由量化的权重还原（近似值）"
            )
        self.runtime.count(self.name, reason)


def patch_of(module: nn.Module) -> Patch | None:
    """module 上的补丁；没有为 None。"""
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, Patch) else None


def is_taken(module: nn.Module) -> bool:
    """module 上有钩子，或 forward 被别人（不是本库的补丁）改写。"""
    return is_hooked(module) or ("forward" in module.__dict__ and patch_of(module) is None)
