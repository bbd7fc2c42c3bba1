"""自己写的 MoE：对不上的不替换，替换之后变了的回退，都说明原因。"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek_opt import MoeAdapter, optimize, register_moe, restore
from deepseek_opt.errors import UnsupportedError
from deepseek_opt.integrations import moe_adapter
from tests.own_moe_cases import (
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


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    """每个测试的登记互不影响。"""
    monkeypatch.setattr(moe_adapter, "ADAPTERS", {})
    torch.manual_seed(0)


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
