"""共用夹具。"""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

from deepseek_opt import _native
from tests.cuda import device

# 一例多久与机器、与同时在跑的别的进程有关：不限时。
hypothesis.settings.register_profile("不限时", deadline=None)
hypothesis.settings.load_profile("不限时")

ISAS = _native.available_isas() if _native.load() else []
if os.environ.get("DSO_HOST") == "1":
    # 同样的测试，算子换成主机模拟的 CUDA 核（scripts/cuda_host.sh）；与 CPU 的指令集无关，跑一遍就够。
    from tests.cuda import host_library

    host_library.load()
    ISAS = ISAS[-1:]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown():
    """几个进程一起跑时，设备出过错的进程就此退出（失败已经报出），余下的测试由新的进程接着跑。"""
    if "PYTEST_XDIST_WORKER" in os.environ and device.is_broken():
        os._exit(1)


@pytest.fixture(params=ISAS)
def isa(request):
    """依次换成本机可用的每一种指令集，测试后换回。"""
    before = _native.isa()
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


@pytest.fixture
def threads():
    """``threads(n)`` 改线程数，测试后恢复。"""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed():
    """失败可以重现。"""
    torch.manual_seed(0)


@pytest.fixture
def small_buffers(monkeypatch):
    """基准计时前冲缓存的大块换成很小的：测试不看时间。"""
    from deepseek_opt.benchmarks import timing  # 只有基准的测试要

    monkeypatch.setattr(timing, "_EVICT_BYTES", 1 << 16)
    timing._evict_buffer.cache_clear()
    yield
    timing._evict_buffer.cache_clear()


@pytest.fixture(name="poisoned")
def _poisoned():
    """没有初始化的内存填 NaN：读到就露出来，不靠运气。"""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
