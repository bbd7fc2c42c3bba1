"""参考实现的计算精度。"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(*tensors: Tensor) -> torch.dtype:
    """计算精度：有 fp64 则 fp64，否则 fp32。"""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
