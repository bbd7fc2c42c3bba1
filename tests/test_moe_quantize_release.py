"""optimize 时量化专家：原权重保留的逐位还原，释放的从此没有，要用到它们的都报错；出错时什么都不变。"""

from __future__ import annotations

import pytest
import torch

import deepseek_opt as dso
from deepseek_opt import MLAConfig, MOEConfig, OptimizationProfile, optimize, restore, switch
from deepseek_opt.errors import InputError, UnsupportedError
from deepseek_opt.integrations import quantized
from deepseek_opt.integrations.patch import patch_of
from deepseek_opt.optimize import find_state, is_optimized
from tests.moe_models import make_ids, make_moe
from tests.moe_quantize_cases import (
    FORMS,
    INT4,
    block_of,
    logits,
    profile,
    rounded,
    same_state,
    shared_of,
    state_of,
)
from tests.test_moe_optimize import snapshot
from tests.tolerances import tol

moe_module = pytest.importorskip("transformers.integrations.moe")


@pytest.fixture
def model():
    return make_moe("deepseek_v3")


@pytest.mark.parametrize("form", FORMS)
def test_kept_weights_come_back_bit_for_bit(model, form):
    before, state, expected = snapshot(model), state_of(model), logits(model)
    optimize(model, profile(**FORMS[form][0]), strict=True)
    assert not torch.equal(logits(model), expected) and same_state(model, state)
    restore(model)
    assert snapshot(model) == before and torch.equal(logits(model), expected)
    assert same_state(model, state)


def test_report_says_what_it_costs(model):
    report = optimize(model, profile(**INT4))
    entry = next(e for e in report.replaced if e.name.endswith("experts"))
    store = patch_of(block_of(model).experts).store
    experts = block_of(model).experts
    assert store.original_bytes == 4 * (experts.gate_up_proj.numel() + experts.down_proj.numel())
    assert store.nbytes < store.original_bytes / 4 and "（保留）" in entry.reason
    switch(model, profile(**INT4, keep_original_weights=False))
    assert "（已释放）" in str(find_state(model).report)


@pytest.fixture
def released(model):
    optimize(model, profile(**INT4, keep_original_weights=False), strict=True)
    return model


def test_released_weights_are_gone(model):
    want = logits(rounded(model, FORMS["int4"][1]))
    refs = [block_of(model).experts.gate_up_proj, block_of(model).experts.down_proj]
    kinds = [type(p) for p in refs]
    optimize(model, profile(**INT4, keep_original_weights=False), strict=True)
    experts = block_of(model).experts
    assert experts.gate_up_proj.is_meta and experts.down_proj.is_meta
    assert all(weight.is_meta for weight in shared_of(block_of(model)))
    assert [type(p) for p in experts.parameters()] == kinds
    assert [p.shape for p in experts.parameters()] == [p.shape for p in refs]
    torch.testing.assert_close(logits(model), want, **tol("fixed_point"))


@pytest.mark.parametrize(
    "use",
    [
        restore,
        lambda m: m.state_dict(),
        lambda m: m.load_state_dict({}, strict=False),
        lambda m: switch(m, profile(quantization="int8")),
        lambda m: switch(m, profile()),
        lambda m: switch(m, OptimizationProfile(mla=MLAConfig())),
        lambda m: switch(m, profile(**INT4), filter_fn=lambda name, _: "experts" not in name),
        lambda m: dso.verify(m, make_ids()),
        lambda m: logits(m.train()),
    ],
)
def test_what_needs_the_released_weights_says_so(released, use):
    expected = logits(released)
    with pytest.raises((UnsupportedError, InputError), match=r"layers\.1\.mlp.*原权重已经释放"):
        use(released)
    assert torch.equal(logits(released.eval()), expected)


def test_save_pretrained_of_a_released_model_is_an_error(released, tmp_path):
    with pytest.raises(UnsupportedError, match="save_quantized"):
        released.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_restore_by_dequantising(released):
    expected = logits(released)
    restore(released, dequantize=True)
    assert not is_optimized(released)
    torch.testing.assert_close(logits(released), expected, **tol("fixed_point"))
    state = state_of(released)
    released.load_state_dict(state)
    assert not any(value.is_meta for value in state.values())


def test_switch_keeps_released_experts_when_the_scheme_is_the_same(released):
    expected = logits(released)
    report = switch(released, OptimizationProfile(mla=MLAConfig(), moe=MOEConfig(**INT4)))
    assert {e.part for e in report.replaced} == {"mla", "moe"} and "已释放" in str(report)
    torch.testing.assert_close(logits(released), expected, **tol("fixed_point"))


# ---- 出错时什么都不变 ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_name_the_layer_and_change_nothing(value):
    model = make_moe(
        "deepseek_v3",
        num_hidden_layers=4,
        num_experts=40,
        n_routed_experts=40,
        num_local_experts=40,
    )
    with torch.no_grad():
        model.model.layers[3].mlp.experts.down_proj[37, 2, 1] = value
    before, state = snapshot(model), [id(p) for p in model.parameters()]
    settings = profile(**INT4, keep_original_weights=False)
    with pytest.raises(InputError, match=r"layers\.3\.mlp\.experts\.down_proj\[37\].*NaN 或无穷"):
        optimize(model, settings)
    assert not is_optimized(model) and snapshot(model) == before
    assert [id(p) for p in model.parameters()] == state
    optimize(model, profile())
    with pytest.raises(InputError, match="NaN"):
        switch(model, settings)
    assert [id(p) for p in model.parameters()] == state and is_optimized(model)
    assert not quantized.stores_in(model)


def test_strict_failure_releases_nothing(model):
    settings = profile(**INT4, keep_original_weights=False, z_loss_weight=0.1)
    with pytest.raises(UnsupportedError, match="z_loss_weight"):
        optimize(model, settings, strict=True)
    assert not is_optimized(model) and not any(p.is_meta for p in model.parameters())
