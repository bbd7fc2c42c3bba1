"""mla_qkv_a：与分开的算子（fp64）比较，有无 q_a、偏置、各种角度形状。"""

from __future__ import annotations

import pytest
import torch

from deepseek_opt import ops, reference
from tests.op_cases import FLOATS, randn, strided, wide
from tests.tolerances import tol


def arguments(batch, steps, width, q_rank, rank, rope_dim, dtype, *, bias=False, shared=False):
    def projection(rows):
        return randn(rows, width, dtype=dtype, scale=width**-0.5)

    query = (None, None, None, 1e-6)
    if q_rank:
        q_bias = randn(q_rank, dtype=dtype) if bias else None
        query = (projection(q_rank), q_bias, randn(q_rank, dtype=dtype), 1e-6)
    joint = rank + rope_dim
    keys = (
        projection(joint),
        randn(joint, dtype=dtype) if bias else None,
        randn(rank, dtype=dtype),
    )
    angle = torch.rand(1 if shared else batch, steps, rope_dim // 2) * 30
    return (randn(batch, steps, width, dtype=dtype), *query, *keys, 1e-5, angle.cos(), angle.sin())


def check(args, interleaved):
    want = reference.mla_qkv_a(*(wide(a) for a in args), interleaved)
    for got, exact in zip(ops.mla_qkv_a(*args, interleaved), want, strict=True):
        assert got.dtype == args[0].dtype and got.shape == exact.shape
        torch.testing.assert_close(got.double(), exact, **tol(got.dtype))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_against_fp64(dtype, interleaved):
    check(arguments(1, 1, 40, 0, 9, 4, dtype, shared=True), interleaved)
    check(arguments(3, 1, 64, 50, 33, 8, dtype, bias=True), interleaved)
    check(arguments(2, 3, 33, 7, 20, 6, dtype), interleaved)
    check(arguments(1, 5, 17, 5, 1, 0, dtype, shared=True, bias=True), interleaved)
    check(arguments(4, 1, 17, 5, 12, 2, dtype, shared=True), interleaved)


@pytest.mark.usefixtures("isa")
def test_views_and_empty():
    args = arguments(2, 3, 33, 7, 20, 6, torch.float32)
    want = ops.mla_qkv_a(*args, True)
    views = (strided(args[0]), strided(args[1]), *args[2:])
    for a, b in zip(ops.mla_qkv_a(*views, True), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    empty = ops.mla_qkv_a(*arguments(0, 1, 33, 7, 20, 6, torch.float32), True)
    assert [t.shape for t in empty] == [(0, 1, 7), (0, 1, 20), (0, 1, 6)]


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, randn(2, 33), "x 的形状"),
        (1, randn(7, 32), "q_a_weight 的形状"),
        (1, None, "应同时给出"),
        (2, randn(8), "q_a_bias 的形状"),
        (3, randn(6), "q_norm_weight 的形状"),
        (5, randn(26, 32), "kv_a_weight 的形状"),
        (7, randn(21), "非负偶数"),
        (9, randn(2, 2, 3), "cos 的形状"),
        (10, randn(1, 3, 3), "sin 的形状"),
        (9, randn(1, 3, 3), "形状|第 0 维"),
    ],
)
def test_bad_input(position, value, message):
    args = list(arguments(2, 3, 33, 7, 20, 6, torch.float32))
    args[position] = value
    with pytest.raises(ValueError, match=message):
        ops.mla_qkv_a(*args, True)
