"""mla_decode 的 Hopper 路径读分页的缓存：一块键由几个框拼成。

从框的边界起的与连续的缓存逐位相同；从别处起的多看几个键（不算），对照 fp64。没有用到的页、一页里没有用到的槽位都是 NaN。
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_opt import ops
from tests.cuda import host_library
from tests.op_cases import attention, paged
from tests.tolerances import tol

pytestmark = pytest.mark.skipif(
    os.environ.get("DSO_HOST") != "1" or os.environ.get("DSO_HOST_MAJOR") != "9",
    reason="要在 scripts/cuda_host.sh 里（DSO_HOST_MAJOR=9）",
)
BF16, F16 = torch.bfloat16, torch.float16
MODES = [("reverse", "lazy"), ("random:1", "lazy"), ("random:2", "eager")]
LARGE, NO_ROPE = (512, 64, 8, 8), (512, 0, 8, 8)  # (r, dr, dn, dv)


def decode(*args):
    """运行一次：没有库冲突；结果与 TMA 读了几个框。"""
    library = host_library.load()
    library.dso_host_reset_counts()
    got = ops.mla_decode(*args)
    assert library.dso_host_conflicts() == 0
    return got, library.dso_host_boxes()


def hide(case):
    """没有 span 看的、被遮住的槽位填 NaN；先算好参考。"""
    want = case.exact()[0]
    seen = torch.zeros(case.latent.shape[:2], dtype=torch.bool)
    for q_begin, q_end, kv_begin, kv_end in case.spans.tolist():
        seen.view(-1)[kv_begin:kv_end] |= q_begin < q_end
    hidden = ~seen if case.kv_mask is None else ~(seen & case.kv_mask)
    case.latent[hidden], case.rope[hidden] = torch.nan, torch.nan
    return want


def check(case, page_size):
    want = hide(case)
    got, boxes = decode(*paged(case, page_size))
    assert boxes > 0  # 走的是 TMA
    torch.testing.assert_close(got.double(), want, **tol(case.q.dtype))
    return got


@pytest.mark.parametrize("page_size", [8, 24, 32, 64, 80, 192])
@pytest.mark.parametrize("heads", [8, 40, 128])
def test_same_bits_as_contiguous(heads, page_size):
    slots = page_size * -(-200 // page_size)
    case = attention(2, 1, slots, heads, LARGE, dtype=BF16, end=[slots, 130])
    assert torch.equal(check(case, page_size), decode(*case.args())[0])


@pytest.mark.parametrize("heads", [1, 20, 64])
@pytest.mark.parametrize("dims", [LARGE, NO_ROPE, (256, 32, 8, 8), (128, 64, 8, 8)])
def test_dims(heads, dims):
    case = attention(2, 1, 160, heads, dims, dtype=F16, masked=True)
    assert torch.equal(check(case, 32), decode(*case.args())[0])


@pytest.mark.parametrize("page_size", [8, 24, 64])
@pytest.mark.parametrize("heads", [5, 60, 128])
def test_rows_begin_anywhere(heads, page_size):
    """从一个框的中间起：前面的键不算，哪怕是 NaN；一行只有一个键，一行什么都看不见。"""
    slots = page_size * -(-250 // page_size)
    begin, end = [3, 100, 63, 9, 71, 129], [slots, 181, 64, 9, 73, slots]
    for masked in (False, True):
        case = attention(6, 1, slots, heads, LARGE, dtype=BF16, begin=begin, end=end, masked=masked)
        assert (check(case, page_size)[3] == 0).all()


@pytest.mark.parametrize("heads, steps", [(8, 5), (16, 10), (128, 2)])
def test_new_tokens_are_causal(heads, steps):
    begin = [0, 21]
    check(attention(2, steps, 192, heads, LARGE, dtype=BF16, begin=begin), 16)
    check(attention(2, steps, 192, heads, LARGE, dtype=BF16, begin=begin, causal=False), 64)


def test_long_rows():
    """一个 warp 一次查 32 个框的页：多于一轮、从一段的中间起。"""
    for page_size in (8, 64):
        case = attention(2, 1, 2560, 16, LARGE, dtype=BF16, begin=[0, 137], end=[2560, 2300])
        check(case, page_size)


@pytest.mark.parametrize("sms", ["1", "3", "6"])
@pytest.mark.parametrize("heads", [16, 64, 128])
def test_pieces(monkeypatch, heads, sms):
    """一行分成几段、几行一段：预读跨段，各段从自己的框起。"""
    monkeypatch.setenv("DSO_HOST_SMS", sms)
    begin, end = [0, 10, 70, 9, 0], [70, 330, 72, 9, 129]
    check(attention(5, 1, 336, heads, LARGE, dtype=BF16, begin=begin, end=end), 16)
    spans = torch.tensor([[0, 1, 0, 150], [1, 4, 20, 190], [4, 5, 5, 70], [5, 6, 0, 1]])
    check(attention(1, 6, 192, heads, LARGE, dtype=BF16).but(spans=spans), 32)


@pytest.mark.parametrize("heads", [16, 64, 128])
def test_only_what_is_seen_is_read(monkeypatch, heads):
    """末尾的框只读到最后一个可看的键；一块 64 个槽位一次读 128 列。"""
    case = attention(1, 1, 192, heads, LARGE, dtype=BF16, end=[130])
    cluster = 2 if heads > 64 else 1
    monkeypatch.setenv("DSO_HOST_SMS", str(cluster))  # 只有一段
    _, whole = decode(*paged(case, 64))
    _, small = decode(*paged(case, 16))
    assert whole == 3 * 5 + cluster  # 三块各四次 128 列、一次旋转的键；各 CTA 的查询
    assert small == 9 * 9 + cluster  # ⌈130 / 16⌉ 个框各八次 64 列、一次旋转的键


@pytest.mark.parametrize("page_size", [1, 4, 12, 100])
def test_small_pages_take_the_other_path(page_size):
    """页的大小不是 8 的倍数：一次 TMA 拼不成 128 字节交错的一轮，走 sm_80 的路径。"""
    case = attention(2, 1, page_size * -(-120 // page_size), 8, LARGE, dtype=BF16)
    want = hide(case)
    got, boxes = decode(*paged(case, page_size))
    assert boxes == 0
    torch.testing.assert_close(got.double(), want, **tol(BF16))


@pytest.mark.parametrize("heads", [8, 64, 128])
def test_same_bits_in_every_order(monkeypatch, heads):
    case = attention(2, 1, 336, heads, LARGE, dtype=BF16, masked=True, begin=[0, 101])
    args, want = paged(case, 24), None
    for order, timing in [("forward", "lazy"), *MODES]:
        monkeypatch.setenv("DSO_HOST_ORDER", order)
        monkeypatch.setenv("DSO_HOST_ASYNC", timing)
        got, _ = decode(*args)
        want = got if want is None else want
        assert torch.equal(got, want), (order, timing)


@settings(max_examples=15)
@given(st.data())
def test_fuzz(data):
    page_size = 8 * data.draw(st.integers(1, 17))
    slots, batch = page_size * data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    steps = data.draw(st.integers(1, 3))
    begin = [data.draw(st.integers(0, slots - steps)) for _ in range(batch)]
    end = [data.draw(st.integers(low + steps, slots)) for low in begin]
    case = attention(
        batch,
        steps,
        slots,
        data.draw(st.sampled_from([1, 7, 16, 33, 64, 128])),
        data.draw(st.sampled_from([LARGE, NO_ROPE, (128, 16, 8, 8)])),
        dtype=data.draw(st.sampled_from([BF16, F16])),
        begin=begin,
        end=end,
        masked=data.draw(st.booleans()),
    )
    check(case, page_size)
