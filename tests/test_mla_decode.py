"""mla_decode：对照 fp64，span、遮盖、量化、视图、巨大步长；误差不大于 eager。"""

from __future__ import annotations

import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_opt import ops
from deepseek_opt.reference.mla import quantize
from tests.op_cases import (
    FLOATS,
    QUANTIZED,
    assert_no_worse,
    attention,
    eager_attention,
    flipped,
    randn,
    strided,
    wide,
)
from tests.tolerances import tol

SMALL = (33, 6, 9, 5)
# (batch, steps, slots, heads, (rank, rope, nope, v))
SHAPES = [
    (1, 1, 5, 2, (16, 4, 8, 6)),
    (3, 5, 70, 3, SMALL),
    (2, 17, 17, 5, (48, 0, 16, 16)),
    (1, 2, 131, 9, (7, 2, 1, 1)),
]


def check(case, dtype=None):
    got = ops.mla_decode(*case.args())
    assert got.dtype == case.q.dtype
    torch.testing.assert_close(got.double(), case.exact()[0], **tol(dtype or case.q.dtype))
    return got


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(dtype, causal, shape):
    check(attention(*shape, dtype=dtype, causal=causal))
    check(attention(*shape, dtype=dtype, causal=causal, masked=True))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("heads", [1, 3, 9, 16, 63, 64, 65, 128])
def test_heads(heads):
    check(attention(2, 1, 20, heads, (16, 4, 6, 5)))


@pytest.mark.parametrize("steps", [1, 2, 7, 16, 33, 64])
def test_new_tokens(steps):
    for dtype in FLOATS:
        check(attention(2, steps, steps + 9, 3, SMALL, dtype=dtype))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("types", [(FLOATS[0], FLOATS[1]), (FLOATS[1], FLOATS[0]), FLOATS[1:]])
def test_mixed_dtypes(types):
    case = attention(2, 2, 70, 3, SMALL, dtype=types[0], cache=types[1])
    check(case)
    check(case.but(kv_b=case.kv_b.to(types[1])))
    check(case.but(rope=case.rope.to(types[0])))


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("cache", QUANTIZED)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantized_latents(dtype, cache):
    check(attention(2, 3, 80, 3, SMALL, dtype=dtype, cache=cache, masked=True))


@pytest.mark.parametrize("cache", QUANTIZED)
def test_quantized_is_close_to_float(cache):
    case = attention(1, 1, 300, 8, (64, 8, 16, 16))
    values, scale = quantize(case.latent, cache)
    got = ops.mla_decode(*case.but(latent=values, scale=scale).args())
    torch.testing.assert_close(got, ops.mla_decode(*case.args()), **tol(cache))


@pytest.mark.parametrize("splits", [511, 512, 513, 1400])
def test_split_over_the_cache(splits):
    for dtype in FLOATS:
        check(attention(1, 1, splits, 4, (24, 4, 8, 8), dtype=dtype))
    check(attention(2, 1, splits, 2, (24, 4, 8, 8), masked=True, begin=[splits - 3, 5]))


@pytest.mark.usefixtures("isa")
def test_left_padding_and_ragged_rows():
    case = attention(4, 3, 40, 2, SMALL, begin=[0, 10, 36, 39], end=[40, 30, 39, 40])
    got = check(case)
    assert (got[3, :2] == 0).all() and (got[3, 2] != 0).any()


@pytest.mark.usefixtures("isa")
def test_unused_slots_may_be_nan():
    """没有 span 看到的、被遮住的槽位都可以是从未写过的内存。"""
    for dtype in (*FLOATS, *QUANTIZED):
        cache = dtype if dtype in QUANTIZED else None
        q = torch.bfloat16 if cache else dtype
        case = attention(
            3, 2, 90, 3, SMALL, dtype=q, cache=cache, begin=[0, 70, 3], end=[66, 90, 5]
        )
        case.kv_mask = torch.rand(3, 90) > 0.4
        want = case.exact()[0]
        slots = torch.arange(90)
        begin, end = torch.tensor([[0], [70], [3]]), torch.tensor([[66], [90], [5]])
        hidden = ~((slots >= begin) & (slots < end) & case.kv_mask)
        if cache:
            case.scale[hidden] = torch.nan
        else:
            case.latent[hidden] = torch.nan
        case.rope[hidden] = torch.nan
        torch.testing.assert_close(ops.mla_decode(*case.args()).double(), want, **tol(q))


@pytest.mark.usefixtures("isa")
def test_query_that_sees_nothing_gives_zero():
    case = attention(2, 2, 30, 3, SMALL, causal=False)
    hidden = case.but(kv_mask=torch.zeros(2, 30, dtype=torch.bool))
    assert (ops.mla_decode(*hidden.args()) == 0).all()
    no_spans = case.but(spans=torch.empty(0, 4, dtype=torch.int64))
    assert (ops.mla_decode(*no_spans.args()) == 0).all()
    empty_keys = case.but(spans=torch.tensor([[0, 2, 5, 5], [2, 4, 60, 60]]))
    assert (ops.mla_decode(*empty_keys.args()) == 0).all()


@pytest.mark.usefixtures("isa")
def test_no_slots_at_all():
    case = attention(2, 1, 0, 3, SMALL, causal=False)
    assert (ops.mla_decode(*case.args()) == 0).all()
    empty = attention(2, 0, 5, 3, SMALL)
    assert ops.mla_decode(*empty.args()).shape == (2, 0, 3, 5)


@pytest.mark.usefixtures("isa")
def test_spans_may_share_keys():
    """几个查询段看同一段键（共享前缀）；次序、长度各异。"""
    spans = torch.tensor([[4, 6, 10, 40], [0, 2, 0, 40], [2, 4, 10, 20], [6, 6, 3, 3]])
    check(attention(1, 7, 40, 3, SMALL).but(spans=spans))


@pytest.mark.usefixtures("isa")
def test_packed_rows_equal_separate_rows():
    case = attention(3, 2, 50, 3, SMALL)
    want = ops.mla_decode(*case.args())
    packed = case.but(
        q=case.q.reshape(1, 6, 3, -1),
        latent=case.latent.reshape(1, 150, -1),
        rope=case.rope.reshape(1, 150, -1),
        spans=ops.spans_from_cu_seqlens(
            torch.tensor([0, 2, 4, 6]), torch.tensor([0, 50, 100, 150])
        ),
    )
    got = ops.mla_decode(*packed.args()).reshape(want.shape)
    torch.testing.assert_close(got, want, **tol(torch.float32))


@pytest.mark.usefixtures("isa")
def test_views():
    case = attention(2, 3, 40, 4, SMALL)
    want = ops.mla_decode(*case.args())
    store, keys = randn(2, 100, 33), randn(2, 100, 6)
    store[:, 20:60], keys[:, 20:60] = case.latent, case.rope
    views = case.but(
        q=case.q.transpose(1, 2).contiguous().transpose(1, 2),
        latent=store[:, 20:60],
        rope=keys[:, 20:60],
        kv_b=strided(case.kv_b),
        spans=strided(case.spans),
    )
    torch.testing.assert_close(ops.mla_decode(*views.args()), want, rtol=0, atol=0)
    flips = case.but(q=flipped(case.q), latent=flipped(case.latent), kv_b=flipped(case.kv_b))
    torch.testing.assert_close(ops.mla_decode(*flips.args()), want, rtol=0, atol=0)


@pytest.mark.usefixtures("isa")
def test_huge_strides():
    """批步长超过 2^31 个元素（稀疏文件映射，不占内存）。"""
    case = attention(2, 1, 9, 2, (16, 4, 6, 5), dtype=torch.bfloat16)
    want = ops.mla_decode(*case.args())
    stride = 2**31 + 64
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(2 * (stride + 4096))
        flat = torch.from_file(file.name, shared=True, size=stride + 4096, dtype=torch.bfloat16)
        latent = flat.as_strided((2, 9, 16), (stride, 16, 1))
        rope = flat.as_strided((2, 9, 4), (stride, 4, 1), 2048)
        offsets = torch.zeros(2, dtype=torch.int64)
        ops.mla_cache_write(latent, rope, None, case.latent, case.rope, offsets)
        got = ops.mla_decode(*case.but(latent=latent, rope=rope).args())
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        del flat, latent, rope


@pytest.mark.usefixtures("isa")
def test_nan_reaches_only_who_sees_it():
    case = attention(2, 2, 20, 3, SMALL)
    case.latent[0, 19, 4] = torch.nan  # 行 0 的最后一个查询看得见
    got = ops.mla_decode(*case.args())
    assert got[0, 1].isnan().all() and got[1].isfinite().all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("slots", [1, 5, 600])
def test_nan_query_gives_nan(slots):
    case = attention(1, 1, slots, 2, SMALL)
    case.q[0, 0, 1] = torch.nan
    got = ops.mla_decode(*case.args())
    assert got[0, 0, 1].isnan().all() and got[0, 0, 0].isfinite().all()


@pytest.mark.usefixtures("isa")
def test_large_scores_do_not_overflow():
    case = attention(1, 2, 30, 2, SMALL)
    case = case.but(q=case.q * 1e4)
    torch.testing.assert_close(
        ops.mla_decode(*case.args()).double(), case.exact()[0], rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("steps", [1, 4])
def test_no_less_accurate_than_eager(dtype, steps):
    case = attention(4, steps, 256, 16, (64, 16, 32, 32), dtype=dtype)
    exact = case.exact()[0]
    assert_no_worse(ops.mla_decode(*case.args()), eager_attention(case), exact)


@settings(max_examples=60)
@given(st.data(), st.sampled_from(FLOATS), st.booleans(), st.booleans())
def test_any_shape(data, dtype, causal, masked):
    steps, spare = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 100))
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    dims = [data.draw(st.integers(low, 40)) for low in (1, 0, 1, 1)]
    slots = steps + spare
    begin = data.draw(st.lists(st.integers(0, spare), min_size=batch, max_size=batch))
    case = attention(
        batch, steps, slots, heads, dims, dtype=dtype, causal=causal, begin=begin, masked=masked
    )
    check(case)


def test_attention_picks_the_kernel():
    """要梯度或词元多时用展开式，否则吸收式；结果都对。"""
    for steps in (1, 100):
        case = attention(1, steps, 100, 3, SMALL)
        torch.testing.assert_close(
            ops.mla_attention(*case.args()).double(), case.exact()[0], **tol(torch.float32)
        )
    case = attention(1, 1, 9, 3, SMALL)
    case.q.requires_grad_()
    ops.mla_attention(*case.args()).sum().backward()
    assert case.q.grad is not None and wide(case.q).dtype == torch.float64
    same = attention(1, 5, 9, 3, (4, 4, 8, 8))  # 秩比展开后的宽度还小：总用吸收式
    torch.testing.assert_close(
        ops.mla_attention(*same.args()), ops.mla_decode(*same.args()), rtol=0, atol=0
    )
