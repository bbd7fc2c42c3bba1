"""量化本库的 MoEFeedForward：路由、容量照旧，路由专家与共享专家是量化的。"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deepseek_opt as dso
from deepseek_opt import MOEConfig, optimize, restore
from deepseek_opt.errors import ConfigError, UnsupportedError
from deepseek_opt.quantize import dequantize, quantize_experts
from tests.moe_quantize_cases import FORMS, INT4, profile
from tests.tolerances import tol


def own_layer(**fields):
    torch.manual_seed(0)
    config = MOEConfig(num_experts=4, num_experts_per_tok=2, num_shared_experts=1, **fields)
    return nn.Sequential(dso.MoEFeedForward(config, 32, 48), nn.Linear(32, 4))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_own_layers(form, keep):
    model, x = own_layer(capacity_factor=1.0, shared_expert_gate=True).eval(), torch.randn(5, 32)
    fields, numbers = FORMS[form]
    plain, twin = model(x), copy.deepcopy(model)
    for weight in (twin[0].gate_up_proj, twin[0].down_proj):
        weight.copy_(dequantize(quantize_experts(weight, *numbers)))
    for weight in (twin[0].shared_gate, twin[0].shared_up, twin[0].shared_down):
        weight.copy_(dequantize(quantize_experts(weight[None], *numbers))[0])
    before = model[0].load_counter.snapshot()
    report = optimize(model, profile(**fields, keep_original_weights=keep), strict=True)
    torch.testing.assert_close(model(x), twin(x), **tol("fixed_point"))
    assert not report.fallbacks and (model[0].load_counter.snapshot() >= before).all()
    assert [e.name for e in report.replaced] == ["0"] and "每个专家" in report.replaced[0].reason
    if keep:
        assert torch.equal(restore(model)(x), plain)
    else:
        with pytest.raises(UnsupportedError, match="已经释放"):
            model.train()(x)
        torch.testing.assert_close(
            restore(model.eval(), dequantize=True)(x), twin(x), **tol("fixed_point")
        )


def test_own_layers_train_with_the_original_weights():
    model = own_layer()
    report = optimize(model, profile(**INT4))
    model(torch.randn(3, 32)).sum().backward()
    assert model[0].gate_up_proj.grad is not None
    assert any("训练" in reason for _, reason in report.fallbacks)


def test_own_layers_filtered_or_not_quantised():
    report = optimize(own_layer(), profile(**INT4), filter_fn=lambda *_: False)
    assert not report.replaced and "filter_fn" in report.skipped[0].reason
    report = optimize(own_layer(), profile(quantization="none"), strict=True)
    assert not report.replaced and report.skipped[0].native


def test_metrics_of_own_layers():
    layer = own_layer()
    optimize(layer, profile(**INT4))
    found = dso.metrics(layer)
    assert found.expert_original_bytes == (4 + 1) * (3 * 48 * 32) * 4
    assert found.expert_weight_bytes < found.expert_original_bytes / 4


def test_int8_has_no_zero_points():
    with pytest.raises(ConfigError, match="int8 没有零点"):
        MOEConfig(quantization="int8", quantization_symmetric=False)
    MOEConfig(quantization="int8", quantization_symmetric=True)


def test_wrong_input_is_the_layers_own_error():
    layer = own_layer().eval()
    optimize(layer, profile(**INT4))
    with pytest.raises(dso.errors.InputError, match="hidden"):
        layer[0](torch.randn(3, 31))
