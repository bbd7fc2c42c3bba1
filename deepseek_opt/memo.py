"""记住由一个张量算出的结果：同一次前向、同一次重排里，各层收到的是同一个张量对象。"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor


class TensorMemo:
    """每个线程记住最近一个张量的结果；张量换了、被原地改过，或 key 不同，都重新计算。

    推理张量不计改写次数，无从知道它变了没有，所以不记。
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def get(self, tensor: Tensor, key: Hashable, make: Callable[[], Any]) -> Any:
        """tensor 的结果；没有记住的由 make() 算出。"""
        if tensor.is_inference():
            return make()
        local = self._local
        key = (tensor._version, key)
        if getattr(local, "ref", _nothing)() is not tensor or local.key != key:
            local.value = make()
            local.ref, local.key = weakref.ref(tensor), key
        return local.value


def _nothing() -> None:
    return None
