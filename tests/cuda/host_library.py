"""把 cuda/ 用主机编译器编成共享库（tests/cuda/host 模拟 CUDA），在没有 GPU 的机器上运行同样的核与绑定。

:func:`load` 之后，torch.ops.deepseek_opt 里有 CUDA 实现的算子在 CPU 张量上改由 CUDA 的绑定与核计算，
所以只在专门的进程里用（tests/cuda/conftest.py）。``DSO_HOST_SANITIZE=1`` 带 ASan 与 UBSan：进程要
先用 LD_PRELOAD 装上 libasan（scripts/cuda_host.sh）。
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from deepseek_opt import _native

ROOT = Path(__file__).resolve().parents[2]
HOST = Path(__file__).resolve().parent / "host"
INCLUDES = [f"-I{path}" for path in (HOST, ROOT / "cuda", ROOT / "csrc")]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def compiler() -> str | None:
    """主机 C++ 编译器；没有就返回 None（测试跳过）。"""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def sanitized() -> bool:
    """这个进程要不要带 ASan 与 UBSan。"""
    return os.environ.get("DSO_HOST_SANITIZE") == "1"


def flags() -> list[str]:
    """编译的标志。-w：主机编译器不认识 #pragma unroll。"""
    common = ["-std=c++20", "-O1", "-g1", "-fPIC", "-w", "-fno-strict-aliasing"]
    return [*common, *(SANITIZE if sanitized() else [])]


def torch_flags() -> list[str]:
    """绑定要的头文件与库。"""
    folder = Path(torch.__file__).parent
    defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030B0000"]
    return [*defines, f"-isystem{folder / 'include'}"]


@contextlib.contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """先写到别处再换名：几个进程同时编译时，别的进程读不到写了一半的文件。"""
    partial = target.with_suffix(f".{os.getpid()}{target.suffix}")
    yield partial
    partial.replace(target)


def _compile(source: Path, extra: list[str], folder: Path) -> Path:
    """编译一个文件；源文件与头文件都没变就用上次的。"""
    command = [compiler(), *flags(), *INCLUDES, *extra, "-x", "c++", "-c"]
    key = hashlib.sha256("\n".join([*command, str(source)]).encode()).hexdigest()[:16]
    target, depends = folder / f"{source.stem}-{key}.o", folder / f"{source.stem}-{key}.d"
    if target.is_file() and depends.is_file():
        words = depends.read_text(encoding="utf-8").replace("\\\n", " ").split()
        built = target.stat().st_mtime_ns
        paths = [Path(word) for word in words if not word.endswith(":")]
        if all(path.is_file() and path.stat().st_mtime_ns < built for path in paths):
            return target
    target.unlink(missing_ok=True)
    depend = ["-MMD", "-MF", str(depends)]
    with _whole(target) as partial:
        subprocess.run([*command, *depend, str(source), "-o", str(partial)], check=True)
    return target


def build(sources: list[Path], name: str, folder: Path, extra: list[str] | None = None) -> Path:
    """编译并链接成共享库。"""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda path: _compile(path, extra or [], folder), sources))
    target = folder / f"{name}.so"
    libs = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ltorch"]
    link = [compiler(), *flags(), "-shared", *map(str, objects)]
    with _whole(target) as partial:
        subprocess.run([*link, *(libs if extra else []), "-o", str(partial)], check=True)
    return target


def simulator(source: Path, folder: Path) -> ctypes.CDLL:
    """单独一个 .cu 与模拟器编成的库（测试模拟器自己）。"""
    return ctypes.CDLL(str(build([source, HOST / "sim.cpp"], source.stem, folder)))


@functools.cache
def load() -> ctypes.CDLL:
    """全部 CUDA 核与绑定的主机版：接管 CPU 张量上的算子（每个进程一次，编译结果在 build/ 里）。"""
    assert _native.load(), _native.load_error()  # 先登记原来的，再盖上
    kernels = sorted((ROOT / "cuda").glob("*.cu"))
    bindings = sorted((ROOT / "cuda").glob("binding*.cpp"))
    folder = ROOT / "build" / ("cuda-host-asan" if sanitized() else "cuda-host")
    sources = [*kernels, *bindings, HOST / "sim.cpp"]
    library = build(sources, "cuda_host", folder, torch_flags())
    torch.ops.load_library(library)
    handle = ctypes.CDLL(str(library))
    handle.dso_host_failure.restype = ctypes.c_char_p
    handle.dso_host_conflicts.restype = ctypes.c_long
    return handle
