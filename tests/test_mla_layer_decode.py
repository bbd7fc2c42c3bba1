"""mla_layer_decode：整层解码与分开的算子（fp64）比较；写缓存、前移 offsets；坏输入时缓存不变。"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_opt import ops, reference
from deepseek_opt.reference.mla import quantize
from tests.op_cases import FLOATS, QUANTIZED, randn, strided, wide
from tests.tolerances import tol

HEADS, NOPE, VALUE, SLOTS = 3, 5, 7, 12


def projection(rows, columns, dtype, bias):
    weight = randn(rows, columns, dtype=dtype, scale=columns**-0.5)
    return weight, randn(rows, dtype=dtype) if bias else None


def arguments(
    batch, steps, width, q_rank, rank, rope_dim, dtype, *, bias=False, shared=False, cache=None
):
    """除 interleaved 之后的缓存外全部随机；缓存里已有参差的旧词元。"""
    low = q_rank or width
    queries = (None, None, None, 1e-6)
    if q_rank:
        queries = (*projection(q_rank, width, dtype, bias), randn(q_rank, dtype=dtype), 1e-6)
    last = projection(HEADS * (NOPE + rope_dim), low, dtype, bias)
    keys = (*projection(rank + rope_dim, width, dtype, bias), randn(rank, dtype=dtype), 1e-5)
    kv_b, _ = projection(HEADS * (NOPE + VALUE), rank, dtype, False)
    out = projection(width + 1, HEADS * VALUE, dtype, bias)
    angle = torch.rand(1 if shared else batch, steps, rope_dim // 2) * 30
    latent = torch.randn(batch, SLOTS, rank).to(dtype)
    scale = None
    if cache is not None:
        latent, scale = quantize(latent, cache)
    offsets = torch.arange(batch) % (SLOTS - steps + 1)
    caches = (latent, randn(batch, SLOTS, rope_dim, dtype=dtype), scale, offsets)
    rotation = (angle.cos(), angle.sin(), True)
    hidden = randn(batch, steps, width, dtype=dtype)
    return (hidden, *queries, *last, *keys, kv_b, *out, *rotation, *caches, None, None, 0.3, HEADS)


def fresh(args):
    """缓存与 offsets 各复制一份：两边都要原地写。"""
    args = list(args)
    for i in range(17, 21):
        args[i] = None if args[i] is None else args[i].clone()
    return args


def check(args):
    mine, exact = fresh(args), fresh(args)
    want = reference.mla_layer_decode(*(wide(a) if i != 19 else a for i, a in enumerate(exact)))
    got = ops.mla_layer_decode(*mine)
    assert got.dtype == args[0].dtype and got.shape == want.shape
    limit = tol(got.dtype)
    torch.testing.assert_close(got.double(), want, rtol=4 * limit["rtol"], atol=4 * limit["atol"])
    assert torch.equal(mine[20], args[20] + args[0].shape[1])
    return mine


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("cache", [None, *QUANTIZED])
def test_against_fp64(dtype, cache):
    check(arguments(1, 1, 40, 0, 9, 4, dtype, shared=True, cache=cache))
    check(arguments(3, 1, 64, 50, 33, 8, dtype, bias=True, cache=cache))
    check(arguments(2, 3, 33, 7, 20, 6, dtype, cache=cache))
    check(arguments(1, 5, 17, 5, 2, 0, dtype, shared=True, bias=True, cache=cache))
    check(arguments(4, 1, 17, 5, 12, 2, dtype, shared=True, cache=cache))
    check((*arguments(2, 3, 33, 7, 20, 6, dtype, cache=cache), True))  # 旋转之后仍成对


@given(
    batch=st.integers(1, 3),
    steps=st.integers(1, 4),
    q_rank=st.sampled_from([0, 1, 13]),
    rank=st.integers(1, 40),
    rope_dim=st.sampled_from([0, 2, 10]),
    layout=st.sampled_from([(False, False), (True, False), (True, True)]),
)
def test_random_shapes(batch, steps, q_rank, rank, rope_dim, layout):
    args = arguments(batch, steps, 23, q_rank, rank, rope_dim, torch.float32)
    check((*args[:16], layout[0], *args[17:], layout[1]))


def test_both_layouts_of_turned_keys_see_the_same():
    """查询与键同样排列，内积不变：只有缓存里旋转键的排列不同。"""
    args = arguments(2, 1, 33, 7, 20, 6, torch.float32)
    args[18].zero_()
    halves, pairs = fresh(args), fresh(args)
    got = ops.mla_layer_decode(*halves), ops.mla_layer_decode(*pairs, True)
    torch.testing.assert_close(*got)
    assert torch.equal(halves[18], torch.cat((pairs[18][..., 0::2], pairs[18][..., 1::2]), -1))


def test_writes_only_the_new_slots():
    args = arguments(2, 3, 33, 7, 20, 6, torch.float32)
    mine = check(args)
    for row, start in enumerate(args[20].tolist()):
        for before, after in ((args[17], mine[17]), (args[18], mine[18])):
            kept = [i for i in range(SLOTS) if not start <= i < start + 3]
            assert torch.equal(before[row, kept], after[row, kept])
            assert not torch.equal(before[row, start : start + 3], after[row, start : start + 3])


def test_spans_and_mask():
    """给出 spans 与 kv_mask 时只看它们允许的槽位。"""
    args = list(arguments(2, 1, 33, 7, 20, 6, torch.float32))
    args[20] = torch.tensor([5, 5])
    args[21] = torch.tensor([[0, 1, 2, 6], [1, 2, SLOTS, SLOTS + 6]])
    args[22] = torch.rand(2, SLOTS) < 0.7
    args[22][:, 5] = True
    check(args)


def test_views_and_empty():
    args = arguments(2, 3, 33, 7, 20, 6, torch.float32)
    want = ops.mla_layer_decode(*fresh(args))
    views = (strided(args[0]), strided(args[1]), *args[2:])
    torch.testing.assert_close(ops.mla_layer_decode(*fresh(views)), want, rtol=0, atol=0)
    empty = ops.mla_layer_decode(*arguments(0, 1, 33, 7, 20, 6, torch.float32))
    assert empty.shape == (0, 1, 34)


def test_same_result_for_any_thread_count():
    args = arguments(2, 3, 33, 7, 20, 6, torch.bfloat16)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(ops.mla_layer_decode(*fresh(args)))
    torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, randn(2, 33), "hidden 的形状"),
        (1, randn(7, 32), "q_a_weight 的形状"),
        (1, None, "应同时给出"),
        (2, randn(8), "q_a_bias 的形状"),
        (3, randn(6), "q_norm_weight 的形状"),
        (5, randn(32, 7), "头数 3 的倍数"),
        (5, randn(33, 6), "weight 的形状"),
        (7, randn(26, 32), "kv_a_weight 的形状"),
        (9, randn(21), "非负偶数"),
        (11, randn(36, 19), "kv_b_weight 的形状"),
        (12, randn(34, 20), "o_weight 的形状"),
        (14, randn(2, 2, 3), "cos 的形状"),
        (15, randn(1, 3, 3), "sin 的形状"),
        (14, randn(1, 3, 3), "形状|第 0 维"),
        (17, randn(2, SLOTS, 19), "latent|kv_b_weight"),
        (17, torch.zeros(2, SLOTS, 20, dtype=torch.int8), "scale"),
        (18, randn(2, SLOTS, 5), "rope|kv_b_weight|整"),
        (20, torch.tensor([0, SLOTS - 2]), "超出缓存"),
        (20, torch.tensor([-1, 0]), "超出缓存"),
        (20, torch.tensor([0]), "offsets 的形状"),
        (20, torch.zeros(2), "offsets 的类型"),
        (20, torch.zeros(4, dtype=torch.int64)[::2], "连续"),
        (21, torch.tensor([[0, 3, 0, SLOTS + 1]]), "键范围"),
        (22, torch.ones(2, 3, dtype=torch.bool), "kv_mask 的形状"),
        (23, float("nan"), "softmax_scale"),
        (24, 0, "头数"),
    ],
)
def test_bad_input_leaves_the_cache_alone(position, value, message):
    args = fresh(arguments(2, 3, 33, 7, 20, 6, torch.float32))
    args[position] = value
    before = [t.clone() for t in args[17:21] if t is not None]
    with pytest.raises(ValueError, match=message):
        ops.mla_layer_decode(*args)
    for old, new in zip(before, (t for t in args[17:21] if t is not None), strict=True):
        assert torch.equal(old, new)
