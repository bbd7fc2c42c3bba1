"""性能指标：环形缓冲、汇总、钩子、去处。"""

from __future__ import annotations

import re
import copy
import io
import json
import pickle
import sys
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import deepseek_opt
from deepseek_opt import LatentCache, MLAAttention, MLAConfig, PerformanceMetrics
from deepseek_opt.errors import InputError, UnsupportedError
from deepseek_opt.metrics import (
    JSONLSink,
    PrometheusSink,
    TensorBoardSink,
    metrics,
    start_metrics,
    stop_metrics,
)
from deepseek_opt.metrics.collector import cache_bytes, memory_usage
from deepseek_opt.metrics.record import CallRecord, RingBuffer, summarize


def record(kind="decode", seconds=0.5, tokens=2, starts=False, size=None) -> CallRecord:
    return CallRecord(kind, seconds, tokens, 1, starts, size)


def attention() -> MLAAttention:
    torch.manual_seed(0)
    return MLAAttention(MLAConfig(num_attention_heads=2), 16).eval()


@given(capacity=st.integers(1, 6), count=st.integers(0, 20))
def test_ring_buffer_keeps_the_newest(capacity, count):
    ring = RingBuffer(capacity)
    for index in range(count):
        ring.append(record(tokens=index))
    items, total = ring.snapshot()
    assert total == count
    assert [item.tokens for item in items] == list(range(count))[-capacity:]
    ring.clear()
    assert ring.snapshot() == ([], 0)


def test_ring_buffer_threads_and_capacity():
    ring = RingBuffer(10_000)
    threads = [
        threading.Thread(target=lambda: [ring.append(record()) for _ in range(500)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    items, total = ring.snapshot()
    assert total == len(items) == 4000
    with pytest.raises(ValueError, match="容量"):
        RingBuffer(0)


def test_summary():
    records = [
        record("prefill", 1.0, 100, starts=True),
        record("decode", 0.1, 1, size=64),
        record("prefill", 2.0, 50, starts=True),
        record("prefill", 3.0, 50),
        record("decode", 0.3, 1, size=128),
    ]
    found = summarize(records, 9, memory_reserved_bytes=5, memory_max_reserved_bytes=7)
    assert (found.calls, found.window_calls) == (9, 5)
    assert (found.prefill_calls, found.decode_calls, found.train_calls) == (3, 2, 0)
    assert (found.prefill_tokens, found.decode_tokens) == (200, 2)
    assert found.time_to_first_token_seconds == 5.0  # 最近一条序列的两块之和
    assert found.time_per_output_token_seconds == pytest.approx(0.2)
    assert found.throughput_tokens_per_second == pytest.approx(202 / 6.4)
    assert found.decode_tokens_per_second == pytest.approx(5)
    assert found.forward_seconds_p50 == 1.0 and found.forward_seconds_p95 == 3.0
    assert found.cache_bytes == 128
    assert (found.memory_reserved_bytes, found.memory_max_reserved_bytes) == (5, 7)
    assert found.spec_decode_num_drafts is None and found.expert_utilization is None
    assert "expert_utilization" not in found.scalars() and found.scalars()["calls"] == 9.0


def test_empty_summary():
    empty = summarize([], 0)
    assert empty == PerformanceMetrics()
    assert empty.forward_seconds_mean is None and empty.throughput_tokens_per_second is None
    assert "还没有" in str(empty)


def test_collects_prefill_and_decode_of_an_own_layer():
    model, cache = attention(), LatentCache(1)
    start_metrics(model)
    with torch.no_grad():
        model(torch.randn(2, 5, 16), cache=cache)
        for _ in range(3):
            model(torch.randn(2, 1, 16), cache=cache)
        model(torch.randn(1, 100, 16))
    found = deepseek_opt.metrics(model)
    assert (found.calls, found.prefill_calls, found.decode_calls) == (5, 2, 3)
    assert (found.prefill_tokens, found.decode_tokens) == (110, 6)
    assert found.cache_bytes == cache.nbytes
    assert found.time_to_first_token_seconds > 0 and found.time_per_output_token_seconds > 0
    assert found.memory_max_reserved_bytes >= found.memory_reserved_bytes > 1 << 20
    text, html = str(found), found._repr_html_()
    assert "decode_calls = 3" in text and re.search(r" [MG]iB", text) and "decode_calls" in html


def test_generate_of_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    start_metrics(model)
    model.generate(torch.ones(2, 6, dtype=torch.long), max_new_tokens=4, min_new_tokens=4)
    found = metrics(model)
    assert (found.prefill_calls, found.decode_calls) == (1, 3)
    assert (found.prefill_tokens, found.decode_tokens) == (12, 6)
    assert found.cache_bytes == 2 * 2 * 2 * 9 * 16 * 4


def test_training_calls_are_counted_apart():
    model = attention().train()
    start_metrics(model)
    model(torch.randn(1, 4, 16)).sum().backward()
    assert metrics(model).train_calls == 1


def test_a_failed_call_is_not_counted_and_nothing_is_left_behind():
    model = attention()
    start_metrics(model)
    with pytest.raises(InputError):
        model(torch.randn(2, 5))
    assert metrics(model).calls == 0
    model(torch.randn(1, 4, 16))
    assert metrics(model).calls == 1


def test_two_threads_share_a_model():
    model = attention()
    start_metrics(model)

    def work():
        with torch.no_grad():
            for _ in range(20):
                model(torch.randn(1, 2, 16))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = metrics(model)
    assert found.calls == 80 and found.prefill_tokens == 160


def test_window_and_clear():
    model = attention()
    collector = start_metrics(model, window=2)
    assert start_metrics(model) is collector
    for _ in range(5):
        model(torch.randn(1, 3, 16))
    assert (metrics(model).calls, metrics(model).window_calls) == (5, 2)
    collector.clear()
    assert metrics(model).calls == 0


def test_stopping_removes_every_hook():
    model = attention()
    other = model.register_forward_hook(lambda *_: None)
    before = copy.copy(model.__dict__)
    start_metrics(model)
    assert stop_metrics(model) and not stop_metrics(model)
    assert model.__dict__.keys() == before.keys()
    for name in ("_forward_hooks", "_forward_pre_hooks"):
        assert len(model.__dict__[name]) == (name == "_forward_hooks")
    for name in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        assert not model.__dict__[name]
    other.remove()


def test_copies_collect_on_their_own():
    model = attention()
    start_metrics(model)
    model(torch.randn(1, 3, 16))
    names = list(model.state_dict())
    stream = io.BytesIO(pickle.dumps(model))
    for clone in (copy.deepcopy(model), pickle.load(stream)):
        assert metrics(clone).calls == 0
        clone(torch.randn(1, 3, 16))
        assert metrics(clone).calls == 1 and stop_metrics(clone)
        assert list(clone.state_dict()) == names
    assert metrics(model).calls == 1


def test_compile_is_not_disturbed():
    model = nn.Linear(4, 4)
    start_metrics(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(2, 4)
    torch.testing.assert_close(compiled(x), nn.functional.linear(x, model.weight, model.bias))


def test_asking_first_starts_collecting():
    model = nn.Linear(3, 3)
    assert metrics(model).calls == 0
    model(torch.randn(5, 3))
    assert metrics(model).prefill_tokens + metrics(model).train_calls > 0
    with pytest.raises(InputError, match="nn.Module"):
        metrics("model")
    with pytest.raises(InputError, match="window"):
        start_metrics(nn.Linear(1, 1), window=0)


def test_hook_attached_during_a_call():
    class Outer(nn.Module):
        def forward(self, x):
            start_metrics(self)
            return x

    model = Outer()
    model(torch.ones(1, 2))
    assert metrics(model).calls == 0


def test_models_without_parameters_or_tensors():
    model = nn.Identity()
    start_metrics(model)
    model("text")
    model(torch.ones(4, dtype=torch.long))
    found = metrics(model)
    assert found.calls == 2 and found.memory_max_reserved_bytes > 0


def test_cache_bytes_of_unknown_caches():
    assert cache_bytes(None) is None and cache_bytes(object()) is None
    assert memory_usage(torch.device("cpu"))[1] > 0


# ---- 去处 ----


def test_jsonl_sink(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        with JSONLSink(path) as sink:
            sink.write(PerformanceMetrics(calls=step), step)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["calls"]) for line in lines] == [(1, 1), (2, 2)]
    assert lines[0]["cache_bytes"] is None and lines[0]["time"] > 0


def test_tensorboard_sink_with_a_writer():
    class Writer:
        def __init__(self):
            self.points, self.closed = [], False

        def add_scalar(self, *point):
            self.points.append(point)

        def close(self):
            self.closed = True

    writer = Writer()
    sink = TensorBoardSink(writer)
    sink.write(PerformanceMetrics(calls=2, cache_bytes=64), 7)
    sink.close()
    assert ("deepseek_opt/cache_bytes", 64.0, 7) in writer.points and writer.closed
    assert not any(name.endswith("forward_seconds_mean") for name, _, _ in writer.points)


def test_tensorboard_sink_with_a_folder(tmp_path):
    pytest.importorskip("tensorboard")
    sink = TensorBoardSink(tmp_path)
    sink.write(PerformanceMetrics(calls=2), 1)
    sink.close()
    assert list(tmp_path.iterdir())


def test_prometheus_sink():
    client = pytest.importorskip("prometheus_client")
    sink = PrometheusSink()
    sink.write(PerformanceMetrics(calls=2, throughput_tokens_per_second=12.5))
    sink.write(PerformanceMetrics(calls=3, throughput_tokens_per_second=20.0), step=2)
    name = "deepseek_opt_throughput_tokens_per_second"
    assert sink.registry.get_sample_value(name) == 20.0
    assert sink.registry.get_sample_value("deepseek_opt_cache_bytes") is None
    assert client.REGISTRY.get_sample_value(name) is None
    shared = client.CollectorRegistry()
    assert PrometheusSink(shared).registry is shared


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UnsupportedError, match="pip install prometheus_client"):
        PrometheusSink()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UnsupportedError, match="pip install tensorboard"):
        TensorBoardSink(tmp_path)


def test_public_names_are_not_hidden_by_submodules():
    import deepseek_opt.metrics.record  # noqa: F401

    assert callable(deepseek_opt.metrics) and deepseek_opt.metrics is metrics
