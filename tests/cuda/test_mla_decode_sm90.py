"""mla_decode 的 Hopper 路径（TMA、wgmma）在主机模拟上：对照 fp64，各种行数、长度、遮盖、视图；次序打乱结果不变。"""

from __future__ import annotations

import os

import pytest
import torch

from deepseek_opt import ops
from tests.cuda import host_library
from tests.op_cases import attention, randn, strided
from tests.tolerances import tol

pytestmark = pytest.mark.skipif(
    os.environ.get("DSO_HOST") != "1" or os.environ.get("DSO_HOST_MAJOR") != "9",
    reason="要在 scripts/cuda_host.sh 里（DSO_HOST_MAJOR=9）",
)
BF16, F16 = torch.bfloat16, torch.float16
MODES = [("reverse", "lazy"), ("random:1", "lazy"), ("random:2", "eager")]
# (r, dr, dn, dv)
LARGE, NO_ROPE = (512, 64, 8, 8), (512, 0, 8, 8)


def decode(case):
    """运行一次：没有库冲突；返回结果。"""
    library = host_library.load()
    library.dso_host_reset_counts()
    got = ops.mla_decode(*case.args())
    assert library.dso_host_conflicts() == 0
    return got


def check(case):
    got, dtype = decode(case), case.q.dtype
    torch.testing.assert_close(got.double(), case.exact()[0], **tol(dtype))
    return got


def hide(case, begin, end):
    """没有 span 看到的、被遮住的槽位填 NaN（先算好的参考不受影响）。"""
    want, slots = case.exact()[0], torch.arange(case.latent.shape[1])
    hidden = (slots < torch.tensor(begin)[:, None]) | (slots >= torch.tensor(end)[:, None])
    if case.kv_mask is not None:
        hidden |= ~case.kv_mask
    case.latent[hidden], case.rope[hidden] = torch.nan, torch.nan
    return want


@pytest.mark.parametrize("heads", [8, 16, 32, 64])
def test_the_path_is_taken(monkeypatch, heads):
    """与 sm_80 的路径各位不会全同：累加的次序不同。"""
    case = attention(1, 1, 150, heads, LARGE, dtype=BF16)
    got = decode(case)
    monkeypatch.setenv("DSO_HOST_MAJOR", "8")
    assert not torch.equal(decode(case), got)


@pytest.mark.parametrize("heads", [1, 3, 8, 9, 16, 20, 33, 64, 80, 128])
def test_heads(heads):
    check(attention(1, 1, 65, heads, LARGE, dtype=BF16))


@pytest.mark.parametrize("slots", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("heads", [8, 48])
def test_lengths(heads, slots):
    check(attention(2, 1, slots, heads, LARGE, dtype=F16, masked=True))


@pytest.mark.parametrize(
    "dims",
    [NO_ROPE, (512, 32, 8, 8), (256, 64, 8, 8), (128, 0, 8, 8), (320, 16, 8, 8), (96, 16, 8, 8)],
)
@pytest.mark.parametrize("heads", [6, 40])
def test_dims(heads, dims):
    """r 不足一档、dr 不足 64：TMA 把界外填成 0；r 不是 64 的倍数走 sm_80 的路径。"""
    check(attention(1, 2, 130, heads, dims, dtype=BF16))


@pytest.mark.parametrize("heads", [5, 60])
@pytest.mark.parametrize("masked", [False, True])
def test_ragged_rows_and_unused_slots(heads, masked):
    """各行长短不一，一行什么都看不见；没用的槽位全是 NaN。"""
    begin, end = [0, 100, 3, 9], [180, 180, 5, 9]
    case = attention(4, 1, 180, heads, LARGE, dtype=BF16, begin=begin, end=end, masked=masked)
    want = hide(case, begin, end)
    got = decode(case)
    torch.testing.assert_close(got.double(), want, **tol(BF16))
    assert (got[3] == 0).all()


@pytest.mark.parametrize("heads", [8, 128])
def test_everything_hidden_gives_zero(heads):
    case = attention(1, 1, 70, heads, LARGE, dtype=BF16)
    hidden = case.but(kv_mask=torch.zeros(1, 70, dtype=torch.bool))
    hide(hidden, [0], [70])
    assert (decode(hidden) == 0).all()


@pytest.mark.parametrize("heads, steps", [(8, 5), (16, 10)])
def test_new_tokens_are_causal(heads, steps):
    """几个词元一组，组内各行能看的不同；一个 span 几组时分几路。"""
    check(attention(2, steps, 140, heads, LARGE, dtype=BF16))
    check(attention(1, steps, steps + 60, heads, LARGE, dtype=BF16, causal=False))


def test_spans_of_different_sizes():
    """长短不一的 span 分在几路上：合并找得到各自的部分结果。"""
    spans = torch.tensor([[0, 1, 0, 150], [1, 9, 20, 190], [9, 10, 5, 70], [10, 12, 0, 190]])
    for heads in (16, 40):
        check(attention(1, 12, 190, heads, LARGE, dtype=BF16).but(spans=spans))


def test_equal_spans_are_not_split(monkeypatch):
    """33 行各两块，各行的内容相同：分给两个 CTA 时多做一块就不拆开任何一行，分给四个时多做一块太多，拆开的几行差几位。"""
    case, one = (attention(rows, 1, 128, 8, (128, 16, 8, 8), dtype=BF16) for rows in (33, 1))
    same = case.but(
        q=one.q.repeat(33, 1, 1, 1),
        latent=one.latent.repeat(33, 1, 1),
        rope=one.rope.repeat(33, 1, 1),
    )
    split = []
    for sms in ("1", "2"):  # 一个 SM 两个 CTA
        monkeypatch.setenv("DSO_HOST_SMS", sms)
        got = check(same)
        split.append(sum(not torch.equal(row, got[0]) for row in got))
    assert split == [0, 2]


@pytest.mark.parametrize("heads", [16, 64])
def test_views(heads):
    """缓存是更大的缓冲区里的一段，行距、批距各异；q 的头与词元交换过。"""
    case = attention(2, 2, 100, heads, LARGE, dtype=BF16)
    want = decode(case)
    store, keys = randn(2, 160, 520, dtype=BF16), randn(2, 160, 72, dtype=BF16)
    store[:, 30:130, :512], keys[:, 30:130, :64] = case.latent, case.rope
    views = case.but(
        q=case.q.transpose(1, 2).contiguous().transpose(1, 2),
        latent=store[:, 30:130, :512],
        rope=keys[:, 30:130, :64],
        spans=strided(case.spans),
    )
    assert torch.equal(decode(views), want)


def test_strides_tma_cannot_take(monkeypatch):
    """批距为 0 的展开视图、不是 16 字节倍数的行距：走 sm_80 的路径。"""
    case = attention(2, 1, 80, 8, LARGE, dtype=BF16)
    for latent in (case.latent[:1].expand(2, -1, -1), strided(case.latent)):
        monkeypatch.setenv("DSO_HOST_MAJOR", "9")
        got = check(case.but(latent=latent))
        monkeypatch.setenv("DSO_HOST_MAJOR", "8")
        assert torch.equal(decode(case.but(latent=latent)), got)


# ---- 一个 cluster 两个 CTA（128 行一组）----


def half(case, begin):
    """只有 [begin, begin + 64) 这些头的同样一份。"""
    width, heads = case.kv_b.shape[0] // case.q.shape[2], slice(begin, begin + 64)
    weight = case.kv_b.unflatten(0, (-1, width))[heads].flatten(0, 1)
    return case.but(q=case.q[:, :, heads].contiguous(), kv_b=weight)


@pytest.mark.parametrize(
    "heads, steps, spans, shared, pieces",
    [(128, 1, 1, True, 1), (128, 2, 1, True, 2), (70, 1, 2, True, 2), (64, 2, 1, True, 1)]
    + [(64, 1, 1, False, 3), (64, 3, 1, False, 3), (16, 8, 3, False, 4)],
)
def test_two_ctas_share_what_they_read(heads, steps, spans, shared, pieces):
    """键从 L2 只读一遍：一个 cluster 的读数是各读各的一半。spans 大于 1 时另有只有一个词元的 span。"""
    case = attention(1, steps + spans - 1, 130, heads, LARGE, dtype=BF16)
    first = torch.tensor([[0, steps, 0, 130]])
    rest = [[steps + i, steps + i + 1, 0, 130] for i in range(spans - 1)]
    check(case.but(spans=torch.cat([first, torch.tensor(rest, dtype=torch.long).view(-1, 4)])))
    groups = -(-steps * heads // 64) + (spans - 1) * -(-heads // 64)
    blocks, boxes = 3, 5  # 潜变量一次 128 列，旋转的键一次
    queries = pieces * (1 + shared)  # 一段里各 CTA 读一次自己的
    assert host_library.load().dso_host_boxes() == groups * blocks * boxes // (1 + shared) + queries


@pytest.mark.parametrize("clusters", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_cluster_has_the_same_bits(monkeypatch, clusters, masked):
    """每个头与一个 CTA 64 行时逐位相同：键的划分一样（一行分成几段、整行一段）。"""
    begin, end = [0, 10, 70, 9, 0], [70, 330, 72, 9, 129]
    case = attention(5, 1, 330, 128, LARGE, dtype=BF16, begin=begin, end=end, masked=masked)
    want = hide(case, begin, end)
    monkeypatch.setenv("DSO_HOST_SMS", str(clusters))
    apart = torch.cat([decode(half(case, 0)), decode(half(case, 64))], 2)
    monkeypatch.setenv("DSO_HOST_SMS", str(2 * clusters))
    got = decode(case)
    torch.testing.assert_close(got.double(), want, **tol(BF16))
    assert torch.equal(got, apart) and (got[3] == 0).all()


@pytest.mark.parametrize("sms", [2, 10])
@pytest.mark.parametrize("heads, steps", [(128, 2), (128, 3), (64, 2), (40, 3), (96, 4)])
def test_cluster_rows(monkeypatch, heads, steps, sms):
    """几个词元合成 128 行的组，最后一组不满；几组时分几路；没有偶数组的不用 cluster，也对。"""
    monkeypatch.setenv("DSO_HOST_SMS", str(sms))
    check(attention(2, steps, 150, heads, LARGE, dtype=F16, masked=True))
    check(attention(1, steps, 150, heads, (320, 32, 8, 8), dtype=BF16, causal=False))


def test_cluster_spans_of_different_sizes(monkeypatch):
    spans = torch.tensor([[0, 1, 0, 150], [1, 4, 20, 190], [4, 5, 5, 70], [5, 6, 0, 1]])
    case = attention(1, 6, 190, 128, LARGE, dtype=BF16).but(spans=spans)
    for sms in ("2", "7", "12"):
        monkeypatch.setenv("DSO_HOST_SMS", sms)
        check(case)


def test_cluster_splits_many_rows(monkeypatch):
    """几乎每个 span 都拆开，行很多：合并时一组线程一次几段列。"""
    monkeypatch.setenv("DSO_HOST_SMS", "16")
    end = [190, 150, 189, 130, 188, 170, 150]
    check(attention(7, 1, 190, 128, LARGE, dtype=BF16, begin=[0, 40, 1, 0, 3, 0, 50], end=end))


@pytest.mark.parametrize("sms", [2, 6])
def test_cluster_has_the_same_bits_in_every_order(monkeypatch, sms):
    monkeypatch.setenv("DSO_HOST_SMS", str(sms))
    case = attention(2, 1, 330, 128, LARGE, dtype=BF16, masked=True, begin=[0, 100], end=[330, 190])
    want = check(case)
    for order, timing in MODES:
        monkeypatch.setenv("DSO_HOST_ORDER", order)
        monkeypatch.setenv("DSO_HOST_ASYNC", timing)
        assert torch.equal(decode(case), want), (order, timing)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 190, 8, LARGE),
        (1, 2, 150, 10, LARGE),
        (1, 1, 200, 128, LARGE),
        (2, 3, 150, 60, (128, 32, 8, 8)),
    ],
    ids=["8 行", "32 行", "64 行两组", "64 行几路"],
)
def test_same_bits_in_every_order(monkeypatch, shape):
    case = attention(*shape, dtype=BF16, masked=True)
    want = check(case)
    for order, timing in MODES:
        monkeypatch.setenv("DSO_HOST_ORDER", order)
        monkeypatch.setenv("DSO_HOST_ASYNC", timing)
        assert torch.equal(decode(case), want), (order, timing)


@pytest.mark.parametrize("heads, rising", [(16, 16), (64, 64), (128, 128), (64, 20), (128, 1)])
@pytest.mark.parametrize("slots", [300, 384])
def test_scores_rise_block_by_block(heads, rising, slots):
    """前 rising 个头每一块的最大值都比前一块大出许多：每一块都要换基准、缩放旧的结果（两个消费者组轮着定），有的 warp 不必。"""
    case = attention(2, 1, slots, heads, LARGE, dtype=BF16)
    # 经旋转的一列：不经舍入的吸收，得分以 2 为底每块多 9
    case.rope[:, :, 0] = (torch.arange(slots) // 64).to(BF16)
    case.q[..., LARGE[2]] = 0
    case.q[:, :, :rising, LARGE[2]] = 9 / (case.softmax_scale * 1.4427)
    check(case)
