"""ExpertRouter：配置到路由规则、抖动、半精度下的偏置、检查点、编译、坏输入。"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from deepseek_opt import ExpertRouter, MOEConfig, RoutingResult, ops
from deepseek_opt.errors import ConfigError, InputError, UnsupportedError
from tests.op_cases import FLOATS, randn

E, H = 16, 24


def config(**options):
    return MOEConfig(**{"num_experts": E, "num_experts_per_tok": 4} | options)


def router(**options):
    layer = ExpertRouter(config(**options), H)
    with torch.no_grad():
        layer.e_score_correction_bias.normal_(std=0.1)
    return layer


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options, want",
    [
        ({}, {"top_k": 4}),
        ({"num_experts_per_tok": None}, {"top_k": 2}),
        ({"num_experts_per_tok": None, "num_experts": 1}, {"top_k": 1}),
        (
            {"num_experts_per_tok": None, "n_group": 16, "topk_group": 1},
            {"top_k": 1, "n_group": 16, "topk_group": 1},
        ),
        (
            {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
            {"top_k": 4, "n_group": 4, "topk_group": 2, "scaling": 2.5},
        ),
        ({"n_group": 4}, {"top_k": 4}),
        (
            {"scoring_func": "softmax", "n_group": 4, "topk_group": 1, "norm_topk_prob": False},
            {
                "top_k": 4,
                "score": "softmax",
                "n_group": 4,
                "group_score": "max",
                "normalize": False,
            },
        ),
        (
            {"n_group": 4, "topk_group": 2, "group_score": "max", "routing_strategy": "topk"},
            ConfigError,
        ),
        (
            {"n_group": 4, "topk_group": 2, "group_score": "max"},
            {"top_k": 4, "n_group": 4, "topk_group": 2, "group_score": "max"},
        ),
        (
            {"scoring_func": "softmax", "normalize_before_topk": False},
            {"top_k": 4, "score": "softmax", "softmax_after": True},
        ),
        ({"normalize_before_topk": False}, {"top_k": 4}),
        (
            {"scoring_func": "sqrtsoftplus", "routing_strategy": "topk"},
            {"top_k": 4, "score": "sqrtsoftplus"},
        ),
    ],
)
def test_config_becomes_the_rule(options, want):
    if want is ConfigError:
        with pytest.raises(ConfigError, match="routing_strategy 为 topk 时不先选组"):
            router(**options)
        return
    layer = router(**options)
    x = randn(2, 5, H)
    got = layer(x)
    assert isinstance(got, RoutingResult) and got.logits.shape == (10, layer.num_experts)
    bias = layer.e_score_correction_bias
    assert_same(got, ops.moe_route(x.view(10, H), layer.weight, None, bias, **want))


def test_leading_shapes():
    layer = router()
    x = randn(6, H)
    want = layer(x)
    for shape in [(2, 3, H), (1, 6, H), (3, 1, 2, H)]:
        assert_same(layer(x.view(shape)), want)
    assert layer(x[0]).indices.shape == (1, 4)
    assert layer(randn(0, H)).counts.tolist() == [0] * E
    assert_same(layer(x.t().contiguous().t()), want)


def test_jitter_only_in_training():
    layer, x = router(router_jitter=0.3), randn(200, H)
    plain = router()
    plain.load_state_dict(layer.state_dict())
    assert_same(layer.eval()(x), plain(x))
    layer.train()
    first, second = layer(x).logits, layer(x).logits
    assert not torch.equal(first, second)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(E, H))  # logits 就是抖动之后的输入
    factor = layer(x).logits / x[:, :E]
    assert 0.7 - 1e-5 <= factor.min() < 0.75 and 1.25 < factor.max() <= 1.3 + 1e-5
    assert_same(plain.train()(x), plain.eval()(x))


def test_gradients_reach_the_weight_and_the_input_but_not_the_bias():
    layer, x = router(n_group=4, topk_group=2), randn(7, H).requires_grad_()
    result = layer(x)
    (result.weights.square().sum() + result.logits.square().mean()).backward()
    assert x.grad.abs().sum() > 0 and layer.weight.grad.abs().sum() > 0
    assert layer.e_score_correction_bias.grad is None
    assert [name for name, _ in layer.named_parameters()] == ["weight"]


@pytest.mark.parametrize("dtype", FLOATS)
def test_half_precision_keeps_the_bias_in_fp32(dtype):
    layer = router()
    bias = layer.e_score_correction_bias.clone()
    nn.Sequential(layer).to(dtype)
    assert layer.weight.dtype == dtype and layer.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(layer.e_score_correction_bias, bias)
    assert dict(layer.named_buffers()).keys() == {"e_score_correction_bias"}
    result = layer(randn(5, H, dtype=dtype))
    assert result.logits.dtype == result.weights.dtype == torch.float32
    layer.e_score_correction_bias += 1e-3
    assert (layer.e_score_correction_bias != bias).all()


def test_to_empty_from_meta():
    layer = ExpertRouter(config(), H, device="meta", dtype=torch.bfloat16)
    assert layer.weight.is_meta and layer.weight.dtype == torch.bfloat16
    layer.to_empty(device="cpu").half().reset_parameters()
    assert layer.e_score_correction_bias.dtype == torch.float32
    assert layer(randn(3, H)).counts.sum() == 12
    meta = ExpertRouter(config(), H, device="meta").half()
    assert meta.e_score_correction_bias.is_meta


def test_state_dict_pickle_and_deepcopy():
    layer, x = router(n_group=4, topk_group=2), randn(5, H)
    assert set(layer.state_dict()) == {"weight", "e_score_correction_bias"}
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_same(other(x), layer(x))
    fresh = router(n_group=4, topk_group=2)
    fresh.load_state_dict(layer.state_dict())
    assert_same(fresh(x), layer(x))
    assert "experts=16, top_k=4, score=sigmoid" in repr(layer)


def test_same_as_transformers():
    """DeepseekV3TopkRouter 的 state_dict 直接装得进来，结果相同。"""
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    options = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    theirs = modeling.DeepseekV3TopkRouter(
        modeling.DeepseekV3Config(
            hidden_size=H, n_routed_experts=E, num_experts_per_tok=4, **options
        )
    )
    ours = router(**options)
    theirs.load_state_dict(ours.state_dict())
    x = randn(2, 30, H)
    logits, weights, indices = theirs(x)
    result = ours(x)
    torch.testing.assert_close(result.logits, logits)
    place, mine = indices.argsort(-1), result.indices.argsort(-1)
    assert torch.equal(result.indices.gather(1, mine), indices.gather(1, place))
    torch.testing.assert_close(result.weights.gather(1, mine), weights.gather(1, place))


def test_changing_the_config_takes_effect():
    settings = config(n_group=4, topk_group=4)
    layer, x = ExpertRouter(settings, H), randn(9, H)
    before = layer(x)
    settings.routed_scaling_factor = 2.0
    torch.testing.assert_close(layer(x).weights, before.weights * 2)
    settings.num_experts_per_tok = 2
    assert layer(x).indices.shape == (9, 2)
    settings.num_experts = 2 * E
    with pytest.raises(ConfigError, match="建层之后不能改动（原值 16）"):
        layer(x)
    settings.num_experts = E
    assert layer(x).indices.shape == (9, 2)


@pytest.mark.parametrize("jitter", [None, 0.1])
def test_compile_fullgraph(jitter):
    layer, x = router(n_group=4, topk_group=2, router_jitter=jitter), randn(5, H)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    result = compiled(x)
    result.weights.sum().backward()
    assert result.counts.sum() == 20 and layer.weight.grad is not None
    assert_same(compiled.eval()(x), layer.eval()(x))


def test_functional_call_and_autocast():
    layer, x = router(), randn(5, H)
    other = torch.func.functional_call(layer, {"weight": layer.weight * 2}, (x,))
    torch.testing.assert_close(other.logits, layer(x).logits * 2)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(layer(x), want)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"num_experts": None}, ConfigError, "moe.num_experts.*必须给出"),
        ({"routing_strategy": "group_limited"}, ConfigError, "moe.n_group.*应大于 1"),
        ({"topk_group": 2}, ConfigError, "moe.topk_group.*不能大于 n_group = 1"),
        ({"routing_strategy": "expert_choice"}, UnsupportedError, "expert_choice"),
    ],
)
def test_config_that_cannot_build_a_router(options, error, message):
    with pytest.raises(error, match=message):
        ExpertRouter(config(**options), H)


@pytest.mark.parametrize("hidden_size", [0, -1, 2.0, True, None])
def test_bad_hidden_size(hidden_size):
    with pytest.raises(InputError, match="参数 hidden_size：应为正整数"):
        ExpertRouter(config(), hidden_size)


def test_bad_config_type():
    with pytest.raises(InputError, match="参数 config：应为MOEConfig"):
        ExpertRouter({"num_experts": 4}, H)


@pytest.mark.parametrize(
    "hidden", [randn(3, H + 1), randn(), randn(3, H).double(), torch.zeros(3, H).long(), None]
)
def test_bad_hidden(hidden):
    with pytest.raises(InputError, match=r"参数 hidden：应为\[..., 24\] 的 float32"):
        router()(hidden)
