"""NVIDIA 驱动的版本：直接问驱动，不经过 torch（各版本的 torch 不一定给得出）。"""

from __future__ import annotations

import ctypes


def driver_version() -> tuple[int, int]:
    """驱动支持的最高 CUDA 版本，如 (13, 0)；没有驱动（或它答不出）是 (0, 0)。"""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0, 0
    found = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(found)) != 0:
        return 0, 0
    return found.value // 1000, found.value % 1000 // 10
