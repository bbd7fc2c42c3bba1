"""optimize 时量化专家：与“权重换成量化再还原的值”的原模型一致；换配置、复制、训练。"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import deepseek_opt as dso
from deepseek_opt import MLAConfig, MOEConfig, OptimizationProfile, optimize, restore, switch
from deepseek_opt.errors import ConfigError, UnsupportedError
from deepseek_opt.integrations import quantized
from deepseek_opt.integrations.patch import patch_of
from deepseek_opt.optimize import find_state
from deepseek_opt.quantize import dequantize, quantize_experts
from tests.moe_models import (
    MODELS,
    available,
    experts_in,
    make_ids,
    make_moe,
    output_of,
    transformers,
)
from tests.moe_quantize_cases import (
    FORMS,
    INT4,
    block_of,
    blocks_in,
    logits,
    profile,
    rounded,
    same_state,
    state_of,
)
from tests.test_moe_models import SKIPPED
from tests.test_moe_optimize import routing
from tests.tolerances import tol

moe_module = pytest.importorskip("transformers.integrations.moe")
HERE = [name for name in MODELS if available(name) and name not in SKIPPED]


@pytest.fixture
def model():
    return make_moe("deepseek_v3")


# ---- 各架构、各格式 ----


@pytest.mark.parametrize("model_type", HERE)
def test_every_model_computes_with_the_quantised_weights(model_type):
    model = make_moe(model_type)
    state, expected = state_of(model), logits(model)
    report = optimize(model, profile(**INT4))
    stores = quantized.stores_in(model)
    assert set(stores) == {*experts_in(model), *blocks_in(model)} and not report.unmet
    want = logits(rounded(restore(copy.deepcopy(model)), FORMS["int4"][1]))
    assert (logits(model) - want).norm() <= tol("fixed_point")["rtol"] * want.norm()
    assert "int4（32 个一组），每个专家" in str(report)
    assert not report.fallbacks and same_state(model, state)
    restore(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model_type", ["deepseek_v3", "mixtral", "qwen2_moe"])
def test_formats(model_type, form):
    model = make_moe(model_type)
    fields, numbers = FORMS[form]
    want = logits(rounded(model, numbers))
    report = optimize(model, profile(**fields), strict=True)
    torch.testing.assert_close(logits(model), want, **tol("fixed_point"))
    assert any(form.split()[0] in entry.reason for entry in report.replaced)
    assert bool(blocks_in(model)) is (model_type != "mixtral")  # 共享专家仍一次算完


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_biased_experts(form, keep):
    """gpt-oss：转置、交错、带偏置。偏置不量化，改动了下一次就生效。"""
    model, (fields, numbers) = make_moe("gpt_oss"), FORMS[form]
    with torch.no_grad():
        for module in experts_in(model).values():
            module.gate_up_proj_bias.normal_()
            module.down_proj_bias.normal_()
    twin = rounded(model, numbers)
    settings = profile(**fields, keep_original_weights=keep)
    report = optimize(model, settings, strict=True)
    torch.testing.assert_close(logits(model), logits(twin), **tol("fixed_point"))
    switch(model, settings)  # 已释放的要由小替身核对
    with torch.no_grad():
        for each in (model, twin):
            for module in experts_in(each).values():
                module.gate_up_proj_bias.mul_(-1.5)
    torch.testing.assert_close(logits(model), logits(twin), **tol("fixed_point"))
    assert not report.fallbacks
    copied = copy.deepcopy(model)
    torch.testing.assert_close(logits(copied), logits(twin), **tol("fixed_point"))


def test_parametrised_weights_are_an_unmet_requirement(model):
    experts = block_of(model).experts
    nn.utils.parametrize.register_parametrization(experts, "down_proj", nn.Identity())
    expected = logits(model)
    report = optimize(model, profile(**INT4))
    assert not quantized.stores_in(model)
    assert any("不是普通参数" in entry.reason for entry in report.unmet)
    torch.testing.assert_close(logits(model), expected, **tol(torch.float32))


@moe_module.use_experts_implementation(is_transposed=True, is_concatenated=False)
class Turned(nn.Module):
    """转置且交错存放、没有偏置的专家（gpt-oss 的布局）。"""

    def __init__(self, _config):
        super().__init__()
        self.num_experts = 3
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 12) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(3, 6, 8) * 0.3)

    def _apply_gate(self, joint):
        return nn.functional.silu(joint[..., ::2]) * joint[..., 1::2]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            token, place = torch.where(top_k_index == e)
            part = self._apply_gate(hidden_states[token] @ self.gate_up_proj[e])
            part = part @ self.down_proj[e] * top_k_weights[token, place, None]
            out.index_add_(0, token, part.to(out.dtype))
        return out


def turned():
    config = transformers.PretrainedConfig()
    config._experts_implementation = "eager"
    return nn.ModuleDict({"experts": Turned(config)}).eval()


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_transposed_and_interleaved(form, keep):
    layer, case = turned(), routing()
    fields, numbers = FORMS[form]
    with torch.no_grad():
        twin = copy.deepcopy(layer)
        inner = twin["experts"]
        plain = torch.cat((inner.gate_up_proj.mT[:, ::2], inner.gate_up_proj.mT[:, 1::2]), 1)
        plain = dequantize(quantize_experts(plain, *numbers))
        inner.gate_up_proj.copy_(torch.stack(plain.chunk(2, 1), 2).flatten(1, 2).mT)
        inner.down_proj.copy_(dequantize(quantize_experts(inner.down_proj.mT, *numbers)).mT)
        want = twin["experts"](*case)
        report = optimize(layer, profile(**fields, keep_original_weights=keep), strict=True)
        torch.testing.assert_close(layer["experts"](*case), want, **tol("fixed_point"))
        assert not report.fallbacks
        restore(layer, dequantize=True)
        if not keep:
            torch.testing.assert_close(layer["experts"].gate_up_proj, inner.gate_up_proj)
            torch.testing.assert_close(layer["experts"].down_proj, inner.down_proj)


# ---- 换配置 ----


def test_switch_both_ways_when_the_originals_are_kept(model):
    plain, state = logits(model), state_of(model)
    optimize(model, profile(**INT4))
    four = logits(model)
    switch(model, profile(quantization="int8"))
    eight = logits(model)
    torch.testing.assert_close(eight, plain, rtol=0, atol=0.02 * float(plain.abs().max()))
    assert not torch.equal(eight, four)
    switch(model, profile(**INT4))
    assert torch.equal(logits(model), four)
    switch(model, profile())
    torch.testing.assert_close(logits(model), plain, **tol(torch.float32))
    assert same_state(restore(model), state)


def test_switch_reuses_the_same_scheme(model):
    optimize(model, profile(**INT4))
    store = patch_of(block_of(model).experts).store
    switch(model, OptimizationProfile(mla=MLAConfig(), moe=MOEConfig(**INT4)))
    assert patch_of(block_of(model).experts).store is store
    with torch.no_grad():
        block_of(model).experts.down_proj.mul_(2)
    switch(model, profile(**INT4))
    assert patch_of(block_of(model).experts).store is not store  # 权重变了，重新量化


def test_changing_the_quantization_afterwards_is_an_error(model):
    settings = profile(**INT4)
    optimize(model, settings)
    settings.moe.quantization_group_size = 64
    with pytest.raises(ConfigError, match="quantization_group_size"):
        logits(model)


def test_filter_fn(model):
    report = optimize(model, profile(**INT4), filter_fn=lambda name, _: "mlp" not in name)
    assert not quantized.stores_in(model) and not report.replaced


# ---- 训练、改动、复制 ----


def test_training_uses_the_original_weights(model):
    ids = make_ids()

    def gradient():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return block_of(model).experts.gate_up_proj.grad.clone()

    expected = gradient()
    report = optimize(model.train(), profile(**INT4))
    assert not report.fallbacks  # 优化时的核对不计
    torch.testing.assert_close(gradient(), expected, rtol=1e-3, atol=1e-6)
    assert any("训练" in reason for _, reason in report.fallbacks)


def test_backward_through_quantised_experts_is_an_error(model):
    optimize(model, profile(**INT4))
    with pytest.raises(RuntimeError, match="只做推理"):
        output_of(model, make_ids()).sum().backward()


def test_changed_originals_are_used_instead(model):
    report = optimize(model, profile(**INT4))
    with torch.no_grad():
        block_of(model).experts.down_proj.zero_()
    now = logits(model)
    assert any("被改动" in reason for _, reason in report.fallbacks)
    restore(model)
    torch.testing.assert_close(now, logits(model), **tol(torch.float32))


@pytest.mark.parametrize("keep", [True, False])
def test_copies_are_independent(model, keep):
    report = optimize(model, profile(**INT4, keep_original_weights=keep))
    expected = logits(model)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (twin, loaded):
        assert torch.equal(logits(other), expected)
        store = patch_of(block_of(other).experts).store
        assert store is not patch_of(block_of(model).experts).store
        state = find_state(other)
        assert not state.report.fallbacks and not state.runtime.fallbacks
    if keep:
        with torch.no_grad():
            block_of(twin).experts.down_proj.zero_()
        assert not torch.allclose(logits(twin), expected)
        stale = copy.deepcopy(twin)
        assert torch.equal(logits(stale), logits(twin))  # 副本里也知道原权重改过
    else:
        with pytest.raises(UnsupportedError, match="已经释放"):
            twin.state_dict()
        restore(twin, dequantize=True)
        twin.state_dict()
    assert torch.equal(logits(model), expected) and not report.fallbacks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype):
    model = make_moe("qwen2_moe", dtype)
    want = logits(rounded(model, FORMS["int4"][1])).float()
    report = optimize(model, profile(**INT4), strict=True)
    got = logits(model)
    assert got.dtype == dtype and not report.fallbacks
    limit = {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert (got.float() - want).abs().max() <= limit * want.abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert logits(make_moe("qwen2_moe")).isfinite().all()


def test_torch_compile():
    model = make_moe("qwen2_moe")
    optimize(model, profile(**INT4), strict=True)
    torch.compiler.reset()
    try:
        block = model.model.layers[1].mlp
        compiled = torch.compile(block, backend="aot_eager")
        x = torch.randn(1, 6, 32)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), block(x), **tol(torch.float32))
    finally:
        torch.compiler.reset()


# ---- verify、metrics ----


@pytest.mark.parametrize("form", FORMS)
def test_verify_states_the_limits(model, form):
    optimize(model, profile(**FORMS[form][0]))
    expected = logits(model)
    checked = dso.verify(model, make_ids(), max_new_tokens=3)
    assert checked.passed, checked.failures
    limit = 0.3 if form.startswith("int4") else 0.1
    assert checked.quantization.startswith(form.split()[0]) and checked.error_limit == limit
    assert checked.accuracy_limit >= 0.005 and f"≤ 均方根的 {limit:.0%}" in str(checked)
    assert torch.equal(logits(model), expected) and quantized.stores_in(model)


def test_verify_fails_on_broken_quantised_weights(model):
    optimize(model, profile(**INT4))
    for _, store in quantized.stores_in(model).values():
        next(reversed(store.parts.values())).scale.mul_(-40)
    checked = dso.verify(model, make_ids(), max_new_tokens=0)
    assert not checked.passed and "平均误差" in checked.failures[0]


def test_metrics_report_the_bytes(model):
    assert dso.metrics(model).expert_weight_bytes is None
    optimize(model, profile())
    plain = dso.metrics(model)
    assert plain.expert_weight_bytes == 30720 and plain.expert_original_bytes is None
    switch(model, profile(**INT4))
    kept = dso.metrics(model)
    size = sum(store.nbytes for _, store in quantized.stores_in(model).values())
    assert (kept.expert_weight_bytes, kept.expert_original_bytes) == (size, 30720)
    logits(model)
    assert "expert_original_bytes = 30.0 KiB" in str(dso.metrics(model))
    switch(model, profile(**INT4, keep_original_weights=False))
    gone = dso.metrics(model)
    assert (gone.expert_weight_bytes, gone.expert_original_bytes) == (size, 0)
