"""mla_cache_write：各 dtype、每行偏移、int8 与 fp8 量化、视图。"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_opt import ops, reference
from tests.op_cases import FLOATS, QUANTIZED, bits, flipped, randn, strided


def caches(batch, slots, rank, rope_dim, dtype):
    keys = torch.bfloat16 if dtype in QUANTIZED else dtype
    latent = torch.full((batch, slots, rank), 7).to(dtype)
    scale = torch.full((batch, slots), 7.0) if dtype in QUANTIZED else None
    return latent, torch.full((batch, slots, rope_dim), 7).to(keys), scale


def check(cache_dtype, dtype, offsets, steps=4, slots=12, rank=33, rope_dim=6):
    batch = len(offsets)
    latent, rope = (
        randn(batch, steps, rank, dtype=dtype),
        randn(batch, steps, rope_dim, dtype=dtype),
    )
    ours, want = (caches(batch, slots, rank, rope_dim, cache_dtype) for _ in range(2))
    start = torch.tensor(offsets)
    ops.mla_cache_write(*ours, latent, rope, start)
    reference.mla_cache_write(*want, latent, rope, start)
    for got, expected in zip(ours, want, strict=True):
        if expected is not None and expected.dtype in QUANTIZED:  # 差至多一个码
            assert (bits(got).int() - bits(expected).int()).abs().max() <= 1
        elif expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    return ours, latent


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("cache_dtype", [*FLOATS, *QUANTIZED])
@pytest.mark.parametrize("dtype", FLOATS)
def test_writes_only_its_slots(cache_dtype, dtype):
    check(cache_dtype, dtype, [0, 8, 3])
    check(cache_dtype, dtype, [5], steps=1, rank=1, rope_dim=2)
    check(cache_dtype, dtype, [0], steps=12, rank=64, rope_dim=0)
    check(cache_dtype, dtype, [2, 1], steps=0)


@pytest.mark.usefixtures("isa")
def test_int8_error_is_half_a_step():
    (latent, _, scale), exact = check(torch.int8, torch.float32, [1, 0], rank=512)
    for row, start in enumerate([1, 0]):
        back = latent[row, start : start + 4].float() * scale[row, start : start + 4, None]
        limit = scale[row, start : start + 4, None] * 0.501
        assert ((back - exact[row]).abs() <= limit).all()


@pytest.mark.usefixtures("isa")
def test_fp8_error_is_half_a_step():
    """相对误差至多 2^-4；小于最大值的 2^-6 / 448 的，绝对误差至多半个次正规的步长。"""
    (latent, _, scale), exact = check(torch.float8_e4m3fn, torch.float32, [1, 0], rank=512)
    for row, start in enumerate([1, 0]):
        unit = scale[row, start : start + 4, None]
        back = latent[row, start : start + 4].float() * unit
        limit = torch.maximum(exact[row].abs() * 2**-4, unit * 2**-10) * 1.001
        assert ((back - exact[row]).abs() <= limit).all()
        assert (back.abs().amax(-1) == 448 * unit[:, 0]).all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", QUANTIZED)
def test_zero_nan_and_inf_tokens(kind):
    """全零的词元尺度为 0；NaN、inf 的词元尺度不是有限数，读出来也不会是看似正常的数。"""
    latent, rope = randn(1, 4, 20), randn(1, 4, 2)
    latent[0, 0], latent[0, 1, 5], latent[0, 2, 19] = 0.0, torch.nan, torch.inf
    cache, keys, scale = caches(1, 4, 20, 2, kind)
    ops.mla_cache_write(cache, keys, scale, latent, rope, torch.tensor([0]))
    assert scale[0, 0] == 0 and (cache[0, 0].float() == 0).all()
    assert scale[0, 1].isnan() and scale[0, 2].isinf() and scale[0, 3].isfinite()
    case = ops.mla_decode(
        randn(1, 1, 1, 4),
        cache,
        keys.float(),
        scale,
        randn(4, 20),
        ops.make_spans(1, 1, 4),
        None,
        0.5,
        2,
    )
    assert case.isnan().all()


@pytest.mark.usefixtures("isa")
def test_views():
    """缓存是更大缓冲的切片（批步长大于 S·r），输入任意步长。"""
    store, keys = torch.zeros(3, 20, 8), torch.zeros(3, 20, 5)
    latent, rope = randn(3, 2, 8), randn(3, 2, 4)
    view = (store[:, 3:15], keys[:, 3:15, :4])
    ops.mla_cache_write(*view, None, flipped(latent), strided(rope), torch.tensor([10, 0, 4]))
    for row, start in enumerate([13, 3, 7]):
        torch.testing.assert_close(store[row, start : start + 2], latent[row], rtol=0, atol=0)
        torch.testing.assert_close(keys[row, start : start + 2, :4], rope[row], rtol=0, atol=0)
    assert store.count_nonzero() == 3 * 2 * 8 and keys.count_nonzero() == 3 * 2 * 4


@settings(max_examples=30)
@given(st.data(), st.sampled_from([*FLOATS, *QUANTIZED]))
def test_any_shape(data, cache_dtype):
    steps, spare = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 6))
    offsets = data.draw(st.lists(st.integers(0, spare), min_size=1, max_size=4))
    rank, rope_dim = data.draw(st.integers(1, 70)), data.draw(st.integers(0, 9))
    check(cache_dtype, torch.float32, offsets, steps, steps + spare, rank, rope_dim)
