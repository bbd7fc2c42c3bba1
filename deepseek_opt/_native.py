"""加载本地库（_C.abi3.so，以及有 CUDA 的 torch 上的 _C_cuda.so）并查询指令集。

加载只注册 ``torch.ops.deepseek_opt.*``，不改动 torch 的任何东西；失败的原因留在
:func:`load_error` 里，不抛出——没有本地库时包仍能导入，``deepseek-opt doctor`` 会说明缺什么。
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import threading
from pathlib import Path

import torch

from deepseek_opt.driver import driver_version
from deepseek_opt.errors import InputError, UnsupportedError

CPU_LIBRARY = "_C.abi3.so"
CUDA_LIBRARY = "_C_cuda.so"
MINIMUM_TORCH = (2, 10)
MINIMUM_CAPABILITY = (8, 0)  # build_native.py 的 CUDA_ARCH 里最低的；doctor 也有一份（不载入本库）

_FOLDER = Path(__file__).resolve().parent
_lock = threading.Lock()


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _try_load(path: Path) -> str | None:
    """加载一个库；成功返回 None，失败返回中文原因。"""
    if _torch_version() < MINIMUM_TORCH:
        return f"需要 torch >= 2.10，装着的是 {torch.__version__}。"
    if not path.is_file():
        return (
            f"没有找到本地库 {path.name}：请在仓库根目录运行 "
            "pip install . --no-build-isolation 重新编译安装。"
        )
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        # torch 的消息里只有路径，动态链接器的原因在 __cause__ 里。
        why = error.__cause__ or error
        return f"本地库 {path.name} 加载失败：{why}。请针对当前的 torch 重新编译安装。"
    return None


@functools.cache
def _load_cpu() -> str | None:
    return _try_load(_cpu_path())


def _cpu_path() -> Path:
    # 换一个库：测覆盖率的插桩版、只有标量核的版本。
    return Path(os.environ.get("DEEPSEEK_OPT_LIBRARY") or _FOLDER / CPU_LIBRARY)


@functools.cache
def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return "装着的 torch 不带 CUDA。"
    path = _FOLDER / CUDA_LIBRARY
    return load_error() or _try_load(path) or _old_driver(path)


def _old_driver(path: Path) -> str | None:
    """驱动比库里静态链接的 CUDA 运行库（版本随编译用的 nvcc）老一个大版本，核启动不了：原因；能用为 None。"""
    driver, built = driver_version(), ctypes.CDLL(str(path)).dso_cuda_runtime_version()
    if driver == (0, 0) or driver[0] >= built // 1000:  # 没有驱动，也就没有 CUDA 张量
        return None
    return (
        f"{path.name} 是用 CUDA {built // 1000}.{built % 1000 // 10} 编译的，而驱动最高支持 "
        f"CUDA {driver[0]}.{driver[1]}：请升级驱动，或用 CUDA {driver[0]} 的 nvcc 重新编译安装。"
    )


def load() -> bool:
    """加载本地库（只做一次，线程安全）。返回 CPU 库是否可用。

    >>> from deepseek_opt import _native
    >>> _native.load()
    True
    """
    with _lock:
        if _load_cpu() is None:
            _load_cuda()
            return True
        return False


def loaded() -> bool:
    """CPU 算子库是否已经可用（必要时先加载）。"""
    return load()


def load_error() -> str | None:
    """CPU 算子库不可用的原因（中文）；可用时为 None。"""
    return _load_cpu()


def cuda_loaded() -> bool:
    """CUDA 算子库是否已经可用。"""
    return load() and _load_cuda() is None


def cuda_load_error() -> str | None:
    """CUDA 算子库不可用的原因（中文）；可用时为 None。"""
    return _load_cuda()


@torch.compiler.assume_constant_result
def missing(device: str, names: tuple[str, ...], grad: bool = False) -> str | None:
    """device 类的设备上不能执行 names 这些算子（grad：连同它们的反向）的原因；都能则为 None。

    能不能在某种设备上算，只由这里说了算：各补丁问它，不能就由原实现计算。

    >>> from deepseek_opt import _native
    >>> _native.missing("cpu", ("linear",), grad=True) is None
    True
    """
    return _missing(device, names, grad)


@functools.cache
def _missing(device: str, names: tuple[str, ...], grad: bool) -> str | None:
    if not load():
        return f"本地算子库不可用：{load_error()}"
    if device == "cuda":
        reason = _old_gpus() if cuda_loaded() else cuda_load_error()
        if reason is not None:
            return f"设备 cuda 上不能用本库的核：{reason}"
    if grad:
        backward = [f"{name}_backward" for name in names]
        names = (*names, *(name for name in backward if hasattr(torch.ops.deepseek_opt, name)))
    lacking = [name for name in names if not _has_kernel(name, device)]
    return f"设备 {device} 上还没有 {'、'.join(lacking)} 的核" if lacking else None


def _old_gpus() -> str | None:
    """看得见的 GPU 里有太旧的：是哪些；都能用为 None。"""
    found = [
        f"{torch.cuda.get_device_name(i)}（sm_{major}{minor}）"
        for i in range(torch.cuda.device_count())
        for major, minor in [torch.cuda.get_device_capability(i)]
        if (major, minor) < MINIMUM_CAPABILITY
    ]
    if not found:
        return None
    needed = "".join(map(str, MINIMUM_CAPABILITY))
    return (
        f"{'、'.join(found)} 太旧，需要 sm_{needed}（Ampere）及更新的 GPU；"
        "还有别的 GPU 时用 CUDA_VISIBLE_DEVICES 只留下它们。"
    )


def _has_kernel(name: str, device: str) -> bool:
    keys = {"cpu": "CPU", "cuda": "CUDA"}
    found = torch._C._dispatch_has_kernel_for_dispatch_key
    return device in keys and found(f"deepseek_opt::{name}", keys[device])


def _call(name: str, *args):
    if not load():
        raise UnsupportedError(load_error())
    return getattr(torch.ops.deepseek_opt, name)(*args)


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def isa() -> str:
    """正在使用的指令集：scalar、avx2、avx512、avx512_vnni 或 avx512_bf16。"""
    return _call("_isa")


def compiled_isas() -> list[str]:
    """编译进本地库的指令集，由慢到快。"""
    return _names(_call("_compiled_isas"))


def available_isas() -> list[str]:
    """编译进来、而且这台机器能跑的指令集，由慢到快。"""
    return _names(_call("_available_isas"))


def set_isa(name: str) -> None:
    """改用另一种指令集（测试与比较用；平时用环境变量 DEEPSEEK_OPT_ISA）。

    Raises:
        InputError: 这台机器上没有这种指令集。
    """
    if name not in available_isas():
        choices = "、".join(available_isas())
        raise InputError(f"指令集 {name!r} 不可用，可选：{choices}。")
    _call("_set_isa", name)


def release_buffers() -> int:
    """回收池里空闲的内存还给系统，返回字节数。"""
    return _call("_release_buffers")


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """建议系统用 2 MiB 的页装这个张量；没有本地库时什么都不做。"""
    if load():
        _call("_advise_huge_pages", tensor)


def build_info() -> dict[str, object]:
    """本地库的构建与运行信息，供 ``deepseek-opt doctor`` 与基准结果记录。

    键：library（路径或 None）、error、isa、compiled_isas、available_isas、machine、torch、
    cuda_library（路径或 None）、cuda_error。
    """
    ready = load()
    cuda_ready = cuda_loaded()
    return {
        "library": str(_cpu_path()) if ready else None,
        "error": load_error(),
        "isa": isa() if ready else None,
        "compiled_isas": compiled_isas() if ready else [],
        "available_isas": available_isas() if ready else [],
        "machine": platform.machine(),
        "torch": torch.__version__,
        "cuda_library": str(_FOLDER / CUDA_LIBRARY) if cuda_ready else None,
        "cuda_error": cuda_load_error(),
    }
