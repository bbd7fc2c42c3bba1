"""generate() 的各种用法：贪心、采样、束搜索、填充、续写、各种缓存；与原模型的词元相同。"""

from __future__ import annotations

import copy

import pytest
import torch


from deepseek_opt import LatentCache, MLAConfig, OptimizationProfile, optimize, restore
from deepseek_opt.cache_layer import LatentLayer
from tests.tiny_models import DynamicCache, StaticCache, make_inputs, make_model
from tests.tolerances import tol

PROFILE = OptimizationProfile(mla=MLAConfig())
MODES = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beam": {"num_beams": 3, "do_sample": False},
    "beam_many": {"num_beams": 4, "num_return_sequences": 3, "do_sample": False},
    "return_sequences": {"do_sample": True, "num_return_sequences": 3},
    "chunked_prefill": {"do_sample": False, "prefill_chunk_size": 5},
    "static": {"do_sample": False, "cache_implementation": "static", "disable_compile": True},
    "no_cache": {"do_sample": False, "use_cache": False},
    "repetition": {"do_sample": False, "repetition_penalty": 1.3},
}


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def models(request):
    """(原模型, 优化后的副本)。"""
    plain = make_model(attn_implementation=request.param)
    fast = copy.deepcopy(plain)
    optimize(fast, PROFILE)
    return plain, fast


def generate(model, ids, mask, **options):
    torch.manual_seed(3)
    return model.generate(ids, attention_mask=mask, max_new_tokens=10, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_same_tokens(models, mode, padding):
    plain, fast = models
    pad = {"none": {}, "left": {"left_pad": 5}, "right": {"right_pad": 4}}[padding]
    ids, mask = make_inputs(**pad)
    expected = generate(plain, ids, mask, **MODES[mode])
    assert torch.equal(generate(fast, ids, mask, **MODES[mode]), expected)


def test_assisted_generation(models):
    plain, fast = models
    ids, mask = make_inputs(batch=1)
    assistant = make_model(seed=7, num_hidden_layers=1)
    expected = generate(plain, ids, mask, do_sample=False)
    actual = generate(fast, ids, mask, do_sample=False, assistant_model=assistant)
    assert torch.equal(actual, expected)


def test_prompt_lookup(models):
    plain, fast = models
    ids, mask = make_inputs(batch=1)
    expected = generate(plain, ids, mask, do_sample=False)
    assert torch.equal(
        generate(fast, ids, mask, do_sample=False, prompt_lookup_num_tokens=3), expected
    )


def _caches(model, kind):
    return {
        "dynamic": lambda: DynamicCache(config=model.config),
        "dynamic_bare": DynamicCache,
        "static": lambda: StaticCache(config=model.config, max_cache_len=48),
        "latent": lambda: LatentCache(model.config.num_hidden_layers),
        "latent_fixed": lambda: LatentCache.for_model(model, 2, 48),
    }[kind]()


@pytest.mark.parametrize("kind", ["dynamic", "dynamic_bare", "static", "latent", "latent_fixed"])
def test_passed_in_cache_continues(models, kind):
    """传入缓存，生成、再接着一段新的提示继续。"""
    plain, fast = models
    ids, mask = make_inputs(left_pad=3)
    more, _ = make_inputs(length=5, seed=9)

    def chat(model, cache):
        first = generate(model, ids, mask, do_sample=False, past_key_values=cache)
        ids2 = torch.cat([first, more], 1)
        mask2 = torch.cat([mask, torch.ones(2, ids2.shape[1] - 12, dtype=mask.dtype)], 1)
        return generate(model, ids2, mask2, do_sample=False, past_key_values=cache)

    expected = chat(plain, DynamicCache(config=plain.config))
    cache = _caches(fast, kind)
    assert torch.equal(chat(fast, cache), expected)
    if kind != "static":
        assert all(isinstance(layer, LatentLayer) for layer in cache.layers)
        assert cache.get_seq_length() == expected.shape[1] - 1


@torch.no_grad()
def test_cache_moves_between_original_and_optimized():
    """原模型写的缓存，优化后接着用；恢复之后原模型再接着用。"""
    model = make_model()
    ids, _ = make_inputs(length=14)
    whole = model(ids).logits
    out = model(ids[:, :6], use_cache=True)
    cache = out.past_key_values
    optimize(model, PROFILE)
    middle = model(ids[:, 6:10], past_key_values=cache).logits
    restore(model)
    last = model(ids[:, 10:], past_key_values=cache).logits
    torch.testing.assert_close(middle, whole[:, 6:10], **tol(torch.float32))
    torch.testing.assert_close(last, whole[:, 10:], **tol(torch.float32))
    layer = cache.layers[0]
    assert layer.keys.shape == (2, 1, 14, 32) and layer.values.shape == (2, 1, 14, 16)


@torch.no_grad()
def test_cache_crop_reorder_select():
    model = make_model()
    ids, _ = make_inputs(batch=3, length=12)
    optimize(model, PROFILE)
    cache = model(ids, use_cache=True).past_key_values
    cache.crop(-4)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([2, 2, 0, 0])
    actual = model(ids[rows, 8:], past_key_values=cache).logits
    expected = model(ids[rows]).logits[:, 8:]
    torch.testing.assert_close(actual, expected, **tol(torch.float32))
    assert isinstance(copy.deepcopy(cache).layers[0], LatentLayer)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(
        model(ids, past_key_values=cache).logits, model(ids).logits, **tol(torch.float32)
    )


@torch.no_grad()
def test_ragged_rows_after_row_crop():
    """逐行截断（每行接受的草稿数不同）之后，各行按自己的长度续写。"""
    model = make_model()
    ids, _ = make_inputs(length=12)
    optimize(model, PROFILE)
    cache = LatentCache(2)
    model(ids[:, :10], past_key_values=cache)
    cache.crop_rows([7, 10])
    positions = torch.tensor([[7, 8], [10, 11]])
    tokens = torch.stack([ids[0, 7:9], ids[1, 10:12]])
    actual = model(tokens, past_key_values=cache, position_ids=positions).logits
    for row, end in ((0, 9), (1, 12)):
        expected = model(ids[row : row + 1, :end]).logits[0, -2:]
        torch.testing.assert_close(actual[row], expected, **tol(torch.float32))
    assert cache.lengths.tolist() == [9, 12]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_low_precision_cache(dtype):
    model = make_model()
    ids, mask = make_inputs(left_pad=3)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
    optimize(model, OptimizationProfile(mla=MLAConfig(cache_dtype=dtype)))
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        out = model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache).logits
        rest = model(ids[:, 9:], attention_mask=mask, past_key_values=cache).logits
    assert cache.layers[0].latent.dtype == getattr(torch, dtype)
    actual = torch.cat([out, rest], 1)[mask.bool()]
    limit = 0.3 if dtype == "float8_e4m3fn" else 0.03  # 3 位尾数足以让随机权重的路由改选
    assert (actual - expected).pow(2).mean().sqrt() < limit * expected.pow(2).mean().sqrt()
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=4, num_beams=2)
    assert generated.shape == (2, 16)


@torch.no_grad()
def test_chunked_prefill_matches_whole():
    model = make_model(attn_implementation="sdpa")
    ids, mask = make_inputs(length=200, left_pad=90)
    plain = model(ids, attention_mask=mask)
    report = optimize(model, OptimizationProfile(mla=MLAConfig(prefill_chunk_size=64)))
    calls = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda m, a: calls.append(a[0].shape[1]))
    for options in ({}, {"use_cache": False}, {"past_key_values": LatentCache(2)}):
        calls.clear()
        out = model(ids, attention_mask=mask, **options)
        assert calls == [64, 64, 64, 8]
        assert (out.past_key_values is None) == ("use_cache" in options)
        torch.testing.assert_close(
            out.logits[mask.bool()], plain.logits[mask.bool()], **tol(torch.float32)
        )
    calls.clear()
    assert len(model(ids, attention_mask=mask, output_hidden_states=True).hidden_states) == 3
    assert calls == [200]
    hook.remove()
    assert not report.fallbacks


def test_training_with_cache_keeps_gradients():
    """训练时 use_cache 默认打开：梯度与原模型一样流过 DynamicCache。"""
    model = make_model().train()
    ids, _ = make_inputs()

    def gradient():
        model.zero_grad()
        first = model(ids[:, :7], use_cache=True)
        second = model(ids[:, 7:], past_key_values=first.past_key_values, labels=ids[:, 7:])
        second.loss.backward()
        return model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight.grad.clone()

    expected = gradient()
    optimize(model, PROFILE)
    torch.testing.assert_close(gradient(), expected, rtol=1e-3, atol=1e-6)


def test_latent_cache_in_grad_mode_is_constant_storage():
    model = make_model()
    ids, _ = make_inputs()
    optimize(model, PROFILE)
    cache = LatentCache(2)
    model(ids[:, :7], past_key_values=cache)
    out = model(ids[:, 7:], past_key_values=cache)
    out.logits.sum().backward()
    assert not cache.layers[0].latent.requires_grad
    with torch.no_grad():
        expected = model(ids).logits[:, 7:]
    torch.testing.assert_close(out.logits, expected, **tol(torch.float32))
