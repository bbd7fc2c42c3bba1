"""rms_norm、add_rms_norm：对照 fp64 与 transformers 的写法。"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_opt import ops, reference
from tests.op_cases import FLOATS, assert_no_worse, flipped, randn, strided
from tests.tolerances import tol

EPS = 1e-6
DIMS = [1, 2, 7, 16, 33, 512]


def eager(x, weight, eps=EPS):
    """transformers 的 RMSNorm。"""
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return weight * (x.float() * torch.rsqrt(variance + eps)).to(x.dtype)


def gradients(function, tensors, grad):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    function(*leaves).backward(grad)
    return [t.grad for t in leaves]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", DIMS)
def test_against_fp64(dtype, dim):
    x, weight = randn(67, dim, dtype=dtype, scale=3.0), randn(dim, dtype=dtype)
    got = ops.rms_norm(x, weight, EPS)
    want = reference.rms_norm(x.double(), weight.double(), EPS)
    torch.testing.assert_close(got.double(), want, **tol(dtype))
    grad = torch.randn_like(got)
    ours = gradients(lambda a, w: ops.rms_norm(a, w, EPS), (x, weight), grad)
    exact = (x.double(), weight.double())
    theirs = gradients(lambda a, w: reference.rms_norm(a, w, EPS), exact, grad.double())
    for a, b in zip(ours, theirs, strict=True):
        size = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double() / size, b / size, **tol(dtype))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
def test_add_rms_norm(dtype):
    x, residual, weight = (
        randn(5, 33, dtype=dtype),
        randn(5, 33, dtype=dtype),
        randn(33, dtype=dtype),
    )
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
    y, total = ops.add_rms_norm(*leaves, EPS)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, ops.rms_norm(x + residual, weight, EPS), rtol=0, atol=0)
    g, h = torch.randn_like(y), torch.randn_like(y)
    torch.autograd.backward((y, total), (g, h))
    exact = [t.double().requires_grad_() for t in (x, residual, weight)]
    torch.autograd.backward(reference.add_rms_norm(*exact, EPS), (g.double(), h.double()))
    for a, b in zip(leaves, exact, strict=True):
        size = max(1.0, b.grad.abs().max().item())
        torch.testing.assert_close(a.grad.double() / size, b.grad / size, **tol(dtype))


def test_only_one_output_used():
    """只用其中一个输出时，另一个的梯度视为 0。"""
    for pick in (0, 1):
        leaves = [randn(3, 8).requires_grad_() for _ in range(2)]
        ops.add_rms_norm(*leaves, torch.ones(8), EPS)[pick].sum().backward()
        assert leaves[0].grad.isfinite().all() and torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.usefixtures("isa")
def test_weight_dtype_may_differ():
    x, weight = randn(4, 20, dtype=torch.bfloat16), randn(20)
    want = reference.rms_norm(x.double(), weight.double(), EPS)
    torch.testing.assert_close(ops.rms_norm(x, weight, EPS).double(), want, **tol(x.dtype))


@pytest.mark.usefixtures("isa")
def test_views_and_empty():
    x, weight = randn(6, 5, 33), randn(33)
    want = eager(x, weight)
    for view in (strided(x), flipped(x)):
        torch.testing.assert_close(ops.rms_norm(view, weight, EPS), want)
    got = ops.rms_norm(x.transpose(0, 1), strided(weight[None])[0], EPS)
    torch.testing.assert_close(got, want.transpose(0, 1))
    assert ops.rms_norm(randn(0, 33), weight, EPS).shape == (0, 33)
    assert ops.rms_norm(randn(33), weight, EPS).shape == (33,)


@pytest.mark.usefixtures("isa")
def test_zeros_and_nan():
    x = randn(3, 40)
    x[0], x[1, 3] = 0.0, torch.nan
    got = ops.rms_norm(x, torch.ones(40), EPS)
    assert (got[0] == 0).all() and got[1].isnan().all() and got[2].isfinite().all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
def test_no_less_accurate_than_transformers(dtype):
    x, weight = randn(64, 512, dtype=dtype), randn(512, dtype=dtype)
    exact = reference.rms_norm(x.double(), weight.double(), EPS)
    assert_no_worse(ops.rms_norm(x, weight, EPS), eager(x, weight), exact)
    grad = randn(64, 512, dtype=dtype)
    ours = gradients(lambda a, w: ops.rms_norm(a, w, EPS), (x, weight), grad)
    theirs = gradients(eager, (x, weight), grad)
    wide = (x.double(), weight.double())
    best = gradients(lambda a, w: reference.rms_norm(a, w, EPS), wide, grad.double())
    for a, b, c in zip(ours, theirs, best, strict=True):
        assert_no_worse(a, b, c)


def test_gradcheck_fp32():
    x, residual, weight = (randn(2, 5).requires_grad_() for _ in range(3))
    weight = randn(5).requires_grad_()
    options = {"eps": 1e-2, "atol": 5e-3, "rtol": 5e-3}
    assert torch.autograd.gradcheck(lambda a, w: ops.rms_norm(a, w, 0.1), (x, weight), **options)
    inputs = (x, residual, weight)
    assert torch.autograd.gradcheck(lambda *a: ops.add_rms_norm(*a, 0.1), inputs, **options)


@settings(max_examples=40)
@given(st.integers(1, 90), st.integers(1, 80), st.sampled_from(FLOATS), st.floats(1e-3, 1e3))
def test_any_shape_and_scale(rows, dim, dtype, scale):
    x, weight = randn(rows, dim, dtype=dtype, scale=scale), randn(dim, dtype=dtype)
    want = reference.rms_norm(x.double(), weight.double(), EPS)
    torch.testing.assert_close(ops.rms_norm(x, weight, EPS).double(), want, **tol(dtype))
