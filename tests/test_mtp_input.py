"""mtp_input：对照 fp64、对照分开的三步；梯度；坏输入。"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_opt import ops, reference
from tests.op_cases import FLOATS, assert_no_worse, flipped, randn, strided, wide
from tests.tolerances import tol

EPS = 1e-6
OP = torch.ops.deepseek_opt.mtp_input


def inputs(shape, width, out, dtype=torch.float32, w_dtype=None):
    weight = randn(out, 2 * width, dtype=w_dtype or dtype, scale=(2 * width) ** -0.5)
    rows = (randn(*shape, width, dtype=dtype, scale=3.0), randn(*shape, width, dtype=dtype))
    return (*rows, randn(width, dtype=dtype), randn(width, dtype=dtype), weight)


def apart(embedding, hidden, e_norm, h_norm, weight, eps=EPS):
    """分开的写法，各步都是本库的算子。"""
    rows = [ops.rms_norm(embedding, e_norm, eps), ops.rms_norm(hidden, h_norm, eps)]
    return ops.linear(torch.cat(rows, -1), weight)


def eager(embedding, hidden, e_norm, h_norm, weight):
    """DeepSeek-V3 检查点的写法。"""

    def norm(x, w):
        return w * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(
            x.dtype
        )

    return torch.nn.functional.linear(
        torch.cat([norm(embedding, e_norm), norm(hidden, h_norm)], -1), weight
    )


def gradients(function, tensors, grad):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    function(*leaves, EPS).backward(grad)
    return [t.grad for t in leaves]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows, width, out", [(1, 1, 1), (3, 17, 5), (33, 64, 48), (130, 33, 131)])
def test_against_fp64(dtype, rows, width, out):
    args = inputs((rows,), width, out, dtype)
    got = ops.mtp_input(*args, EPS)
    exact = tuple(wide(t) for t in args)
    torch.testing.assert_close(got.double(), reference.mtp_input(*exact, EPS), **tol(dtype))
    grad = torch.randn_like(got)
    theirs = gradients(reference.mtp_input, exact, grad.double())
    for a, b in zip(gradients(OP, args, grad), theirs, strict=True):
        size = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double() / size, b / size, **tol(dtype))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 8, 200])
def test_same_as_the_separate_ops(dtype, rows):
    """融合只省中间的张量与调用：前向、反向与分开的算子逐位相同。"""
    args = inputs((rows,), 48, 40, dtype)
    grad = randn(rows, 40, dtype=dtype)
    torch.testing.assert_close(ops.mtp_input(*args, EPS), apart(*args), rtol=0, atol=0)
    for a, b in zip(gradients(OP, args, grad), gradients(apart, args, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_less_accurate_than_eager(dtype):
    args = inputs((64,), 256, 128, dtype)
    exact = reference.mtp_input(*(wide(t) for t in args), EPS)
    assert_no_worse(ops.mtp_input(*args, EPS), eager(*args), exact)


@pytest.mark.usefixtures("isa")
def test_embedding_comes_first():
    x, zero, norm = torch.ones(1, 4), torch.zeros(1, 4), torch.ones(4)
    weight = torch.cat([torch.eye(4), 2 * torch.eye(4)], 1)
    torch.testing.assert_close(ops.mtp_input(x, zero, norm, norm, weight, EPS), x)
    torch.testing.assert_close(ops.mtp_input(zero, x, norm, norm, weight, EPS), 2 * x)


@pytest.mark.usefixtures("isa")
def test_views_shapes_and_mixed_dtypes():
    e, h, e_norm, h_norm, weight = inputs((3, 5), 32, 9)
    want = ops.mtp_input(e, h, e_norm, h_norm, weight, EPS)
    assert want.shape == (3, 5, 9)
    # 主机模拟里矩阵乘是 torch 的（真卡上是 cuBLAS）：步长不同，走的路可以不同
    limits = tol(torch.float32) if os.environ.get("DSO_HOST") == "1" else {"rtol": 0, "atol": 0}
    for view in (strided, flipped):
        got = ops.mtp_input(view(e), view(h), e_norm, h_norm, view(weight), EPS)
        torch.testing.assert_close(got, want, **limits)
    one = ops.mtp_input(e[0, 0], h[0, 0], e_norm, h_norm, weight, EPS)
    torch.testing.assert_close(one, want[0, 0], **tol(torch.float32))
    mixed = (e.half(), h.half(), e_norm.bfloat16(), h_norm, weight.bfloat16())
    exact = reference.mtp_input(*(wide(t) for t in mixed), EPS)
    torch.testing.assert_close(ops.mtp_input(*mixed, EPS).double(), exact, **tol(torch.float16))


@pytest.mark.usefixtures("isa")
def test_empty_and_nan():
    e, h, *rest = inputs((0,), 6, 4)
    leaves = [t.requires_grad_() for t in (e, h, *rest)]
    y = ops.mtp_input(*leaves, EPS)
    assert y.shape == (0, 4)
    y.sum().backward()
    assert all((t.grad == 0).all() and t.grad.shape == t.shape for t in leaves)
    e, h, *rest = inputs((3,), 6, 4)
    e[1, 2] = torch.nan
    got = ops.mtp_input(e, h, *rest, EPS)
    assert got[1].isnan().all() and got[[0, 2]].isfinite().all()


@settings(max_examples=30)
@given(st.integers(1, 110), st.integers(1, 70), st.integers(1, 50), st.sampled_from(FLOATS))
def test_any_shape(rows, width, out, dtype):
    args = inputs((rows,), width, out, dtype)
    want = reference.mtp_input(*(wide(t) for t in args), EPS)
    torch.testing.assert_close(ops.mtp_input(*args, EPS).double(), want, **tol(dtype))


@pytest.mark.parametrize("wanted", range(5))
def test_only_the_wanted_gradients(wanted):
    args = list(inputs((4,), 6, 5))
    args[wanted].requires_grad_()
    OP(*args, EPS).square().sum().backward()
    full = [t.detach().clone().requires_grad_() for t in args]
    ops.mtp_input(*full, EPS).square().sum().backward()
    torch.testing.assert_close(args[wanted].grad, full[wanted].grad, rtol=0, atol=0)
    assert [t.grad is None for t in args] == [i != wanted for i in range(5)]


def test_gradcheck():
    args = [t.requires_grad_() for t in inputs((2,), 3, 2)]
    options = {"eps": 1e-2, "atol": 1e-2, "rtol": 1e-2}
    assert torch.autograd.gradcheck(lambda *a: ops.mtp_input(*a, 0.1), args, **options)


def test_double_backward_is_refused():
    args = [t.requires_grad_() for t in inputs((2,), 3, 2)]
    loss = ops.mtp_input(*args, EPS).square().sum()
    (grad,) = torch.autograd.grad(loss, args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="没有导数"):
        grad.sum().backward()


def test_same_result_for_any_thread_count(threads):
    args, runs = inputs((150,), 70, 130), []
    for count in (1, 2, 5):
        threads(count)
        runs.append([ops.mtp_input(*args, EPS), *gradients(OP, args, torch.ones(150, 130))])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, runs[0], strict=True))


def test_opcheck_and_autocast():
    args = inputs((3,), 8, 5)
    torch.library.opcheck(OP.default, (*(t.clone().requires_grad_() for t in args), EPS))
    want = ops.mtp_input(*(t.bfloat16() for t in args), EPS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.mtp_input(*args, EPS), want)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def step(*args):
        return ops.mtp_input(*args, EPS).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 9):
        args, results = inputs((rows,), 8, 5), []
        for function in (step, compiled):
            leaves = [t.clone().requires_grad_() for t in args]
            loss = function(*leaves)
            loss.backward()
            results.append([loss.detach(), *(t.grad for t in leaves)])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "index, value, message",
    [
        (0, torch.tensor(1.0), "embedding 至少要有 1 维"),
        (0, randn(2, 4).double(), "embedding 的类型.*float64"),
        (1, randn(2, 5), r"hidden 的形状应与 embedding \[2, 4\] 相同，实际是 \[2, 5\]"),
        (1, randn(2, 4).half(), "hidden 的类型应为 float32，实际是 float16"),
        (2, randn(5), r"embedding_norm 的形状应为 \[4\]，实际是 \[5\]"),
        (3, randn(5), r"hidden_norm 的形状应为 \[4\]，实际是 \[5\]"),
        (3, randn(4).double(), "hidden_norm 的类型"),
        (4, randn(3, 4), r"weight 的形状应为 \[\*, 8\]，实际是 \[3, 4\]"),
        (4, randn(3, 8).int(), "weight 的类型.*int32"),
    ],
)
def test_bad_input(index, value, message):
    args = list(inputs((2,), 4, 3))
    args[index] = value
    with pytest.raises(ValueError, match=f"deepseek_opt：mtp_input：.*{message}"):
        OP(*args, EPS)
