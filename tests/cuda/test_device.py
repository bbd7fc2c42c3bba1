"""测试用的设备：出过错看得出来。"""

from __future__ import annotations

import pytest
import torch

from tests.cuda import device


@pytest.mark.parametrize(
    "initialized, error, broken",
    [
        (False, RuntimeError("CUDA error"), False),
        (True, None, False),
        (True, RuntimeError("CUDA error: an illegal memory access was encountered"), True),
    ],
)
def test_is_broken(monkeypatch, initialized, error, broken):
    """没有用过 CUDA 的进程不去碰它；用过的看能不能等到。"""

    def synchronize():
        assert initialized
        if error:
            raise error

    with monkeypatch.context() as patch:  # 测试结束之前还原：收尾时 conftest 也要看
        patch.setattr(torch.cuda, "is_initialized", lambda: initialized)
        patch.setattr(torch.cuda, "synchronize", synchronize)
        assert device.is_broken() is broken
