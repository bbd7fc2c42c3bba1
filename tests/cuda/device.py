"""有 GPU 就在 GPU 上、没有就在主机模拟上的测试共用：设备、跳过的条件。"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepseek_opt.generation.step import Found, Step

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


def reads_of(generate: Callable[[], Any]) -> tuple[list[bool], int, str]:
    """generate() 里每次读回时是不是已在送往主机，照常计算（不是重放）的步数；读回之外要等设备的地方在哪里。"""
    read: list[bool] = []
    run: list[int] = []
    where = ""
    real_read, real_run = Found.read, Step.run

    def counted(self: Found) -> Any:
        read.append(self.ready is not None)
        torch.cuda.set_sync_debug_mode("default")
        found = real_read(self)
        torch.cuda.set_sync_debug_mode("error")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Found, "read", counted)
        patch.setattr(Step, "run", lambda *a, **k: run.append(1) or real_run(*a, **k))
        try:
            generate()
        except RuntimeError as error:  # 最后取结果、结束时的读回不在步里
            assert "synchroniz" in str(error)
            where = traceback.format_exc()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return read, len(run), where
