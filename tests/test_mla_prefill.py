"""mla_prefill：前向（out、lse）与反向，打包、分块、遮盖、NaN；误差不大于 eager。"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_opt import ops, reference
from tests.op_cases import (
    FLOATS,
    QUANTIZED,
    assert_no_worse,
    attention,
    eager_attention,
    flipped,
    randn,
    strided,
)
from tests.tolerances import tol

SMALL = (33, 6, 9, 5)
SHAPES = [
    (1, 1, 5, 2, (16, 4, 8, 6)),
    (3, 5, 70, 3, SMALL),
    (2, 50, 50, 2, (20, 0, 8, 17)),
    (1, 3, 270, 2, (7, 2, 1, 1)),
]


def check(case, dtype=None, gradient=True):
    """前向与四个梯度对照 fp64；返回 (out, lse, 梯度)。"""
    limits = tol(dtype or case.q.dtype)
    want, want_lse = case.exact()
    leaves = case.leaves() if gradient else []
    out, lse = ops.mla_prefill(*(case.with_leaves(leaves) if gradient else case).args())
    assert out.dtype == case.q.dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), want, **limits)
    torch.testing.assert_close(lse.double(), want_lse, **limits)
    if not gradient:
        return None
    grad = torch.randn_like(out)
    out.backward(grad)
    exact = case.leaves(torch.float64)
    reference.mla_prefill(*case.with_leaves(exact).args())[0].backward(grad.double())
    for ours, theirs in zip(leaves, exact, strict=True):
        assert ours.grad.dtype == ours.dtype
        size = max(1.0, theirs.grad.abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours.grad.double() / size, theirs.grad / size, **limits)
    return [leaf.grad for leaf in leaves]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(dtype, causal, shape):
    check(attention(*shape, dtype=dtype, causal=causal))
    check(attention(*shape, dtype=dtype, causal=causal, masked=True))


@pytest.mark.parametrize("heads", [1, 3, 9, 16, 63, 64, 128])
def test_heads(heads):
    check(attention(2, 3, 20, heads, (16, 4, 6, 5)))


@pytest.mark.parametrize("length", [47, 48, 49, 64, 65, 255, 256, 257, 300])
def test_tile_edges(length):
    check(attention(1, length, length, 2, (12, 4, 6, 5)))
    check(attention(1, length, length, 1, (12, 4, 6, 5), dtype=torch.bfloat16))


@pytest.mark.usefixtures("isa")
def test_mixed_dtypes():
    case = attention(2, 9, 40, 3, SMALL, dtype=torch.float32, cache=torch.bfloat16)
    out, _ = ops.mla_prefill(*case.args())
    torch.testing.assert_close(out.double(), case.exact()[0], **tol(torch.float32))
    check(case, torch.bfloat16)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("cache", QUANTIZED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantized_latents(dtype, cache):
    case = attention(2, 9, 80, 3, SMALL, dtype=dtype, cache=cache, masked=True)
    check(case, gradient=False)


@pytest.mark.usefixtures("isa")
def test_matches_decode():
    case = attention(2, 4, 90, 3, SMALL)
    out, _ = ops.mla_prefill(*case.args())
    torch.testing.assert_close(out, ops.mla_decode(*case.args()), **tol(torch.float32))


@pytest.mark.usefixtures("isa")
def test_left_padding_and_ragged_rows():
    case = attention(4, 6, 40, 2, SMALL, begin=[0, 10, 37, 40], end=[40, 30, 39, 40])
    grads = check(case)
    assert all(g.isfinite().all() for g in grads)


def test_packed_equals_separate():
    """cu_seqlens 打包的结果与梯度等于逐条序列。"""
    lengths = [1, 7, 0, 30, 12]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    case = attention(1, 50, 50, 3, SMALL).but(spans=ops.spans_from_cu_seqlens(bounds))
    leaves = case.leaves()
    out, _ = ops.mla_prefill(*case.with_leaves(leaves).args())
    grad = torch.randn_like(out)
    out.backward(grad)
    weight = torch.zeros_like(case.kv_b)
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        part = slice(begin, end)
        one = case.but(q=case.q[:, part], latent=case.latent[:, part], rope=case.rope[:, part])
        mine = one.leaves()
        one = one.with_leaves(mine).but(spans=ops.make_spans(1, end - begin, end - begin))
        alone, _ = ops.mla_prefill(*one.args())
        alone.backward(grad[:, part])
        torch.testing.assert_close(out[:, part], alone, **tol(torch.float32))
        for whole, single in zip(leaves[:3], mine[:3], strict=True):
            torch.testing.assert_close(whole.grad[:, part], single.grad, **tol(torch.float32))
        weight += mine[3].grad
    torch.testing.assert_close(leaves[3].grad, weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 48, 64])
def test_chunked_equals_one_shot(chunk):
    length = 130
    case = attention(2, length, length, 3, SMALL)
    whole, _ = ops.mla_prefill(*case.args())
    for begin in range(0, length, chunk):
        end = min(length, begin + chunk)
        spans = ops.make_spans(2, end - begin, end, slots=length)
        part = case.but(q=case.q[:, begin:end], spans=spans)
        torch.testing.assert_close(
            ops.mla_prefill(*part.args())[0], whole[:, begin:end], **tol(torch.float32)
        )


@pytest.mark.usefixtures("isa")
def test_spans_may_share_keys():
    spans = torch.tensor([[4, 6, 10, 40], [0, 2, 0, 40], [2, 4, 10, 20], [6, 6, 3, 3]])
    check(attention(1, 7, 40, 3, SMALL).but(spans=spans))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
def test_unused_slots_may_be_nan(dtype):
    """没有查询看得见的槽位可以是 NaN：结果与全部梯度都不受影响。"""
    case = attention(3, 2, 90, 3, SMALL, dtype=dtype, begin=[0, 70, 3], end=[66, 90, 5])
    case.kv_mask = torch.rand(3, 90) > 0.4
    grad = torch.randn(3, 2, 3, 5).to(dtype)
    slots, begin, end = (
        torch.arange(90),
        torch.tensor([[0], [70], [3]]),
        torch.tensor([[66], [90], [5]]),
    )
    hidden = ~((slots >= begin) & (slots < end) & case.kv_mask)
    results = []
    for fill in (0.0, torch.nan):
        latent, rope = case.latent.clone(), case.rope.clone()
        latent[hidden], rope[hidden] = fill, fill
        filled = case.but(latent=latent, rope=rope)
        leaves = filled.leaves()
        out, lse = ops.mla_prefill(*filled.with_leaves(leaves).args())
        out.backward(grad)
        results.append((out, lse, *(leaf.grad for leaf in leaves)))
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    assert (results[1][3][hidden] == 0).all() and (results[1][4][hidden] == 0).all()


@pytest.mark.usefixtures("isa")
def test_query_that_sees_nothing():
    case = attention(2, 2, 30, 3, SMALL, causal=False)
    hidden = case.but(kv_mask=torch.zeros(2, 30, dtype=torch.bool))
    no_spans = case.but(spans=torch.empty(0, 4, dtype=torch.int64))
    no_keys = case.but(spans=torch.tensor([[0, 2, 5, 5], [2, 4, 60, 60]]))
    for blind in (hidden, no_spans, no_keys):
        leaves = blind.leaves()
        out, lse = ops.mla_prefill(*blind.with_leaves(leaves).args())
        assert (out == 0).all() and lse.isneginf().all()
        out.sum().backward()
        assert all((leaf.grad == 0).all() for leaf in leaves)


def test_no_slots_and_no_tokens():
    case = attention(2, 1, 0, 3, SMALL, causal=False)
    leaves = case.leaves()
    out, lse = ops.mla_prefill(*case.with_leaves(leaves).args())
    assert (out == 0).all() and lse.isneginf().all()
    out.sum().backward()
    assert (leaves[3].grad == 0).all()
    out, lse = ops.mla_prefill(*attention(2, 0, 5, 3, SMALL).args())
    assert out.shape == (2, 0, 3, 5) and lse.shape == (2, 0, 3)


@pytest.mark.usefixtures("isa")
def test_views():
    case = attention(2, 7, 40, 4, SMALL)
    store, keys = randn(2, 100, 33), randn(2, 100, 6)
    store[:, 20:60], keys[:, 20:60] = case.latent, case.rope
    views = case.but(
        q=case.q.transpose(1, 2).contiguous().transpose(1, 2),
        latent=store[:, 20:60],
        rope=keys[:, 20:60],
        kv_b=strided(case.kv_b),
    )
    flips = case.but(q=flipped(case.q), latent=flipped(case.latent), kv_b=flipped(case.kv_b))
    grad = torch.randn(2, 7, 4, 5)
    results = []
    for each in (case, views, flips):
        tensors = [t.detach().requires_grad_() for t in (each.q, each.latent, each.rope, each.kv_b)]
        out, lse = ops.mla_prefill(*each.with_leaves(tensors).args())
        out.backward(grad.transpose(1, 2).contiguous().transpose(1, 2))
        results.append((out, lse, *(t.grad for t in tensors)))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.usefixtures("isa")
def test_nan_reaches_only_who_sees_it():
    case = attention(2, 4, 20, 3, SMALL)
    case.latent[0, 18, 4] = torch.nan  # 行 0 的后两个查询看得见
    out, _ = ops.mla_prefill(*case.args())
    assert out[0, 2:].isnan().all() and out[1].isfinite().all()


def test_lse_has_no_gradient():
    case = attention(1, 3, 5, 2, SMALL)
    out, lse = ops.mla_prefill(*case.with_leaves(case.leaves()).args())
    assert out.requires_grad and not lse.requires_grad


def test_partial_gradients():
    """只有一个输入要梯度时，与全部要梯度时相同。"""
    case = attention(2, 5, 9, 2, SMALL)
    every = case.leaves()
    ops.mla_prefill(*case.with_leaves(every).args())[0].square().sum().backward()
    for index in range(4):
        some = [t.detach() for t in case.leaves()]
        some[index].requires_grad_()
        ops.mla_prefill(*case.with_leaves(some).args())[0].square().sum().backward()
        torch.testing.assert_close(some[index].grad, every[index].grad, rtol=0, atol=0)


def test_gradcheck_fp32():
    case = attention(1, 2, 3, 2, (3, 2, 2, 2))

    def function(*tensors):
        return ops.mla_prefill(*case.with_leaves(list(tensors)).args())[0]

    leaves = case.leaves()
    assert torch.autograd.gradcheck(function, leaves, eps=1e-2, atol=3e-3, rtol=3e-3)


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_less_accurate_than_eager(dtype):
    case = attention(2, 128, 128, 8, (64, 16, 32, 32), dtype=dtype)
    grad = torch.randn(2, 128, 8, 32).to(dtype)
    runs = []
    for function, kind in ((ops.mla_prefill, None), (eager_attention, None), (None, torch.float64)):
        leaves = case.leaves(kind)
        with_grad = case.with_leaves(leaves)
        if function is eager_attention:
            out = eager_attention(with_grad)
        else:
            out = (function or reference.mla_prefill)(*with_grad.args())[0]
        out.backward(grad.to(out.dtype))
        runs.append((out, *(leaf.grad for leaf in leaves)))
    for index, (ours, eager, exact) in enumerate(zip(*runs, strict=True)):
        # fp32 的 dq 用 dO·O 求 softmax 的行和（不保存概率），比逐项求和多一次舍入。
        factor = 1.25 if index == 1 and dtype == torch.float32 else 1.1
        assert_no_worse(ours.detach(), eager.detach(), exact.detach(), factor)


@settings(max_examples=40)
@given(st.data(), st.sampled_from(FLOATS), st.booleans(), st.booleans())
def test_any_shape(data, dtype, causal, masked):
    steps, spare = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 60))
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    dims = [data.draw(st.integers(low, 40)) for low in (1, 0, 1, 1)]
    begin = data.draw(st.lists(st.integers(0, spare), min_size=batch, max_size=batch))
    case = attention(
        batch,
        steps,
        steps + spare,
        heads,
        dims,
        dtype=dtype,
        causal=causal,
        begin=begin,
        masked=masked,
    )
    check(case)
