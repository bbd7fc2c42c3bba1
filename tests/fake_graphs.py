"""没有 GPU 时核对 CUDA graph 的录制与重放：CPU 上的替身，语义相同。

录的时候算一遍、记下每个算子与它的参数，再把改写过的张量恢复成录之前的（真的录制什么都不执行）；重放时按记下的参数
逐个再算，结果写回录时的那些张量。所以一步里凡是由主机的数决定的（切片的位置、送过去的常数……）都定在录时的值上，
与真的 graph 一样会露出来。
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepseek_opt.generation import graphs

_EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph 的替身。"""

    replays = 0

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple, dict, Any]] = []
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "item"), f"录制中读回主机：{name}"
        for tensor in _written(func, args, kwargs):
            self._before.append((tensor, tensor.clone()))
        out = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, out))
        return out

    def undo(self) -> None:
        """录完：改写过的恢复原样。"""
        for tensor, before in reversed(self._before):
            tensor.copy_(before)
        self._before.clear()

    def replay(self) -> None:
        """再算一遍。"""
        Graph.replays += 1
        for func, args, kwargs, out in self._calls:
            if func.overloadpacket.__name__ in _EMPTY:
                continue
            given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                if old.untyped_storage().data_ptr() not in given:  # 视图、原地的已经是新的
                    old.copy_(new)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _written(func: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += _tensors(value)
    return found


@contextmanager
def _capture(graph: Graph, **_: Any):
    with graph:
        yield
    graph.undo()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU 上的生成也录制、重放。"""
    Graph.replays = 0
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", _capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
    monkeypatch.setattr(graphs, "can_capture", lambda _device: True)
