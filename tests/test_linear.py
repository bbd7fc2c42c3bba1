"""linear：对照 fp64，前向与反向，各指令集、各 dtype、各种形状与步长。"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_opt import ops
from tests.op_cases import FLOATS, assert_no_worse, flipped, randn, strided
from tests.tolerances import tol

SHAPES = [(1, 1, 1), (1, 7, 5), (3, 33, 64), (8, 100, 129), (97, 131, 17), (101, 40, 33)]


def check(x, weight, bias=None):
    """前向与三个梯度对照 fp64。"""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    if bias is not None:
        leaves.append(bias.detach().clone().requires_grad_())
        exact.append(bias.detach().double().requires_grad_())
    got, want = ops.linear(*leaves), F.linear(*exact)
    assert got.dtype == x.dtype and got.shape == want.shape
    torch.testing.assert_close(got.double(), want, **tol(x.dtype))
    grad = torch.randn_like(got)
    got.backward(grad)
    want.backward(grad.double())
    for ours, theirs in zip(leaves, exact, strict=True):
        assert ours.grad.dtype == ours.dtype
        size = max(1.0, theirs.grad.abs().max().item() if theirs.numel() else 1.0)
        torch.testing.assert_close(ours.grad.double() / size, theirs.grad / size, **tol(x.dtype))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(dtype, shape):
    m, n, k = shape
    weight = randn(n, k, dtype=dtype, scale=k**-0.5)
    check(randn(m, k, dtype=dtype), weight)
    check(randn(m, k, dtype=dtype), weight, randn(n, dtype=dtype))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("types", [(FLOATS[0], FLOATS[1]), (FLOATS[1], FLOATS[0])])
@pytest.mark.parametrize("m", [2, 100])
def test_mixed_dtypes(types, m):
    x, weight = randn(m, 37, dtype=types[0]), randn(19, 37, dtype=types[1], scale=0.2)
    got = ops.linear(x, weight, randn(19, dtype=types[1]) * 0)
    want = F.linear(x.double(), weight.double())
    torch.testing.assert_close(got.double(), want, **tol(types[0]))


@pytest.mark.usefixtures("isa")
def test_leading_shapes():
    weight, bias = randn(5, 8), randn(5)
    for shape in [(8,), (2, 8), (2, 3, 8), (2, 1, 3, 8)]:
        x = randn(*shape)
        torch.testing.assert_close(ops.linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("rows", [3, 120])
def test_non_contiguous(rows):
    x, weight = randn(rows, 33), randn(20, 33, scale=0.2)
    want = F.linear(x, weight)
    for view in (strided, flipped):
        torch.testing.assert_close(ops.linear(view(x), view(weight)), want, **tol(x.dtype))
    cube = randn(2, 3, 7, 33)
    got = ops.linear(cube.transpose(1, 2), strided(weight))
    torch.testing.assert_close(got, F.linear(cube.transpose(1, 2), weight), **tol(x.dtype))
    check(strided(x), strided(weight))


@pytest.mark.usefixtures("isa")
def test_empty():
    assert ops.linear(randn(0, 4), randn(3, 4)).shape == (0, 3)
    assert ops.linear(randn(2, 0, 4), randn(3, 4)).shape == (2, 0, 3)
    assert ops.linear(randn(2, 4), randn(0, 4)).shape == (2, 0)
    check(randn(0, 4), randn(3, 4), randn(3))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("rows", [2, 120])
def test_zero_depth(rows):
    """K = 0：结果就是偏置。"""
    bias = randn(5)
    torch.testing.assert_close(ops.linear(randn(rows, 0), randn(5, 0), bias), bias.expand(rows, 5))
    assert (ops.linear(randn(rows, 0), randn(5, 0)) == 0).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("rows", [2, 120])
def test_nan_stays_in_its_row(rows):
    x, weight = randn(rows, 40), randn(30, 40)
    x[1, 17] = torch.nan
    got = ops.linear(x, weight)
    assert got[1].isnan().all() and not got[0].isnan().any()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 8, 200])
def test_no_less_accurate_than_torch(dtype, rows):
    x, weight = randn(rows, 768, dtype=dtype), randn(256, 768, dtype=dtype, scale=768**-0.5)
    exact = F.linear(x.double(), weight.double())
    assert_no_worse(ops.linear(x, weight), F.linear(x, weight), exact)


def test_gradcheck_fp32():
    tensors = [
        randn(3, 4).requires_grad_(),
        randn(2, 4).requires_grad_(),
        randn(2).requires_grad_(),
    ]
    assert torch.autograd.gradcheck(ops.linear, tensors, eps=1e-2, atol=1e-3, rtol=1e-3)


@settings(max_examples=40)
@given(st.integers(1, 130), st.integers(1, 140), st.integers(1, 70), st.sampled_from(FLOATS))
def test_any_shape(m, n, k, dtype):
    x, weight = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, scale=k**-0.5)
    want = F.linear(x.double(), weight.double())
    torch.testing.assert_close(ops.linear(x, weight).double(), want, **tol(dtype))
