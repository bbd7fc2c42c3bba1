"""optimize、restore、switch、optimized：只改实例、能还原、能回滚、随模型复制与保存。"""

from __future__ import annotations

import copy
import io
import logging
import threading

import pytest
import torch
from torch import nn

from deepseek_opt import (
    AttentionOptimizer,
    DenseConfig,
    MLAConfig,
    OptimizationProfile,
    optimize,
    optimized,
    restore,
    switch,
    verify,
)
from deepseek_opt.errors import ConfigError, UnsupportedError
from deepseek_opt.metrics import is_collecting, metrics, start_metrics
from deepseek_opt.optimize import is_optimized
from tests.optimize_cases import logits, profile
from tests.tiny_models import make_inputs, make_model
from tests.tolerances import tol


@pytest.fixture
def model():
    return make_model(attn_implementation="eager")


def snapshot(model):
    """实例上除参数外的一切：各模块 __dict__ 的键与对象身份。"""
    return [
        {k: id(v) for k, v in m.__dict__.items() if not k.startswith("_")} for m in model.modules()
    ]


def test_restore_is_bit_for_bit(model):
    before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    config, expected = model.config, logits(model)
    optimize(model, OptimizationProfile(mla=MLAConfig(), dense=DenseConfig()))
    assert is_optimized(model) and type(model.model.layers[0].self_attn).forward is not None
    restore(model)
    assert snapshot(model) == before and model.model.config is config
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), expected) and not is_optimized(model)
    assert not any(k.startswith("_deepseek_opt") for m in model.modules() for k in m.__dict__)


def test_only_this_instance_changes(model):
    other = make_model(attn_implementation="eager")
    shared = type(model)(model.config).eval()  # 同一个配置对象
    optimize(model, profile())
    for untouched in (other, shared):
        assert not any("forward" in m.__dict__ for m in untouched.modules())
        assert untouched.model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "eager"


def test_state_dict_and_save_pretrained_unchanged(model, tmp_path):
    model.save_pretrained(tmp_path / "before")
    keys = list(model.state_dict())
    optimize(model, OptimizationProfile(mla=MLAConfig(), dense=DenseConfig()))
    assert list(model.state_dict()) == keys
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    model.save_pretrained(tmp_path / "after")
    model.model.save_pretrained(tmp_path / "base_after")
    restore(model)
    model.model.save_pretrained(tmp_path / "base_before")
    for old, new in (("before", "after"), ("base_before", "base_after")):
        files = sorted(p.name for p in (tmp_path / old).iterdir())
        assert files == sorted(p.name for p in (tmp_path / new).iterdir())
        for name in files:
            assert (tmp_path / old / name).read_bytes() == (tmp_path / new / name).read_bytes(), (
                name
            )


def test_base_model_as_root(tmp_path):
    base = make_model(attn_implementation="eager").model
    ids, mask = make_inputs(left_pad=3)
    with torch.no_grad():
        expected = base(ids, attention_mask=mask).last_hidden_state
        base.save_pretrained(tmp_path / "before")
        optimize(base, profile())
        actual = base(ids, attention_mask=mask).last_hidden_state
    base.save_pretrained(tmp_path / "after")
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **tol(torch.float32))
    one, two = (tmp_path / n / "config.json" for n in ("before", "after"))
    assert one.read_bytes() == two.read_bytes()
    restore(base)


def test_deepcopy_is_independent(model):
    optimize(model, profile())
    twin = copy.deepcopy(model)
    attention = twin.model.layers[0].self_attn
    assert attention.forward.module is attention
    with torch.no_grad():
        attention.o_proj.weight.zero_()
    expected = logits(model)
    restore(model)
    assert is_optimized(twin)
    torch.testing.assert_close(logits(model), expected, **tol(torch.float32))
    assert not torch.allclose(logits(twin), expected)
    twin_profile = switch(twin, profile(cache_dtype="bfloat16"))
    assert twin_profile.replaced
    restore(twin)
    layer = copy.deepcopy(optimize_and_take(model))
    assert layer.self_attn.forward.module is layer.self_attn


def optimize_and_take(model):
    optimize(model, profile())
    return model.model.layers[1]


def test_whole_model_can_be_pickled(model):
    optimize(model, profile())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert is_optimized(loaded)
    torch.testing.assert_close(logits(loaded), logits(model), **tol(torch.float32))
    restore(loaded)


def test_switch_replaces_the_profile(model):
    expected = logits(model)
    first = optimize(model, profile())
    second = switch(model, OptimizationProfile(dense=DenseConfig()))
    assert {e.part for e in first.replaced} == {"mla"}
    assert {e.part for e in second.replaced} == {"dense"}
    assert "forward" not in model.model.layers[0].self_attn.__dict__
    torch.testing.assert_close(logits(model), expected, **tol(torch.float32))
    restore(model)


def test_failed_switch_keeps_the_old_optimization(model):
    report = optimize(model, profile())
    with pytest.raises(ConfigError, match="kv_lora_rank"):
        switch(model, profile(kv_lora_rank=999))
    assert is_optimized(model)
    logits(model)
    assert not report.fallbacks
    restore(model)
    assert not is_optimized(model)


def test_optimized_restores_even_on_error(model):
    expected = logits(model)
    with optimized(model, profile()) as report:
        assert report.replaced
    with pytest.raises(ZeroDivisionError), optimized(model, profile()):
        raise ZeroDivisionError
    assert not is_optimized(model) and torch.equal(logits(model), expected)


def test_error_in_the_middle_rolls_back(model):
    before, seen = snapshot(model), []

    def explode(name, _module):
        seen.append(name)
        if len(seen) == 4:
            raise RuntimeError("中途出错")
        return True

    with pytest.raises(RuntimeError, match="中途出错"):
        optimize(
            model, OptimizationProfile(mla=MLAConfig(), dense=DenseConfig()), filter_fn=explode
        )
    assert snapshot(model) == before and not is_optimized(model)


def test_filter_fn_chooses_layers(model):
    report = optimize(model, profile(), filter_fn=lambda name, _: "layers.1" in name)
    assert [e.name for e in report.replaced] == ["model.layers.1.self_attn"]
    assert "filter_fn" in report.skipped[0].reason
    expected = logits(model)
    assert model.model.config._attn_implementation == "eager"  # 还有没替换的层，掩码照旧
    restore(model)
    torch.testing.assert_close(logits(model), expected, **tol(torch.float32))


def test_strict_and_missing_parts(caplog):
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UnsupportedError, match="没有 MLA 注意力层"):
        optimize(plain, profile(), strict=True)
    assert not is_optimized(plain)
    with caplog.at_level(logging.WARNING, logger="deepseek_opt"):
        report = optimize(plain, profile())
    assert not report.replaced and "什么都没有替换" in caplog.text
    restore(plain)


def test_missing_mtp_is_reported(model):
    from deepseek_opt import MTPConfig

    wanted = OptimizationProfile(mla=MLAConfig(), mtp=MTPConfig())
    report = optimize(model, wanted)
    assert report.replaced and report.unmet[0].part == "mtp"
    assert "MTP" in report.unmet[0].reason and "attach_mtp" in report.unmet[0].reason
    restore(model)
    with pytest.raises(UnsupportedError, match="mtp"):
        optimize(model, wanted, strict=True)
    assert not is_optimized(model)


def test_live_config_takes_effect_or_explains(model):
    settings = profile()
    optimize(model, settings)
    ids, _ = make_inputs()
    with torch.no_grad():
        first = model(ids, use_cache=True).past_key_values
        settings.mla.cache_dtype = "bfloat16"
        second = model(ids, use_cache=True).past_key_values
        assert first.layers[0].latent.dtype == torch.float32
        assert second.layers[0].latent.dtype == torch.bfloat16
        settings.mla.kv_lora_rank = 8
        with pytest.raises(ConfigError, match="kv_lora_rank"):
            model(ids)
        settings.mla.kv_lora_rank = None
        model(ids)
    restore(model)


def test_attention_optimizer_class(model):
    optimizer = AttentionOptimizer(MLAConfig())
    attention = model.model.layers[0].self_attn
    assert optimizer.can_optimize(attention) and not optimizer.can_optimize(model.model.norm)
    report = optimizer.apply(model)
    assert len(report.replaced) == 2
    optimizer.config.cache_dtype = "float16"
    logits(model)
    optimizer.restore(model)
    assert not is_optimized(model)


def test_two_models_in_two_threads():
    models = [make_model(seed=i) for i in range(2)]
    expected = [logits(m) for m in models]
    errors = []

    def work(model, want):
        try:
            for _ in range(5):
                optimize(model, profile())
                torch.testing.assert_close(logits(model), want, **tol(torch.float32))
                restore(model)
        except BaseException as error:  # 线程里的错误要带回主线程
            errors.append(error)
            raise

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(models, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_two_threads_generate_with_one_model(model):
    prompts = [make_inputs(seed=i, left_pad=i) for i in range(4)]
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = [model.generate(ids, attention_mask=mask, **options) for ids, mask in prompts]
    optimize(model, profile())
    results = [None] * len(prompts)

    def work(index):
        ids, mask = prompts[index]
        results[index] = model.generate(ids, attention_mask=mask, **options)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    restore(model)


def test_metrics_are_collected_from_optimize_to_restore(model):
    optimize(model, profile())
    logits(model)
    switch(model, profile(cache_dtype="int8"))
    verify(model, make_inputs()[0])  # 对照用的前向不计入
    logits(model)
    assert metrics(model).calls == 2
    restore(model)
    assert not is_collecting(model) and not model._forward_hooks and not model._forward_pre_hooks


def test_metrics_started_by_the_user_outlive_restore(model):
    start_metrics(model)
    with optimized(model, profile()):
        logits(model)
    assert is_collecting(model) and metrics(model).calls == 1
