"""基准：小形状上各类 Case、子进程量内存、登记表、JSON；没有对时间的断言。"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
# pylint: disable=wrong-import-position

from deepseek_opt import _native, cli  # noqa: E402
from deepseek_opt.benchmarks import (  # noqa: E402
    cases,
    counts,
    memory_cases,
    mla,
    overhead,
    process_memory,
    runner,
    shapes,
    standard,
    timing,
)
from deepseek_opt.benchmarks.probe import (  # noqa: E402
    IMPLEMENTATIONS,
    Probe,
    ProbeError,
    ProbeReading,
    ProbeSpec,
    cache_bytes,
    make_subject,
    measure,
)
from deepseek_opt.errors import InputError, UnsupportedError  # noqa: E402
from tests.tolerances import tol  # noqa: E402

TINY = shapes.TINY


@pytest.fixture(autouse=True)
def _fast(small_buffers, threads):  # pylint: disable=unused-argument
    """小的驱逐缓冲、一个线程、不重测屋顶线。"""
    threads(1)


@pytest.fixture(name="env")
def _env():
    peaks = {"bfloat16": 100.0, "float32": 50.0, "float16": 50.0}
    roofs = {n: timing.Roofline(n, 10.0, peaks) for n in (1, 2)}
    return cases.Env(TINY, quick=True, threads=1, rooflines=roofs)


def test_every_speed_case_runs(env):
    isa, threads = _native.isa(), torch.get_num_threads()
    found = [case for case in mla.build(env) if isinstance(case, cases.SpeedCase)]
    assert len({case.key for case in found}) == len(found) > 10
    for case in found:
        (row,) = case.run(env)
        if row.note:
            assert case.isa == "avx2"
            continue
        assert row.peer > 0 and row.ours > 0 and row.ratio > 0 and row.roofline > 0
        assert row.details["peer_rounds"] >= 1
    assert (_native.isa(), torch.get_num_threads()) == (isa, threads)


def test_reference_targets_are_those_of_the_issue():
    found = {c.key: c.target for c in mla.build(cases.Env()) if isinstance(c, cases.SpeedCase)}
    assert found["attention.decode.long"] == 60 and found["attention.decode.batch"] == 80
    assert [found[f"ffn.{n}"] for n in (1, 8, 40, 512)] == [2.0, 1.6, 1.3, 1.0]
    assert found["model.decode.long"] == 6 and found["avx2.decode.long"] is None
    total = shapes.build_model.__doc__ and shapes.REFERENCE.config
    assert (total["hidden_size"], total["kv_lora_rank"], total["n_routed_experts"]) == (
        2048,
        512,
        64,
    )


@pytest.mark.parametrize("build", [mla._decode, mla._prefill, mla._train])
def test_both_sides_do_the_same_work(env, build):
    """计时的两边给出同样的结果，不是比两件不同的事。"""
    wanted = {"rows": 2, "context": 8} if build is mla._decode else {"tokens": 8}
    work = build(env, dtype=torch.float32, **wanted)
    if build is mla._train:
        grads = []
        for side in (work.peer, work.ours):
            side()
            grads.append(side.args[0].o_proj.weight.grad.clone())
        torch.testing.assert_close(*grads, **tol(torch.float32))
        return
    with torch.inference_mode():
        torch.testing.assert_close(work.ours()[0], work.peer()[0], **tol(torch.float32))


def test_twin_shares_weights_and_leaves_the_peer_alone():
    layer = shapes.build_attention(TINY, torch.float32)
    fast = mla._optimized_twin(layer)
    assert "forward" in fast.__dict__ and "forward" not in layer.__dict__
    assert all(a is b for a, b in zip(layer.parameters(), fast.parameters(), strict=True))


def test_built_model_is_sane():
    model = shapes.build_model(TINY, torch.float32)
    with torch.inference_mode():
        logits = model(torch.arange(12)[None]).logits
    assert logits.isfinite().all() and logits.std() > 0
    rope = model.model.rotary_emb.inv_freq
    assert rope[0] == 1 and rope.isfinite().all()


def test_standard_attention_eager_equals_sdpa_and_cache():
    config = shapes.make_config(TINY)
    eager = standard.StandardAttention(config, 0, "eager")
    sdpa = standard.StandardAttention(config, 0, "sdpa")
    sdpa.load_state_dict(eager.state_dict())
    hidden = torch.randn(2, 9, TINY.config["hidden_size"])
    rope = shapes.rope_tables(TINY, 2, 0, 9, torch.float32)
    from transformers import DynamicCache

    with torch.inference_mode():
        whole, _ = eager(hidden, rope)
        torch.testing.assert_close(sdpa(hidden, rope)[0], whole, **tol(torch.float32))
        for layer in (eager, sdpa):
            cache, parts = DynamicCache(), []
            for begin, end in ((0, 4), (4, 8), (8, 9)):
                part = tuple(t[:, begin:end] for t in rope)
                parts.append(layer(hidden[:, begin:end], part, None, past_key_values=cache)[0])
            torch.testing.assert_close(torch.cat(parts, 1), whole, **tol(torch.float32))
    with pytest.raises(InputError, match="implementation"):
        standard.StandardAttention(config, 0, "flash")


@pytest.mark.parametrize("subject", ["layer", "model"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_subjects(subject, name):
    spec = ProbeSpec(subject, "tiny", name, "float32", threads=1)
    with torch.inference_mode():
        reading = measure(make_subject(spec), 1, 24, decode=2, repeats=2)
    assert reading.prefill_s > 0 and reading.decode_s > 0 and reading.cache_bytes > 0
    standard_bytes = 2 * TINY.config["hidden_size"] * 4
    layers = TINY.config["num_hidden_layers"] if subject == "model" else 1
    if name.startswith("standard"):
        assert reading.cache_bytes == 24 * standard_bytes * layers


def test_cache_bytes_of_latents():
    cache = shapes.make_cache(TINY, 2, 5, 2, torch.bfloat16)
    assert cache_bytes(cache) == 2 * 2 * 5 * (32 + 8) * 2


def test_probe_process_measures_and_reports_failure():
    spec = ProbeSpec("layer", "tiny", "optimized", "float32", threads=1)
    with Probe(spec) as probe:
        reading = probe.measure(1, 64, decode=1)
        assert isinstance(reading, ProbeReading) and reading.length == 64
        assert reading.method in ("VmHWM", "sampling")
        with pytest.raises(ProbeError, match="本库"):
            probe.measure(1, -1)


def test_unknown_subject():
    with pytest.raises(InputError, match="不认识"):
        make_subject(ProbeSpec("cloud", "tiny", "optimized", "float32", threads=1))


@pytest.mark.parametrize("clear", [True, False])
def test_peak_sees_temporary_memory(monkeypatch, tmp_path, clear):
    """放掉的内存也算进峰值；不能清零内核记录时改为采样。"""
    if not clear:
        monkeypatch.setattr(process_memory, "_CLEAR", tmp_path / "missing" / "clear_refs")
    size = 96 << 20

    def run():
        block = torch.ones(size // 4)
        total = sum(float(block.sum()) for _ in range(3))
        del block
        return total

    reading = process_memory.measure_peak(run)
    assert reading.result == 3 * size // 4
    assert 0.9 * size < reading.peak_bytes < 1.5 * size
    assert reading.method == ("VmHWM" if clear else "sampling")


def test_exact_allocations_give_memory_back_at_once():
    with process_memory.exact_allocations():
        block = torch.ones(256 << 20, dtype=torch.uint8)  # 大到堆里没有这样的空闲块
        held = process_memory.status_bytes("VmRSS")
        del block
        assert held - process_memory.status_bytes("VmRSS") > 250 << 20


def test_memory_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(process_memory, "_STATUS", tmp_path / "none")
    with pytest.raises(UnsupportedError, match="VmRSS"):
        process_memory.status_bytes("VmRSS")


def _fake_probe(sizes):
    def probe(_env, _subject, implementation, length):
        if implementation not in sizes:
            raise ProbeError("未运行：约需 9.9 GB")
        size = sizes[implementation] * length
        return ProbeReading(1, length, 1.0, size, size, None, "VmHWM")

    return probe


def test_memory_rows(env, monkeypatch):
    sizes = {"optimized": 10, "standard_sdpa": 100, "transformers_sdpa": 12}
    monkeypatch.setattr(memory_cases, "probe_once", _fake_probe(sizes))
    rows = {r.key: r for r in memory_cases.MemoryCase("m", "layer", 64).run(env)}
    assert rows["m.standard_sdpa"].ratio == pytest.approx(0.9) and rows["m.standard_sdpa"].met
    assert rows["m.transformers_sdpa"].met is False
    assert rows["m.standard_eager"].met is None and "GB" in rows["m.standard_eager"].note
    assert rows["m.cache"].target == 0.85 and rows["m.cache"].met
    double = {r.key: r for r in memory_cases.LengthCase("d", "layer", 64).run(env)}
    assert double["d.standard_sdpa"].ratio == pytest.approx(0.8) and double["d.standard_sdpa"].met


def test_memory_is_not_attempted_when_it_cannot_fit(env, monkeypatch):
    monkeypatch.setattr(memory_cases, "available_bytes", lambda: 1)
    with pytest.raises(ProbeError, match="约需"):
        memory_cases.probe_once(env, "model", "standard_eager", 64)


def test_overhead(env):
    rows = overhead.OverheadCase("o", "开销").run(env)
    assert {row.unit for row in rows} == {"us"} and len(rows) == 6
    assert all(row.ours > 0 and row.met is None for row in rows)


def test_interleaved_does_not_repeat_a_slow_side(monkeypatch):
    clock = iter(range(0, 10000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    calls = []
    peer, ours = timing.interleaved(
        lambda: calls.append("peer"), lambda: calls.append("ours"), rounds=3, seconds=0.5
    )
    assert calls == ["peer", "ours"] and peer.best == ours.best == 1.0


def test_roofline_measures_and_floors():
    roof = timing.measure_roofline(quick=True)
    assert roof.read_gbps > 0 and set(roof.gflops) == {"bfloat16", "float32", "float16"}
    roof = timing.Roofline(1, 10.0, {"bfloat16": 100.0})
    assert roof.floor_seconds(1e9, 1e9, torch.bfloat16) == pytest.approx(0.1)
    assert roof.floor_seconds(1e11, 1e9, torch.bfloat16) == pytest.approx(1.0)


def test_counts_of_the_reference_shape():
    config = shapes.REFERENCE.config
    weights = 2048 * 768 + 768 * 16 * 192 + 2048 * 576 + 16 * 128 * 2048 + 512 * 16 * 256
    cost = counts.attention_decode(config, 1, 4096, 2)
    assert cost.read_bytes == weights * 2 + 4096 * 576 * 2
    half = counts.attention_decode(config, 1, 4096, 2, 1)
    assert cost.read_bytes - half.read_bytes == 4096 * 576
    forward = counts.attention_prefill(config, 2048, 2)
    assert counts.attention_prefill(config, 2048, 2, backward=True).flops == 3 * forward.flops
    assert counts.gated_ffn(4, 8, 2, 2) == (2 * 2 * 96, 192)
    whole = counts.model_decode(config, 1, 4096, 2)
    assert 3 * cost.read_bytes < whole.read_bytes < 1.37e9 * 2


class _Constant(cases.Case):
    def __init__(self, key, row):
        self.key, self.title, self._row = key, key, row

    def run(self, env):
        if self._row is None:
            raise ProbeError("子进程没了")
        return [self._row]


def _row(key="k", **changes):
    row = cases.Row(key, "工作", "speed", "ms", "对照", 10.0, 2.0, 4.0, 0.5)
    return replace(row, **changes)


@pytest.fixture(name="suite")
def _suite(monkeypatch):
    """一个只有常数的套件：达标、未达标、没有对照、子进程失败。"""
    monkeypatch.setattr(cases, "_SUITES", dict(cases._SUITES))
    rows = {
        "good": _row("good"),
        "bad": _row("bad", target=9.0),
        "info": _row("info", target=None, peer=None),
        "saving": _row("saving", kind="saving", unit="MiB", target=0.4),
        "lost": None,
    }
    items = [_Constant(key, row) for key, row in rows.items()]
    cases.register_suite("demo-suite", "测试", lambda env: items)
    return "demo-suite"


def test_suite_registry_and_rows(suite):
    assert {"mla", suite} <= set(cases.suite_names())
    result = runner.run_suite(suite, shape=TINY)
    met = {row.key: row.met for row in result.rows}
    assert met == {"good": True, "bad": False, "info": None, "saving": True, "lost": False}
    assert [row.key for row in result.failed] == ["bad", "lost"]
    text = result.render()
    assert "5.00x" in text and "省 80.0%" in text and "子进程没了" in text
    assert "达到要求：2 / 4" in text
    with pytest.raises(InputError, match="SUITE"):
        cases.find_suite("nope")
    with pytest.raises(InputError, match="没有选中"):
        runner.run_suite(suite, only=("zzz",))


def test_moe_suite_on_a_tiny_shape():
    """每一项都真的跑一遍：两边都有读数，屋顶线合理。"""
    result = runner.run_suite("moe", shape=TINY, quick=True)
    rows = {row.key: row for row in result.rows}
    assert set(rows) >= {"layer.1", "layer.train.bf16", "layer.train.memory", "router.512"}
    assert {
        "experts.int8.1",
        "experts.int4-g128.8",
        "experts.int4-g32.1",
        "experts.fp8-g128.8",
    } <= set(rows)
    assert {"model.decode.1x24", "model.prefill.16", "model.overhead"} <= set(rows)
    for row in result.rows:
        assert row.ours is not None and row.peer is not None and row.note == "", row.key
        assert row.kind == "saving" or (row.ours > 0 and row.roofline > 0), row.key


def test_counts_of_the_moe_layer():
    config = shapes.REFERENCE.config
    expert = 3 * 2048 * 1408
    one = counts.moe_layer(config, 1, 2, 6)
    assert one.flops == 2 * (8 * expert + 64 * 2048)
    assert one.read_bytes == 2 * (8 * expert + 64 * 2048)
    assert counts.moe_layer(config, 1, 2, 6, backward=True).flops == 3 * one.flops
    assert counts.model_prefill(config, 2, 2).flops > 2 * counts.moe_layer(config, 2, 2, 64).flops


def test_counts_of_quantized_experts():
    config = shapes.REFERENCE.config
    expert, rows = 3 * 2048 * 1408, 8 * 2 * 1408 + 7 * 2048
    eight = counts.quantized_experts(config, 1, 6, 8, 0)
    assert eight.flops == 2 * 8 * expert and eight.read_bytes == 8 * expert + 4 * rows
    four = counts.quantized_experts(config, 1, 6, 4, 128)
    assert four.flops == eight.flops and four.read_bytes == 8 * expert * (0.5 + 4 / 128)


def test_each_finished_case_is_reported(suite):
    seen = []
    result = runner.run_suite(
        suite, shape=TINY, finished=lambda so_far: seen.append(len(so_far.rows))
    )
    assert seen == [1, 2, 3, 4, 5]
    assert runner.row_line(result.rows[0]).count("5.00x") == 1
    assert "占屋顶线 50%" in runner.row_line(result.rows[0])


def test_json_document(suite, tmp_path, capsys):
    path = tmp_path / "deep" / "reading.json"
    assert cli.run(["bench", suite, "--shape", "tiny", "--json", str(path), "--quick"]) == 0
    assert "达到要求" in capsys.readouterr().out
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document["schema"] == 1 and document["suite"] == suite and document["quick"] is True
    assert set(document) >= {"date", "shape", "threads", "machine", "versions", "roofline", "rows"}
    assert set(document["machine"]) == {"cpu", "cores", "memory_gib", "flags", "isa", "system"}
    assert set(document["versions"]) == {"python", "torch", "transformers", "deepseek_opt"}
    first = document["rows"][0]
    assert first["ratio"] == 5.0 and first["met"] is True and first["roofline"] == 0.5
    assert str(tmp_path) not in json.dumps(document)


def test_command_strict_and_bad_arguments(suite, capsys):
    assert cli.run(["bench", suite, "--strict"]) == 1
    assert cli.run(["bench", suite, "--strict", "--only", "good", "--threads", "1"]) == 0
    capsys.readouterr()
    for args, word in (
        (["--threads", "0"], "--threads"),
        (["--shape", "huge"], "--shape"),
        (["--isa", "mmx"], "mmx"),
    ):
        assert cli.run(["bench", suite, *args]) == 1
        assert word in capsys.readouterr().err


def test_needs_transformers(suite, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UnsupportedError, match="transformers"):
        runner.run_suite(suite)
