"""没有 GPU 时核对 Python 一侧：模型与张量都在假的 CUDA 上（FakeTensorMode：只有形状、类型与设备）。

放错设备的张量当场报错；读回主机（``.item()``、``bool(...)``、``nonzero``）与跨设备的拷贝由 :class:`Watch` 记下——在真的
GPU 上它们都要等设备做完前面的事。
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepseek_opt import _native

CUDA = torch.device("cuda", 0)
# 只有 CPU 的 torch 没有 CUDA 的 DeviceGuard，原地的算子因此不能在假的 CUDA 张量上跑；登记一个什么都不做的。
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
const c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
const c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
}
"""
_aten = torch.ops.aten
_READS = (_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal)
_COPIES = (_aten._to_copy, _aten.copy_)


@functools.cache
def _install_guard() -> None:
    if torch.version.cuda is not None:
        return
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("没有 C++ 编译器")
    root = Path(torch.__file__).parent
    folder = Path(tempfile.mkdtemp(prefix="deepseek-opt-guard-"))
    (folder / "guard.cpp").write_text(_GUARD, encoding="ascii")
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", "-w", f"-I{root / 'include'}"]
    links = [f"-L{root / 'lib'}", "-lc10"]
    target = folder / "guard.so"
    command = [compiler, *flags, str(folder / "guard.cpp"), "-o", str(target), *links]
    subprocess.run(command, check=True)
    ctypes.CDLL(str(target))
    shutil.rmtree(folder)


class Watch(TorchDispatchMode):
    """记下等设备的操作：``reads`` 是读回主机的，``copies`` 是主机与设备之间的拷贝；``ops`` 是本库的算子。"""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []
        self.copies: list[str] = []
        self.ops: list[str] = []

    @property
    def waits(self) -> list[str]:
        """要等设备的。"""
        return self.reads + self.copies

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = func.overloadpacket
        before = _devices(args)
        if "cuda" in before and (packet in _READS or _by_mask(packet, args)):
            self.reads.append(str(packet))
        if func.namespace == "deepseek_opt":
            self.ops.append(packet.__name__)
            assert before == {"cuda"}, f"{packet.__name__} 的参数在 {before}"
        out = func(*args, **kwargs)
        if packet in _COPIES and len(before | _devices(out)) > 1:
            self.copies.append(str(packet))
        return out


def _by_mask(packet: Any, args: tuple) -> bool:
    """用 bool 张量取下标：结果有几个，要读回来才知道。"""
    leaves = tree_leaves(args[1:2])
    return packet is _aten.index and any(getattr(t, "dtype", None) is torch.bool for t in leaves)


def _devices(tree: Any) -> set[str]:
    return {t.device.type for t in tree_leaves(tree) if isinstance(t, Tensor)}


@contextlib.contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """块内的新张量都是假的，本库当作各种设备上都有核。"""
    _install_guard()
    monkeypatch.setattr(_native, "missing", lambda *_args, **_kwargs: None)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        yield mode


def move(model: nn.Module) -> nn.Module:
    """模型（在 CPU 上建好、优化过）的参数与缓冲区换成假的 CUDA 张量；要在 fake_cuda 里。"""
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                fresh = torch.empty(old.shape, dtype=old.dtype, device=CUDA)
                module._parameters[name] = nn.Parameter(fresh, requires_grad=False)
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.empty(old.shape, dtype=old.dtype, device=CUDA)
    return model
