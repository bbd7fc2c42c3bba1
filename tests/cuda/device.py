"""有 GPU 就在 GPU 上、没有就在主机模拟上的测试共用：设备、跳过的条件。"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
LARGE = ON_GPU and os.environ.get("DSO_SMALL") != "1"  # compute-sanitizer 下慢几十倍：只用小的形状
marks = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not ON_GPU and os.environ.get("DSO_HOST") != "1", reason="没有 CUDA 设备，也不在主机模拟里"
    ),
]

needs_gpu = pytest.mark.skipif(not ON_GPU, reason="要真的 GPU")


def is_broken() -> bool:
    """这个进程里的 CUDA 出过错（越界访问等）：之后的调用都会失败。"""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
