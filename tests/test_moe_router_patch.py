"""transformers 路由器的替换：结果、计数、钩子、活的属性、不该换的不换、还原。"""

from __future__ import annotations

import pytest
import torch

from deepseek_opt import MOEConfig, OptimizationProfile, expert_statistics, optimize, restore
from deepseek_opt.integrations import router
from deepseek_opt.integrations.patch import patch_of
from tests.tiny_models import make_model

PROFILE = OptimizationProfile(moe=MOEConfig())
GROUPED = {"n_group": 2, "topk_group": 1}


def build(model_type="deepseek_v3", **overrides):
    model = make_model(model_type, **overrides)
    for module in model.modules():
        bias = module._buffers.get("e_score_correction_bias")
        if bias is not None:
            bias.copy_(torch.randn_like(bias) * 0.1)
    return model


def gates(model):
    return [m for m in model.modules() if router.looks_like_router(m)]


def logits_of(model):
    with torch.no_grad():
        return model(torch.arange(1, 15).view(2, 7)).logits


@pytest.mark.parametrize(
    "model_type, overrides",
    [
        ("deepseek_v3", {}),
        ("deepseek_v3", GROUPED),
        ("deepseek_v2", {"topk_method": "greedy"}),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", **GROUPED}),
    ],
)
def test_same_result_and_undone(model_type, overrides):
    model = build(model_type, **overrides)
    before = logits_of(model)
    report = optimize(model, PROFILE)
    (gate,) = gates(model)
    assert isinstance(patch_of(gate), router.RouterPatch)
    assert any(e.replaced and e.reason == "路由一次算完" for e in report.entries)
    torch.testing.assert_close(logits_of(model), before, rtol=1e-4, atol=1e-5)
    x = torch.randn(3, gate.weight.shape[1])
    for mine, theirs in zip(gate(x), type(gate).forward(gate, x), strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
    restore(model)
    assert patch_of(gate) is None
    assert torch.equal(logits_of(model), before)


def test_counts_without_calling_the_gate_module():
    model = build()
    optimize(model, PROFILE)
    logits_of(model)
    (found,) = expert_statistics(model).values()
    assert int(torch.as_tensor(found.tokens_per_expert).sum()) == 14 * gates(model)[0].top_k


def test_hooks_on_the_gate_still_run():
    model = build()
    optimize(model, PROFILE)
    seen = []
    handle = gates(model)[0].register_forward_hook(lambda *_: seen.append(1))
    before = logits_of(model)
    handle.remove()
    assert seen and torch.equal(before, logits_of(model))


def test_attributes_are_live():
    model = build()
    optimize(model, PROFILE)
    (gate,) = gates(model)
    gate.routed_scaling_factor = 3.0
    changed = logits_of(model)
    restore(model)
    torch.testing.assert_close(changed, logits_of(model), rtol=1e-4, atol=1e-5)


def test_gradients_match():
    model = build().train()
    ids = torch.arange(1, 9)[None]
    model(ids).logits.square().mean().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    optimize(model, PROFILE)
    model(ids).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in want:
            torch.testing.assert_close(parameter.grad, want[name], rtol=1e-3, atol=1e-6)


def test_a_changed_forward_is_left_alone():
    model = build()
    (gate,) = gates(model)

    class Louder(type(gate)):
        def forward(self, hidden_states):
            logits, weights, indices = super().forward(hidden_states)
            return logits, weights * 2, indices

    gate.__class__ = Louder
    report = optimize(model, PROFILE)
    assert patch_of(gate) is None
    assert any(e.kind == "Louder" and "不同" in e.reason for e in report.entries)


def test_falls_back_with_a_reason():
    model = build()
    report = optimize(model, PROFILE)
    (gate,) = gates(model)
    out = gate(torch.randn(2, gate.weight.shape[1], dtype=torch.float64).float().double())
    assert out[0].shape == (2, gate.num_experts)
    assert any("float64" in reason for _, reason in report.fallbacks)


def test_filter_is_honoured():
    model = build()
    report = optimize(model, PROFILE, filter_fn=lambda name, _: not name.endswith("gate"))
    assert patch_of(gates(model)[0]) is None
    assert any("filter_fn" in e.reason for e in report.entries if e.name.endswith("gate"))
