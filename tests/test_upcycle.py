"""稠密 FFN 升级为 MoE：输出不变，能接着训练，能还原，坏输入不改动模型。"""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import deepseek_opt
from deepseek_opt import MOEConfig, MoEFeedForward, restore_ffn, upcycle_ffn, upcycle_model
from deepseek_opt.errors import DeepSeekOptError, InputError, UnsupportedError

ASSETS = Path(deepseek_opt.__file__).parent / "assets" / "stdlib_model"
EXACT = {"rtol": 1e-5, "atol": 1e-5}
ACTS = {"silu": nn.SiLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU()}


class FFN(nn.Module):
    def __init__(
        self, hidden=16, inner=24, act="silu", names=("gate_proj", "up_proj", "down_proj")
    ):
        super().__init__()
        for name, out in zip(names, (inner, inner, hidden), strict=True):
            width = hidden if out == inner else inner
            setattr(self, name, nn.Linear(width, out, bias=False))
        self.names, self.act_fn = names, ACTS[act]

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act_fn(gate(x)) * up(x))


def config(**fields):
    return MOEConfig(**{"num_experts": 8, "num_experts_per_tok": 2, **fields})


def tokens(*shape, width=16):
    return torch.randn(*shape, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


WAYS = [
    ("duplicate", None, {}),
    ("duplicate", None, {"scoring_func": "sigmoid", "n_group": 4, "topk_group": 2}),
    ("duplicate", None, {"normalize_before_topk": False}),
    ("duplicate", None, {"num_shared_experts": 1, "shared_expert_gate": True}),
    ("split", None, {}),
    ("split", 2, {"num_experts_per_tok": 4}),
    ("split", 4, {"num_experts_per_tok": 4, "scoring_func": "sigmoid"}),
    ("split", 1, {"scoring_func": "sqrtsoftplus"}),
    ("split", 8, {"num_experts_per_tok": 8, "num_shared_experts": 1}),
    ("split", None, {"normalize_before_topk": False}),
]


@pytest.mark.parametrize(("method", "parts", "fields"), WAYS)
def test_output_is_unchanged(method, parts, fields):
    ffn, x = FFN(), tokens(3, 20)
    layer = upcycle_ffn(ffn, config(**fields), method=method, parts=parts)
    torch.testing.assert_close(layer(x), ffn(x), **EXACT)
    count = layer.intermediate_size * (parts or (2 if method == "split" else 1))
    assert count == 24 and layer.training


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_is_recognised(act, dtype):
    ffn = FFN(act=act).to(dtype).eval()
    layer = upcycle_ffn(ffn, config(), method="split")
    assert layer.activation == act and not layer.training
    assert {p.dtype for p in layer.parameters()} == {dtype}
    close = EXACT if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(layer(tokens(9).to(dtype)), ffn(tokens(9).to(dtype)), **close)


def test_other_attribute_names():
    ffn = FFN(names=("w1", "w3", "w2"))
    layer = upcycle_ffn(ffn, config(), names=("w1", "w3", "w2"))
    torch.testing.assert_close(layer(tokens(4)), ffn(tokens(4)), **EXACT)
    with pytest.raises(UnsupportedError, match="gate_proj"):
        upcycle_ffn(ffn, config())


def test_split_selects_whole_copies():
    layer = upcycle_ffn(FFN(), config(num_experts=12, num_experts_per_tok=3), method="split")
    chosen = layer.router(tokens(50)).indices.sort(-1)[0]
    assert (chosen[:, :1] % 3 == 0).all() and (chosen - chosen[:, :1]).eq(torch.arange(3)).all()
    assert chosen[:, 0].unique().numel() > 1  # 不同的词元去不同的副本


def grads(layer, x, target):
    layer.zero_grad()
    F.mse_loss(layer(x), target).backward()
    per_expert = layer.gate_up_proj.grad.flatten(1)
    distinct = len({tuple(row.tolist()) for row in per_expert})
    return distinct, float(layer.router.weight.grad.abs().max())


@pytest.mark.parametrize("method", ["duplicate", "split"])
def test_training_goes_on_and_experts_part(method):
    layer, x = upcycle_ffn(FFN(), config(), method=method), tokens(64)
    target = torch.sin(3 * x)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    distinct, router = grads(layer, x, target)
    assert distinct > 2
    # 副本完全相同时选谁都一样，路由没有梯度；切开的各份不同，从第一步就有。
    assert router < 1e-7 if method == "duplicate" else router > 1e-6
    before = F.mse_loss(layer(x), target).item()
    for _ in range(30):
        optimizer.step()
        distinct, router = grads(layer, x, target)
    assert distinct == 8 and router > 1e-6
    assert F.mse_loss(layer(x), target).item() < 0.95 * before


def test_aux_loss_moves_the_router_at_once():
    layer = upcycle_ffn(FFN(), config(balance_strategy="global_aux_loss"))
    layer(tokens(32))
    layer.aux_loss.backward()
    assert layer.router.weight.grad.abs().max() > 0


# ---- 整个模型 ----


def llama():
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(settings).eval()


@pytest.mark.parametrize("method", ["duplicate", "split"])
def test_llama(method):
    model = llama()
    ids = torch.randint(0, 64, (2, 9))
    want, weights = model(ids).logits, copy.deepcopy(model.state_dict())
    report = upcycle_model(model, config(), method=method)
    assert [entry.name for entry in report.replaced] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    torch.testing.assert_close(model(ids).logits, want, **EXACT)
    assert "已升级" in str(report) and report[0].parameters_after > report[0].parameters_before
    model.train()(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.model.layers[0].mlp.parameters())
    with pytest.raises(DeepSeekOptError, match="已经升级过"):
        upcycle_model(model, config())
    assert restore_ffn(model) == 2
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert model.model.layers[0].mlp.training and not hasattr(model, "_deepseek_opt_upcycled_ffn")
    with pytest.raises(DeepSeekOptError, match="没有升级过"):
        restore_ffn(model)


@pytest.mark.parametrize("method", ["duplicate", "split"])
@torch.no_grad()
def test_shipped_model(method):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32).eval()
    ids = torch.randint(2, 4096, (1, 40))
    dense, seen = model.model.layers[0].mlp, []
    handle = dense.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    want = model(ids, use_cache=False).logits
    handle.remove()
    report = upcycle_model(model, config(num_experts=4), method=method)
    assert [entry.name for entry in report.replaced] == ["model.layers.0.mlp"]
    assert {entry.reason for entry in report.skipped} == {"是 MoE 的一部分"}  # 共享专家不动
    assert len(seen) == 1
    x, out = seen[0]
    got, precise = model.model.layers[0].mlp(x), copy.deepcopy(dense).double()(x.double())
    # 这一层的输出可达几十：误差相对于它的大小，而且不比原来的舍入误差大
    assert (got - out).abs().max() <= 1e-5 * out.abs().max()
    assert (got - precise).abs().max() <= 1.5 * (out - precise).abs().max()
    torch.testing.assert_close(model(ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)


def test_shared_config_and_filter_and_shared_modules():
    ffn = FFN()
    model = nn.ModuleDict({"a": ffn, "b": FFN(), "c": ffn})
    report = upcycle_model(model, config(), lambda name, _: name != "b")
    assert model["a"] is model["c"] and isinstance(model["a"], MoEFeedForward)
    assert isinstance(model["b"], FFN) and report.skipped[0].reason == "filter_fn 排除"
    assert model["a"].config is report.config
    assert restore_ffn(model) == 2 and model["a"] is model["c"] is ffn


# ---- 不能升级的 ----


@pytest.mark.parametrize(
    ("fields", "method", "parts", "message"),
    [
        ({"norm_topk_prob": False}, "duplicate", None, "norm_topk_prob 应为 True"),
        ({"routed_scaling_factor": 2.5}, "split", None, "routed_scaling_factor 应为 2.0"),
        ({"capacity_factor": 1.0}, "duplicate", None, "capacity_factor"),
        ({"routing_strategy": "expert_choice"}, "duplicate", None, "expert_choice"),
        ({"balance_strategy": "forced"}, "split", None, "forced"),
        ({"n_group": 4}, "split", None, "n_group"),
        ({}, "split", 3, "parts：应为整除"),
        ({}, "split", 0, "parts：应为整除"),
        ({}, "duplicate", 2, "parts：应为 None"),
        ({}, "carve", None, "method：应为"),
        ({"num_experts": None}, "duplicate", None, "num_experts"),
    ],
)
def test_inexact_requests_are_refused(fields, method, parts, message):
    model = nn.Sequential(FFN())
    with pytest.raises(InputError, match=message):
        upcycle_model(model, config(**fields), method=method, parts=parts)
    assert isinstance(model[0], FFN)


def with_bias():
    ffn = FFN()
    ffn.add_module("up_proj", nn.Linear(16, 24))
    return ffn


def with_tanh():
    ffn = FFN()
    ffn.act_fn = nn.Tanh()
    return ffn


def with_forward():
    ffn = FFN()
    ffn.forward = lambda x: x
    return ffn


def with_dropout():
    ffn = FFN()
    ffn.add_module("drop", nn.Dropout(0.1))
    return ffn


class Residual(FFN):
    def forward(self, x):
        return x + super().forward(x)


@pytest.mark.parametrize(
    ("ffn", "message"),
    [
        (with_bias, "up_proj 带偏置"),
        (with_tanh, "计算的不是"),
        (Residual, "计算的不是"),
        (with_forward, "forward 已被替换"),
        (with_dropout, "dropout"),
        (lambda: FFN(inner=21), "中间宽 21 不能切成 2 份"),
        (lambda: FFN().to("meta"), "无法核对"),
        (lambda: nn.Linear(4, 4), "gate_proj"),
    ],
)
def test_other_modules_are_refused_with_the_reason(ffn, message):
    with pytest.raises(UnsupportedError, match=message):
        upcycle_ffn(ffn(), config(), method="split")


def test_model_without_candidates_says_why():
    model = nn.Sequential(with_bias(), nn.Linear(2, 2))
    with pytest.raises(DeepSeekOptError, match="没有可以升级(.|\n)*up_proj 带偏置"):
        upcycle_model(model, config())
    assert type(model[0]) is FFN
    with pytest.raises(InputError, match="model"):
        upcycle_model(None, config())
    with pytest.raises(InputError, match="config"):
        upcycle_model(model, {"num_experts": 4})
