"""optimize 换哪些层：算得与原来一样（训练、低精度、自己的模块），不认得的不换、说明原因。"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from deepseek_opt import DenseConfig, LatentCache, MLAConfig, OptimizationProfile, optimize, restore
from deepseek_opt.integrations import AttentionSpec, register_spec, specs
from tests.optimize_cases import logits, profile
from tests.tiny_models import make_inputs, make_model
from tests.tolerances import tol


@pytest.fixture
def model():
    return make_model(attn_implementation="eager")


def test_dense_parts_match(model):
    expected = logits(model)
    report = optimize(model, OptimizationProfile(dense=DenseConfig()))
    kinds = {e.kind for e in report.replaced}
    assert {"门控 FFN", "LM head", "投影", "RMSNorm"} <= kinds
    torch.testing.assert_close(logits(model), expected, **tol(torch.float32))
    assert not report.fallbacks
    restore(model)
    report = optimize(model, OptimizationProfile(mla=MLAConfig(), dense=DenseConfig(norms=False)))
    assert "RMSNorm" not in {e.kind for e in report.replaced}
    torch.testing.assert_close(logits(model), expected, **tol(torch.float32))
    restore(model)


def test_dense_refuses_what_it_does_not_know():
    class Odd(nn.Module):
        def __init__(self, act=None, bias=False, scale=1.0):
            super().__init__()
            self.gate_proj = nn.Linear(8, 12, bias=bias)
            self.up_proj = nn.Linear(8, 12, bias=bias)
            self.down_proj = nn.Linear(12, 8, bias=bias)
            self.act_fn = act or nn.SiLU()
            self.scale = scale

        def forward(self, x):
            hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(hidden) * self.scale

    class Scaled(Odd):
        def forward(self, x):
            return super().forward(x) * 2

    modules = nn.ModuleDict(
        {"gelu": Odd(nn.GELU()), "bias": Odd(bias=True), "scaled": Scaled(), "ok": Odd()}
    )
    report = optimize(modules, OptimizationProfile(dense=DenseConfig(projections=False)))
    reasons = {e.name: e.reason for e in report.skipped}
    assert set(reasons) == {"gelu", "bias", "scaled"}
    assert "SiLU" in reasons["gelu"] and "偏置" in reasons["bias"] and "不是" in reasons["scaled"]
    assert [e.name for e in report.replaced] == ["ok"]
    modules["ok"].up_proj.register_forward_hook(lambda *_: None)
    modules["ok"](torch.randn(2, 8))
    assert sum(report.fallbacks.values()) == 1  # 后来加的钩子要被看见
    restore(modules)


def test_training_modes_and_gradient_checkpointing(model):
    ids, _ = make_inputs()

    def gradient():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return model.model.layers[0].self_attn.kv_b_proj.weight.grad.clone()

    model.train()
    expected = gradient()
    report = optimize(model, profile())
    torch.testing.assert_close(gradient(), expected, rtol=1e-3, atol=1e-6)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.testing.assert_close(gradient(), expected, rtol=1e-3, atol=1e-6)
    assert not report.fallbacks
    model.eval()
    logits(model)
    restore(model)


def test_dropout_falls_back_with_reason():
    model = make_model(attn_implementation="eager", attention_dropout=0.2)
    ids, _ = make_inputs()
    expected_eval = logits(model)
    report = optimize(model, profile())
    torch.testing.assert_close(logits(model), expected_eval, **tol(torch.float32))
    assert not report.fallbacks
    model.train()
    torch.manual_seed(0)
    actual = model(ids).logits
    assert {r for _, r in report.fallbacks} and all("dropout" in r for _, r in report.fallbacks)
    restore(model)
    torch.manual_seed(0)
    assert torch.equal(model(ids).logits, actual)


class OwnAttention(nn.Module):
    """用户自己的 MLA 注意力：名字、旋转约定、返回值都与 DeepSeek 不同。"""

    def __init__(self):
        super().__init__()
        self.rank, self.nope, self.rot, self.vd, self.idx = 16, 8, 8, 8, 0
        self.query = nn.Linear(32, 2 * 16, bias=False)
        self.down = nn.Linear(32, 24, bias=False)
        self.norm = nn.RMSNorm(16, eps=1e-6)
        self.up = nn.Linear(16, 2 * 16, bias=False)
        self.out = nn.Linear(16, 32, bias=False)
        self.temperature = 0.25

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None
    ):
        assert attention_mask is None and past_key_values is None
        batch, steps, _ = hidden_states.shape
        cos, sin = (t[..., :4].unsqueeze(2) for t in position_embeddings)

        def turn(x):
            a, b = x.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        q = self.query(hidden_states).view(batch, steps, 2, 16)
        q = torch.cat((q[..., :8], turn(q[..., 8:])), -1)
        latent, rope = self.down(hidden_states).split((16, 8), -1)
        kv = self.up(self.norm(latent)).view(batch, steps, 2, 16)
        k = torch.cat((kv[..., :8], turn(rope.unsqueeze(2)).expand(-1, -1, 2, -1)), -1)
        score = torch.einsum("bthd,bshd->bhts", q, k) * self.temperature
        score = score.masked_fill(torch.ones(steps, steps).triu(1).bool(), -torch.inf)
        out = torch.einsum("bhts,bshd->bthd", score.softmax(-1), kv[..., 8:])
        return self.out(out.flatten(2))


def test_register_spec_for_own_module():
    layer = OwnAttention()
    hidden, angle = torch.randn(2, 5, 32), torch.rand(1, 5, 8)
    rotation = (angle.cos(), angle.sin())
    expected = layer(hidden, rotation)
    holder = nn.ModuleDict({"attention": layer})
    spec = AttentionSpec(
        cls=OwnAttention,
        q_proj="query",
        q_a_proj=None,
        q_a_layernorm=None,
        q_b_proj=None,
        kv_a_proj="down",
        kv_a_layernorm="norm",
        kv_b_proj="up",
        o_proj="out",
        kv_lora_rank="rank",
        qk_nope_head_dim="nope",
        qk_rope_head_dim="rot",
        v_head_dim="vd",
        layer_idx="idx",
        scaling="temperature",
        rope="half",
        returns_tuple=False,
    )
    register_spec(spec)
    try:
        assert len(optimize(holder, profile(), strict=True).replaced) == 1
        torch.testing.assert_close(layer(hidden, rotation), expected, **tol(torch.float32))
        cache = LatentCache(1)
        with torch.no_grad():
            parts = [
                layer(hidden[:, a:b], tuple(t[:, a:b] for t in rotation), past_key_values=cache)
                for a, b in ((0, 3), (3, 5))
            ]
        torch.testing.assert_close(torch.cat(parts, 1), expected, **tol(torch.float32))
        restore(holder)
    finally:
        del specs.SPECS[spec.key]


def test_subclass_with_its_own_forward_is_left_alone(model):
    cls = type(model.model.layers[0].self_attn)

    class Custom(cls):
        def forward(self, hidden_states, **kwargs):
            out, weights = super().forward(hidden_states, **kwargs)
            return out * 2, weights

    model.model.layers[0].self_attn.__class__ = Custom
    report = optimize(model, profile())
    assert "改写" in report.skipped[0].reason and len(report.replaced) == 1
    restore(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_is_not_worse(dtype):
    """以 fp32 为准：16 位时我们的误差不比 transformers 的 eager 大。"""
    reference = make_model(attn_implementation="eager", num_hidden_layers=1)
    low = copy.deepcopy(reference).to(dtype)
    reference.load_state_dict({k: v.float() for k, v in low.state_dict().items()})
    ids, mask = make_inputs(batch=4, length=48, left_pad=7)

    def run(model):
        with torch.no_grad():
            return model(ids, attention_mask=mask).logits[mask.bool()].float()

    exact = run(reference)
    theirs = (run(low) - exact).pow(2).mean().sqrt()
    optimize(low, profile())
    ours = (run(low) - exact).pow(2).mean().sqrt()
    assert ours <= 1.05 * theirs


def test_autocast_is_not_worse():
    model = make_model(attn_implementation="eager", num_hidden_layers=1)
    exact = logits(model)

    def error():
        with torch.autocast("cpu", torch.bfloat16):
            return (logits(model).float() - exact).pow(2).mean().sqrt()

    theirs = error()
    report = optimize(model, profile())
    assert error() <= 1.1 * theirs
    assert not report.fallbacks


def test_own_layers_need_no_replacement():
    from deepseek_opt import MLAAttention

    config = MLAConfig(
        num_attention_heads=2,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
    )
    model = torch.nn.Sequential(MLAAttention(config, 16))
    report = optimize(model, OptimizationProfile(mla=MLAConfig()), strict=True)
    assert "已经是本库的层" in str(report)


def test_clamped_ffn_is_not_mistaken_for_a_plain_one():
    """DeepSeek-V4、GLM-5 的写法：平常的输入碰不到截断，核对时要放大才看得出。"""

    class Clamped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj = torch.nn.Linear(8, 12, bias=False)
            self.up_proj = torch.nn.Linear(8, 12, bias=False)
            self.down_proj = torch.nn.Linear(12, 8, bias=False)
            self.act_fn = torch.nn.SiLU()

        def forward(self, x):
            up = self.up_proj(x).clamp(-10, 10)
            return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10)) * up)

    model = torch.nn.Sequential(Clamped())
    report = optimize(model, OptimizationProfile(dense=DenseConfig(ffn=True, projections=False)))
    assert "forward 不是 down(silu(gate x) * up x)" in report.skipped[0].reason
