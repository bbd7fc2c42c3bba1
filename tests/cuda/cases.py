"""CUDA 算子的测试形状：主机模拟与 GPU 测试共用。"""

from __future__ import annotations

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (行数, 宽度)：一个 warp 一行、一块一行、不能宽访存、行数不满一块、单元素。
NORM_SHAPES = [(5, 64), (9, 512), (3, 2048), (7, 100), (2, 1031), (1, 1), (33, 24)]
# (B, T, H, d)：宽访存、d/2 不是 4 的倍数、只有一个头。
ROPE_SHAPES = [(2, 3, 4, 64), (1, 5, 1, 64), (2, 2, 3, 6), (1, 1, 2, 2)]
# (B, T, C, r, dr)：常见形状、没有旋转部分、奇数宽度。
CACHE_SHAPES = [(2, 3, 8, 64, 16), (1, 5, 6, 512, 64), (2, 1, 4, 32, 0), (3, 2, 5, 13, 7)]


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """可重复的标准正态张量（CPU）。"""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
