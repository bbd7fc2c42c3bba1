"""MoE 部分的 optimize、restore：只改实例、能还原、能复制与保存，条件不符时如实回退或报错。"""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from torch import nn

from deepseek_opt import DenseConfig, MLAConfig, MOEConfig, OptimizationProfile, optimize, restore
from deepseek_opt.errors import ConfigError, InputError, UnsupportedError
from deepseek_opt.integrations.experts import ExpertsPatch
from deepseek_opt.integrations.moe_block import MoeBlockPatch
from deepseek_opt.integrations.patch import patch_of
from deepseek_opt.optimize import is_optimized
from tests.moe_cases import kept_by
from tests.moe_models import experts_in, make_ids, make_moe, output_of, transformers
from tests.tolerances import tol

moe_module = pytest.importorskip("transformers.integrations.moe")


def profile(**fields):
    return OptimizationProfile(moe=MOEConfig(**fields))


@pytest.fixture
def model():
    return make_moe("deepseek_v3")


def block_of(model):
    return model.model.layers[1].mlp


@torch.no_grad()
def logits(model):
    return output_of(model, make_ids())


def snapshot(model):
    return [
        {k: id(v) for k, v in m.__dict__.items() if not k.startswith("_")} for m in model.modules()
    ]


@moe_module.use_experts_implementation
class OwnExperts(nn.Module):
    """用户自己的类，名字与 transformers 无关。"""

    def __init__(self, _config, act=None, scale=1.0):
        super().__init__()
        self.num_experts = 3
        self.gate_up_proj = nn.Parameter(torch.randn(3, 12, 8) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(3, 8, 6) * 0.3)
        self.act_fn = act or nn.SiLU()
        self.scale = scale

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            token, place = torch.where(top_k_index == e)
            joint = hidden_states[token] @ self.gate_up_proj[e].mT
            part = self._apply_gate(joint) @ self.down_proj[e].mT * self.scale
            out.index_add_(0, token, (part * top_k_weights[token, place, None]).to(out.dtype))
        return out


def own(**kwargs):
    config = transformers.PretrainedConfig()
    config._experts_implementation = "eager"
    return OwnExperts(config, **kwargs)


def routing(tokens=5):
    index = torch.randint(0, 3, (tokens, 2))
    return torch.randn(tokens, 8), index, torch.rand(tokens, 2)


def test_restore_is_bit_for_bit(model):
    before, expected = snapshot(model), logits(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    everything = OptimizationProfile(mla=MLAConfig(), dense=DenseConfig(), moe=MOEConfig())
    report = optimize(model, everything, strict=True)
    assert isinstance(patch_of(block_of(model)), MoeBlockPatch)
    assert isinstance(patch_of(block_of(model).experts), ExpertsPatch)
    assert {e.part for e in report.replaced} == {"mla", "dense", "moe"}
    assert "MoE" in str(report) and report.to_dict()["replaced"]
    torch.testing.assert_close(logits(model), expected, **tol(torch.float32))
    assert list(model.state_dict()) == list(state) and not report.fallbacks
    restore(model)
    assert snapshot(model) == before and torch.equal(logits(model), expected)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_twice_is_an_error(model):
    optimize(model, profile())
    with pytest.raises(InputError, match="已经优化过"):
        optimize(model, profile())
    assert isinstance(patch_of(block_of(model)), MoeBlockPatch)
    restore(model)


def test_model_without_moe_is_reported():
    plain = nn.Sequential(nn.Linear(4, 4))
    report = optimize(plain, profile())
    assert [e.part for e in report.unmet] == ["moe"] and "没有 MoE" in report.unmet[0].reason
    restore(plain)
    with pytest.raises(UnsupportedError, match="没有 MoE"):
        optimize(plain, profile(), strict=True)
    assert not is_optimized(plain)


@pytest.mark.parametrize(
    ("field", "given", "actual"),
    [
        ("num_experts", 64, 4),
        ("num_experts_per_tok", 3, 2),
        ("num_shared_experts", 2, 1),
        ("routing_strategy", "group_limited", "topk"),
    ],
)
def test_config_that_disagrees_with_the_model(model, field, given, actual):
    before = snapshot(model)
    with pytest.raises(ConfigError) as caught:
        optimize(model, profile(**{field: given}))
    assert field in str(caught.value) and repr(actual) in str(caught.value)
    assert snapshot(model) == before
    optimize(model, profile(**{field: actual}), strict=True)


def test_fields_without_effect_are_reported(model):
    wanted = {"balance_strategy": "bias_update", "bias_update_rate": 0.001}
    report = optimize(model, profile(**wanted))
    assert report.replaced and {e.kind for e in report.unmet} == set(wanted)
    restore(model)
    with pytest.raises(UnsupportedError, match="balance_strategy"):
        optimize(model, profile(**wanted), strict=True)
    assert not is_optimized(model)
    optimize(model, profile(balance_strategy="none", quantization="none"), strict=True)


def test_recompute_experts(model):
    """改动即时生效：重算时前向不留专家的 gate、up，梯度相同（同一个模型、同样的输入）。"""
    settings, sizes, grads = profile(recompute_experts=False), [], []
    optimize(model, settings, strict=True)
    for recompute in (False, True):
        settings.moe.recompute_experts = recompute
        out, size = kept_by(functools.partial(output_of, model, make_ids()))
        sizes.append(size)
        model.zero_grad()
        out.square().mean().backward()
        grads.append([p.grad.clone() for p in block_of(model).experts.parameters()])
    assert sizes[1] < sizes[0]
    torch.testing.assert_close(*grads, **tol(torch.float32))


def test_changing_the_config_afterwards_is_an_error(model):
    settings = profile()
    optimize(model, settings)
    settings.moe.num_experts = 8
    with pytest.raises(ConfigError, match="num_experts"):
        logits(model)
    settings.moe.num_experts = None
    logits(model)


def test_deepcopy_and_pickle_are_independent(model):
    report = optimize(model, profile())
    expected = logits(model)
    twin = copy.deepcopy(model)
    inner = block_of(twin).experts
    assert patch_of(inner).module is inner and patch_of(block_of(twin)).module is block_of(twin)
    assert patch_of(inner).load_counter.snapshot().sum() == 0
    with torch.no_grad():
        inner.down_proj.zero_()
    assert torch.equal(logits(model), expected) and not torch.allclose(logits(twin), expected)
    restore(model)
    assert is_optimized(twin)
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(loaded), logits(twin)) and not report.fallbacks


def test_save_pretrained_unchanged(model, tmp_path):
    model.save_pretrained(tmp_path / "before")
    optimize(model, profile())
    model.save_pretrained(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(model, reentrant):
    model.train()
    ids = make_ids()

    def gradient():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return block_of(model).experts.gate_up_proj.grad.clone()

    expected = gradient()
    report = optimize(model, profile())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradient(), expected, rtol=1e-3, atol=1e-6)
    counts = patch_of(block_of(model).experts).load_counter.snapshot()
    assert counts.sum() == ids.numel() * 2 and not report.fallbacks  # 反向里的重算不计


def test_counts_follow_the_routing(model):
    optimize(model, profile())
    seen = []
    block_of(model).gate.register_forward_hook(lambda _m, _i, out: seen.append(out[2]))
    logits(model)
    expected = torch.bincount(seen[0].flatten(), minlength=4)
    assert torch.equal(patch_of(block_of(model).experts).load_counter.snapshot(), expected)


def test_hooks_added_later_still_fire(model):
    expected = logits(model)
    report = optimize(model, profile())
    seen = []
    handle = block_of(model).experts.register_forward_hook(lambda *_: seen.append("experts"))
    torch.testing.assert_close(logits(model), expected, **tol(torch.float32))
    handle.remove()
    block_of(model).shared_experts.register_forward_hook(lambda *_: seen.append("shared"))
    torch.testing.assert_close(logits(model), expected, **tol(torch.float32))
    assert seen == ["experts", "shared"] and sum(report.fallbacks.values()) == 2


def test_filter_fn(model):
    report = optimize(model, profile(), filter_fn=lambda name, _: name.endswith("experts"))
    assert [type(patch_of(m)) for m in experts_in(model).values()] == [ExpertsPatch]
    assert patch_of(block_of(model)) is None
    assert any("filter_fn" in e.reason for e in report.skipped)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_low_precision(model_type, dtype):
    model = make_moe(model_type, dtype)
    expected = logits(model).float()
    report = optimize(model, profile(), strict=True)
    limit = {torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    assert (logits(model).float() - expected).abs().max() <= limit * expected.abs().max()
    assert not report.fallbacks


def test_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = logits(model)
        report = optimize(model, profile())
        actual = logits(model)
    assert actual.dtype == expected.dtype and not report.fallbacks
    assert (actual - expected).abs().max() <= 0.1 * expected.abs().max()


def test_own_class_sentinel_empty_and_strided_inputs():
    layer = nn.ModuleList([own()])
    x, index, weight = routing()
    index[1, 0] = 3  # 哨兵
    wide = torch.randn(5, 16)[:, ::2]
    cases = [(x, index, weight), (wide, index, weight), routing(0)]
    cases += [(x, index.T.contiguous().T, weight.T.contiguous().T), (x, index.int(), weight)]
    with torch.no_grad():
        expected = [layer[0](*case) for case in cases]
        report = optimize(layer, profile(), strict=True)
        for case, want in zip(cases, expected, strict=True):
            torch.testing.assert_close(layer[0](*case), want, **tol(torch.float32))
        assert not report.fallbacks
        layer[0](hidden_states=x, top_k_index=index, top_k_weights=weight)
    assert not report.fallbacks


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.__dict__.update(_is_expert_parallel=True), "专家并行"),
        (lambda m: setattr(m, "act_fn", nn.GELU()), "激活函数"),
        (lambda m: m.double(), "float64"),
    ],
)
def test_changes_after_optimize_fall_back(change, reason):
    layer = nn.ModuleList([own()])
    case = routing()
    report = optimize(layer, profile())
    change(layer[0])
    case = tuple(t.to(layer[0].down_proj.dtype) if t.is_floating_point() else t for t in case)
    with torch.no_grad():
        actual = layer[0](*case)
        assert any(reason in r for _, r in report.fallbacks)
        restore(layer)
        assert torch.equal(actual, layer[0](*case))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: own(scale=2.0), "计算不同"),
        (lambda: own(act=nn.Tanh()), "激活不是"),
        (lambda: own().double(), "float64"),
        (lambda: own().to("meta"), "meta"),
    ],
)
def test_refused_from_the_start(make, reason):
    layer = nn.ModuleList([make()])
    report = optimize(layer, profile())
    assert not report.replaced and reason in report.skipped[0].reason
    restore(layer)
    with pytest.raises(UnsupportedError, match=reason):
        optimize(layer, profile(), strict=True)


def test_class_defined_in_main(monkeypatch):
    class Odd(OwnExperts):
        """改写了 forward 的子类：行为未知。"""

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return super().forward(hidden_states, top_k_index, top_k_weights) + 1

    monkeypatch.setattr(OwnExperts, "__module__", "__main__")
    config = own().config
    layers = nn.ModuleList([own(), Odd(config)])
    report = optimize(layers, profile())
    assert [e.name for e in report.replaced] == ["0"] and "改写" in report.skipped[0].reason


def test_torch_compile():
    model = make_moe("qwen2_moe")
    expected = logits(model)
    optimize(model, profile(), strict=True)
    torch.compiler.reset()
    try:
        compiled = torch.compile(block_of(model), backend="aot_eager")
        x = torch.randn(1, 6, 32)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), block_of(model)(x), **tol(torch.float32))
    finally:
        torch.compiler.reset()
    torch.testing.assert_close(logits(model), expected, **tol(torch.float32))
