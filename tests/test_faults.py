"""中途失败：不论在哪一处、什么错误，缓存都与调用之前相同，接着用的结果不变；内存不足的都是 DeviceMemoryError。"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves

from deepseek_opt import (
    DenseConfig,
    LatentCache,
    MLAAttention,
    MLAConfig,
    OptimizationProfile,
    device_memory,
    op_calls,
    ops,
    optimize,
)
from deepseek_opt.cache_rows import CachePoint
from deepseek_opt.errors import DeviceMemoryError, InputError, MemoryBudgetError
from deepseek_opt.kv_layer import KVLayer
from deepseek_opt.op_rules import register
from deepseek_opt.row_lengths import RowLengths
from tests.faults import MESSAGE, failing_allocation, layer_failures, state, unchanged
from tests.op_cases import QUANTIZED
from tests.test_mla_layer_decode import arguments
from tests.test_ops_rules import CASES
from tests.tiny_models import DynamicCache, make_inputs, make_model
from tests.tolerances import tol

PROFILE = OptimizationProfile(mla=MLAConfig(), dense=DenseConfig())


# ---- 整层的算子 ----


@pytest.mark.parametrize("cache", [None, *QUANTIZED])
def test_layer_decode_changes_nothing_when_it_fails(cache):
    assert layer_failures(arguments(3, 1, 48, 24, 32, 8, torch.bfloat16, cache=cache)) > 5


# ---- 一个模型的前向 ----


@pytest.fixture(scope="module", name="model", params=["youtu", "deepseek_v3"])
def _model(request):
    found = make_model(request.param)
    optimize(found, PROFILE)
    return found


def filled(model, make, ragged):
    ids, _ = make_inputs()
    cache = make()
    model(input_ids=ids, past_key_values=cache)
    if ragged:
        for layer in cache.layers:
            layer.crop_rows([12, 7])
    return cache


@pytest.mark.parametrize("make", [DynamicCache, lambda: LatentCache(2)])
@pytest.mark.parametrize("ragged", [False, True])
@torch.no_grad()
def test_any_allocation_of_a_forward(model, make, ragged):
    """基础模型的一步里的每一次分配依次失败：缓存都退回；再算一次与没有失败过的逐位相同。"""
    step, base = make_inputs()[0][:, :1], model.get_decoder()
    cache = filled(model, make, ragged)
    before, nth, failed = state(cache), 1, True
    while failed:
        with failing_allocation(nth) as seen:
            try:
                after = base(input_ids=step, past_key_values=cache)[0]
            except DeviceMemoryError:
                unchanged(cache, before)
            failed, nth = seen.count == nth, nth + 1
    assert nth > 10
    wanted = base(input_ids=step, past_key_values=filled(model, make, ragged))[0]
    assert torch.equal(after, wanted)


class Broken(Exception):
    """用户的钩子抛出的。"""


@pytest.mark.parametrize("kind", [Broken, RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("make", [DynamicCache, lambda: LatentCache(2)])
@torch.no_grad()
def test_any_error_of_a_forward(model, make, kind):
    """第二层的 FFN 抛出：两层都已经写过缓存。原来的错误照样抛出，缓存退回。"""
    ids, _ = make_inputs()
    caches, error = [make(), filled(model, make, False), filled(model, make, True)], kind("坏了")
    wanted = [state(cache) for cache in caches]

    def fail(*_args):
        raise error

    hook = model.get_decoder().layers[1].mlp.register_forward_pre_hook(fail)
    for cache, before in zip(caches, wanted, strict=True):
        for steps in (1, 5):
            with pytest.raises(kind) as caught:
                model(input_ids=ids[:, :steps], past_key_values=cache)
            if kind is torch.OutOfMemoryError:
                assert isinstance(caught.value, DeviceMemoryError)
                assert "已退回调用之前" in str(caught.value)
            else:
                assert caught.value is error
            for layer in cache.layers[len(before) :]:
                assert layer.get_seq_length() == 0
            del cache.layers[len(before) :]
            unchanged(cache, before)
    hook.remove()
    for cache in caches[:2]:
        model(input_ids=ids, past_key_values=cache)
        assert cache.layers[1].row_lengths() == [cache.get_seq_length()] * 2


def test_errors_while_recording_gradients(model):
    """求导时缓存的层是拼接的普通张量：多出的截去；接着用与没有出过错一样。"""
    ids, _ = make_inputs()
    more = ids[:, :3]
    for make in (DynamicCache, lambda: LatentCache(2)):
        with torch.no_grad():
            mine = filled(model, make, False)
        plain = make()
        model(input_ids=ids, past_key_values=plain)
        for cache in (mine, plain, make()):
            size = cache.get_seq_length()
            hook = model.get_decoder().norm.register_forward_pre_hook(_broken)
            with pytest.raises(Broken):
                model(input_ids=more, past_key_values=cache)
            hook.remove()
            assert all(_length(layer) == size for layer in cache.layers)
            again = model(input_ids=more, past_key_values=cache).logits
            whole = model(input_ids=torch.cat((ids[:, :size], more), 1)).logits
            torch.testing.assert_close(again, whole[:, -3:], **tol(torch.float32))


def _length(layer):
    return layer.length if isinstance(layer, RowLengths) else layer.get_seq_length()


def _broken(*_args):
    raise Broken


@torch.no_grad()
def test_positions_on_the_device_are_rewritten(model, monkeypatch):
    """算子在设备上前移了位置之后才失败（设备上的核不等结果）：主机还不知道，位置也要改回。"""
    step = make_inputs()[0][:, :1]
    real = torch.ops.deepseek_opt.mla_layer_decode.default

    def late(*args):
        real(*args)
        raise RuntimeError("launch failure")

    for ragged in (False, True):
        cache = filled(model, lambda: LatentCache(2), ragged)
        before = state(cache)
        monkeypatch.setattr(ops._run, "_OPS", _Only("mla_layer_decode", late))
        with pytest.raises(RuntimeError, match="launch failure"):
            model(input_ids=step, past_key_values=cache)
        monkeypatch.undo()
        unchanged(cache, before)


class _Only:
    """torch.ops.deepseek_opt，只有 name 换成 op。"""

    def __init__(self, name, op):
        self.name, self.op = name, op

    def __getattr__(self, name):
        if name == self.name:
            return type("Packet", (), {"default": staticmethod(self.op)})
        return getattr(torch.ops.deepseek_opt, name)


def test_restoring_does_not_hide_the_error(model, monkeypatch, caplog):
    """设备已经出错，位置也写不回去：抛出的仍是原来的错误，主机上的已退回。"""
    with torch.no_grad():
        cache = filled(model, lambda: LatentCache(2), False)
        hook = model.get_decoder().norm.register_forward_pre_hook(_broken)

        def refuse(_self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(type(cache.layers[0]), "_rewrite_offsets", refuse)
        with pytest.raises(Broken), caplog.at_level("ERROR", logger="deepseek_opt"):
            model(input_ids=make_inputs()[0][:, :1], past_key_values=cache)
        hook.remove()
    assert cache.layers[1].row_lengths() == [12, 12] and "没有退回" in caplog.text


def test_recording_a_graph_leaves_the_device_alone(monkeypatch):
    """录 CUDA graph 时设备上什么都没有做：只退回主机上的。"""
    layer = LatentCache(1).layer(0)
    layer.append(torch.randn(2, 3, 8), torch.randn(2, 3, 2))
    mark = layer.mark()
    layer.append(torch.randn(2, 1, 8), torch.randn(2, 1, 2))
    monkeypatch.setattr("deepseek_opt.row_lengths.capturing", lambda _device: True)
    layer.unwind(mark)
    assert layer.row_lengths() == [3, 3] and layer.offsets.tolist() == [4, 4]


def test_layers_of_different_lengths():
    """一个缓存里各层的长度不同（MTP 的一层、没有用到的一层）：各退回各的，不会变长。"""
    cache = LatentCache(4)
    for index, steps in enumerate((5, 3, 4)):
        cache.update(index, torch.randn(2, steps, 8), torch.randn(2, steps, 2))
    cache.layers[2].crop_rows([4, 1])
    before, point = state(cache), CachePoint(cache)
    for index in (0, 2, 3):
        cache.update(index, torch.randn(2, 2, 8), torch.randn(2, 2, 2))
    point.restore()
    unchanged(cache, before)
    assert cache.layers[3].lengths is None


def test_own_layer_restores_on_any_error():
    config = MLAConfig(
        num_attention_heads=4,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )
    layer, cache = MLAAttention(config, 64).eval(), LatentCache(1)
    with torch.no_grad():
        for steps in (5, 1):
            hook = layer.o_proj.register_forward_pre_hook(_broken)
            before = state(cache)
            with pytest.raises(Broken):
                layer(torch.randn(2, steps, 64), cache=cache)
            hook.remove()
            unchanged(cache, before)
            layer(torch.randn(2, steps, 64), cache=cache)
    assert cache.layers[0].row_lengths() == [6, 6]


# ---- 内存不足 ----


def _grads(out):
    return [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]


@pytest.mark.parametrize("name", [name for name in CASES if not name.split()[0].endswith("ward")])
def test_backward(name):
    """可求导的算子，反向里第一次分配失败：前向同样的一句中文。"""
    args = CASES[name]()
    out = _grads(getattr(torch.ops.deepseek_opt, name.split()[0])(*args))
    if not out:
        return
    loss = sum(t.float().square().sum() for t in out)
    with failing_allocation(1) as seen, pytest.raises(DeviceMemoryError, match="的内存不够：算子 "):
        loss.backward()
    assert seen.count == 1


def test_other_parts_of_a_backward(monkeypatch):
    """反向里 torch 自己的（展开的梯度变成连续的）放不下：也说明是哪个算子的反向。"""
    x = torch.ones(2, 3, requires_grad=True)
    y = ops.linear(x, torch.ones(4, 3))

    def fail(_self):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch.Tensor, "contiguous", fail)
    with pytest.raises(DeviceMemoryError, match=r"算子 linear 的反向，梯度的形状 \[2, 4\]"):
        y.sum().backward()


def test_errors_in_a_backward_pass_through():
    x = torch.ones(2, 3, requires_grad=True)
    y = ops.linear(x, torch.ones(4, 3))
    x.data = torch.ones(2, 5)
    with pytest.raises(ValueError, match="linear_backward：grad 应为") as caught:
        y.sum().backward()
    assert not isinstance(caught.value, InputError)


_LIMITED = """
import resource
import torch
from deepseek_opt import ops
from deepseek_opt.errors import DeviceMemoryError

torch.set_num_threads(1)
x, weight = torch.ones(1 << 12, 1, requires_grad=True), torch.ones(1 << 12, 1, requires_grad=True)
y = ops.linear(x, weight)
ops.linear(x, weight).sum().backward()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), -1))
for call in (lambda: y.sum().backward(), lambda: ops.linear(x, weight)):
    try:
        call()
    except DeviceMemoryError as error:
        assert isinstance(error, torch.OutOfMemoryError) and "内存不够" in str(error), error
    else:
        raise SystemExit("没有失败")
"""


def test_a_real_limit():
    """进程的地址空间不够：前向、反向都是 DeviceMemoryError。"""
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_real_failure_outside_new_empty():
    """输入要先变成连续的，就放不下了。"""
    x = torch.ones(1, 1).expand(1 << 22, 1 << 22)
    with pytest.raises(DeviceMemoryError, match=r"\[4194304, 4194304\].*aten::contiguous 失败"):
        ops.linear(x, torch.ones(1, 1 << 22))


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    "error, answer",
    [
        (torch.OutOfMemoryError(MESSAGE), True),
        (MemoryError("std::bad_alloc"), True),
        (MemoryBudgetError("放不进预算"), False),
        (ValueError("out of memory"), False),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("deepseek_opt：linear 启动失败：out of memory。"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (
            RuntimeError("deepseek_opt：torch 的 aten::new_empty 失败：CUDA error: an illegal"),
            False,
        ),
        (RuntimeError("deepseek_opt：torch 的 aten::contiguous 失败：原因不明"), True),
        (RuntimeError("deepseek_opt：torch 的 aten::view 失败：原因不明"), False),
        (RuntimeError("illegal memory access"), False),
    ],
)
def test_recognition(error, answer):
    assert device_memory.is_out_of_memory(error, CPU) is answer


def test_recognition_by_the_allocator():
    """torch 没有给出原因时（2.13 以前）看 GPU 的分配器失败过没有；设备已经出错的不算。"""
    failures, broken = [2], []

    def synchronize(_device):
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.MonkeyPatch.context() as patch:  # 测试结束之前就换回：收尾也要问 torch.cuda
        patch.setattr(device_memory, "_ooms", {0: 2})
        patch.setattr(device_memory, "capturing", lambda _device: False)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "memory_stats", lambda _index: {"num_ooms": failures[0]})
        patch.setattr(torch.cuda, "synchronize", synchronize)
        for name in ("new_empty", "mm"):
            error = RuntimeError(f"deepseek_opt：torch 的 aten::{name} 失败：原因不明")
            assert not device_memory.is_out_of_memory(error, CUDA)
            failures[0] += 1
            assert device_memory.is_out_of_memory(error, CUDA)
            assert not device_memory.is_out_of_memory(error, CUDA)  # 这一次的算过了
        failures[0] += 1
        broken.append(True)
        assert not device_memory.is_out_of_memory(error, CUDA)


def test_growing_on_the_cpu(monkeypatch):
    """CPU 的分配器抛出的是 RuntimeError：缓存增长时同样认得，翻倍不行就只取够用的。"""
    layer = KVLayer(name="第 0 层")
    layer.append(torch.randn(2, 4, 60, 8), torch.randn(2, 4, 60, 8))
    real, capacity = torch.zeros, layer.capacity

    def limited(*args, **kwargs):
        if args[1] > capacity + 64:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", limited)
    more = torch.randn(2, 4, 80, 8)
    layer.append(more, more)
    assert layer.capacity == capacity + 64
    with pytest.raises(DeviceMemoryError, match="第 0 层缓存要增长到"):
        layer.append(more, more)
    assert layer.length == 140


# ---- 设备不一 ----


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, NotImplementedError])
def test_mixed_devices_explain_any_failure(kind):
    """绑定里的检查、设备的切换各有各的说法：张量不在一处时都说清哪个在哪里，列表里的也是。"""

    def fail(*_args):
        raise kind("DeviceGuard(-1)")

    x, w = torch.ones(2, 4), torch.ones(4, 4, device="meta")
    with pytest.raises(
        InputError, match="linear：全部张量应在同一设备上.*x 在 cpu，weight 在 meta"
    ):
        op_calls.call("linear", fail, (x, w))
    index, mix = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    lists = ([x, w, x], [x], [x], [], [], [], [])
    with pytest.raises(InputError, match=r"gate\[0\] 在 cpu，gate\[1\] 在 meta，up\[0\] 在 cpu"):
        op_calls.call("moe_experts_list", fail, (x, index, mix, *lists, "silu", 1.0, 1.0, True))
    spans = torch.zeros(1, 4, dtype=torch.int64)
    where = [w] * 3
    with pytest.raises(kind):  # spans 可以在 CPU 上，那不是原因
        op_calls.call("mla_decode", fail, (*where, None, w, spans, None, 0.3, 6))


def test_mixed_devices_in_a_backward():
    x, weight = torch.ones(2, 3), torch.ones(3, device="meta")
    with pytest.raises(InputError, match="rms_norm_backward：全部.*grad 在 cpu，.*weight 在 meta"):
        register.run("rms_norm_backward", x, x, weight, 1e-6)
