"""分页的 mla_decode：页的次序怎样打乱都与连续的缓存逐位相同；写入、共用的页、坏的页表。"""

from __future__ import annotations

import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_opt import ops, reference
from tests.op_cases import FLOATS, QUANTIZED, attention, flipped, paged, randn, strided, wide
from tests.tolerances import tol

SMALL = (33, 6, 9, 5)
CACHES = [(dtype, dtype) for dtype in FLOATS]
CACHES += [(torch.bfloat16, kind) for kind in QUANTIZED] + [(torch.float32, torch.bfloat16)]
# 每页的槽位数：一个、奇数、不是一块键的约数、正好一块、比一块大。
PAGES = [1, 3, 24, 32, 64, 100]
# (kv_lora_rank, rope, nope, v)：能走矩阵单元的、没有旋转部分的、奇数的。
DIMS = [(64, 16, 8, 8), (128, 0, 16, 8), SMALL]
INT = torch.int32


def same(case, page_size):
    args = paged(case, page_size)
    got, want = ops.mla_decode(*args), ops.mla_decode(*case.args())
    assert torch.equal(got, want)
    return args


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("dtype, cache", CACHES)
def test_same_bits_as_contiguous(dtype, cache, page_size, dims):
    slots = page_size * -(-130 // page_size)
    for masked in (False, True):
        same(attention(2, 2, slots, 3, dims, dtype=dtype, cache=cache, masked=masked), page_size)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_ragged_rows(page_size):
    """各行的起止不在页的边上；没有 span 看的页号是乱的，那些页是 NaN。"""
    begin, end = [0, 70, 3, 128], [66, 128, 5, 192]
    case = attention(4, 2, 192, 3, SMALL, begin=begin, end=end)
    args = same(case, page_size)
    assert (args[-1] == -7).any()


@pytest.mark.usefixtures("isa")
def test_split_over_the_cache():
    same(attention(1, 1, 1400, 4, (24, 4, 8, 8), dtype=torch.bfloat16), 28)


@pytest.mark.parametrize("cache", [None, *QUANTIZED])
def test_reference(cache):
    case = attention(2, 3, 40, 3, SMALL, cache=cache, begin=[0, 9], masked=True)
    args = paged(case, 8)
    want = reference.mla_decode(*(wide(value) for value in args))
    assert torch.equal(want, case.exact()[0])
    torch.testing.assert_close(ops.mla_decode(*args).double(), want, **tol(torch.float32))


@pytest.mark.usefixtures("isa")
def test_rows_may_share_pages():
    """共享的前缀只存一份。"""
    case = attention(3, 1, 48, 2, SMALL)
    case.latent[:, :32], case.rope[:, :32] = case.latent[0, :32], case.rope[0, :32]
    want = ops.mla_decode(*case.args())
    args = list(paged(case, 16))
    args[-1][1:, :2] = args[-1][0, :2]
    assert torch.equal(ops.mla_decode(*args), want)


@pytest.mark.usefixtures("isa")
def test_views():
    case = attention(2, 2, 60, 3, SMALL)
    want = ops.mla_decode(*case.args())
    q, latent, rope, scale, *rest, table = paged(case, 12)
    for change in (strided, flipped):
        got = ops.mla_decode(q, change(latent), change(rope), scale, *rest, change(table))
        assert torch.equal(got, want)
    store = torch.full((2 * latent.shape[0], 20, 33), torch.nan)
    store[::2, 5:17] = latent
    assert torch.equal(ops.mla_decode(q, store[::2, 5:17], rope, scale, *rest, table), want)


@pytest.mark.usefixtures("isa")
def test_huge_strides():
    """页与页相隔超过 2^31 个元素（稀疏文件映射，不占内存）。"""
    case = attention(1, 1, 8, 2, (16, 4, 6, 5), dtype=torch.bfloat16)
    want = ops.mla_decode(*case.args())
    stride = 2**31 + 64
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(2 * (stride + 4096))
        flat = torch.from_file(file.name, shared=True, size=stride + 4096, dtype=torch.bfloat16)
        latent = flat.as_strided((2, 4, 16), (stride, 16, 1))
        rope = flat.as_strided((2, 4, 4), (stride, 4, 1), 2048)
        table = torch.tensor([[1, 0]], dtype=INT)
        latent[table[0].long()] = case.latent.view(2, 4, 16)
        rope[table[0].long()] = case.rope.view(2, 4, 4)
        got = ops.mla_decode(*case.but(latent=latent, rope=rope).args(), table)
        assert torch.equal(got, want)
        del flat, latent, rope


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("kind", [torch.float32, *QUANTIZED])
def test_written_through_the_table(kind):
    """mla_cache_write 写进页里：整个缓存看成一行，一个词元一个位置。"""
    size, table = 5, torch.tensor([[6, 1, 3], [0, 4, 2]], dtype=INT)
    keys = torch.bfloat16 if kind in QUANTIZED else kind
    latent, rope = randn(2, 13, 24), randn(2, 13, 4)

    def empty(*lead):
        scale = torch.zeros(*lead) if kind in QUANTIZED else None
        return torch.zeros(*lead, 24).to(kind), torch.zeros(*lead, 4).to(keys), scale

    whole, pages = empty(2, 15), empty(7, size)
    ops.mla_cache_write(*whole, latent, rope, torch.tensor([0, 0]))
    slot = torch.arange(13)
    places = (table[:, slot // size].long() * size + slot % size).flatten()
    flat = [
        None if p is None else p.flatten(0, 1).expand(26, *p.shape[:0], -1, *p.shape[2:])
        for p in pages
    ]
    ops.mla_cache_write(*flat, latent.view(26, 1, 24), rope.view(26, 1, 4), places)
    rest = randn(2 * 11, 24), ops.make_spans(2, 1, 15, end=[13, 8]), None, 0.3, 5, True
    q = randn(2, 1, 2, 10)
    assert torch.equal(ops.mla_decode(q, *pages, *rest, table), ops.mla_decode(q, *whole, *rest))


@pytest.mark.usefixtures("isa")
def test_nothing_to_see():
    case = attention(2, 1, 8, 3, SMALL, causal=False)
    args = list(paged(case, 4))
    nothing = torch.tensor([[0, 1, 3, 3], [1, 2, 16, 16]])
    args[5], args[-1] = nothing, torch.full_like(args[-1], 10**9)
    assert (ops.mla_decode(*args) == 0).all()
    args[5], args[-1] = torch.empty(0, 4, dtype=torch.int64), torch.empty(2, 0, dtype=INT)
    assert (ops.mla_decode(*args) == 0).all()
    args[0] = args[0][:, :0]
    assert ops.mla_decode(*args).shape == (2, 0, 3, 5)


@settings(max_examples=40)
@given(st.data(), st.sampled_from(CACHES), st.booleans(), st.booleans())
def test_any_shape(data, kinds, causal, masked):
    page_size, per_row = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 6))
    slots = page_size * per_row
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    steps = data.draw(st.integers(1, min(20, slots)))
    dims = [data.draw(st.integers(low, 40)) for low in (1, 0, 1, 1)]
    begin = data.draw(st.lists(st.integers(0, slots - steps), min_size=batch, max_size=batch))
    options = {"dtype": kinds[0], "cache": kinds[1], "causal": causal, "masked": masked}
    same(attention(batch, steps, slots, heads, dims, begin=begin, **options), page_size)


def arguments():
    case = attention(2, 1, 8, 2, (5, 2, 3, 4), end=[8, 3])
    names = ("q", "latent", "rope", "scale", "kv_b", "spans", "kv_mask", "softmax_scale")
    values = dict(zip((*names, "v_head_dim", "causal", "block_table"), paged(case, 4), strict=True))
    return values  # 6 页，每页 4 个槽位；第 1 行只看第 0 页


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"block_table": torch.zeros(2, 2, dtype=torch.int64)}, "block_table 的类型应为 int32"),
        ({"block_table": torch.zeros(3, 2, dtype=INT)}, r"block_table 的形状应为 \[2, \*\]"),
        ({"block_table": torch.zeros(4, dtype=INT)}, "block_table 的形状"),
        (
            {"block_table": torch.tensor([[0, 6], [1, 0]], dtype=INT)},
            r"block_table\[0, 1\] 应是 0 到 5 的页号，实际是 6",
        ),
        ({"block_table": torch.tensor([[0, 1], [-1, 0]], dtype=INT)}, r"block_table\[1, 0\].*-1"),
        ({"block_table": torch.zeros(2, 1, dtype=INT)}, "spans.*共 2 行，每行 4 个"),
        ({"latent": torch.ones(6, 0, 5), "rope": torch.ones(6, 0, 2)}, "每页的槽位数.*应大于 0"),
        ({"latent": torch.ones(6, 20)}, "latent 的形状"),
        ({"rope": torch.ones(6, 3, 2)}, r"rope 的形状应为 \[6, 4, \*\]"),
        ({"rope": torch.ones(2, 8, 2)}, r"rope 的形状应为 \[6, 4, \*\]"),
        ({"scale": torch.ones(6, 4)}, "时必须给出 scale，否则不能给"),
        ({"kv_mask": torch.ones(6, 4, dtype=torch.bool)}, r"kv_mask 的形状应为 \[2, 8\]"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=f"deepseek_opt：mla_decode：.*{message}"):
        ops.mla_decode(*{**arguments(), **changes}.values())


def test_unused_pages_are_not_checked():
    args = arguments()
    want = ops.mla_decode(*args.values())
    args["block_table"][1, 1] = 10**9
    assert torch.equal(ops.mla_decode(*args.values()), want)


def test_pages_on_another_device():
    args = arguments()
    args["latent"] = args["latent"].to("meta")
    with pytest.raises(ValueError, match="mla_decode：全部张量应在同一设备上"):
        ops.mla_decode(*args.values())
    args = arguments()
    args["block_table"] = args["block_table"].to("meta")
    with pytest.raises(ValueError, match="全部张量应在同一设备上.*block_table 在 meta"):
        ops.mla_decode(*args.values())
