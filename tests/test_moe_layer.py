"""MoEFeedForward：与逐专家的写法一致，容量与丢弃，由专家选，强制均衡，辅助损失，训练。"""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek_opt import MOEConfig, MoEFeedForward, aux_loss
from deepseek_opt.errors import ConfigError, InputError, UnsupportedError
from deepseek_opt.layers.balance_loss import balance_loss, routing_scores, z_loss
from deepseek_opt.layers.dispatch import Dispatch, count_experts, drop_over_capacity, expert_choice
from tests.tolerances import tol

HIDDEN, INNER = 16, 12


def make(seed=0, **fields):
    options = {name: fields.pop(name) for name in ("activation", "dtype") if name in fields}
    torch.manual_seed(seed)
    fields = {"num_experts": 8, "num_experts_per_tok": 2, **fields}
    layer = MoEFeedForward(MOEConfig(**fields), HIDDEN, INNER, **options)
    with torch.no_grad():
        layer.router.weight.normal_()
    return layer


def inputs(*shape, seed=1):
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed))


def expected(layer, x, weights, indices, act=F.silu):
    """逐词元、逐专家直接计算。"""
    out = []
    for row, ws, es in zip(x.reshape(-1, HIDDEN), weights, indices, strict=True):
        y = torch.zeros(HIDDEN)
        for w, e in zip(ws, es, strict=True):
            if e < layer.num_experts:
                gate, up = (layer.gate_up_proj[e] @ row).chunk(2)
                y = y + w * (layer.down_proj[e] @ (act(gate) * up))
        if layer.shared_gate is not None:
            y_s = layer.shared_down @ (F.silu(layer.shared_gate @ row) * (layer.shared_up @ row))
            if layer.shared_coefficient is not None:
                y_s = y_s * torch.sigmoid(layer.shared_coefficient[0] @ row)
            y = y + y_s
        out.append(y)
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_experts_per_tok": 8, "scoring_func": "sigmoid", "routed_scaling_factor": 2.5},
        {"num_shared_experts": 2},
        {"num_shared_experts": 1, "shared_expert_gate": True, "norm_topk_prob": False},
        {"n_group": 4, "topk_group": 2, "scoring_func": "sqrtsoftplus"},
        {"normalize_before_topk": False, "num_experts_per_tok": 1},
    ],
)
def test_same_as_expert_by_expert(fields):
    layer, x = make(**fields), inputs(2, 5)
    if layer.shared_coefficient is not None:
        nn.init.normal_(layer.shared_coefficient)
    got = layer(x)
    routed = layer.router(x)
    want = expected(layer, x, routed.weights, routed.indices)
    torch.testing.assert_close(got, want, **tol(torch.float32))
    for parameter in layer.parameters():
        assert parameter.requires_grad
    (grads, wanted) = (
        torch.autograd.grad(value.square().sum(), list(layer.parameters()), allow_unused=True)
        for value in (got, want)
    )
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-4)


def test_activation_and_leading_shapes():
    layer, x = make(activation="relu"), inputs(2, 3, 4)
    whole = layer(x)
    routed = layer.router(x)
    torch.testing.assert_close(
        whole, expected(layer, x, routed.weights, routed.indices, F.relu), **tol(torch.float32)
    )
    torch.testing.assert_close(layer(x[0, 0, 0]), whole[0, 0, 0], **tol(torch.float32))
    assert layer(x[:0]).shape == (0, 3, 4, HIDDEN) and layer.aux_loss is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer, x = make(), inputs(7)
    half = copy.deepcopy(layer).to(dtype)
    out = half(x.to(dtype))
    assert out.dtype == dtype and out.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).isfinite().all()


# ---- 容量 ----


def drop(indices, weights, limit, **options):
    indices, weights = torch.tensor(indices), torch.tensor(weights)
    options = {"by_weight": False, "renormalize": False, **options}
    plan = Dispatch(weights, indices, count_experts(indices, 2))
    return drop_over_capacity(plan, limit, **options)


def test_later_tokens_are_dropped():
    plan = drop([[0], [1], [0], [0]], [[0.1], [0.2], [0.3], [0.4]], 2)
    assert plan.indices.tolist() == [[0], [1], [0], [2]]
    assert plan.weights[-1] == 0 and plan.dropped == 1
    assert plan.counts.tolist() == [3, 1]  # 真实的需求，不是留下的


def test_smallest_weights_are_dropped():
    plan = drop([[0], [1], [0], [0]], [[0.1], [0.2], [0.3], [0.4]], 2, by_weight=True)
    assert plan.indices.tolist() == [[2], [1], [0], [0]]


def test_rest_is_renormalized_to_the_old_sum():
    weights = [[0.6, 0.4], [0.5, 0.3], [0.2, 0.1]]
    plan = drop([[0, 1], [1, 0], [0, 1]], weights, 1, renormalize=True)
    assert plan.indices.tolist() == [[0, 1], [2, 2], [2, 2]]
    assert not plan.weights[1:].any()
    plan = drop([[0, 1], [1, 0]], weights[:2], 1, by_weight=True, renormalize=True)
    assert plan.indices.tolist() == [[0, 2], [1, 2]]
    torch.testing.assert_close(plan.weights, torch.tensor([[1.0, 0.0], [0.8, 0.0]]))


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 12),
    top_k=st.integers(1, 3),
    limit=st.integers(1, 6),
    by_weight=st.booleans(),
    renormalize=st.booleans(),
)
def test_nobody_exceeds_the_capacity(tokens, top_k, limit, by_weight, renormalize):
    generator = torch.Generator().manual_seed(tokens * 97 + top_k)
    scores = torch.rand(tokens, 4, generator=generator)
    weights, indices = scores.topk(top_k, -1)
    plan = drop_over_capacity(
        Dispatch(weights, indices, count_experts(indices, 4)),
        limit,
        by_weight=by_weight,
        renormalize=renormalize,
    )
    kept = count_experts(plan.indices, 4)
    assert torch.equal(kept, plan.counts.clamp(max=limit))
    assert int(plan.dropped) == int((plan.counts - kept).sum())
    assert ((plan.indices == 4) == (plan.weights == 0)).all()
    if renormalize:
        alive = kept.new_tensor((plan.indices < 4).any(-1).tolist(), dtype=torch.bool)
        torch.testing.assert_close(plan.weights.sum(-1)[alive], weights.sum(-1)[alive])


def test_capacity_in_the_layer_is_live_and_all_on_one_expert_works():
    layer, x = make(capacity_factor=1.0, num_experts_per_tok=1), inputs(16)
    layer.eval()
    with torch.no_grad():
        layer.router.weight.zero_()  # 得分全相同：都去 0 号
    out = layer(x)
    assert (out.abs().sum(-1) > 0).tolist() == [True] * 2 + [False] * 14
    assert layer.load_counter.dropped() == 14
    layer.config.capacity_factor = 8.0
    assert (layer(x).abs().sum(-1) > 0).all()


# ---- 由专家选、强制均衡 ----


def test_experts_choose_their_best_tokens():
    scores = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    plan = expert_choice(scores, 2, 1.0)
    assert plan.counts.tolist() == [2, 2, 2]
    for expert in range(3):
        token, place = torch.where(plan.indices == expert)
        assert set(token.tolist()) == set(scores[:, expert].topk(2)[1].tolist())
        torch.testing.assert_close(plan.weights[token, place], scores[token, expert])
    assert (plan.weights[plan.indices == 3] == 0).all()


def test_expert_choice_layer_is_balanced_and_trains_its_router():
    layer = make(routing_strategy="expert_choice", scoring_func="sigmoid", capacity_factor=0.5)
    out = layer(inputs(4, 8))
    assert layer.load_counter.snapshot().tolist() == [4] * 8  # ⌈0.5 · 32 · 2 / 8⌉
    out.square().sum().backward()
    assert layer.router.weight.grad.abs().sum() > 0
    assert layer(inputs(0)).shape == (0, HIDDEN)


def test_forced_balance_is_exact():
    layer = make(balance_strategy="forced")
    with torch.no_grad():
        layer.router.weight.zero_()
    layer(inputs(12))
    assert layer.load_counter.snapshot().tolist() == [3] * 8


# ---- 辅助损失 ----


def test_balance_loss_is_one_when_even_and_grows_with_imbalance():
    indices = torch.arange(8).view(4, 2) % 4
    even = balance_loss(torch.zeros(4, 4), indices, "softmax", 1)
    torch.testing.assert_close(even, torch.tensor(1.0))
    skewed = torch.tensor([[9.0, 0.0, 0.0, 0.0]]).expand(4, 4)
    worst = balance_loss(skewed, torch.zeros(4, 1, dtype=torch.int64), "softmax", 1)
    assert worst > 3.9


def test_sequence_loss_is_the_mean_over_sequences():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator)
    indices = logits.topk(2)[1]
    for kind in ("softmax", "sigmoid", "sqrtsoftplus"):
        parts = [balance_loss(logits[i : i + 3], indices[i : i + 3], kind, 1) for i in (0, 3)]
        got = balance_loss(logits, indices, kind, 2)
        torch.testing.assert_close(got, torch.stack(parts).mean())


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({"balance_strategy": "sequence_aux_loss", "aux_loss_weight": 0.5}, (0.5, 3, 0.0)),
        ({"balance_strategy": "sequence_aux_loss"}, (1e-4, 3, 0.0)),
        ({"balance_strategy": "global_aux_loss", "z_loss_weight": 0.1}, (1e-2, 1, 0.1)),
        ({"balance_strategy": "bias_update", "sequence_aux_loss_weight": 0.2}, (0.2, 3, 0.0)),
        ({"z_loss_weight": 0.1}, (0.0, 1, 0.1)),
    ],
)
def test_layer_loss(fields, want):
    layer, x = make(**fields), inputs(3, 4)
    layer(x)
    weight, sequences, z_weight = want
    routed = layer.router(x)
    total = weight * balance_loss(routed.logits, routed.indices, "sigmoid", sequences)
    total = total + z_weight * routed.logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(layer.aux_loss, total)
    (grad,) = torch.autograd.grad(layer.aux_loss, layer.router.weight)
    assert grad.abs().sum() > 0
    layer.eval()(x)
    assert layer.aux_loss is None


def test_losses_of_a_model_are_summed():
    model = nn.Sequential(make(z_loss_weight=0.1), nn.Linear(HIDDEN, HIDDEN), make(seed=2))
    assert aux_loss(model) == 0
    model(inputs(5))
    torch.testing.assert_close(aux_loss(model), model[0].aux_loss)
    assert aux_loss(model).requires_grad and model[2].aux_loss is None
    assert aux_loss(nn.Identity()) == 0
    with pytest.raises(InputError, match="model"):
        aux_loss(None)


def test_z_loss_pulls_logits_down():
    logits = torch.full((3, 4), 5.0, requires_grad=True)
    z_loss(logits).backward()
    assert (logits.grad > 0).all()
    torch.testing.assert_close(routing_scores(torch.zeros(1), "sigmoid"), torch.tensor([0.5]))


# ---- 复制、改配置、坏输入 ----


def test_copies_are_independent(tmp_path):
    layer = make(z_loss_weight=0.1)
    want = layer(inputs(3))
    other = copy.deepcopy(layer)  # 带着计算图的损失不妨碍复制
    assert other.aux_loss is None and layer.aux_loss is not None
    assert not other.load_counter.snapshot().any()
    torch.testing.assert_close(other(inputs(3)), want)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    fresh = make(seed=5, z_loss_weight=0.1)
    fresh.load_state_dict(torch.load(tmp_path / "layer.pt"))
    torch.testing.assert_close(fresh(inputs(3)), want)
    assert set(layer.state_dict()) == {
        "gate_up_proj",
        "down_proj",
        "router.weight",
        "router.e_score_correction_bias",
    }


def test_frozen_fields_are_explained():
    layer = make()
    layer.config.num_experts = 16
    with pytest.raises(ConfigError, match="num_experts"):
        layer(inputs(2))
    layer.config.num_experts = 8
    assert layer(inputs(2)).shape == (2, HIDDEN)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, HIDDEN + 1), f"hidden：应为最后一维为 {HIDDEN} 的张量"),
        (torch.tensor(1.0), "hidden：应为"),
        (torch.zeros(3, HIDDEN, dtype=torch.bfloat16), "hidden：应为类型 torch.float32"),
        (torch.zeros(3, HIDDEN, device="meta"), "hidden：应为设备 cpu"),
        ("x", "hidden：应为"),
    ],
)
def test_bad_input_changes_nothing(x, message):
    layer = make()
    with pytest.raises(InputError, match=message):
        layer(x)
    assert not layer.load_counter.snapshot().any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, 8, 8), InputError, "config"),
        ((MOEConfig(num_experts_per_tok=1), 8, 8), InputError, "config.num_experts"),
        ((MOEConfig(num_experts=4), 8, 8), InputError, "config.num_experts_per_tok"),
        ((MOEConfig(num_experts=4, num_experts_per_tok=1), 0, 8), InputError, "hidden_size"),
        ((MOEConfig(num_experts=4, num_experts_per_tok=1), 8, 2.0), InputError, "intermediate"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        MoEFeedForward(*arguments)


def test_activation_and_quantization_are_checked():
    config = MOEConfig(num_experts=4, num_experts_per_tok=1)
    with pytest.raises(InputError, match="activation"):
        MoEFeedForward(config, 8, 8, activation="swish")
    config.quantization = "int8"
    with pytest.raises(UnsupportedError, match="quantization"):
        MoEFeedForward(config, 8, 8)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"routing_strategy": "expert_choice", "n_group": 2}, "n_group"),
        ({"routing_strategy": "expert_choice", "norm_topk_prob": True}, "norm_topk_prob"),
        ({"num_shared_experts": 0, "shared_expert_gate": True}, "shared_expert_gate"),
        ({"drop_renormalize": True}, "drop_renormalize"),
        ({"sequence_aux_loss_weight": 0.1}, "sequence_aux_loss_weight"),
        ({"routing_strategy": "topk", "n_group": 4, "topk_group": 2}, "topk_group"),
    ],
)
def test_contradictions_are_one_error(fields, path):
    with pytest.raises(ConfigError) as info:
        MOEConfig(**fields)
    assert [problem.path for problem in info.value.problems] == [path]


# ---- 训练 ----


class _Model(nn.Module):
    """最小的因果语言模型：嵌入、与前一个词元混合、MoE、输出。"""

    def __init__(self, **fields):
        super().__init__()
        self.embed = nn.Embedding(24, HIDDEN)
        self.moe = make(**fields)
        self.head = nn.Linear(HIDDEN, 24)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + 0.5 * F.pad(x, (0, 0, 1, 0))[:, :-1]
        return self.head(x + self.moe(x))


@pytest.mark.parametrize(
    "fields",
    [
        {"balance_strategy": "global_aux_loss", "z_loss_weight": 1e-3, "router_jitter": 0.01},
        {"capacity_factor": 1.25, "drop_renormalize": True, "num_shared_experts": 1},
    ],
)
def test_learns_to_predict_the_next_token(fields):
    model = _Model(**fields)
    generator = torch.Generator().manual_seed(3)
    steps = torch.randint(1, 4, (8, 1), generator=generator)  # 每行一个等差数列
    ids = (torch.arange(17) * steps + torch.randint(0, 24, (8, 1), generator=generator)) % 24
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-2), []
    for _ in range(40):
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + aux_loss(model)).backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
