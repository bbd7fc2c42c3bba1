"""全部测试共用的一张误差表；按 dtype，数值来自各类型的舍入单位与累加长度。"""

from __future__ import annotations

import torch

_TABLE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
    torch.int8: {"rtol": 3e-2, "atol": 3e-2},
    torch.float8_e4m3fn: {"rtol": 8e-2, "atol": 8e-2},
    # fp32 的激活乘量化的权重，AVX512-VNNI 起：激活化为 16 位定点，每个元素差至多（组内）最大值的 1 / 65278。
    "fixed_point": {"rtol": 2e-4, "atol": 2e-4},
}


def tol(dtype: torch.dtype | str) -> dict[str, float]:
    """返回 ``torch.testing.assert_close`` 用的 rtol、atol。"""
    return dict(_TABLE[dtype])
