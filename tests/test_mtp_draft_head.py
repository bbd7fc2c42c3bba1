"""mtp_draft_head：对照 fp64 的 argmax，部分词表，坏输入。"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_opt import ops, reference
from tests.op_cases import FLOATS, randn, strided, wide
from tests.tolerances import tol

OP = torch.ops.deepseek_opt.mtp_draft_head


def regret(token, hidden, weight, bias, vocabulary):
    """选中的比最好的差多少（fp64），及分数的大小。"""
    scores = wide(hidden) @ wide(weight).T
    scores = scores if bias is None else scores + wide(bias)
    allowed = scores if vocabulary is None else scores[:, vocabulary]
    chosen = scores.gather(1, token[:, None])[:, 0]
    return (allowed.amax(1) - chosen).clamp_min(0), allowed.abs().amax(1) + 1


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@given(data=st.data())
@settings(max_examples=25)
def test_against_fp64(dtype, data):
    draw = data.draw
    rows, width, vocab = (draw(st.integers(a, b)) for a, b in ((1, 110), (1, 70), (1, 500)))
    hidden, weight = randn(rows, width, dtype=dtype), randn(vocab, width, dtype=dtype)
    if draw(st.booleans()):
        hidden, weight = strided(hidden), strided(weight)
    bias = randn(vocab, dtype=dtype) if draw(st.booleans()) else None
    vocabulary = None
    if draw(st.booleans()):
        ids = draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=60, unique=True))
        vocabulary = torch.tensor(sorted(ids) if draw(st.booleans()) else ids)
    token = ops.mtp_draft_head(hidden, weight, bias, vocabulary)
    assert token.shape == (rows,) and token.dtype == torch.int64
    if vocabulary is not None:
        assert torch.isin(token, vocabulary).all()
    lost, size = regret(token, hidden, weight, bias, vocabulary)
    assert bool((lost <= tol(torch.float32)["atol"] * size * width**0.5).all())


def test_exact_ties_take_the_first_candidate():
    hidden, weight = torch.ones(2, 3), torch.ones(5, 3)
    assert ops.mtp_draft_head(hidden, weight).tolist() == [0, 0]
    assert ops.mtp_draft_head(hidden, weight, None, torch.tensor([4, 1])).tolist() == [4, 4]
    assert reference.mtp_draft_head(hidden, weight, None, torch.tensor([4, 1])).tolist() == [4, 4]


def test_threads_do_not_matter():
    hidden, weight = randn(7, 64), randn(4001, 64)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(ops.mtp_draft_head(hidden, weight))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_opcheck_and_empty():
    args = (randn(3, 8), randn(20, 8), randn(20), torch.tensor([3, 4, 9]))
    torch.library.opcheck(OP.default, args)
    torch.library.opcheck(OP.default, (randn(3, 8), randn(20, 8), None, None))
    assert ops.mtp_draft_head(randn(0, 8), randn(20, 8)).shape == (0,)
    assert ops.mtp_draft_head(randn(2, 0), randn(4, 0)).tolist() == [0, 0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": randn(2, 3, 8)}, "hidden"),
        ({"hidden": torch.ones(2, 8, dtype=torch.int64)}, "hidden"),
        ({"weight": randn(20, 7)}, "weight"),
        ({"weight": randn(0, 8)}, "weight 至少要有一行"),
        ({"bias": randn(19)}, "bias"),
        ({"bias": randn(20, dtype=torch.bfloat16)}, "bias"),
        ({"vocabulary": torch.tensor([], dtype=torch.int64)}, "至少要有一个词元"),
        ({"vocabulary": torch.tensor([3, 20])}, r"vocabulary\[1\] 应在 \[0, 20\) 内，实际是 20"),
        ({"vocabulary": torch.tensor([-1])}, r"vocabulary\[0\]"),
        ({"vocabulary": torch.tensor([1.0])}, "vocabulary"),
    ],
)
def test_bad_input(change, message):
    given_args = {"hidden": randn(2, 8), "weight": randn(20, 8), "bias": None, "vocabulary": None}
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.mtp_draft_head(**{**given_args, **change})


def test_nan_names_the_row():
    hidden = randn(3, 8)
    hidden[1, 2] = float("nan")
    with pytest.raises((ValueError, RuntimeError), match="第 1 行的分数含 NaN"):
        ops.mtp_draft_head(hidden, randn(300, 8))
