"""benchmarks/gpu.py 能跑完并写出 JSON（在 CPU 上用极小的形状，不看数字），并且不放过错的结果。"""

from __future__ import annotations

import contextlib
import json
import time
import types
import weakref

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_cases import (
    check,
    compiled,
    environment,
    length,
    memory,
    mla_decode,
    mla_prefill,
    models,
)
from benchmarks.gpu_cases.row import FAILED, OK, SKIPPED, Peer, Row, Target
from benchmarks.gpu_cases.runner import Case, Env, run_case
from benchmarks.gpu_cases.timer import Timer
from deepseek_opt import ops
from deepseek_opt.errors import UnsupportedError


@pytest.fixture
def bench(tmp_path):
    """bench(参数…) -> (退出码, JSON)；在 CPU 上 quick。"""

    def run(*arguments: str) -> tuple[int, dict]:
        output = tmp_path / "results" / "gpu.json"
        code = gpu.main(["--device", "cpu", "--quick", "--output", str(output), *arguments])
        return code, json.loads(output.read_text(encoding="utf-8"))

    return run


@pytest.fixture
def env():
    """CPU 上的极小运行。"""
    return Env("cpu", True, Timer("cpu", True), 10.0, 1.0, time.monotonic() + 60)


def rows_of(result: dict) -> dict[str, dict]:
    return {row["key"]: row for row in result["rows"]}


@pytest.mark.slow
def test_everything_runs(bench, capsys):
    """每组都有读数；子进程里的编译对照也在内。"""
    code, result = bench()
    assert code == 0 and result["complete"]
    assert result["roofline"]["copy_gbps"] > 0 and result["torch"] and result["date"]
    rows = rows_of(result)
    assert not [row for row in rows.values() if row["status"] == FAILED]
    skipped = [key for key, row in rows.items() if row["status"] == SKIPPED]
    assert all(key.startswith("memory.") for key in skipped), skipped  # 太小，量不到
    out = capsys.readouterr().out
    assert f"共 {len(rows)} 行" in out and "已写入" in out
    for heads, count in ((128, 6), (16, 14)):  # 各有两项分页的
        found = [row for key, row in rows.items() if key.startswith(f"mla_decode.h{heads}.")]
        assert len(found) == count
        assert all(row["us"] > 0 and row["error"] >= 0 and row["value"] > 0 for row in found)
        assert {row["target"] for row in found} == ({600.0} if heads == 128 else {0.8})
    pages = [row for key, row in rows.items() if ".page" in key]
    assert all([peer["name"] for peer in row["peers"]] == ["本库，不分页"] for row in pages)
    for key in ("forward", "backward"):
        row = rows[f"mla_prefill.h128.s8192.{key}"]
        assert row["target"] == {"forward": 550.0, "backward": 400.0}[key]
        assert {peer["name"] for peer in row["peers"]} == {
            f"SDPA {name}（{how}）" for name in ("flash", "cuDNN") for how in ("含展开", "已展开")
        }
    for batch in (1, 8, 64):
        assert rows[f"decode_step.b{batch}.bandwidth"]["target"] == 0.75
        assert rows[f"decode_step.b{batch}.transformers"]["target"] == 5.0
        assert rows[f"decode_step.b{batch}.compiled"]["details"]["compile_s"] > 0
    for batch in (1, 8):
        assert rows[f"generate.b{batch}.bandwidth"]["target"] == 0.75
        assert len(rows[f"generate.b{batch}.bandwidth"]["peers"]) == 2
        assert rows[f"generate.b{batch}.transformers"]["target"] == 5.0
        row = rows[f"moe13b.b{batch}"]
        assert row["target"] == 1.3 and [peer["name"] for peer in row["peers"]] == [
            "本库，稠密",
            "transformers，同样的 MoE",
            "transformers，稠密",
        ]
    assert sum(key.startswith("memory.") for key in rows) == 4 * 4
    assert rows["length.16gb.standard_sdpa"]["value"] == length.LIMIT
    assert not any("met" in row for row in rows.values())  # quick 不下结论
    names = {key.split(".")[0] for key in rows}
    assert {"rms_norm", "add_rms_norm", "rms_norm_backward", "rope", "cache_write"} <= names


def spoiled(op):
    """结果里有一个元素错了的算子。"""

    def run(*args):
        out = op(*args)
        (out[0] if isinstance(out, tuple) else out).flatten()[-1] += 100
        return out

    return run


@pytest.mark.parametrize(
    "group, name, row",
    [
        ("mla_decode", "mla_decode", "mla_decode.h16.b32.s1024"),
        ("mla_prefill", "mla_prefill", "mla_prefill.h16.s8192"),
        ("dense", "rms_norm", "rms_norm.4x64.bfloat16"),
        ("dense", "rope", "rope.1x4x2x64.float32"),
    ],
)
def test_a_wrong_result_fails_and_is_not_timed(bench, monkeypatch, capsys, group, name, row):
    monkeypatch.setattr(ops, name, spoiled(getattr(ops, name)))
    code, result = bench("--only", group, "--match", row)
    found = rows_of(result)[row]
    assert code == 1 and found["status"] == FAILED and "us" not in found
    assert "与参考不符" in found["reason"] and "失败" in capsys.readouterr().out


def test_a_wrong_gradient_fails(bench, monkeypatch):
    """前向对、反向错：前向的读数还在。"""
    right = ops.mla_prefill

    def wrong(q, *rest):
        out, lse = right(q, *rest)
        return out + (q - q.detach()).sum() * 0.5, lse

    monkeypatch.setattr(ops, "mla_prefill", wrong)
    code, result = bench("--only", "mla_prefill")
    rows = rows_of(result)
    assert code == 1 and rows["mla_prefill.h16.s8192.forward"]["status"] == OK
    assert "dq" in rows["mla_prefill.h16.s8192"]["reason"]
    assert "mla_prefill.h16.s8192.backward" not in rows


def test_not_finite_fails(bench, monkeypatch):
    monkeypatch.setattr(ops, "mla_decode", lambda q, *_, **__: q[..., :16] * torch.nan)
    code, result = bench("--only", "mla_decode", "--match", "h16.b32,h128")
    assert code == 1 and all("NaN" in row["reason"] for row in result["rows"])


@pytest.mark.parametrize(
    "error, status",
    [
        (UnsupportedError("没有对应的核"), SKIPPED),
        (NotImplementedError("no kernel"), SKIPPED),
        (torch.OutOfMemoryError("CUDA out of memory"), SKIPPED),
        (RuntimeError("mla_decode：CUDA error: out of memory"), SKIPPED),
        (RuntimeError("启动失败"), FAILED),
    ],
)
def test_errors_become_rows(bench, monkeypatch, error, status):
    """一项出错，其余各项照常。"""

    def fail(*_):
        raise error

    monkeypatch.setattr(ops, "rope", fail)
    code, result = bench("--only", "dense", "--match", "rope,cache_write")
    rows = rows_of(result)
    assert code == (1 if status == FAILED else 0) and result["complete"]
    found = rows["rope.1x4x2x64.bfloat16"]
    assert found["status"] == status and str(error)[-4:] in found["reason"]
    assert rows["cache_write.1x4.int8"]["status"] == OK


def test_budget(bench, capsys):
    """预算用完：余下的都跳过，总结里有名字，不算失败。"""
    code, result = bench("--budget-s", "0")
    assert code == 0 and {row["status"] for row in result["rows"]} == {SKIPPED}
    assert all("时间预算" in row["reason"] for row in result["rows"])
    assert "decode_step.b64" in capsys.readouterr().out.split("跳过：")[-1]


def test_rows_survive_an_interruption(bench, monkeypatch, tmp_path):
    """中途被打断：已有的读数在 JSON 里，注明没有跑完。"""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "rope", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench("--only", "dense", "--match", "bfloat16")
    result = json.loads((tmp_path / "results" / "gpu.json").read_text(encoding="utf-8"))
    assert not result["complete"] and rows_of(result)["rms_norm.4x64.bfloat16"]["us"] > 0


def test_match(bench):
    keys = list(rows_of(bench("--only", "mla_decode", "--match", "h16.b32")[1]))
    assert keys and all("h16.b32" in key for key in keys)


def test_unknown_group(bench):
    with pytest.raises(SystemExit):
        bench("--only", "nothing")


def test_a_model_that_falls_back_is_not_measured(env, monkeypatch):
    """注意力由原实现计算时不给读数：那是原实现与自己比。"""
    plain = models.optimized

    def falls_back(model):
        fast, report = plain(model)
        report.fallbacks["model.layers.0.self_attn", "设备 cuda 上还没有 MLA 核"] += 1
        return fast, report

    monkeypatch.setattr(models, "optimized", falls_back)
    rows = []
    for group in ("decode_step", "memory", "length"):
        run_case(env, gpu.GROUPS[group].cases(env)[0], rows.append)
    assert [row.status for row in rows] == [SKIPPED] * 3
    assert all("还没有 MLA 核" in row.reason for row in rows)


def test_a_wrong_layer_fails(env, monkeypatch):
    """模型里的注意力算错了也看得出来。"""
    right = ops.mla_layer_decode
    monkeypatch.setattr(ops, "mla_layer_decode", lambda *args: right(*args) * 1.5)
    rows = []
    run_case(env, gpu.GROUPS["decode_step"].cases(env)[0], rows.append)
    assert [row.status for row in rows] == [FAILED] and "fp32" in rows[0].reason


def test_a_peer_that_fails_or_is_wrong_is_only_noted(env, monkeypatch):
    def broken(*_):
        raise RuntimeError("没有这个后端\n第二行")

    wrong = mla_decode.absorbed
    dims = mla_decode.mla_inputs.small(mla_decode.Dims(2, 1, 24, 2))
    peers = {"坏的": broken, "错的": lambda *args: wrong(dims, mla_decode.attend_bmm, *args) + 1}
    monkeypatch.setattr(mla_decode, "peers", lambda *_: peers)
    rows = []
    run_case(env, mla_decode.cases(env)[0], rows.append)
    first, second = rows[0].peers
    assert rows[0].status == OK and first.us is None and second.us is None
    assert first.note == "RuntimeError：没有这个后端" and "与参考不符" in second.note


@pytest.mark.parametrize("limit, expected", [(100, (96, "memory")), (128, (128, "memory"))])
def test_longest(limit, expected):
    """加倍到放不下，再试中点。"""
    tried = []

    def fits(n):
        tried.append(n)
        return n <= limit

    assert length.longest(fits, 16, 1 << 20, time.monotonic() + 60) == expected
    assert tried == ([16, 32, 64, 128, 96] if limit == 100 else [16, 32, 64, 128, 256, 192])


def test_longest_stops():
    """第一次就放不下；到了上限；时间用完。"""
    assert length.longest(lambda n: False, 16, 64, time.monotonic() + 60) == (0, "memory")
    assert length.longest(lambda n: True, 16, 64, time.monotonic() + 60) == (64, "limit")
    assert length.longest(lambda n: True, 16, 64, time.monotonic() - 1) == (16, "time")


def test_length_is_judged_only_when_the_peer_ran_out(env, monkeypatch):
    """对照没有试到放不下为止，就不下结论。"""
    answers = iter([(64, "memory"), (128, "time"), (512, "limit")])
    monkeypatch.setattr(length, "longest", lambda *_: next(answers))
    eager, sdpa = length.run(env)
    assert (eager.value, eager.met) == (8.0, True) and (sdpa.value, sdpa.met) == (4.0, None)


def test_backward_is_the_difference(env):
    forward = Row("f", us=100.0, peers=[Peer("a", 200.0), Peer("b")])
    both = Row("fb", us=400.0, dtype="bfloat16", peers=[Peer("a", 1100.0), Peer("b", 5.0)])
    row = mla_prefill.backward_row(env, "b", forward, both, 3e8)
    assert row.us == 300.0 and row.tflops == pytest.approx(1.0) and row.met is False
    first, second = row.peers
    assert (first.us, first.speedup) == (900.0, 3.0) and second.us is None and second.note


def test_flops_and_bytes(env):
    """issue 的口径：吸收式 2BHS(r + dr + r)，缓存的字节；因果前向 HSS(dqk + dv)。"""
    work = mla_decode.work(mla_decode.Dims(2, 1, 64, 16), env, "x")
    assert work.flops == 2 * 2 * 16 * 64 * 1088 and work.bytes == 2 * 64 * 576 * 2
    assert mla_prefill.flops(mla_prefill.Dims(1, 64, 64, 16)) == 16 * 64 * 64 * 320


def test_memory_rows(env, monkeypatch):
    """省四成算达到；对照放不下时只记我们的；缓存另记；本库的输出与 transformers 不同算失败。"""
    outputs = {"optimized": torch.ones(4)}
    usage = {"optimized": memory.Usage(60, 10), "transformers_eager": memory.Usage(99, 10)}

    def measured(_env, name, _length):
        if name == "standard_eager":
            raise RuntimeError("CUDA out of memory")
        found = usage.get(name, memory.Usage(100, 40))
        return found, outputs.get(name, torch.ones(4))

    monkeypatch.setattr(memory, "_measured", measured)
    rows = []
    run_case(env, memory.cases(env)[0], rows.append)
    met = {row.key.removeprefix("memory.s2048."): row.met for row in rows}
    assert met == {
        "standard_eager": None,
        "standard_sdpa": True,
        "transformers_eager": False,
        "transformers_sdpa": True,
    }
    assert rows[0].status == SKIPPED and rows[0].details["ours_bytes"] == 60
    assert rows[1].details["cache_saving"] == 0.75 and rows[3].details["error"] == 0
    outputs["optimized"] = torch.zeros(4)
    run_case(env, memory.cases(env)[0], rows.append)
    assert rows[-1].status == FAILED and "注意力的输出" in rows[-1].reason


def test_meter_counts_from_the_first_start(monkeypatch):
    """分段送入：峰值取各段最大，从第一段开始之前算起。"""
    readings = {"VmRSS": iter([100, 150]), "VmHWM": iter([180, 260])}
    monkeypatch.setattr(memory.process_memory, "status_bytes", lambda key: next(readings[key]))
    monkeypatch.setattr(memory.process_memory, "reset_peak", lambda: True)
    meter = memory.Meter("cpu")
    for _ in range(2):
        meter.start()
        meter.stop()
    assert meter.peak == 160


def test_compile_that_takes_too_long_is_noted(env):
    found, why = compiled.measured(env, 0.01)
    assert not found and "没有编译完" in why


class FakeGraph:
    """录下一次 run()，replay 时重放；broken 时录不成。"""

    broken = False

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def fake_cuda(monkeypatch):
    """没有 GPU 时走一遍 CUDA 一侧的计时：事件、流、图都是替身。"""
    clock = iter(range(1000))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.at = 0

        def record(self):
            self.at = next(clock)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at  # 毫秒

    @contextlib.contextmanager
    def graph(_):
        yield
        if FakeGraph.broken:
            raise RuntimeError("不能录\n第二行")

    streams = []
    fakes = {"Event": Event, "CUDAGraph": FakeGraph, "graph": graph}
    fakes |= {"current_stream": lambda: "原来的流", "set_stream": streams.append}
    fakes |= {"synchronize": lambda: None}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return streams


def test_graph_timing(fake_cuda):
    """录成图的按次数平均；一轮的次数由单次用时定。"""
    timer, calls = Timer("cuda", False), []
    side = timer.prepare(calls.append, [(0,), (1,), (2,)], graph=True)
    assert side.mode == "graph" and side.calls == 20  # 1 毫秒一次，一轮 20 毫秒
    assert calls[:2] == [0, 1] and calls[-20:] == [i % 3 for i in range(20)]
    assert timer.in_turn([side, side]) == [50.0, 50.0] and side.run.__self__.replays == 16
    assert not fake_cuda


@pytest.mark.usefixtures("fake_cuda")
def test_a_graph_keeps_what_it_reads():
    """图里只有地址：被录的函数（连同它持有的缓存）要活到不再重放。"""

    class Cache:
        pass

    cache = Cache()
    alive = weakref.ref(cache)
    side = Timer("cuda", quick=True).prepare(lambda held=cache: held, [()], graph=True)
    del cache
    assert side.mode == "graph" and alive() is not None


def test_a_graph_that_cannot_be_captured(fake_cuda, monkeypatch):
    """换回原来的流，逐次调用，原因记下。"""
    monkeypatch.setattr(FakeGraph, "broken", True)
    side = Timer("cuda", False).prepare(lambda: None, [()], graph=True)
    assert side.mode == "eager" and side.note == "录不成 CUDA 图：RuntimeError：不能录"
    assert fake_cuda == ["原来的流"]


def test_cuda_environment(monkeypatch, tmp_path):
    """驱动与时钟来自 nvidia-smi；没有它也能写。"""
    properties = types.SimpleNamespace(
        name="卡", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = environment.environment("cuda")
    assert found["device"] == "卡" and found["capability"] == "9.0" and found["smi"] == {}
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '580.1, 1980 MHz, 1980 MHz, 3201 MHz, 700.00 W, 40'\n")
    script.chmod(0o755)
    smi = environment.smi()
    assert smi["driver_version"] == "580.1" and smi["clocks.sm"] == "1980 MHz" and len(smi) == 6


def test_memory_cap_is_lifted_again(monkeypatch):
    fractions = []
    total = types.SimpleNamespace(total_memory=64 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: total)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    with pytest.raises(ValueError), length.capped("cuda"):
        raise ValueError
    assert fractions == [0.25, 1.0]


def test_case_keeps_what_it_yielded(env):
    def run(_):
        yield Row("first").judge(2.0, "倍", Target(1.0, "倍"))
        raise check.WrongResult("不对")

    rows = []
    run_case(env, Case("case", run), rows.append)
    assert [(row.key, row.status, row.met) for row in rows] == [
        ("first", OK, True),
        ("case", FAILED, None),
    ]
    assert rows[0].line().endswith("2 倍（要求 1，达到）") and "失败：不对" in rows[1].line()
