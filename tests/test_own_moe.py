"""自己写的 MoE（门 + nn.ModuleList 的专家）：登记之后替换，与自己的 forward 对照；没有登记的、登记错的说明。"""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek_opt import (
    DenseConfig,
    MOEConfig,
    MoeAdapter,
    OptimizationProfile,
    expert_statistics,
    optimize,
    register_moe,
    restore,
    update_expert_bias,
)
from deepseek_opt.errors import ConfigError, InputError, UnsupportedError
from deepseek_opt.integrations import moe_adapter
from deepseek_opt.integrations.own_moe import OwnMoePatch
from deepseek_opt.integrations.patch import patch_of
from tests.own_moe_cases import (
    EXPERTS,
    INNER,
    NAMES,
    PROFILE,
    Expert,
    H,
    Model,
    OwnMoe,
    ReturnsLogits,
    assert_same,
    prepared,
    reason_of,
    results,
)
from tests.tolerances import tol


class FusedExpert(nn.Module):
    """gate 与 up 在一个 nn.Linear 里，每个专家的宽度不同。"""

    def __init__(self, width=INNER):
        super().__init__()
        self.w12, self.w3 = nn.Linear(H, 2 * width), nn.Linear(width, H)

    def forward(self, x):
        gate, up = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * up)


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """每个测试的登记互不影响。"""
    monkeypatch.setattr(moe_adapter, "ADAPTERS", {})
    torch.manual_seed(0)


class ScaledSigmoid(OwnMoe):
    """DeepSeek-V3 的路由：sigmoid、只影响选择的偏置、分组、系数。"""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.linspace(-0.1, 0.1, EXPERTS))
        self.factor = 2.5

    def route(self, x):
        logits = F.linear(x.float(), self.gate.weight.float())
        scores = logits.sigmoid()
        choice = (scores + self.bias).unflatten(-1, (3, 2))
        groups = choice.sum(-1).topk(2).indices
        mask = torch.zeros(len(x), 3).scatter(1, groups, 1.0).bool()
        index = choice.masked_fill(~mask[..., None], -torch.inf).flatten(1).topk(2).indices
        weights = scores.gather(1, index)
        return logits, weights / weights.sum(-1, keepdim=True) * self.factor, index


class SoftmaxAfter(OwnMoe):
    def route(self, x):
        logits = self.gate(x)
        best, index = logits.topk(2)
        return logits, best.softmax(-1), index


def plain_expert():
    return nn.Sequential(nn.Linear(H, INNER), nn.GELU(), nn.Linear(INNER, H))


def ragged():
    widths = iter((5, 40, 24, 24, 1, 24))
    return lambda: FusedExpert(next(widths))


FORMS = {
    "mixtral": (OwnMoe, {}),
    "带偏置": (lambda: OwnMoe(lambda: Expert(bias=True)), {}),
    "上下相接、宽度各异": (
        lambda: OwnMoe(ragged()),
        {"gate_proj": "w12", "up_proj": None, "down_proj": "w3", "fused": True},
    ),
    "没有门": (
        lambda: OwnMoe(plain_expert),
        {"gate_proj": "0", "up_proj": None, "down_proj": "2", "activation": "gelu"},
    ),
    "relu": (lambda: OwnMoe(lambda: Expert(F.relu)), {"activation": "relu"}),
    "共享专家": (lambda: OwnMoe(shared=Expert()), {"shared": "shared"}),
    "另一种共享专家": (lambda: OwnMoe(shared=nn.Linear(H, H)), {"shared": "shared"}),
    "一个专家": (lambda: OwnMoe(top_k=1), {"top_k": 1}),
    "先选再 softmax": (SoftmaxAfter, {"softmax_after": True, "normalize": False}),
    "deepseek": (
        ScaledSigmoid,
        {"score": "sigmoid", "gate_fp32": True, "choice_bias": "bias", "scaling": "factor"}
        | {"n_group": 3, "topk_group": 2},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_matches_its_own_forward(form):
    block, fields = FORMS[form]
    model = prepared(block, **fields)
    expected, before = results(model), [dict(m.__dict__) for m in model.modules()]
    report = optimize(model, PROFILE, strict=True)
    assert [e.name for e in report.replaced] == ["layers.0", "layers.1"]
    assert_same(results(model), expected)
    assert not report.fallbacks
    counts = expert_statistics(model)["layers.0"].tokens_per_expert
    assert sum(counts) == 14 * model.layers[0].top_k
    restore(model)
    assert [dict(m.__dict__) for m in model.modules()] == before
    assert torch.equal(results(model)[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = prepared().to(dtype)
    expected = results(model, dtype)
    report = optimize(model, PROFILE, strict=True)
    actual = results(model, dtype)
    assert actual[0].dtype == dtype and not report.fallbacks
    assert (actual[0] - expected[0]).abs().max() <= 0.1 * expected[0].abs().max()


def test_autocast_and_compile():
    model = prepared(lambda: OwnMoe(shared=Expert()), shared="shared")
    x = torch.randn(3, 5, H)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        expected = model(x)
        optimize(model, PROFILE, strict=True)
        assert (model(x) - expected).abs().max() <= 0.1 * expected.abs().max()
        assert model(x).dtype == expected.dtype
    torch.compiler.reset()
    compiled = torch.compile(model.layers[0], backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model.layers[0](x), **tol(torch.float32))


def test_shared_gate_and_logits():
    class Gated(ReturnsLogits):
        def __init__(self):
            super().__init__(shared=Expert())
            self.coefficient = nn.Linear(H, 1)

        def forward(self, hidden):
            shared, self.__dict__["shared"] = self.shared, None
            out, logits = OwnMoe.forward(self, hidden)
            del self.__dict__["shared"]
            return out + self.coefficient(hidden).sigmoid() * shared(hidden), logits

    block = nn.ModuleList([Gated()])
    fields = {"shared": "shared", "shared_gate": "coefficient", "returns_logits": True}
    register_moe(MoeAdapter(cls=Gated, **NAMES, **fields))
    x = torch.randn(2, 5, H)
    expected = block[0](x)
    optimize(block, PROFILE, strict=True)
    for a, b in zip(block[0](x), expected, strict=True):
        torch.testing.assert_close(a, b, **tol(torch.float32))


def test_expert_bias_is_updated():
    model = prepared(FORMS["deepseek"][0], **FORMS["deepseek"][1])
    optimize(model, PROFILE, strict=True)
    results(model)
    before = model.layers[0].bias.clone()
    assert update_expert_bias(model, 0.5) == 2
    assert (model.layers[0].bias - before).abs().max() == 0.5


def test_config_is_checked_and_fields_without_effect_are_reported():
    model = prepared()
    with pytest.raises(ConfigError, match="num_experts"):
        optimize(model, OptimizationProfile(moe=MOEConfig(num_experts=EXPERTS + 1)))
    assert patch_of(model.layers[0]) is None
    known = MOEConfig(num_experts=EXPERTS, num_experts_per_tok=2, scoring_func="softmax")
    optimize(model, OptimizationProfile(moe=known), strict=True)
    restore(model)
    report = optimize(model, OptimizationProfile(moe=MOEConfig(balance_strategy="bias_update")))
    assert [entry.kind for entry in report.unmet] == ["balance_strategy"]


def test_deepcopy_and_pickle():
    model = prepared()
    optimize(model, PROFILE)
    expected = results(model)[0]
    twin = copy.deepcopy(model)
    assert patch_of(twin.layers[0]).module is twin.layers[0]
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    restore(model)
    assert torch.equal(results(loaded)[0], expected) and torch.equal(results(twin)[0], expected)


def test_dense_part_leaves_the_experts_alone():
    model = prepared()
    optimize(model, OptimizationProfile(moe=MOEConfig(), dense=DenseConfig(projections=True)))
    assert isinstance(patch_of(model.layers[0]), OwnMoePatch)
    assert all(patch_of(m) is None for m in model.layers[0].experts.modules())


# ---- 没有登记 ----


def test_unregistered_is_not_silent():
    reason = reason_of(Model(OwnMoe))
    assert "像是 MoE（门 gate，6 个专家 experts：Expert，其中的 nn.Linear 有 w1、w3、w2）" in reason
    assert "register_moe(MoeAdapter(cls=OwnMoe, gate_proj=…" in reason
    with pytest.raises(UnsupportedError, match="register_moe"):
        optimize(Model(OwnMoe), PROFILE, strict=True)


def test_advice_names_the_attributes():
    block = OwnMoe()
    for old, new in (("gate", "router"), ("experts", "ffns")):
        block.add_module(new, getattr(block, old))
        delattr(block, old)
    assert 'cls=OwnMoe, gate="router", experts="ffns"' in moe_adapter.describe_unregistered(block)


def test_other_lists_are_not_mistaken_for_experts():
    layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3)])
    for other in (
        nn.ModuleDict({"layers": layers, "head": nn.Linear(4, 5)}),  # 门的宽度对不上
        nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)] * 3), "gate": nn.Linear(4, 3)}),
        nn.ModuleDict({"experts": nn.ModuleList(), "gate": nn.Linear(4, 1)}),
    ):
        assert moe_adapter.describe_unregistered(other) is None


def test_class_typed_into_a_notebook(monkeypatch):
    """``__main__`` 里的类：重新执行单元格得到新的类对象，路径相同，登记仍然有效。"""
    monkeypatch.setattr(OwnMoe, "__module__", "__main__")
    assert "register_moe" in reason_of(Model(OwnMoe))
    model = prepared()
    again = type("OwnMoe", (OwnMoe,), {"__module__": "__main__", "forward": OwnMoe.forward})
    assert optimize(model, PROFILE).replaced
    assert optimize(Model(again), PROFILE).replaced


def test_filter_fn():
    model = prepared()
    report = optimize(model, PROFILE, filter_fn=lambda name, _: name != "layers.0")
    assert [entry.name for entry in report.replaced] == ["layers.1"]
    assert "filter_fn" in report.skipped[0].reason


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: None, "adapter：应为给出 path 或 cls 的 MoeAdapter"),
        (MoeAdapter, "adapter：应为给出 path 或 cls"),
        (lambda: MoeAdapter(cls=OwnMoe, activation="swish"), "adapter.activation"),
        (lambda: MoeAdapter(cls=OwnMoe, score="tanh"), "adapter.score"),
        (lambda: MoeAdapter(cls=OwnMoe, group_score="mean"), "adapter.group_score"),
        (lambda: MoeAdapter(cls=OwnMoe, fused=True), "adapter.up_proj：应为 None"),
        (
            lambda: MoeAdapter(cls=OwnMoe, up_proj=None, activation="clipped"),
            "adapter.activation：应为不截断的",
        ),
    ],
)
def test_bad_adapters(make, message):
    with pytest.raises(InputError, match=message):
        register_moe(make())
    assert not moe_adapter.ADAPTERS
