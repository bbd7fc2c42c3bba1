"""模型一级的错误输入：每一种都给出中文消息，模型与缓存保持原样。"""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn


from deepseek_opt import (
    AttentionOptimizer,
    DenseConfig,
    LatentCache,
    MLAConfig,
    OptimizationProfile,
    optimize,
    restore,
    switch,
)
from deepseek_opt.errors import (
    ConfigError,
    InputError,
    MemoryBudgetError,
    UnsupportedError,
)
from deepseek_opt.integrations import register_spec
from deepseek_opt.integrations.specs import MIN_TRANSFORMERS
from deepseek_opt.optimize import is_optimized
from tests.tiny_models import DynamicCache, StaticCache, make_inputs, make_model

PROFILE = OptimizationProfile(mla=MLAConfig())


def chinese(error):
    return bool(re.search(r"[\u4e00-\u9fff]", str(error.value)))


@pytest.fixture
def model():
    return make_model()


@torch.no_grad()
def logits(model, **kwargs):
    return model(make_inputs()[0], **kwargs).logits


def test_optimize_twice_names_switch(model):
    optimize(model, PROFILE)
    with pytest.raises(InputError, match=r"switch\(model, profile\)"):
        optimize(model, PROFILE)
    with pytest.raises(InputError, match="已经优化过"):
        optimize(model.model, PROFILE)
    assert is_optimized(model)
    restore(model)


def test_restore_and_switch_without_optimize(model):
    for action in (lambda: restore(model), lambda: switch(model, PROFILE)):
        with pytest.raises(InputError, match="没有优化过"):
            action()


@pytest.mark.parametrize("bad", [None, "model", 3])
def test_not_a_model(bad):
    for action in (
        lambda: optimize(bad, PROFILE),
        lambda: restore(bad),
        lambda: switch(bad, PROFILE),
    ):
        with pytest.raises(InputError, match="torch.nn.Module"):
            action()


@pytest.mark.parametrize("bad", [None, {}, MLAConfig(), "long_context"])
def test_not_a_profile(model, bad):
    with pytest.raises(InputError, match="OptimizationProfile"):
        optimize(model, bad)
    assert not is_optimized(model)


def test_attention_optimizer_wants_mla_config():
    with pytest.raises(InputError, match="MLAConfig"):
        AttentionOptimizer(PROFILE)


def test_config_that_contradicts_the_model(model):
    wrong = MLAConfig(num_attention_heads=3, kv_lora_rank=64, qk_rope_head_dim=2)
    with pytest.raises(ConfigError) as caught:
        optimize(model, OptimizationProfile(mla=wrong))
    for word in ("num_attention_heads", "kv_lora_rank", "qk_rope_head_dim", "self_attn"):
        assert word in str(caught.value)
    assert not is_optimized(model)


def test_strict_lists_everything_that_is_missing():
    profile = OptimizationProfile(mla=MLAConfig(), dense=DenseConfig(lm_head=True))
    headless = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UnsupportedError) as caught:
        optimize(headless, profile, strict=True)
    assert "MLA" in str(caught.value) and "LM head" in str(caught.value)
    assert not is_optimized(headless)


def test_cache_from_another_model(model):
    optimize(model, PROFILE)
    ids, _ = make_inputs()
    other = make_model(kv_lora_rank=24)
    deep = make_model(num_hidden_layers=3)
    with torch.no_grad():
        foreign = other(ids, use_cache=True).past_key_values
        short = LatentCache(1)
        standard = DynamicCache()
        standard.update(torch.zeros(2, 4, 3, 8), torch.zeros(2, 4, 3, 8), 0)
        for cache in (foreign, standard):
            before = (cache.layers[0].keys.clone(), cache.get_seq_length())
            with pytest.raises(InputError, match="另一个模型"):
                model(ids, past_key_values=cache)
            assert (
                torch.equal(cache.layers[0].keys, before[0]) and cache.get_seq_length() == before[1]
            )
        with pytest.raises(InputError, match="另一个模型"):
            model(ids, past_key_values=short)
        assert deep(ids).logits.shape == model(ids).logits.shape
    restore(model)


def test_cache_with_other_batch(model):
    optimize(model, PROFILE)
    with torch.no_grad():
        cache = model(make_inputs(batch=2)[0], use_cache=True).past_key_values
        before = cache.layers[0].keys.clone()
        with pytest.raises(InputError, match="2 行"):
            model(make_inputs(batch=3, length=1)[0], past_key_values=cache)
        assert torch.equal(cache.layers[0].keys, before)
    restore(model)


@pytest.mark.parametrize("kind", ["latent", "dynamic", "static"])
def test_length_beyond_the_cache(model, kind):
    limit = OptimizationProfile(mla=MLAConfig(max_cache_length=16))
    optimize(model, limit if kind == "dynamic" else PROFILE)
    cache = {
        "latent": lambda: LatentCache.for_model(model, 2, 16),
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=16),
    }[kind]()
    ids, _ = make_inputs(length=18)
    with torch.no_grad():
        model(ids[:, :15], past_key_values=cache)
        with pytest.raises(InputError, match="16"):
            model(ids[:, 15:], past_key_values=cache)
        assert int(cache.get_seq_length()) == 15
        out = model(ids[:, 15:16], past_key_values=cache)
    assert out.logits.isfinite().all()
    restore(model)


def test_memory_budget_names_the_largest_length(model):
    budget = OptimizationProfile(mla=MLAConfig(memory_budget_bytes=2_000_000))
    optimize(model, budget)
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), pytest.raises(MemoryBudgetError, match="最多") as caught:
        model(torch.ones(1, 40_000, dtype=torch.int64), past_key_values=cache)
    longest = caught.value.max_length
    assert 0 < longest < 40_000 and cache.get_seq_length() == 0
    with torch.no_grad():
        model(make_inputs()[0], past_key_values=cache)
    restore(model)


def test_ragged_cache_with_mask(model):
    optimize(model, PROFILE)
    ids, mask = make_inputs(left_pad=2)
    cache = LatentCache(2)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache)
        cache.crop_rows([5, 8])
        wrong = torch.cat([mask[:, :8], mask[:, :1]], 1)
        with pytest.raises(InputError, match="各行长度不同"):
            model(ids[:, 8:9], attention_mask=wrong, past_key_values=cache)
    assert cache.lengths.tolist() == [5, 8]
    restore(model)


def test_non_finite_weights_stay_visible(model):
    """NaN 进，NaN 出：不会变成看似正常的数。"""
    optimize(model, PROFILE)
    with torch.no_grad():
        model.model.embed_tokens.weight[make_inputs()[0][0, 0]] = float("nan")
    out = logits(model)
    assert out[0].isnan().all(-1).any()
    restore(model)


def test_meta_device_model():
    with torch.device("meta"):
        model = make_empty()
    report = optimize(model, PROFILE)
    assert report.replaced
    out = model(torch.ones(1, 3, dtype=torch.int64, device="meta"))
    assert out.logits.is_meta
    assert any("设备 meta" in reason for _, reason in report.fallbacks)
    restore(model)


def make_empty():
    from transformers import DeepseekV3ForCausalLM

    from tests.tiny_models import make_config

    return DeepseekV3ForCausalLM(make_config("deepseek_v3", num_hidden_layers=1))


def test_double_precision_uses_the_original():
    model = make_model(dtype=torch.float64, num_hidden_layers=1)
    expected = logits(model)
    report = optimize(model, PROFILE)
    assert torch.equal(logits(model), expected)
    assert "float64" in next(iter(report.fallbacks))[1]
    restore(model)


@pytest.mark.parametrize("bad", [None, "spec"])
def test_bad_spec(bad):
    with pytest.raises(InputError, match="AttentionSpec"):
        register_spec(bad)


def test_old_transformers_is_refused(model, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.14.2")
    with pytest.raises(UnsupportedError, match=re.escape(MIN_TRANSFORMERS)):
        optimize(model, PROFILE)
    assert not is_optimized(model)


def test_messages_are_chinese(model):
    with pytest.raises(InputError) as caught:
        restore(model)
    assert chinese(caught)
