"""测试模拟器自己时共用：编译一小段 .cu 与模拟器，在各种次序下运行。"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import shutil
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch

from tests.cuda import host_library as host

FAILED = 719
# 与用它的测试一起跑，带着 ASan 与 UBSan，不跑第二遍。
marks = pytest.mark.skipif(os.environ.get("DSO_HOST") != "1", reason="不在主机模拟里")
MODES = [("forward", "eager"), ("reverse", "lazy"), ("random:1", "lazy"), ("random:2", "eager")]
_FOLDER = Path(tempfile.mkdtemp(prefix="deepseek-opt-simulator-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)


@functools.cache
def simulate(text: str, **defines: int) -> ctypes.CDLL:
    """编译一个核与模拟器；同样的只编译一次。"""
    lines = [f"#define {key} {value}\n" for key, value in defines.items()]
    content = "".join(lines) + textwrap.dedent(text)
    source = _FOLDER / f"kernel_{hashlib.sha256(content.encode()).hexdigest()[:12]}.cu"
    source.write_text(content, encoding="utf-8")
    library = host.simulator(source, _FOLDER)
    library.dso_host_failure.restype = ctypes.c_char_p
    library.dso_host_conflicts.restype = ctypes.c_long
    return library


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
