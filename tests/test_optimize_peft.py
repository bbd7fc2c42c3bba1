"""PEFT 包过的投影：LoRA 在任何一个投影上、优化之前或之后包、训练、合并、停用。"""

from __future__ import annotations

import copy

import pytest
import torch

from deepseek_opt import MLAConfig, OptimizationProfile, optimize, restore
from deepseek_opt.optimize import is_optimized
from tests.tiny_models import make_inputs, make_model
from tests.tolerances import tol

peft = pytest.importorskip("peft")

PROFILE = OptimizationProfile(mla=MLAConfig())
ALL = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


def wrap(model, targets=ALL, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@torch.no_grad()
def logits(model):
    ids, mask = make_inputs(left_pad=3)
    return model(input_ids=ids, attention_mask=mask).logits[mask.bool()]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **tol(torch.float32))


@pytest.fixture
def model():
    return make_model(attn_implementation="eager")


def test_wrapped_before_optimize(model):
    wrapped = wrap(model).eval()
    expected = logits(wrapped)
    report = optimize(wrapped, PROFILE, strict=True)
    assert len(report.replaced) == 2
    close(logits(wrapped), expected)
    assert not report.fallbacks
    restore(wrapped)
    assert torch.equal(logits(wrapped), expected)


def test_wrapped_after_optimize(model):
    plain = wrap(copy.deepcopy(model)).eval()
    report = optimize(model, PROFILE)
    wrapped = wrap(model).eval()
    close(logits(wrapped), logits(plain))
    assert not report.fallbacks
    restore(wrapped)
    assert not is_optimized(model)
    close(logits(wrapped), logits(plain))


def test_disable_merge_and_update(model):
    base = logits(model)
    wrapped = wrap(model).eval()
    expected = logits(wrapped)
    optimize(wrapped, PROFILE)
    close(logits(wrapped), expected)
    with wrapped.disable_adapter():
        close(logits(wrapped), base)
    wrapped.merge_adapter()
    close(logits(wrapped), expected)
    wrapped.unmerge_adapter()
    with torch.no_grad():  # 缓存的有效权重要跟着 LoRA 参数走
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.5)
    changed = logits(wrapped)
    restore(wrapped)
    close(changed, logits(wrapped))
    assert not torch.allclose(changed, expected)


def test_gradients_of_lora(model):
    wrapped = wrap(model).train()
    ids, _ = make_inputs()

    def gradients():
        wrapped.zero_grad()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        return {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}

    expected = gradients()
    report = optimize(wrapped, PROFILE)
    actual = gradients()
    assert actual.keys() == expected.keys() and any("kv_b_proj.lora_A" in n for n in actual)
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-3, atol=1e-6, msg=name)
    assert not report.fallbacks


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.3}])
def test_unsupported_lora_falls_back(model, options):
    wrapped = wrap(model, ["kv_b_proj"], **options)
    training = "lora_dropout" in options
    wrapped.train(training)
    report = optimize(wrapped, PROFILE)
    ids, _ = make_inputs()

    def run():
        torch.manual_seed(1)
        with torch.no_grad():
            return wrapped(input_ids=ids).logits

    actual = run()
    noted = [e.reason for e in report.skipped] + [r for _, r in report.fallbacks]
    assert noted and all("kv_b_proj" in reason for reason in noted)
    restore(wrapped)
    assert torch.equal(run(), actual)


def test_unload_after_optimize(model):
    base = logits(model)
    wrapped = wrap(model).eval()
    optimize(wrapped, PROFILE)
    logits(wrapped)
    inner = wrapped.unload()
    close(logits(inner), base)
    restore(inner)
