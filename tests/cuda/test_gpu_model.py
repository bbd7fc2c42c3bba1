"""整个模型在真卡上：解码一步录成 CUDA graph，重放与逐次调用逐位相同；缓存放不下时报错，之后照常。"""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

# pylint: disable=wrong-import-position
from deepseek_opt import DenseConfig, MLAConfig, OptimizationProfile, optimize  # noqa: E402
from deepseek_opt.benchmarks import shapes  # noqa: E402
from deepseek_opt.errors import DeviceMemoryError  # noqa: E402
from tests.faults import failing_allocation  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="要真的 GPU"),
]
PROMPT, STEPS = 20, 9
DENSE = shapes.Shape("dense", {**shapes.TINY.config, "first_k_dense_replace": 2})


@pytest.fixture(name="model", scope="module")
def _model():
    model = shapes.build_model(DENSE, torch.bfloat16, "sdpa", "cuda")
    report = optimize(model, OptimizationProfile(mla=MLAConfig(), dense=DenseConfig()))
    assert not report.fallbacks
    return model


def prefilled(model, rows):
    """(缓存, 下一个词元, 它的位置)；缓存留出以后各步的位置。"""
    tokens = torch.arange(rows * PROMPT, device="cuda").view(rows, PROMPT) * 7 % 128
    cache = transformers.DynamicCache(config=model.config)
    logits = model(tokens, past_key_values=cache).logits
    for layer in cache.layers:
        layer.reserve(PROMPT + STEPS + 2, layer.latent, layer.rope)
    position = torch.full((1, 1), PROMPT, device="cuda")
    return cache, logits[:, -1:].argmax(-1), position


def step(model, cache, token, position):
    """一步：token、position 原地换成下一步的；返回 logits。"""
    logits = model(token, position_ids=position, past_key_values=cache).logits
    token.copy_(logits[:, -1:].argmax(-1))
    position.add_(1)
    return logits


@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_decoding_in_a_graph(model, rows):
    """图里没有等待，位置、长度都在设备上前移；每次重放之后主机上的长度跟上。"""
    eager = prefilled(model, rows)
    wanted = [step(model, *eager).clone() for _ in range(STEPS)]
    cache, token, position = prefilled(model, rows)
    found = [step(model, cache, token, position).clone()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(model, cache, token, position)
    for layer in cache.layers:
        layer.advance(-1)  # 录制时没有执行
    for _ in range(STEPS - 1):
        graph.replay()
        for layer in cache.layers:
            layer.advance(1)
        found.append(logits.clone())
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)
    for mine, theirs in zip(cache.layers, eager[0].layers, strict=True):
        assert mine.length == theirs.length == PROMPT + STEPS
        assert torch.equal(mine.offsets, theirs.offsets)
        assert torch.equal(mine.keys, theirs.keys)


@torch.inference_mode()
def test_a_step_never_waits(model):
    cache, token, position = prefilled(model, 2)
    step(model, cache, token, position)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(STEPS):
            step(model, cache, token, position)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def test_out_of_memory_leaves_the_cache_usable(model):
    """显存给得很少：预填充放不下时一句中文；缓存退回原处，放得下的照常。"""
    cache, token, position = prefilled(model, 1)
    before = [layer.keys.clone() for layer in cache.layers]
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    try:
        long = torch.zeros(1, 400_000, dtype=torch.int64, device="cuda")
        with pytest.raises(DeviceMemoryError, match="的内存不够"):
            model(long, past_key_values=cache)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for layer, kept in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, kept)
    assert step(model, cache, token, position).isfinite().all()


@torch.inference_mode()
def test_any_failed_allocation_of_a_step(model):
    """一步里每一处分配依次失败：设备上已经前移的位置也退回；之后与没有失败过的逐位相同。"""
    base, (cache, token, position) = model.get_decoder(), prefilled(model, 2)
    other, same, place = prefilled(model, 2)
    assert torch.equal(token, same) and torch.equal(position, place)
    nth, failed = 0, True
    while failed:
        nth += 1
        with failing_allocation(nth, "CUDA") as seen:
            try:
                got = base(token, position_ids=position, past_key_values=cache)[0]
            except DeviceMemoryError:
                for layer in cache.layers:
                    assert layer.row_lengths() == layer.offsets.tolist() == [PROMPT] * 2
            failed = seen.count == nth
    assert nth > 10
    assert torch.equal(got, base(same, position_ids=place, past_key_values=other)[0])
