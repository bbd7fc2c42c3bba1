"""把 cuda/ 用主机编译器编成共享库（tests/cuda/host 模拟 CUDA），在没有 GPU 的机器上运行同样的核与绑定。

:func:`load` 之后，torch.ops.deepseek_opt 里有 CUDA 实现的算子在 CPU 张量上改由 CUDA 的绑定与核计算，
所以只在专门的进程里用（tests/conftest.py）。``DSO_HOST_SANITIZE=1`` 带 ASan 与 UBSan：进程要
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
# 模拟器自己：测的是核，所以不插桩，照 -O2 编译，调度才不占去一半的时间。
SIMULATOR = [HOST / "sim.cpp", HOST / "async.cpp"]
SIMULATOR_FLAGS = ["-std=c++20", "-O2", "-g1", "-fPIC", "-w"]
# 去掉的几项由 ASan 在访问处查（空指针、地址算出界），或这里用不到（虚表）：编译省三成。
SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-sanitize=null,object-size,pointer-overflow,vptr",
    "-fno-sanitize-recover=undefined",
]


def compiler() -> str:
    """主机 C++ 编译器。"""
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    assert found, "没有主机 C++ 编译器"
    return found


def sanitized() -> bool:
    """这个进程要不要带 ASan 与 UBSan。"""
    return os.environ.get("DSO_HOST_SANITIZE") == "1"


def flags() -> list[str]:
    """编译的标志。-w：主机编译器不认识 #pragma unroll。"""
    common = ["-std=c++20", "-O1", "-g1", "-fPIC", "-w", "-fno-strict-aliasing"]
    return [*common, *(SANITIZE if sanitized() else [])]


def _run(command: list[str]) -> None:
    """运行编译器：它自己不装 LD_PRELOAD 里的 libasan，慢三成。"""
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    subprocess.run(command, env=environment, check=True)


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


def _folder() -> Path:
    """编译结果放在哪里。"""
    return ROOT / "build" / ("cuda-host-asan" if sanitized() else "cuda-host")


def _compile(source: Path, options: list[str], folder: Path) -> Path:
    """编译一个文件；源文件与头文件都没变就用上次的。"""
    command = [compiler(), *options, *INCLUDES, "-x", "c++", "-c"]
    key = hashlib.sha256("\n".join([*command, str(source)]).encode()).hexdigest()[:16]
    target, depends = folder / f"{source.stem}-{key}.o", folder / f"{source.stem}-{key}.d"
    if target.is_file() and depends.is_file():
        words = depends.read_text(encoding="utf-8").replace("\\\n", " ").split()
        built = target.stat().st_mtime_ns
        paths = [Path(word) for word in words if not word.endswith(":")]
        if all(path.is_file() and path.stat().st_mtime_ns < built for path in paths):
            return target
    with _whole(target) as partial, _whole(depends) as rule:
        depend = ["-MMD", "-MF", str(rule)]
        _run([*command, *depend, str(source), "-o", str(partial)])
    return target


def build(sources: list[Path], name: str, folder: Path, extra: list[str] | None = None) -> Path:
    """连同模拟器编译并链接成共享库。"""
    options = [*flags(), *(extra or [])]
    own = [*SIMULATOR_FLAGS, *(["-DDSO_HOST_ASAN"] if sanitized() else [])]
    jobs = [(path, options, folder) for path in sources]
    jobs += [(path, own, _folder()) for path in SIMULATOR]  # 与谁链接都是同一份
    for path in (folder, _folder()):
        path.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda job: _compile(*job), jobs))
    target = folder / f"{name}.so"
    libs = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-ltorch"]
    link = [compiler(), *flags(), "-shared", *map(str, objects)]
    with _whole(target) as partial:
        _run([*link, *(libs if extra else []), "-o", str(partial)])
    return target


def simulator(source: Path, folder: Path) -> ctypes.CDLL:
    """单独一个 .cu 与模拟器编成的库（测试模拟器自己）。"""
    return ctypes.CDLL(str(build([source], source.stem, folder)))


@functools.cache
def load() -> ctypes.CDLL:
    """全部 CUDA 核与绑定的主机版：接管 CPU 张量上的算子（每个进程一次，编译结果在 build/ 里）。"""
    assert _native.load(), _native.load_error()  # 先登记原来的，再盖上
    kernels = sorted((ROOT / "cuda").glob("*.cu"))
    bindings = sorted((ROOT / "cuda").glob("binding*.cpp"))
    library = build([*kernels, *bindings], "cuda_host", _folder(), torch_flags())
    torch.ops.load_library(library)
    handle = ctypes.CDLL(str(library))
    handle.dso_host_failure.restype = ctypes.c_char_p
    handle.dso_host_conflicts.restype = ctypes.c_long
    return handle
