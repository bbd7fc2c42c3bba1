"""与路由专家一次算完的共享专家也量化：保留、释放、改动、钩子、出错、存取。"""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import deepseek_opt as dso
from deepseek_opt import optimize, restore, switch
from deepseek_opt.errors import InputError, UnsupportedError
from deepseek_opt.integrations import quantized
from deepseek_opt.optimize import is_optimized
from tests.moe_models import make_moe
from tests.moe_quantize_cases import (
    FORMS,
    INT4,
    block_of,
    blocks_in,
    logits,
    profile,
    rounded,
    same_state,
    shared_of,
    state_of,
)
from tests.test_quantized_file import edited, hollow
from tests.tolerances import tol

BLOCK = "model.layers.1.mlp"
DOWN = f"{BLOCK}.shared_experts.down_proj.weight"


class Wrapped(nn.Module):
    """像 LoRA 那样包着一个 nn.Linear。"""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return 2 * self.base(x)


@pytest.fixture
def model():
    return make_moe("deepseek_v3")


def store_of(model):
    return quantized.stores_in(model)[BLOCK][1]


def routed_only(model):
    """只有路由专家量化时应有的结果。"""
    twin = rounded(model, FORMS["int4"][1])
    for weight, original in zip(shared_of(block_of(twin)), shared_of(block_of(model)), strict=True):
        weight.data.copy_(original.data)
    return logits(twin)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen2_moe"])
def test_shared_experts_are_quantised_and_the_coefficient_is_not(model_type):
    model = make_moe(model_type)
    report = optimize(model, profile(**INT4), strict=True)
    entries = [e for e in report.replaced if e.name in blocks_in(model)]
    assert entries and all("共享专家也是 int4（32 个一组）" in e.reason for e in entries)
    for name in blocks_in(model):
        block, store = quantized.stores_in(model)[name]
        shared = shared_of(block)
        assert [part.shape[1:] for part in store.parts.values()] == [w.shape for w in shared]
        assert store.original_bytes == sum(4 * w.numel() for w in shared)
        assert store.nbytes < store.original_bytes / 4
        tensors = store.shared_tensors([torch.ones(3)])
        assert [t.dtype for t in tensors.tensors] == [*[torch.uint8] * 3, torch.float32]


@pytest.mark.parametrize("block", ["hook", "lora"])
def test_what_blocks_the_fusion_keeps_the_shared_expert_as_it_is(model, block):
    mlp = block_of(model).shared_experts
    if block == "hook":
        mlp.register_forward_hook(lambda *_: None)
    else:
        mlp.up_proj = Wrapped(mlp.up_proj)
        mlp.up_proj.base.weight.data.mul_(0.5)
    plain = make_moe("deepseek_v3")
    expected, settings = routed_only(plain), profile(**INT4, keep_original_weights=False)
    report = optimize(model, settings, strict=True)
    (entry,) = [e for e in report.skipped if e.name == BLOCK]
    assert "共享专家单独计算，保持原来的类型" in entry.reason
    assert list(quantized.stores_in(model)) == [f"{BLOCK}.experts"]
    assert not any(p.is_meta for p in mlp.parameters())
    torch.testing.assert_close(logits(model), expected, **tol("fixed_point"))


def test_changed_originals_are_used_instead(model, tmp_path):
    report = optimize(model, profile(**INT4))
    with torch.no_grad():
        block_of(model).shared_experts.down_proj.weight.mul_(3)
    expected = routed_only(restore(copy.deepcopy(model)))
    torch.testing.assert_close(logits(model), expected, **tol("fixed_point"))
    assert {reason for _, reason in report.fallbacks} == {
        "共享专家的原权重在量化之后被改动，量化的已不是同一份"
    }
    with pytest.raises(InputError, match=rf"{BLOCK} 的原权重在量化之后被改动"):
        dso.save_quantized(model, tmp_path / "x.safetensors")
    old = store_of(model)
    report = switch(model, profile(**INT4))
    assert store_of(model) is not old and not report.fallbacks
    want = logits(rounded(restore(copy.deepcopy(model)), FORMS["int4"][1]))
    torch.testing.assert_close(logits(model), want, **tol("fixed_point"))


@pytest.mark.parametrize("keep", [True, False])
def test_a_hook_added_later(model, keep):
    report = optimize(model, profile(**INT4, keep_original_weights=keep))
    before, called = logits(model), []
    hook = block_of(model).shared_experts.register_forward_hook(lambda *_: called.append(1))
    if keep:
        expected = routed_only(restore(copy.deepcopy(model)))
        torch.testing.assert_close(logits(model), expected, **tol("fixed_point"))
        assert called and any("钩子" in reason for _, reason in report.fallbacks)
    else:
        with pytest.raises(UnsupportedError, match=rf"{BLOCK} 不能由量化的专家计算.*钩子"):
            logits(model)
        with pytest.raises(UnsupportedError, match=rf"{BLOCK} 的原权重已经释放"):
            switch(model, profile(**INT4))
    hook.remove()
    assert torch.equal(logits(model), before)


def test_released_shared_weights_say_so(model):
    state = state_of(model)
    optimize(model, profile(**INT4, keep_original_weights=False))
    expected, mlp = logits(model), block_of(model).shared_experts
    with pytest.raises(UnsupportedError, match="shared_experts|gate_proj|专家 的原权重已经释放"):
        mlp.state_dict()
    with pytest.raises(InputError, match="原权重已经释放"):
        mlp.load_state_dict({}, strict=False)
    switch(model, profile(**INT4))
    assert torch.equal(logits(model), expected) and store_of(model).released
    restore(model, dequantize=True)
    assert all(w.dtype == torch.float32 and not w.is_meta for w in shared_of(block_of(model)))
    torch.testing.assert_close(logits(model), expected, **tol("fixed_point"))
    assert list(model.state_dict()) == list(state) and not same_state(model, state)
    model.load_state_dict(state)
    assert same_state(model, state)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_non_finite_weights_are_named_and_change_nothing(model, value):
    with torch.no_grad():
        shared_of(block_of(model))[2][3, 1] = value
    before = [id(p) for p in model.parameters()]
    with pytest.raises(InputError, match=rf"{DOWN}：应为有限的数"):
        optimize(model, profile(**INT4, keep_original_weights=False))
    assert not is_optimized(model) and [id(p) for p in model.parameters()] == before
    optimize(model, profile())
    with pytest.raises(InputError, match="NaN"):
        switch(model, profile(**INT4))
    assert is_optimized(model) and not quantized.stores_in(model)


def test_non_finite_weights_of_own_layers():
    config = dso.MOEConfig(num_experts=4, num_experts_per_tok=2, num_shared_experts=1)
    layer = nn.Sequential(dso.MoEFeedForward(config, 32, 48))
    with torch.no_grad():
        layer[0].shared_up[3, 1] = float("nan")
    with pytest.raises(InputError, match=r"0\.shared_up：应为有限的数"):
        optimize(layer, profile(**INT4))
    assert not is_optimized(layer)


# ---- 存取 ----


@pytest.fixture
def path(model, tmp_path):
    optimize(model, profile(**INT4))
    return dso.save_quantized(model, tmp_path / "model.safetensors")


def test_file_has_the_codes_and_not_the_originals(path):
    keys = set(load_file(path))
    assert {f"{DOWN}.packed", f"{DOWN}.scale"} <= keys and DOWN not in keys
    with safe_open(path, "pt") as file:
        assert file.metadata()["version"] == "2"


def test_old_files_and_missing_parts_are_refused(path):
    def drop(tensors):
        del tensors[f"{DOWN}.scale"]

    with pytest.raises(InputError, match=rf"{DOWN}\.scale：文件里没有"):
        dso.load_quantized(hollow(), edited(path, drop))
    with pytest.raises(InputError, match="版本是 1（旧格式，共享专家没有量化；请由原权重重新"):
        dso.load_quantized(hollow(), edited(path, version="1"))


def test_a_model_that_cannot_fuse(path):
    """文件里的共享专家是量化的，而模型的要单独计算：没有原权重时报错，有时用原权重。"""
    model = hollow()
    block_of(model).shared_experts.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match=rf"{BLOCK} 的原权重已经释放"):
        dso.load_quantized(model, path)
    assert all(p.is_meta for p in model.parameters()) and not is_optimized(model)
    model = make_moe("deepseek_v3")
    expected = routed_only(model)
    block_of(model).shared_experts.register_forward_hook(lambda *_: None)
    dso.load_quantized(model, path)
    torch.testing.assert_close(logits(model), expected, **tol("fixed_point"))


def test_a_file_with_the_shared_expert_as_it_is(model, tmp_path):
    hook = block_of(model).shared_experts.register_forward_hook(lambda *_: None)
    optimize(model, profile(**INT4))
    expected = logits(model)
    path = dso.save_quantized(model, tmp_path / "part.safetensors")
    hook.remove()
    other = hollow()
    report = dso.load_quantized(other, path)
    assert list(quantized.stores_in(other)) == [f"{BLOCK}.experts"]
    assert any(
        e.name == BLOCK and e.reason == "共享专家与路由专家一次算完" for e in report.replaced
    )
    torch.testing.assert_close(logits(other), expected, **tol("fixed_point"))
