"""反向直接累加到 .grad：与通常的累加结果相同，不安全时照常。"""

import pytest
import torch
from torch import nn

import deepseek_opt as dso
from deepseek_opt import ops
from deepseek_opt.op_rules import moe as rules
from tests.tolerances import tol

_CONFIG = {"num_experts": 5, "num_experts_per_tok": 2, "num_shared_experts": 1}


def _layer(dtype=torch.float32):
    torch.manual_seed(0)
    return dso.MoEFeedForward(dso.MOEConfig(**_CONFIG), 24, 40).to(dtype)


def _grads(layer):
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def _train(layer, steps=3):
    for seed in range(steps):
        torch.manual_seed(seed)
        x = torch.randn(7, 24).to(next(layer.parameters()).dtype)
        (layer(x) * torch.randn(7, 24)).sum().backward()


def _same(actual, wanted, dtype=torch.float32):
    for name, want in wanted.items():
        torch.testing.assert_close(actual[name], want, **tol(dtype))


@pytest.fixture(name="calls")
def _calls(monkeypatch):
    """每次反向有没有直接累加。"""
    found = []
    real = rules.accumulation_targets

    def recorded(*weights):
        targets = real(*weights)
        found.append(targets is not None)
        return targets

    monkeypatch.setattr(rules, "accumulation_targets", recorded)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_as_ordinary_accumulation(dtype, calls):
    plain, direct = _layer(dtype), _layer(dtype)
    dso.accumulate_into_grad(direct)
    _train(plain)
    assert not any(calls)
    _train(direct, 1)
    address = direct.gate_up_proj.grad.data_ptr()
    direct.zero_grad(set_to_none=False)
    _train(direct)
    assert calls[-4:] == [False, True, True, True]
    assert direct.gate_up_proj.grad.data_ptr() == address
    _same(_grads(direct), _grads(plain), dtype)


@pytest.mark.parametrize("transposed", [False, True])
def test_layouts_biases_and_empty_experts(transposed, calls):
    torch.manual_seed(0)
    shapes = ((4, 9, 14), (4, 7, 9)) if transposed else ((4, 14, 9), (4, 9, 7))
    up, down = (nn.Parameter(torch.randn(shape)) for shape in shapes)
    biases = [nn.Parameter(torch.randn(4, n)) for n in (14, 9)]
    x, indices, weights = torch.randn(6, 9), torch.tensor([[0, 2]] * 6), torch.rand(6, 2)
    owner = nn.ParameterList([up, down, *biases])
    start = [torch.randn_like(p) for p in owner]
    found = []
    for enabled in (False, True):
        dso.accumulate_into_grad(owner, enabled)
        for p, old in zip(owner, start, strict=True):
            p.grad = old.clone()
        experts = (up, biases[0], down, biases[1])
        y = ops.moe_experts(x, indices, weights, *experts, transposed=transposed)
        y.square().sum().backward()
        found.append({str(i): p.grad for i, p in enumerate(owner)})
    assert calls == [False, True]
    _same(found[1], found[0])
    assert torch.equal(found[1]["0"][1], start[0][1]), "没有词元的专家，梯度不变"


def _hooked(layer):
    layer.gate_up_proj.register_hook(lambda grad: grad)


def _post_hooked(layer):
    layer.down_proj.register_post_accumulate_grad_hook(lambda p: None)


def _without_grad(layer):
    layer.gate_up_proj.grad = None


def _strided(layer):
    grad = layer.gate_up_proj.grad
    layer.gate_up_proj.grad = grad.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("spoil", [_hooked, _post_hooked, _without_grad, _strided])
def test_unsafe_cases_take_the_ordinary_path(spoil, calls):
    plain, direct = _layer(), _layer()
    dso.accumulate_into_grad(direct)
    for layer in (plain, direct):
        _train(layer, 1)
        spoil(layer)
        _train(layer, 1)
    assert not any(calls)
    _same(_grads(direct), _grads(plain))


def test_autograd_grad_still_returns_the_gradient(calls):
    layer = _layer()
    dso.accumulate_into_grad(layer)
    _train(layer, 1)
    before = _grads(layer)
    loss = layer(torch.randn(7, 24)).sum()
    found = torch.autograd.grad(loss, [layer.gate_up_proj, layer.down_proj])
    assert not any(calls) and all(g.abs().sum() > 0 for g in found)
    _same(_grads(layer), before)


def test_autocast_takes_the_ordinary_path(calls):
    layer = _layer()
    dso.accumulate_into_grad(layer)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(torch.randn(7, 24)).float().sum()
        loss.backward()
    assert not any(calls)


def test_checkpoint_takes_the_ordinary_path(calls):
    plain, direct = _layer(), _layer()
    dso.accumulate_into_grad(direct)
    for layer in (plain, direct):
        for seed in range(2):
            torch.manual_seed(seed)
            x = torch.randn(7, 24, requires_grad=True)
            out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            out.square().sum().backward()
    assert not any(calls)
    _same(_grads(direct), _grads(plain))


def test_disabled_again(calls):
    layer = _layer()
    dso.accumulate_into_grad(layer)
    dso.accumulate_into_grad(layer, enabled=False)
    _train(layer)
    assert not any(calls)


def test_bad_input():
    with pytest.raises(dso.errors.InputError, match="参数 model：应为 nn.Module"):
        dso.accumulate_into_grad("layer")


def test_wrong_gradient_is_refused():
    x, indices, weights = torch.randn(3, 8), torch.tensor([[0], [1], [0]]), torch.rand(3, 1)
    up, down = torch.randn(2, 12, 8), torch.randn(2, 8, 6)
    act = ("silu", 1.7, 7.0, False, False, True)
    call = (torch.randn(3, 8), x, indices, weights, up, None, down, None, [], *act, True, False)
    bad = {
        "形状": (torch.zeros(2, 12, 9), torch.zeros_like(down)),
        "类型": (torch.zeros_like(up), torch.zeros_like(down).bfloat16()),
        "连续": (torch.zeros(2, 8, 12).transpose(1, 2), torch.zeros_like(down)),
    }
    for word, grads in bad.items():
        with pytest.raises(ValueError, match=word):
            torch.ops.deepseek_opt.moe_experts_backward_into(*call, *grads)
        assert all(g.abs().sum() == 0 for g in grads)
