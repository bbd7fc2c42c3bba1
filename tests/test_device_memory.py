"""设备的内存不够：一个中文错误写明大小；缓存退回调用之前，模型接着能用。"""

from __future__ import annotations

import pickle
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from deepseek_opt import (
    KVCache,
    LatentCache,
    MLAAttention,
    MLAConfig,
    OptimizationProfile,
    _native,
    device_memory,
    ops,
    optimize,
)
from deepseek_opt.errors import DeepSeekOptError, DeviceMemoryError
from tests.op_cases import QUANTIZED
from tests.tiny_models import DynamicCache, make_inputs, make_model
from tests.tolerances import tol

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."
CONFIG = MLAConfig(
    num_attention_heads=4,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
)


class Failing:
    """第 after 次之后的分配都内存不足；limit 不为 None 时只有容量超过它的不足。"""

    def __init__(self, original, after=0, limit=None):
        self.original, self.after, self.limit = original, after, limit

    def __call__(self, *args, **kwargs):
        big = self.limit is None or args[1] > self.limit
        if big:
            self.after -= 1
        if big and self.after < 0:
            raise torch.OutOfMemoryError(MESSAGE)
        return self.original(*args, **kwargs)


def state(cache):
    return [(layer.row_lengths(), [b.clone() for b in layer.buffers()]) for layer in cache.layers]


def unchanged(cache, before):
    for layer, (rows, buffers) in zip(cache.layers, before, strict=True):
        assert layer.row_lengths() == rows == layer.lengths.tolist()
        assert layer.offsets.tolist() == rows
        for now, old in zip(layer.buffers(), buffers, strict=True):
            assert now.shape == old.shape
            for b, n in enumerate(rows):
                assert torch.equal(now[b, :n], old[b, :n])


def test_hierarchy():
    assert issubclass(DeviceMemoryError, torch.OutOfMemoryError)
    error = DeviceMemoryError("不够", required_bytes=5, free_bytes=3)
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, DeepSeekOptError) and str(copy) == "不够"
    assert (copy.required_bytes, copy.free_bytes) == (5, 3)


def write(cache, steps):
    if isinstance(cache, KVCache):
        cache.update(0, torch.randn(2, 4, steps, 8), torch.randn(2, 4, steps, 8))
    else:
        cache.update(0, torch.randn(2, steps, 32), torch.randn(2, steps, 8))


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize(
    "make", [KVCache, LatentCache, *(partial(LatentCache, dtype=kind) for kind in QUANTIZED)]
)
def test_growth(monkeypatch, make, after):
    """第一块、第二块缓冲区放不下：什么都没有换；之后照常。"""
    cache = make(1)
    name = "zeros" if isinstance(cache, KVCache) else "empty"
    write(cache, 100)
    before = state(cache)
    monkeypatch.setattr(torch, name, Failing(getattr(torch, name), after))
    with pytest.raises(DeviceMemoryError, match="第 0 层缓存要增长到每行 320 个词元") as caught:
        write(cache, 180)
    assert "Tried to allocate 2.00 GiB" in str(caught.value)
    assert caught.value.required_bytes and "[2, 320, " in str(caught.value)
    monkeypatch.undo()
    unchanged(cache, before)
    write(cache, 180)
    assert cache.get_seq_length() == 280


def test_first_allocation(monkeypatch):
    cache = LatentCache(2)
    monkeypatch.setattr(torch, "empty", Failing(torch.empty))
    with pytest.raises(DeviceMemoryError, match="第 0 层"):
        write(cache, 5)
    monkeypatch.undo()
    assert cache.lengths is None and cache.nbytes == 0
    write(cache, 5)


def test_growth_takes_only_what_is_needed(monkeypatch):
    """翻倍放不下就只取够用的。"""
    cache = LatentCache(1)
    write(cache, 100)
    before, capacity = state(cache)[0][1][0][:, :100], cache.layers[0].capacity
    monkeypatch.setattr(torch, "empty", Failing(torch.empty, limit=capacity + 64))
    write(cache, capacity - 100 + 1)
    assert cache.layers[0].capacity == capacity + 64
    assert torch.equal(cache.layers[0].latent[:, :100], before)


@pytest.fixture(scope="module", params=["youtu", "deepseek_v3"])
def model(request):
    found = make_model(request.param)
    optimize(found, OptimizationProfile(mla=MLAConfig()))
    return found


def break_op(monkeypatch, names, calls):
    """第 calls 次调用 names 之一时内存不足。"""
    real, left = torch.ops.deepseek_opt, {"calls": calls}

    def call(name):
        def default(*args):
            left["calls"] -= name in names
            if name in names and left["calls"] == 0:
                raise RuntimeError("deepseek_opt：torch 的 aten::new_empty 失败：原因不明")
            return getattr(real, name).default(*args)

        return SimpleNamespace(default=default)

    class Packets:
        def __getattr__(self, name):
            return call(name)

    monkeypatch.setattr(ops._run, "_OPS", Packets())


@pytest.mark.parametrize("make", [DynamicCache, lambda: LatentCache(2)])
@pytest.mark.parametrize("ragged", [False, True])
def test_forward_of_a_model(monkeypatch, model, make, ragged):
    """第二层放不下：第一层已经写入的也退回，再算一次与没有出过错一样。"""
    ids, _ = make_inputs()
    step = ids[:, :1]
    with torch.no_grad():
        cache = make()
        model(input_ids=ids, past_key_values=cache)
        if ragged:
            for layer in cache.layers:
                layer.crop_rows([12, 7])
        before = state(cache)
        break_op(monkeypatch, {"mla_layer_decode", "mla_decode"}, 2)
        with pytest.raises(DeviceMemoryError, match="算子 mla_.*张量的形状"):
            model(input_ids=step, past_key_values=cache)
        monkeypatch.undo()
        unchanged(cache, before)
        after = model(input_ids=step, past_key_values=cache).logits
        other = make()
        model(input_ids=ids, past_key_values=other)
        if ragged:
            for layer in other.layers:
                layer.crop_rows([12, 7])
        expected = model(input_ids=step, past_key_values=other).logits
    torch.testing.assert_close(after, expected, **tol(torch.float32))


def test_first_forward_frees_the_cache(monkeypatch, model):
    ids, mask = make_inputs(left_pad=3)
    with torch.no_grad():
        cache, expected = DynamicCache(), model(input_ids=ids, attention_mask=mask).logits
        break_op(monkeypatch, {"mla_prefill", "mla_decode", "mla_layer_decode"}, 2)
        with pytest.raises(torch.OutOfMemoryError):
            model(input_ids=ids, attention_mask=mask, past_key_values=cache)
        monkeypatch.undo()
        assert cache.get_seq_length() == 0 and not any(x.buffers() for x in cache.layers[:1])
        held = LatentCache.for_model(model, 2, 32)
        size = held.nbytes
        break_op(monkeypatch, {"mla_prefill", "mla_decode", "mla_layer_decode"}, 2)
        with pytest.raises(torch.OutOfMemoryError):
            model(input_ids=ids, attention_mask=mask, past_key_values=held)
        monkeypatch.undo()
        assert held.nbytes == size and held.get_seq_length() == 0  # 预先分配的留着
        again = model(input_ids=ids, attention_mask=mask, past_key_values=held).logits
    torch.testing.assert_close(again, expected, **tol(torch.float32))


def test_other_parts_of_a_forward(model):
    """不是本库的算子放不下：同样退回缓存，报错说明是哪个前向。"""
    ids, _ = make_inputs()
    with torch.no_grad():
        cache = LatentCache(2)
        model(input_ids=ids, past_key_values=cache)
        before = state(cache)
        norm = model.get_decoder().norm

        def fail(*_args):
            raise torch.OutOfMemoryError(MESSAGE)

        hook = norm.register_forward_pre_hook(fail)
        with pytest.raises(DeviceMemoryError, match=r"的前向，输入 \[2, 12\]，缓存 \d+ 字节"):
            model(input_ids=ids, past_key_values=cache)
        hook.remove()
        unchanged(cache, before)


def test_own_layer(monkeypatch):
    layer, cache = MLAAttention(CONFIG, 64).eval(), LatentCache(1)
    with torch.no_grad():
        for steps in (5, 1):
            x = torch.randn(2, steps, 64)
            past = cache.get_seq_length()
            break_op(monkeypatch, {"mla_prefill", "mla_decode"}, 1)
            with pytest.raises(DeviceMemoryError):
                layer(x, cache=cache)
            monkeypatch.undo()
            assert cache.get_seq_length() == past and bool(cache.nbytes) == bool(past)
            layer(x, cache=cache)
    assert cache.get_seq_length() == 6


def test_other_errors_pass_through(monkeypatch):
    def fail(*_args):
        raise RuntimeError("illegal memory access")

    packet = SimpleNamespace(default=fail)
    monkeypatch.setattr(ops._run, "_OPS", SimpleNamespace(linear=packet))
    with pytest.raises(RuntimeError, match="illegal") as caught:
        ops.linear(torch.ones(1, 2), torch.ones(3, 2))
    assert not isinstance(caught.value, DeepSeekOptError)


def test_real_allocation_failure():
    """CPU 上真的放不下的一次：绑定里的分配经过稳定 ABI，异常的类型与消息都没有了。"""
    assert _native.load()
    with pytest.raises(DeviceMemoryError, match=r"算子 linear，张量的形状 \[16777216, 1\]"):
        ops.linear(torch.ones(1 << 24, 1), torch.ones(1 << 24, 1))


def test_free_bytes(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (3 << 20, 16 << 30))
    error = device_memory.out_of_memory("做一件事", device, RuntimeError(MESSAGE), 5 << 20)
    assert (error.required_bytes, error.free_bytes) == (5 << 20, 3 << 20)
    assert "做一件事，要 5" in str(error) and "设备上还空着 3" in str(error)
    assert device_memory.out_of_memory("另一件", device, error) is error
