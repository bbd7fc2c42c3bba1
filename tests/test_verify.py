"""verify：原实现与优化后逐项对照；结束后模型与之前完全一样。"""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from deepseek_opt import (
    DenseConfig,
    MLAConfig,
    OptimizationProfile,
    optimize,
    restore,
    verify,
)
from deepseek_opt.errors import InputError
from deepseek_opt.optimize import find_state, is_optimized
from tests.tiny_models import make_inputs, make_model


def inputs(**kwargs):
    ids, mask = make_inputs(**kwargs)
    return {"input_ids": ids, "attention_mask": mask}


def test_passes_in_fp32_and_leaves_the_model_alone():
    model = make_model().train()
    model.model.layers[1].eval()
    report = verify(model, inputs(left_pad=3), max_new_tokens=6)
    assert report.passed and report.greedy_equal and report.agreement == 1
    assert report.greedy_matched == report.greedy_total == 12 and report.tokens == 21
    assert len(report.layers) == 3 and report.layers[0].max_error == 0
    assert report.max_error < 1e-4 * report.scale and report.replaced == 2
    assert not is_optimized(model) and model.training and not model.model.layers[1].training
    text = report.render()
    assert str(report) == text and "通过" in text and "逐层误差" in text
    assert "<table>" in report._repr_html_() and json.dumps(report.to_dict(), ensure_ascii=False)


def test_uses_the_current_optimization():
    model = make_model()
    optimized = optimize(model, OptimizationProfile(mla=MLAConfig(), dense=DenseConfig()))
    state = find_state(model)
    report = verify(model, inputs()["input_ids"], max_new_tokens=0)
    assert report.passed and report.greedy_equal is None
    assert report.replaced == len(optimized.replaced)
    assert (
        find_state(model) is state
        and model.model.layers[0].self_attn.forward.runtime is state.runtime
    )
    with pytest.raises(InputError, match="switch"):
        verify(model, inputs(), profile=OptimizationProfile(mla=MLAConfig()))
    restore(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    report = verify(
        make_model(dtype=dtype, num_hidden_layers=1), inputs(length=24), max_new_tokens=4
    )
    assert report.passed, str(report)
    assert report.dtype == str(dtype)[6:]


def test_a_wrong_replacement_fails():
    model = make_model()
    optimize(model, OptimizationProfile(mla=MLAConfig()))
    patch = model.model.layers[0].self_attn.forward
    assert patch.rope == "interleaved"
    patch.rope = "half"  # 故意装错旋转约定
    report = verify(model, inputs(), max_new_tokens=3)
    assert (
        not report.passed and "未通过" in str(report) and any("误差" in f for f in report.failures)
    )


def test_nothing_replaced_is_not_a_pass():
    report = verify(nn.Sequential(nn.Linear(4, 4)), {"input": torch.randn(2, 4)})
    assert not report.passed and "没有替换" in report.failures[0]


def test_own_module_with_dense_parts():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return self.inner(x)

    model, x = Block(), torch.randn(2, 5, 8)
    profile = OptimizationProfile(dense=DenseConfig())
    report = verify(model, {"x": x}, profile=profile)
    assert report.passed and [layer.name for layer in report.layers] == ["inner"]


@pytest.mark.parametrize(
    ("bad", "options", "word"),
    [
        ("文本", {}, "inputs"),
        ({}, {}, "inputs"),
        (torch.zeros(1, 2, dtype=torch.int64), {"max_new_tokens": -1}, "max_new_tokens"),
        (torch.zeros(1, 2, dtype=torch.int64), {"max_new_tokens": 1.5}, "max_new_tokens"),
    ],
)
def test_bad_arguments(bad, options, word):
    model = make_model()
    with pytest.raises(InputError, match=word):
        verify(model, bad, **options)
    assert not is_optimized(model)


def test_not_a_model():
    with pytest.raises(InputError, match="model"):
        verify("模型", inputs())


def test_failing_forward_puts_everything_back():
    model = make_model()
    optimize(model, OptimizationProfile(mla=MLAConfig()))
    with pytest.raises(Exception):  # noqa: B017  任何错误都要先装回去
        verify(model, {"input_ids": torch.full((1, 3), 10_000)})
    assert is_optimized(model) and model.model.layers[0].self_attn.forward.module is not None
    restore(model)
