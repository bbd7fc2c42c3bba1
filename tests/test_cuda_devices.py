"""CUDA 张量经过 Python 一侧：都在该在的设备上；解码的一步既不读回主机，也不往设备送东西。"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from deepseek_opt import (
    DenseConfig,
    KVCache,
    LatentCache,
    MLAAttention,
    MLAConfig,
    MOEConfig,
    OptimizationProfile,
    optimize,
)
from deepseek_opt.cache_rows import crop_rows
from deepseek_opt.integrations.masks import build_plan
from deepseek_opt.integrations.patch import Patch
from deepseek_opt.layers import LatentMultiheadAttention
from deepseek_opt.optimize import find_state
from tests.fake_cuda import CUDA, Watch, fake_cuda, move
from tests.moe_models import make_moe
from tests.tiny_models import MODELS, DynamicCache, StaticCache, available, make_model

PROFILE = OptimizationProfile(mla=MLAConfig(), dense=DenseConfig(ffn=True))
CONFIG = MLAConfig(
    num_attention_heads=4,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
)
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "latent": lambda config: LatentCache(config.num_hidden_layers),
    "int8": lambda config: LatentCache(config.num_hidden_layers, dtype="int8"),
    "fp8": lambda config: LatentCache(config.num_hidden_layers, dtype="float8_e4m3fn"),
    "static": lambda config: StaticCache(config=config, max_cache_len=64),
}


@pytest.fixture
def cuda(monkeypatch):
    """块内是假的 CUDA。"""
    with fake_cuda(monkeypatch) as mode:
        yield mode


def model_on_cuda(model_type="youtu", profile=PROFILE, **overrides):
    """在 CPU 上优化好，再换成假的 CUDA 张量（优化时要用真的数核对）。"""
    model = make_model(model_type, **overrides)
    optimize(model, profile)
    return model


def tokens(rows: int, steps: int):
    return torch.empty(rows, steps, dtype=torch.int64, device=CUDA)


def run(model, steps, cache, mask=None):
    with Watch() as watch:
        out = model(
            input_ids=tokens(2, steps), attention_mask=mask, past_key_values=cache, use_cache=True
        )
    assert out.logits.device == CUDA
    return watch


def fallbacks(model):
    return dict(find_state(model).runtime.fallbacks)


def test_watch_notices(cuda):
    x = torch.ones(3, device=CUDA)
    with Watch() as watch:
        x.cpu()
        x.copy_(torch.ones(3))
        x.add_(x)
    assert watch.copies == ["aten._to_copy", "aten.copy_"] and not watch.reads
    for read in (x.tolist, lambda: bool(x.any()), lambda: x[x > 0]):
        with Watch() as watch, pytest.raises(Exception, match="aten"):
            read()
        assert len(watch.reads) == 1
    with pytest.raises(Exception, match="same device"):
        x.add(torch.ones(3))
    assert x.device.type == "cuda" and cuda is not None


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", CACHES)
def test_decoding_never_waits(monkeypatch, kind, padded, implementation):
    model = model_on_cuda(attn_implementation=implementation)
    with fake_cuda(monkeypatch):
        cache = CACHES[kind](move(model).config)
        mask = torch.ones(2, 9, dtype=torch.int64, device=CUDA) if padded else None
        first = run(model, 9, cache, mask)
        assert not first.reads
        for steps in (1, 1, 3):
            if padded:
                mask = torch.cat((mask, mask.new_ones(2, steps)), 1)
            watch = run(model, steps, cache, mask)
            assert not watch.waits
            whole = kind != "static" and steps == 1  # 两行共用一份角度，几个词元时不合成一个算子
            wanted = "mla_layer_decode" if whole else "mla_decode"
            assert watch.ops.count(wanted) == model.config.num_hidden_layers
    assert not fallbacks(model)


@pytest.mark.parametrize("kind", ["dynamic", "latent"])
def test_rows_of_different_length(monkeypatch, kind):
    """逐行退回时送一次长度；之后各步照样不等设备。"""
    model = model_on_cuda()
    with fake_cuda(monkeypatch):
        cache = CACHES[kind](move(model).config)
        run(model, 9, cache)
        with Watch() as watch:
            crop_rows(cache, [9, 5])
        assert watch.copies == ["aten._to_copy"] and not watch.reads
        addresses = [layer.offsets for layer in cache.layers]
        for steps in (1, 2):
            assert not run(model, steps, cache).waits
        assert all(a is layer.offsets for a, layer in zip(addresses, cache.layers, strict=True))
        assert [layer.row_lengths() for layer in cache.layers] == [[12, 8]] * 2
        with Watch() as watch:
            cache.crop(-2)
            assert cache.layers[0].offsets.device == CUDA
        assert not watch.waits and cache.layers[1].row_lengths() == [10, 6]
    assert not fallbacks(model)


def test_replaying_a_graph():
    """重放时只有设备上的 offsets 前移；advance 之后主机与它一致，接着写在对的地方。"""
    cache = LatentCache(2)
    for index in range(2):
        cache.update(index, torch.randn(2, 5, 8), torch.randn(2, 5, 2))
    cache.crop_rows([5, 3])
    for layer in cache.layers:
        layer.offsets.add_(1)  # 图里的核做的
    cache.advance()
    assert cache.lengths.tolist() == cache.layers[1].offsets.tolist() == [6, 4]
    cache.update(0, torch.ones(2, 1, 8), torch.ones(2, 1, 2))
    assert bool((cache.layers[0].latent[1, 4] == 1).all()) and cache.get_seq_length() == 7


@pytest.mark.parametrize("kind", ["dynamic", "latent"])
def test_reordering_reads_the_index_once(monkeypatch, kind):
    """束搜索：各层收到同一个下标，只有第一层读回来。"""
    model = model_on_cuda()
    with fake_cuda(monkeypatch):
        cache = CACHES[kind](move(model).config)
        run(model, 9, cache)
        index = torch.empty(2, dtype=torch.int64, device=CUDA)
        with Watch() as watch, pytest.raises(DataDependentOutputException):
            cache.reorder_cache(index)  # 假的张量没有数可读
        assert watch.copies == ["aten._to_copy"]


@pytest.mark.parametrize("model_type", MODELS)
def test_every_architecture(monkeypatch, model_type):
    """不合成一个算子的写法也都在设备上：分块的长输入、缩放、门、各种旋转。"""
    if not available(model_type):
        pytest.skip("这个版本的 transformers 没有")
    model = model_on_cuda(model_type, OptimizationProfile(mla=MLAConfig()))
    layers = [
        m for m in model.modules() if type(m.__dict__.get("forward")).__name__ == "AttentionPatch"
    ]
    with fake_cuda(monkeypatch):
        move(model)
        for layer in layers:
            patch = layer.forward
            width = getattr(layer, "hidden_size", model.config.hidden_size)
            for batch, steps in ((2, 1), (1, 5), (1, 4200)):
                hidden = torch.empty(batch, steps, width, device=CUDA)
                with Watch() as watch:
                    out = patch(hidden, **arguments(patch, model.config, batch, steps))
                out = out[0] if isinstance(out, tuple) else out
                assert out.device == CUDA and not watch.waits and watch.ops
    assert layers and not fallbacks(model)


def arguments(patch, config, batch, steps):
    """一层注意力的其余参数。"""
    angles = torch.empty(1, steps, patch.rope_dim, device=CUDA)
    if patch.spec.rope_complex:
        pair = torch.empty(1, steps, patch.rope_dim // 2, dtype=torch.complex64, device=CUDA)
    else:
        pair = (angles, angles)
    return {
        "position_embeddings": pair,
        "position_ids": torch.arange(steps, device=CUDA)[None],
        "attention_mask": None,
        "past_key_values": DynamicCache(config=config) if batch == 1 else None,
    }


def test_training_forward(monkeypatch):
    model = model_on_cuda().train()
    with fake_cuda(monkeypatch), torch.enable_grad():
        move(model).requires_grad_(True)
        mask = torch.ones(2, 9, dtype=torch.int64, device=CUDA)
        with Watch() as watch:
            out = model(input_ids=tokens(2, 9), attention_mask=mask, use_cache=False)
        assert out.logits.requires_grad and not watch.waits
        assert watch.ops.count("mla_prefill") == 2
    assert not fallbacks(model)


def test_long_prefill(monkeypatch):
    """基础模型分段、层内分块都不等设备。"""
    model = model_on_cuda(max_position_embeddings=8192)
    with fake_cuda(monkeypatch):
        cache = DynamicCache(config=move(model).config)
        mask = torch.ones(2, 5000, dtype=torch.int64, device=CUDA)
        watch = run(model, 5000, cache, mask)
        assert not watch.waits and watch.ops.count("mla_prefill") > 4
    assert not fallbacks(model)


def test_full_mask_is_read_once(cuda):
    """4 维掩码要逐元素核对：一起读回来，只等一次。"""
    mask = torch.ones(2, 1, 4, 9, dtype=torch.bool, device=cuda and CUDA)
    with Watch() as watch, pytest.raises(DataDependentOutputException):
        build_plan(mask, 2, 4, 9, 16, CUDA)
    assert watch.copies == ["aten._to_copy"] and not watch.reads
    assert "在 cpu" in build_plan(torch.ones(2, 9), 2, 4, 9, 16, CUDA).reason


def test_autocast_of_the_device(monkeypatch):
    """autocast 看的是模型所在的设备：CUDA 上的 autocast 时不合成一个算子。"""
    model = model_on_cuda()
    with fake_cuda(monkeypatch):
        cache = DynamicCache(config=move(model).config)
        run(model, 9, cache)
        torch.set_autocast_enabled("cuda", True)
        try:
            watch = run(model, 1, cache)
        finally:
            torch.set_autocast_enabled("cuda", False)
        assert not watch.reads and "mla_layer_decode" not in watch.ops


# ---- 自己的模型用的层 ----


@pytest.mark.parametrize("masked", [False, True])
def test_own_layer(monkeypatch, masked):
    layer = MLAAttention(CONFIG, 64).eval()
    with fake_cuda(monkeypatch):
        cache = LatentCache(1)
        move(layer)
        for steps in (9, 1, 3):
            hidden = torch.empty(2, steps, 64, device=CUDA)
            total = cache.get_seq_length() + steps
            mask = torch.ones(2, total, dtype=torch.bool, device=CUDA) if masked else None
            with Watch() as watch:
                assert layer(hidden, attention_mask=mask, cache=cache).device == CUDA
            assert not watch.waits
        cache.crop_rows([4, 9])
        with Watch() as watch:
            layer(torch.empty(2, 1, 64, device=CUDA), cache=cache)
        assert not watch.waits and cache.layers[0].row_lengths() == [5, 10]


def test_own_layer_without_cache(monkeypatch):
    layer, other = MLAAttention(CONFIG, 64), LatentMultiheadAttention(CONFIG, 64, batch_first=True)
    with fake_cuda(monkeypatch):
        x = torch.empty(1, 6, 64, device=CUDA)
        hidden = torch.zeros(1, 6, dtype=torch.bool, device=CUDA)
        with Watch() as watch:
            move(layer)(x)
            move(other)(x, x, x, need_weights=False)
            other(x, x, x, key_padding_mask=hidden, need_weights=False, is_causal=True)
        assert not watch.waits
        with pytest.raises(Exception, match="local_scalar"), Watch() as watch:
            layer(x, cu_seqlens=torch.empty(3, dtype=torch.int64, device=CUDA))
        assert len(watch.reads) == 1  # 打包的各层只核对一次


def test_packed_lengths_are_checked_once():
    layer, x = MLAAttention(CONFIG, 64), torch.randn(1, 6, 64)
    ends = torch.tensor([0, 2, 6])
    first = layer(x, cu_seqlens=ends)
    assert torch.equal(layer(x, cu_seqlens=ends), first)
    ends[1] = 7  # 原地改过的重新核对
    with pytest.raises(ValueError, match="递增"):
        layer(x, cu_seqlens=ends)


def test_kv_cache(cuda):
    cache = KVCache(1)
    keys = torch.empty(2, 4, 5, 8, device=CUDA)
    cache.update(0, keys, keys)
    cache.crop_rows([5, 2])
    with Watch() as watch:
        mask = cache.mask(0, 1)
        found, _ = cache.update(0, keys[:, :, :1], keys[:, :, :1])
    assert mask.device == found.device == CUDA and not watch.waits
    assert cuda is not None and cache.layers[0].row_lengths() == [6, 3]


def test_mixed_devices_name_the_argument(cuda):
    from deepseek_opt import ops

    x = torch.empty(2, 8, device=CUDA)
    with pytest.raises(ValueError, match="rms_norm.*x 在 cuda:0，weight 在 cpu"):
        ops.rms_norm(x, torch.empty(8), 1e-6)
    cache = LatentCache(1)
    with pytest.raises(ValueError, match="rope：应为与 latent 同在 cuda:0"):
        cache.update(0, x[:, None], torch.empty(2, 1, 4))
    cache.update(0, x[:, None], x[:, None])
    with pytest.raises(ValueError, match="缓存在 cuda:0，传入的 latent、rope 在 cpu"):
        cache.update(0, torch.empty(2, 1, 8), torch.empty(2, 1, 8))
    assert cuda is not None and cache.get_seq_length() == 1


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen2_moe", "gpt_oss"])
def test_moe_decodes_without_waiting(monkeypatch, model_type):
    """路由、专家与计数：一步里不读回主机，也不往设备送东西。"""
    profile = OptimizationProfile(mla=MLAConfig(), moe=MOEConfig())
    model = make_moe(model_type).eval()
    optimize(model, profile)
    names = [p for m in model.modules() for p in m.__dict__.values() if isinstance(p, Patch)]
    blocks = [p for p in names if type(p).__name__ in ("MoeBlockPatch", "ExpertsPatch")]
    assert blocks
    with fake_cuda(monkeypatch):
        move(model)
        width = model.config.hidden_size
        first = blocks[0].module
        hidden = torch.empty(1, 1, width, device=CUDA)
        args = (hidden,)
        if type(blocks[0]).__name__ == "ExpertsPatch":
            index = torch.empty(1, 2, dtype=torch.int64, device=CUDA)
            args = (hidden[0], index, torch.empty(1, 2, device=CUDA))
        first(*args)  # 计数器随设备搬一次
        with Watch() as watch:
            out = first(*args)
        assert (out[0] if isinstance(out, tuple) else out).device == CUDA
        assert not watch.waits and "moe_experts" in watch.ops
    assert not fallbacks(model)
