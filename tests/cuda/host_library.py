"""把 cuda/*.cu 用主机编译器编成共享库（tests/cuda/host 模拟 CUDA），供没有 GPU 的机器测试。"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HOST = Path(__file__).resolve().parent / "host"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


def compiler() -> str | None:
    """主机 C++ 编译器；没有就返回 None（测试跳过）。"""
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")


def compile_shared(sources: list[Path], name: str) -> ctypes.CDLL:
    """编译成共享库并加载。-w：主机编译器不认识 #pragma unroll。"""
    folder = Path(tempfile.mkdtemp(prefix="deepseek-opt-cuda-host-"))
    target = folder / f"{name}.so"
    includes = [f"-I{path}" for path in (HOST, ROOT / "cuda", ROOT / "csrc")]
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-w", *includes]
    command = [compiler(), *flags, "-x", "c++", *map(str, sources), "-o", str(target)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))
    shutil.rmtree(folder)  # 已经映射进来，文件可以删
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """全部 CUDA 核的主机版（每个进程编译一次，约 3 秒）。"""
    library = compile_shared([*sorted((ROOT / "cuda").glob("*.cu")), HOST / "api.cpp"], "kernels")
    library.host_rms_norm_backward_scratch.restype = ctypes.c_int64
    return library


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """张量首元素的地址；None 为空指针。"""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def int64s(*values: int) -> ctypes.Array:
    """int64 数组参数。"""
    return (ctypes.c_int64 * len(values))(*values)


def code(dtype: torch.dtype) -> ctypes.c_int:
    """dso_dtype 的编号。"""
    return ctypes.c_int(DTYPES[dtype])


def rms_norm(x, residual, weight, eps):
    """(y, total)；x、residual [rows, dim]，行距任意、列连续。"""
    rows, dim = x.shape
    y = torch.empty(rows, dim, dtype=x.dtype)
    total = None if residual is None else torch.empty_like(y)
    status = load().host_rms_norm(
        *(ctypes.c_int64(rows), ctypes.c_int64(dim), pointer(x), ctypes.c_int64(x.stride(0))),
        *(pointer(residual), ctypes.c_int64(0 if residual is None else residual.stride(0))),
        *(code(x.dtype), pointer(weight), code(weight.dtype), pointer(y), pointer(total)),
        ctypes.c_float(eps),
    )
    assert status == 0
    return y, total


def rms_norm_backward(grad, x, weight, eps):
    """(dx, dweight)。"""
    rows, dim = x.shape
    dx, dw = torch.empty(rows, dim, dtype=x.dtype), torch.empty_like(weight)
    sizes = (ctypes.c_int64(rows), ctypes.c_int64(dim))
    scratch = torch.empty(load().host_rms_norm_backward_scratch(*sizes), dtype=torch.uint8)
    status = load().host_rms_norm_backward(
        *(*sizes, pointer(grad), ctypes.c_int64(grad.stride(0))),
        *(pointer(x), ctypes.c_int64(x.stride(0)), code(x.dtype)),
        *(pointer(weight), code(weight.dtype), pointer(dx), pointer(dw)),
        *(ctypes.c_float(eps), pointer(scratch)),
    )
    assert status == 0
    return dx, dw


def rope(x, cos, sin, interleaved, inverse=False):
    """x [B, T, H, d]；cos、sin [1 或 B, T, d/2] fp32 连续。"""
    y = torch.empty(x.shape, dtype=x.dtype)
    shared = 0 if cos.shape[0] == 1 else cos.stride(0)
    status = load().host_rope(
        *(int64s(*x.shape), int64s(*x.stride()[:3], shared, cos.stride(1))),
        *(pointer(x), code(x.dtype), pointer(cos), pointer(sin), pointer(y)),
        *(ctypes.c_int(interleaved), ctypes.c_int(inverse)),
    )
    assert status == 0
    return y


def mla_cache_write(latent_cache, rope_cache, scale_cache, latent, rope_keys, offsets):
    """原地写缓存；全部连续。"""
    batch, steps, rank = latent.shape
    tensors = (latent, rope_keys, latent_cache, rope_cache)
    status = load().host_mla_cache_write(
        int64s(batch, steps, rank, rope_keys.shape[2], latent_cache.shape[1]),
        (ctypes.c_int * 4)(*(DTYPES[tensor.dtype] for tensor in tensors)),
        *map(pointer, tensors),
        *(pointer(scale_cache), pointer(offsets)),
    )
    assert status == 0
