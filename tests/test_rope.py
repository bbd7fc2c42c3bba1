"""rope、rope_：对照 fp64；逆即转置；可求导。"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_opt import ops, reference
from tests.op_cases import FLOATS, flipped, randn, strided
from tests.tolerances import tol


def angles(batch, steps, half, scale=1.0):
    angle = torch.rand(batch, steps, half) * 100
    return angle.cos() * scale, angle.sin() * scale


# (interleaved, keep_pairs)
LAYOUTS = pytest.mark.parametrize("layout", [(False, False), (True, False), (True, True)])


def turn(op, x, cos, sin, layout, inverse=False):
    return op(x, cos, sin, layout[0], inverse, layout[1])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@LAYOUTS
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_against_fp64(dtype, layout, inverse, shared):
    for half in (1, 3, 8, 33):
        x = randn(3, 5, 2, 2 * half, dtype=dtype)
        cos, sin = angles(1 if shared else 3, 5, half, 1.3)
        got = turn(ops.rope, x, cos, sin, layout, inverse)
        want = turn(reference.rope, x.double(), cos.double(), sin.double(), layout, inverse)
        torch.testing.assert_close(got.double(), want, **tol(dtype))


def test_pairs_are_complex_numbers():
    """成对进、成对出就是复数乘法（transformers 的 DeepSeek-V2）；不成对出的只是排列不同。"""
    x, (cos, sin) = randn(2, 3, 4, 10), angles(2, 3, 5)
    want = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin).unsqueeze(2)
    got = ops.rope(x, cos, sin, True, keep_pairs=True)
    torch.testing.assert_close(got, torch.view_as_real(want).flatten(-2))
    halves = torch.cat((got[..., 0::2], got[..., 1::2]), -1)
    assert torch.equal(ops.rope(x, cos, sin, True), halves)
    for op in (ops.rope, ops.rope_):
        with pytest.raises(ValueError, match="keep_pairs=True 时 interleaved 也应为 True"):
            op(x, cos, sin, False, keep_pairs=True)


@pytest.mark.usefixtures("isa")
@LAYOUTS
def test_inverse_is_transpose(layout):
    x, y = randn(2, 3, 4, 10), randn(2, 3, 4, 10)
    cos, sin = angles(2, 3, 5)
    turned = turn(ops.rope, x, cos, sin, layout)
    torch.testing.assert_close(turn(ops.rope, turned, cos, sin, layout, True), x)
    right = (x * turn(ops.rope, y, cos, sin, layout, True)).sum()
    torch.testing.assert_close((turned * y).sum(), right)


@LAYOUTS
@pytest.mark.parametrize("inverse", [False, True])
def test_gradient(layout, inverse):
    x, (cos, sin) = randn(2, 3, 2, 6), angles(1, 3, 3)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    grad = randn(2, 3, 2, 6)
    turn(ops.rope, ours, cos, sin, layout, inverse).backward(grad)
    wide = (cos.double(), sin.double())
    turn(reference.rope, exact, *wide, layout, inverse).backward(grad.double())
    torch.testing.assert_close(ours.grad.double(), exact.grad, **tol(torch.float32))

    def function(value):
        return turn(ops.rope, value, cos, sin, layout, inverse)

    leaf = randn(1, 3, 1, 6).requires_grad_()
    assert torch.autograd.gradcheck(function, (leaf,), eps=1e-2, atol=1e-3, rtol=1e-3)


@pytest.mark.usefixtures("isa")
def test_angles_of_any_dtype():
    x, (cos, sin) = randn(1, 4, 2, 8), angles(1, 4, 4)
    for dtype in (torch.float64, torch.bfloat16):
        c, s = cos.to(dtype), sin.to(dtype)
        torch.testing.assert_close(
            ops.rope(x, c, s, True), ops.rope(x, c.float(), s.float(), True), rtol=0, atol=0
        )


@pytest.mark.usefixtures("isa")
def test_views_and_empty():
    x, (cos, sin) = randn(2, 5, 3, 12), angles(2, 5, 6)
    want = ops.rope(x, cos, sin, True)
    for view in (strided(x), flipped(x), x.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.testing.assert_close(ops.rope(view, cos, sin, True), want, rtol=0, atol=0)
    torch.testing.assert_close(ops.rope(x, flipped(cos), strided(sin), True), want)
    assert ops.rope(randn(2, 0, 3, 12), cos[:, :0], sin[:, :0], True).shape == (2, 0, 3, 12)
    assert ops.rope(randn(2, 5, 3, 0), cos[..., :0], sin[..., :0], True).shape == (2, 5, 3, 0)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@LAYOUTS
def test_in_place_on_a_slice(dtype, layout):
    """只旋转最后几维，其余不动。"""
    q, (cos, sin) = randn(2, 5, 3, 14, dtype=dtype), angles(2, 5, 4)
    before = q.clone()
    ops.rope_(q[..., 6:], cos, sin, *layout)
    torch.testing.assert_close(q[..., :6], before[..., :6], rtol=0, atol=0)
    want = turn(ops.rope, before[..., 6:], cos, sin, layout)
    torch.testing.assert_close(q[..., 6:], want, rtol=0, atol=0)


@pytest.mark.usefixtures("isa")
def test_nan_touches_only_its_pair():
    x, (cos, sin) = randn(1, 1, 2, 16), angles(1, 1, 8)
    x[0, 0, 1, 3] = torch.nan
    assert ops.rope(x, cos, sin, False).isnan().sum() == 2


@settings(max_examples=30)
@given(
    st.integers(1, 3),
    st.integers(1, 20),
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from([(False, False), (True, False), (True, True)]),
)
def test_any_shape(batch, steps, heads, half, layout):
    x, (cos, sin) = randn(batch, steps, heads, 2 * half), angles(batch, steps, half)
    want = turn(reference.rope, x.double(), cos.double(), sin.double(), layout)
    got = turn(ops.rope, x, cos, sin, layout).double()
    torch.testing.assert_close(got, want, **tol(torch.float32))
