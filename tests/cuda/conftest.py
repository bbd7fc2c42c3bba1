"""模拟器自己的测试共用的夹具。"""

from __future__ import annotations

import pytest

from tests.cuda.simulation import MODES


@pytest.fixture(params=MODES, ids="-".join)
def mode(request, monkeypatch):
    """线程的次序、异步的动作何时执行，依次换成各种。"""
    monkeypatch.setenv("DSO_HOST_ORDER", request.param[0])
    monkeypatch.setenv("DSO_HOST_ASYNC", request.param[1])
