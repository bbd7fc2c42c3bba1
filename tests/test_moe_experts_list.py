"""moe_experts_list：与成叠的 moe_experts 逐位相同，梯度写进各自的张量；错误与 torch 的约定。"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from deepseek_opt import ops, reference
from tests.moe_cases import Layout, close, experts
from tests.moe_list_cases import LISTS, Lists
from tests.op_cases import FLOATS, randn, strided
from tests.tolerances import tol

OPS = torch.ops.deepseek_opt


def make(joint=False, sizes=(9, 8, 6, 7), count=4, **options) -> Lists:
    return Lists.of(experts(sizes, count, **options), joint)


def ragged(dtype=torch.float32) -> Lists:
    """各专家的中间宽不同，偏置只有一部分。"""
    widths = (5, 130, 1, 33)
    lists = {name: [] for name in LISTS}
    for width in widths:
        lists["gate"].append(randn(width, 8, dtype=dtype))
        lists["up"].append(randn(width, 8, dtype=dtype))
        lists["up_bias"].append(randn(width, dtype=dtype))
        lists["down"].append(randn(7, width, dtype=dtype, scale=0.1))
    index = torch.randint(0, 5, (40, 2))  # 4 是哨兵
    return Lists(randn(40, 8, dtype=dtype), index, torch.rand(40, 2), lists)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("tokens", [5, 300])
def test_same_as_stacked(tokens, joint, dtype):
    options = {"bias": True, "shared": 4, "dtype": dtype}
    case = experts((tokens, 40, 130, 21), 5, 2, **options)
    mine, grad = Lists.of(case, joint), randn(tokens, 21, dtype=dtype)
    assert torch.equal(mine.run(), case.run())
    want = case.gradients(grad)
    split = dataclasses.replace(case, **{name: want[name] for name in ("gate_up", "down")})
    split = split.but(gate_up_bias=want["gate_up_bias"], down_bias=want["down_bias"])
    split = split.but(x=want["x"], weights=want["weights"])
    split = split.but(shared=tuple(want[f"shared[{i}]"] for i in range(4)))
    expected = Lists.of(split, joint).flat()
    for got, exact in zip(mine.gradients(grad), expected, strict=True):
        assert torch.equal(got, exact)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("layout", [Layout(a) for a in ops.ACTIVATIONS] + [Layout(gated=False)])
def test_activations_against_the_reference(layout):
    shared = 3 if layout.gated else 0
    mine = make(sizes=(30, 12, 20, 9), layout=layout, bias=True, shared=shared)
    check(mine, torch.float32)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
def test_experts_of_different_width(dtype):
    check(ragged(dtype), dtype)


def check(mine: Lists, dtype) -> None:
    exact = mine.map(torch.Tensor.double)
    close(mine.run(), exact.run(reference.moe_experts_list), dtype)
    grad = randn(*mine.run().shape, dtype=dtype)
    want = exact.gradients(grad.double(), reference.moe_experts_list)
    for got, best in zip(mine.gradients(grad), want, strict=True):
        close(got, best, dtype)


def test_weights_are_read_in_place():
    """行距任意的权重（例如大矩阵的一部分）照样读；梯度是连续的。"""
    plain = make(bias=True)
    grad = randn(9, 7)
    views = plain.map(lambda t: strided(t) if t.dim() > 1 else t)
    assert torch.equal(views.run(), plain.run())
    leaf = plain.map(lambda t: (strided(t) if t.dim() > 1 else t).detach().requires_grad_())
    leaf.run().backward(grad)
    for t, want in zip(leaf.flat(), plain.gradients(grad), strict=True):
        assert torch.equal(t.grad, want)


def test_gradients_reach_the_linears():
    linears = [nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)]
    twins = [nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)]
    gate, up, down = ([a, b] for a, b in zip(linears, twins, strict=True))
    lists = [[m.weight for m in group] for group in (gate, up, down)]
    biases = [[m.bias for m in group] for group in (gate, up, down)]
    index = torch.zeros(3, 1, dtype=torch.int64)  # 1 号没有词元
    ops.moe_experts_list(randn(3, 8), index, torch.ones(3, 1), *lists, *biases).sum().backward()
    for used, idle in (gate, up, down):
        assert used.weight.grad.any() and used.bias.grad.any()
        assert not idle.weight.grad.any() and not idle.bias.grad.any()


@pytest.mark.parametrize("wanted", ["x", "weights", "gate", "shared"])
def test_only_the_wanted_gradients(wanted):
    mine = make(bias=True, shared=3).map(torch.clone)
    chosen = getattr(mine, wanted) if wanted in ("x", "weights") else mine.lists[wanted][0]
    chosen.requires_grad_()
    mine.run().sum().backward()
    assert [t is chosen for t in mine.flat()] == [t.grad is not None for t in mine.flat()]


def test_thread_count_does_not_change_results(threads):
    mine, grad, runs = make(sizes=(150, 40, 140, 30)), randn(150, 30), []
    for count in (1, 3):
        threads(count)
        runs.append([mine.run(), *mine.gradients(grad)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_autocast(dtype):
    mine = make(bias=True)
    weights = mine.weights
    lower = mine.map(lambda t: t if t is weights else t.to(dtype))
    with torch.autocast("cpu", dtype):
        got = mine.run()
    assert got.dtype == dtype and torch.equal(got, lower.run())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_fullgraph(backend):
    mine = make(bias=True, shared=4)
    torch._dynamo.reset()
    compiled = torch.compile(ops.moe_experts_list, fullgraph=True, backend=backend)
    grad = torch.ones(9, 7)
    assert torch.equal(mine.run(compiled), mine.run())
    for got, want in zip(mine.gradients(grad, compiled), mine.gradients(grad), strict=True):
        torch.testing.assert_close(got, want, **tol(torch.float32))


def test_double_backward_is_refused():
    leaf = make().leaves()
    (grad,) = torch.autograd.grad(leaf.run().square().sum(), leaf.x, create_graph=True)
    with pytest.raises(RuntimeError, match="moe_experts_list_backward 没有导数"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gate", [], "gate 应至少有一个专家，实际为空"),
        ("up", [randn(6, 8)], "up 应有 4 个张量（每个专家一个）或为空，实际有 1 个"),
        ("down", [], "down 应有 4 个张量（每个专家一个），实际有 0 个"),
        ("gate_bias", [randn(6)], "gate_bias 应有 4 个张量"),
        ("up_bias", [randn(6)] * 3, "up_bias 应有 4 个张量"),
        ("down_bias", [randn(7)] * 5, "down_bias 应有 4 个张量"),
        ("gate", [randn(6, 8)] * 3 + [randn(6, 9)], r"gate\[3\] 的形状应为 \[\*, 8\]"),
        ("up", [randn(6, 8), randn(5, 8)] * 2, r"up\[1\] 的形状应为 \[6, 8\]"),
        ("down", [randn(7, 6)] * 3 + [randn(6, 6)], r"down\[3\] 的形状应为 \[7, 6\]"),
        ("down", [randn(7)] * 4, r"down\[0\] 的形状应为 \[\*, \*\]"),
        ("gate_bias", [randn(6)] * 3 + [randn(5)], r"gate_bias\[3\] 的形状应为 \[6\]"),
        ("up_bias", [randn(7)] * 4, r"up_bias\[0\] 的形状应为 \[6\]"),
        ("down_bias", [randn(8)] * 4, r"down_bias\[0\] 的形状应为 \[7\]"),
        ("up", [randn(6, 8).half()] * 4, r"up\[0\] 的类型应为 float32，实际是 float16"),
        ("gate", [randn(6, 8).double()] * 4, r"gate\[0\] 的类型应为 float32、bfloat16"),
    ],
)
def test_bad_lists(name, value, message):
    mine = make(bias=True)
    wrong = dataclasses.replace(mine, lists={**mine.lists, name: value})
    with pytest.raises(ValueError, match=message):
        wrong.run()
    with pytest.raises(ValueError, match=message):
        OPS.moe_experts_list_backward(randn(9, 7), *wrong.args(), True, True, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gated": False}, "gated 为 False 时 up 应为空，实际有 4 个"),
        ({"activation": "swish"}, "activation 应为 silu"),
        ({"x": randn(9)}, "x 的形状"),
        ({"indices": torch.full((9, 2), -1)}, "应不小于 0"),
    ],
)
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make(), **change).run()


def test_joint_needs_an_even_width_and_shared_needs_a_gate():
    joint = make(joint=True)
    joint.lists["gate"] = [randn(7, 8)] * 4
    with pytest.raises(ValueError, match=r"gate\[0\] 应由等宽的 gate 与 up 组成，实际宽 7"):
        joint.run()
    plain = make(layout=Layout(gated=False))
    plain.lists["shared"] = make(shared=3).lists["shared"]
    with pytest.raises(ValueError, match="有 shared 时必须有门"):
        plain.run()
