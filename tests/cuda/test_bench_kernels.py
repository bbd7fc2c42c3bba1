"""解码一步的基准里各核花的时间，与关掉提前启动的一份（CPU 上只看记得对不对）。"""

from __future__ import annotations

import os
import time

import pytest

from benchmarks.gpu_cases import decode_step, environment, kernels, mla_heads
from benchmarks.gpu_cases.row import OK
from benchmarks.gpu_cases.runner import Env, run_case
from benchmarks.gpu_cases.timer import Clocked, Timer


@pytest.fixture
def env():
    """CPU 上的极小运行。"""
    return Env("cpu", True, Timer("cpu", True), 10.0, 1.0, time.monotonic() + 60)


def test_the_step_lists_its_kernels(env):
    """花时间最多的在前，各占多少；没有图时没有不提前启动的一份。"""
    rows = []
    run_case(env, decode_step.cases(env)[0], rows.append)
    details = rows[0].details
    times = [entry["us"] for entry in details["profile"]]
    assert rows[0].status == OK and times == sorted(times, reverse=True) and times[-1] >= 0
    assert details["kernels"] > len(times) == kernels.LISTED and details["span_us"] > 0
    assert details["no_pdl_us"] is None


def test_the_products_of_the_heads_are_read_apart(env):
    """整个算子之外，另有两个 torch.bmm、不提前启动的与各核的时间。"""
    rows = []
    run_case(env, mla_heads.cases(env)[0], rows.append)
    row = rows[0]
    assert row.status == OK and [peer.name for peer in row.peers] == ["torch 吸收式 bmm"]
    assert row.peers[0].us > 0 and row.details["bmm_us"] > 0 and row.details["no_pdl_us"] > 0
    assert row.details["kernels"] > 0 and kernels.PDL not in os.environ


def test_the_step_is_also_timed_without_early_launch(env, monkeypatch):
    """第二份图在关掉提前启动时录下，核的时间看的是它。"""
    seen, plain = [], Timer.prepare

    def prepare(self, call, inputs, graph=False):
        seen.append((graph, os.environ.get(kernels.PDL)))
        side = plain(self, call, inputs)
        side.mode = "graph" if graph else side.mode
        return side

    profiled = []
    monkeypatch.setattr(Timer, "prepare", prepare)
    monkeypatch.setattr(kernels, "profiled", lambda side, device: profiled.append(side) or {})
    monkeypatch.setattr(Timer, "in_turn", lambda self, sides: [1.0, 2.0, 3.0, 4.0])
    rows = []
    run_case(env, decode_step.cases(env)[0], rows.append)
    assert seen == [(True, None), (True, "0"), (False, None), (False, None)]
    assert kernels.PDL not in os.environ and profiled[0].mode == "graph"
    details = rows[0].details
    assert (rows[0].us, details["no_pdl_us"], details["eager_us"]) == (1.0, 2.0, 3.0)


def test_kernels_are_summed_per_step():
    name = "void dso::(anonymous namespace)::rms_norm_kernel<8>(dso_rms_norm_params)"
    add = "void at::native::elementwise_kernel<4, at::native::CUDAFunctor_add<float> >(int)"
    events = [(name, 0.0, 2.0), (add, 3.0, 5.0), (name, 10.0, 4.0), (name, 15.0, 5.0)]
    found = kernels.summary(events, 2)
    assert (found["kernels"], found["kernels_us"], found["span_us"]) == (2.0, 8.0, 10.0)
    first, second = found["profile"]
    assert first == {"name": "rms_norm_kernel<8>", "count": 1.5, "us": 5.5}
    assert second["name"] == "elementwise_kernel<4, CUDAFunctor_add<float> >"


def test_a_profiler_that_sees_nothing_is_noted(monkeypatch):
    def broken(**_):
        raise RuntimeError("没有权限\n第二行")

    assert "没有看到核" in kernels.profiled(Clocked(lambda: None, 1), "cpu")["profile_note"]
    monkeypatch.setattr(kernels, "profile", broken)
    found = kernels.profiled(Clocked(lambda: None, 1), "cpu")
    assert found == {"profile_note": "RuntimeError：没有权限"}


def test_settings_are_restored(monkeypatch):
    monkeypatch.setenv("SOME", "1")
    for value, inside in (("2", "2"), (None, "1")):
        with environment.setting("SOME", value):
            assert os.environ["SOME"] == inside
        assert os.environ["SOME"] == "1"
