"""日志：默认不出声；DEBUG 时每次算子调用一行，写明算子、指令集、形状、耗时。"""

from __future__ import annotations

import logging
import re

import pytest
import torch

from deepseek_opt import _native, log, ops


@pytest.fixture
def restored():
    """测试后恢复记录器的级别与处理器。"""
    level, handlers = log.LOGGER.level, list(log.LOGGER.handlers)
    yield
    log.LOGGER.setLevel(level)
    log.LOGGER.handlers[:] = handlers


def test_silent_by_default(capfd):
    assert not log.debugging()
    ops.linear(torch.ones(2, 3), torch.ones(4, 3))
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("restored")
def test_debug_shows_each_call(caplog):
    with caplog.at_level(logging.DEBUG, logger="deepseek_opt"):
        x, weight = torch.ones(2, 3, dtype=torch.bfloat16), torch.ones(4, 3)
        got = ops.linear(x, weight)
    assert got.tolist() == [[3.0] * 4] * 2
    line = caplog.messages[-1]
    want = rf"linear（{_native.isa()}）\(2, 3\) bfloat16，\(4, 3\) float32：\d+\.\d{{3}} 毫秒"
    assert re.fullmatch(want, line), line


@pytest.mark.usefixtures("restored")
def test_debug_does_not_break_autograd_or_compile(caplog):
    with caplog.at_level(logging.DEBUG, logger="deepseek_opt"):
        x = torch.ones(2, 3, requires_grad=True)
        ops.rms_norm(x, torch.ones(3), 1e-6).sum().backward()
        assert x.grad.shape == (2, 3)
        caplog.clear()
        compiled = torch.compile(lambda v: ops.rms_norm(v, torch.ones(3), 1e-6), backend="eager")
        compiled(torch.ones(2, 3))
    assert not [r for r in caplog.records if r.name == "deepseek_opt"]


@pytest.mark.usefixtures("restored")
def test_enable_twice_adds_one_handler(capfd):
    before = len(log.LOGGER.handlers)
    log.enable("WARNING")
    assert log.enable(logging.DEBUG) is log.LOGGER and log.debugging()
    assert len(log.LOGGER.handlers) == before + 1
    ops.linear(torch.ones(1, 3), torch.ones(4, 3))
    assert "DEBUG deepseek_opt：linear" in capfd.readouterr().err
