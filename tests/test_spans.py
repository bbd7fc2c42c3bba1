"""make_spans、spans_from_cu_seqlens，以及核对 spans 的检查。"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_opt import ops
from deepseek_opt.ops.spans import _sliced, row_spans
from tests.op_cases import attention
from tests.tolerances import tol


def test_default_sees_every_slot():
    assert ops.make_spans(2, 3, 5).tolist() == [[0, 3, 0, 5], [3, 6, 5, 10]]
    assert ops.make_spans(2, 1, 5, slots=8).tolist() == [[0, 1, 0, 5], [1, 2, 8, 13]]
    assert ops.make_spans(0, 1, 5).shape == (0, 4)


def test_left_padding_drops_padded_queries():
    spans = ops.make_spans(3, 4, 4, begin=[0, 1, 4])
    assert spans.tolist() == [[0, 4, 0, 4], [5, 8, 5, 8], [12, 12, 12, 12]]


def test_begin_and_end():
    spans = ops.make_spans(2, 2, 6, begin=torch.tensor([1, 0]), end=[4, 6], slots=7)
    assert spans.tolist() == [[0, 2, 1, 4], [2, 4, 7, 13]]
    spans = ops.make_spans(1, 3, 6, begin=[5], end=[6])
    assert spans.tolist() == [[2, 3, 5, 6]]


def test_non_causal_keeps_every_query():
    spans = ops.make_spans(2, 4, 3, begin=[0, 2], causal=False)
    assert spans.tolist() == [[0, 4, 0, 3], [4, 8, 5, 6]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"begin": [0]}, r"begin 的形状应为 \[2\]，实际是 \[1\]"),
        ({"end": [[1, 2]]}, "end 的形状"),
        ({"begin": [-1, 0]}, "第 0 行.*begin = -1"),
        ({"begin": [0, 5], "end": [6, 4]}, "第 1 行.*begin = 5、end = 4"),
        ({"end": [6, 7]}, "0 <= begin <= end <= 6"),
        ({"end": [1, 6]}, "end = 1 小于新词元数 2"),
    ],
)
def test_bad_ranges(options, message):
    with pytest.raises(ValueError, match=message):
        ops.make_spans(2, 2, 6, **options)


@pytest.mark.parametrize("ends", [7, [7, 4, 5]])
def test_row_spans_are_make_spans(ends):
    """在设备上算的与 make_spans 相同。"""
    given = ends if isinstance(ends, int) else torch.tensor(ends)
    mine = row_spans(3, 2, 8, given, torch.device("cpu"))
    whole = [ends] * 3 if isinstance(ends, int) else ends
    assert mine.equal(ops.make_spans(3, 2, 7, end=whole, slots=8))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("start, stop", [(0, 2), (2, 4), (1, 4), (3, 4)])
def test_slices_that_keep_empty_rows(start, stop, is_causal):
    """设备上不去掉被切空的：其余相同，切空的范围是空的而且仍在缓存之内。"""
    spans = torch.tensor([[0, 2, 0, 3], [2, 4, 3, 6], [5, 8, 6, 12]])
    part = _sliced(spans, 4, start, stop, is_causal)
    filled = part[:, 0] < part[:, 1]
    assert part[filled].equal(ops.slice_spans(spans, 4, start, stop, is_causal))
    assert part[~filled, 0].equal(part[~filled, 1])
    assert bool((part[:, 2] <= part[:, 3]).all()) and bool((part[:, 3] <= 12).all())


def test_kv_len_out_of_range():
    with pytest.raises(ValueError, match="end = 1 小于新词元数 2"):
        ops.make_spans(1, 2, 1)
    with pytest.raises(ValueError, match="end <= 4"):
        ops.make_spans(1, 1, 5, slots=4)


def test_cu_seqlens():
    q, k = torch.tensor([0, 3, 3, 5], dtype=torch.int32), torch.tensor([0, 3, 4, 9])
    assert ops.spans_from_cu_seqlens(q).tolist() == [[0, 3, 0, 3], [3, 3, 3, 3], [3, 5, 3, 5]]
    spans = ops.spans_from_cu_seqlens(q, k)
    assert spans.dtype == torch.int64 and spans[2].tolist() == [3, 5, 4, 9]
    assert ops.spans_from_cu_seqlens(torch.tensor([0])).shape == (0, 4)


@pytest.mark.parametrize("bad", [[], [1, 2], [0, 3, 2], [[0, 1]]])
def test_bad_cu_seqlens(bad):
    with pytest.raises(ValueError, match="cu_q 应为从 0 开始、不下降"):
        ops.spans_from_cu_seqlens(torch.tensor(bad, dtype=torch.int64))
    with pytest.raises(ValueError, match="cu_k"):
        ops.spans_from_cu_seqlens(torch.tensor([0, 1]), torch.tensor(bad, dtype=torch.int64))


def test_cu_seqlens_of_different_lengths():
    with pytest.raises(ValueError, match="cu_q 与 cu_k 的长度应相同，实际是 2 与 3"):
        ops.spans_from_cu_seqlens(torch.tensor([0, 1]), torch.tensor([0, 1, 2]))


@settings(max_examples=60)
@given(st.data())
def test_any_spans_are_accepted_by_the_kernels(data):
    batch, steps = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    slots = steps + data.draw(st.integers(0, 9))
    end = data.draw(st.lists(st.integers(steps, slots), min_size=batch, max_size=batch))
    begin = [data.draw(st.integers(0, e)) for e in end]
    case = attention(batch, steps, slots, 2, (5, 2, 3, 4), begin=begin, end=end)
    torch.testing.assert_close(
        ops.mla_decode(*case.args()).double(), case.exact()[0], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "spans, message",
    [
        ([[0, 5, 0, 6]], r"spans\[0\] 的查询范围 \[0, 5\) 应落在同一行之内"),
        ([[-1, 1, 0, 6]], "查询范围"),
        ([[2, 1, 0, 6]], "查询范围"),
        ([[0, 2, 0, 6], [4, 8, 6, 13]], r"spans\[1\] 的键范围 \[6, 13\)"),
        ([[0, 2, -2, 6]], "键范围"),
        ([[0, 2, 5, 7]], "键范围"),
        ([[0, 4, 0, 3]], "键数 3 不应少于查询数 4"),
        ([[0, 2, 0, 6], [1, 3, 0, 6]], "查询范围重叠"),
    ],
)
@pytest.mark.parametrize("name", ["mla_decode", "mla_prefill"])
def test_kernels_reject_bad_spans(name, spans, message):
    case = attention(2, 4, 6, 2, (5, 2, 3, 4)).but(spans=torch.tensor(spans))
    with pytest.raises(ValueError, match=message):
        getattr(ops, name)(*case.args())


@pytest.mark.parametrize("causal", [True, False])
def test_slice_spans_equals_slicing_the_output(causal):
    torch.manual_seed(0)
    batch, steps, heads = 2, 11, 3
    q, latent = torch.randn(batch, steps, heads, 12), torch.randn(batch, steps, 16)
    rope, weight = torch.randn(batch, steps, 4), torch.randn(heads * (8 + 6), 16)
    spans = ops.make_spans(batch, steps, steps, begin=[0, 4], causal=causal)
    whole, _ = ops.mla_prefill(q, latent, rope, None, weight, spans, None, 0.3, 6, causal)
    for start, stop in ((0, 3), (3, 4), (4, 11)):
        part = ops.slice_spans(spans, steps, start, stop, causal)
        args = (latent, rope, None, weight, part, None, 0.3, 6, causal)
        out, _ = ops.mla_prefill(q[:, start:stop], *args)
        torch.testing.assert_close(out, whole[:, start:stop], **tol(torch.float32))


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 2), (3, 9)])
def test_slice_spans_rejects_bad_ranges(start, stop):
    with pytest.raises(ValueError, match="slice_spans：应满足"):
        ops.slice_spans(ops.make_spans(1, 8, 8), 8, start, stop)
