"""自己写的 MoE（门 + nn.ModuleList 的专家）：登记之后替换，与自己的 forward 对照；对不上的如实说明。"""

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
from tests.tolerances import tol

H, INNER, EXPERTS = 16, 24, 6
PROFILE = OptimizationProfile(moe=MOEConfig())
NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class Expert(nn.Module):
    """Mixtral 的写法。"""

    def __init__(self, act=F.silu, bias=False):
        super().__init__()
        self.w1, self.w3 = nn.Linear(H, INNER, bias=bias), nn.Linear(H, INNER, bias=bias)
        self.w2, self.act = nn.Linear(INNER, H, bias=bias), act

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class FusedExpert(nn.Module):
    """gate 与 up 在一个 nn.Linear 里，每个专家的宽度不同。"""

    def __init__(self, width=INNER):
        super().__init__()
        self.w12, self.w3 = nn.Linear(H, 2 * width), nn.Linear(width, H)

    def forward(self, x):
        gate, up = self.w12(x).chunk(2, -1)
        return self.w3(F.silu(gate) * up)


class OwnMoe(nn.Module):
    """逐个专家循环；各种写法由参数给出。"""

    def __init__(self, make=Expert, top_k=2, shared=None, **options):
        super().__init__()
        self.gate = nn.Linear(H, EXPERTS, bias=False)
        self.experts = nn.ModuleList([make() for _ in range(EXPERTS)])
        self.shared = shared
        self.top_k, self.options = top_k, options

    def route(self, x):
        scores = self.gate(x).float().softmax(-1)
        weights, index = scores.topk(self.top_k)
        return self.gate(x), weights / weights.sum(-1, keepdim=True), index

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        logits, weights, index = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, place = torch.where(index == e)
            out.index_add_(0, token, (expert(x[token]) * weights[token, place, None]).to(x.dtype))
        if self.shared is not None:
            out = out + self.shared(x)
        return self.finish(out.view(hidden.shape), logits)

    def finish(self, out, _logits):
        return out


class Model(nn.Module):
    """归一化加 MoE，两层。"""

    def __init__(self, make):
        super().__init__()
        self.layers = nn.ModuleList([make() for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(F.rms_norm(x, (H,)))
        return x


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """每个测试的登记互不影响。"""
    monkeypatch.setattr(moe_adapter, "ADAPTERS", {})
    torch.manual_seed(0)


def prepared(block=OwnMoe, **fields):
    """登记 block 的类并建好模型。"""
    model = Model(block)
    register_moe(MoeAdapter(cls=type(model.layers[0]), **{**NAMES, **fields}))
    return model


def results(model, dtype=torch.float32):
    model.zero_grad()
    x = torch.randn(2, 7, H, generator=torch.Generator().manual_seed(1)).to(dtype)
    x.requires_grad_()
    out = model(x)
    out.square().sum().backward()
    grads = [x.grad, *(p.grad.clone() for p in model.parameters())]
    return out.detach(), grads


def assert_same(actual, expected, dtype=torch.float32):
    for a, b in zip([actual[0], *actual[1]], [expected[0], *expected[1]], strict=True):
        size = b.abs().max().float().clamp(min=1.0)
        torch.testing.assert_close(a.float() / size, b.float() / size, **tol(dtype))


def reason_of(model):
    """没有替换的那一层的原因。"""
    report = optimize(model, PROFILE)
    (entry, *_) = report.skipped
    assert entry.part == "moe" and entry.required and not report.replaced
    restore(model)
    return entry.reason


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


class ReturnsLogits(OwnMoe):
    def forward(self, hidden):
        return super().forward(hidden)[0]

    def finish(self, out, logits):
        return (out, logits)


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


# ---- 不替换的，以及运行中变了的 ----


class Half(OwnMoe):
    def finish(self, out, _logits):
        return out * 0.5


class Remembers(OwnMoe):
    """记下辅助损失；train_only 时只在训练模式。"""

    train_only = False
    aux = None

    def finish(self, out, logits):
        if self.training or not self.train_only:
            self.aux = logits.logsumexp(-1).mean()
        return out


class Counts(OwnMoe):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def finish(self, out, logits):
        self.seen.add_(len(logits))
        return out


class Swaps(Counts):
    def finish(self, out, logits):
        self.register_buffer("seen", self.seen + len(logits))
        return out


class Wraps(OwnMoe):
    """子类改写了 forward。"""

    def forward(self, hidden):
        return super().forward(hidden) + 1


class Lora(nn.Linear):
    """任何不是 nn.Linear 本身的投影（LoRA、量化）。"""


def with_expert(change):
    def make():
        block = OwnMoe()
        change(block.experts[1])
        return block

    return make


def zero_gate():
    block = OwnMoe()
    nn.init.zeros_(block.gate.weight)
    return block


REFUSED = {
    "多乘了系数": (Half, {}, "输出对不上"),
    "激活不同": (lambda: OwnMoe(lambda: Expert(F.gelu)), {}, "输出对不上"),
    "没有归一化": (OwnMoe, {"normalize": False}, "输出对不上"),
    "记下辅助损失": (Remembers, {}, "forward 会改动 aux"),
    "计数的缓冲区": (Counts, {}, "forward 会改动 seen"),
    "换掉缓冲区": (Swaps, {}, "forward 会改动 seen"),
    "返回元组": (ReturnsLogits, {"returns_logits": True}, "不是 (输出, logits)"),
    "没有这个属性": (OwnMoe, {"top_k": "num_active"}, "没有登记里写的属性.*num_active"),
    "没有共享专家": (OwnMoe, {"shared_gate": "coefficient"}, "coefficient"),
    "不是列表": (OwnMoe, {"experts": "gate"}, "gate 不是非空的 nn.ModuleList"),
    "没有 w4": (OwnMoe, {"down_proj": "w4"}, "没有登记里写的属性.*w4"),
    "top_k 太大": (OwnMoe, {"top_k": 7}, "top_k"),
    "门全是 0": (zero_gate, {}, "近乎相同的得分"),
    "LoRA": (
        with_expert(lambda e: setattr(e, "w2", Lora(INNER, H))),
        {},
        "专家 1 的 w2 是 Lora 或带有钩子，不是普通 nn.Linear",
    ),
    "钩子": (
        with_expert(lambda e: e.register_forward_hook(lambda *_: None)),
        {},
        "专家 1 上有钩子",
    ),
    "类型不一": (with_expert(lambda e: e.w1.double()), {}, "专家 1 的 w1"),
    "偏置不一": (
        with_expert(lambda e: setattr(e, "w1", nn.Linear(H, INNER))),
        {},
        "w1 有的专家带偏置，有的不带",
    ),
    "meta": (lambda: OwnMoe().to("meta"), {}, "meta"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    block, fields, message = REFUSED[case]
    model = prepared(block, **fields)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match=message.replace("(", r"\(").replace(")", r"\)")):
        optimize(model, PROFILE, strict=True)
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert all(v.is_meta or torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert getattr(model.layers[0], "aux", None) is None


def test_subclass_with_its_own_forward():
    register_moe(MoeAdapter(cls=OwnMoe, **NAMES))
    model = Model(Wraps)
    assert "改写了父类的 forward" in reason_of(model)
    register_moe(MoeAdapter(cls=Wraps, **NAMES))
    assert "输出对不上" in reason_of(model)


def test_training_only_effects_use_the_original_while_training(monkeypatch):
    monkeypatch.setattr(Remembers, "train_only", True)
    model = prepared(Remembers)
    report = optimize(model, PROFILE)
    assert all("训练模式：forward 会改动 aux" in entry.reason for entry in report.replaced)
    results(model.train())
    assert model.layers[0].aux.requires_grad
    assert sum(report.fallbacks.values()) == 2
    expected = results(model.eval())
    assert sum(report.fallbacks.values()) == 2  # eval 时由本库计算
    restore(model)
    assert_same(results(model), expected)


def test_dropout_is_noticed():
    class Dropped(OwnMoe):
        def finish(self, out, _logits):
            return F.dropout(out, 0.5, self.training)

    state = torch.get_rng_state()
    model = prepared(Dropped)
    state = torch.get_rng_state()
    report = optimize(model, PROFILE)
    assert torch.equal(torch.get_rng_state(), state)  # 核对不消耗随机数
    assert "训练模式：forward 与登记的写法不同" in report.replaced[0].reason


CHANGES = {
    "钩子": (lambda b: b.experts[0].register_forward_hook(lambda *_: None), "专家 0 上有钩子"),
    "投影的钩子": (lambda b: b.experts[0].w1.register_forward_hook(lambda *_: None), "w1 是"),
    "换成 LoRA": (lambda b: setattr(b.experts[2], "w2", Lora(INNER, H)), "专家 2 的 w2 是 Lora"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changes_after_optimize_fall_back(case):
    change, message = CHANGES[case]
    model = prepared()
    report = optimize(model, PROFILE)
    change(model.layers[0])
    out = results(model)[0]
    ((name, reason),) = report.fallbacks
    assert name == "layers.0" and message in reason
    restore(model)
    torch.testing.assert_close(results(model)[0], out, **tol(torch.float32))


def test_other_calls_go_to_the_original():
    model = prepared()
    report = optimize(model, PROFILE)
    x = torch.randn(2, H)
    expected = model.layers[0](x)
    torch.testing.assert_close(model.layers[0](hidden=x), expected, **tol(torch.float32))
    assert report.fallbacks["layers.0", "调用方式不是 forward(hidden)"] == 1
    model.double()
    model.layers[0](x.double())
    assert any("float64" in reason for _, reason in report.fallbacks)


def test_hooks_on_the_gate_still_fire():
    model, seen = prepared(), []
    model.layers[0].gate.register_forward_hook(lambda *_: seen.append(1))
    report = optimize(model, PROFILE, strict=True)
    seen.clear()
    results(model)
    assert seen == [1] and not report.fallbacks


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
