"""Hopper 的反向（TMA、wgmma）在主机模拟上：四个梯度对照 fp64，跨过块边，NaN 不外泄，次序无关。"""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from deepseek_opt import ops, reference
from tests.cuda.test_orders import same_in_every_order
from tests.op_cases import assert_no_worse, attention, eager_attention, flipped, randn, strided
from tests.test_mla_prefill import check

pytestmark = pytest.mark.skipif(
    os.environ.get("DSO_HOST") != "1", reason="要在 scripts/cuda_host.sh 里"
)
BF16 = torch.bfloat16
HALF = [torch.bfloat16, torch.float16]
# (r, dr, dn, dv)：两种块宽，没有旋转部分，各维不满一块。
DIMS = [(64, 64, 128, 128), (32, 16, 32, 64), (32, 0, 64, 40), (16, 8, 96, 104)]
# (T, S)：不满一块、正好、多一个、几块键、长的缓存接短的查询。
LENGTHS = [(1, 1), (64, 64), (129, 129), (130, 400), (3, 257)]


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """模拟一块 Hopper 的卡。"""
    monkeypatch.setenv("DSO_HOST_MAJOR", "9")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_against_fp64(dims, lengths, dtype):
    check(attention(2, *lengths, 2, dims, dtype=dtype))


@pytest.mark.parametrize("causal", [True, False])
def test_masks_spans_and_views(causal):
    """填充、空洞、不等长的 span、不连续的输入。"""
    options = {"dtype": BF16, "causal": causal}
    check(attention(2, 70, 200, 2, DIMS[0], masked=True, **options))
    check(attention(3, 40, 150, 2, DIMS[1], begin=[0, 17, 100], end=[150, 140, 149], **options))
    case = attention(2, 70, 140, 2, DIMS[0], **options)
    check(case.but(q=strided(case.q), rope=strided(case.rope), kv_b=strided(case.kv_b)))
    check(case.but(q=flipped(case.q), latent=flipped(case.latent)))
    if not causal:  # 查询可以比键多
        check(attention(2, 200, 90, 2, DIMS[0], **options))


def gradients(case, grad):
    """(dq, dlatent, drope, dkv_b)；grad 里的 NaN 照样传下去。"""
    leaves = case.leaves()
    out, _ = ops.mla_prefill(*case.with_leaves(leaves).args())
    return torch.autograd.grad(out, leaves, grad)


def documents(*ends):
    """一行里几个文档的 span。"""
    bounds = [0, *ends]
    return torch.tensor([[a, b, a, b] for a, b in itertools.pairwise(bounds)])


@pytest.mark.parametrize("poison", ["latent", "rope", "q", "grad"])
def test_packed_documents(poison):
    """一行里几个文档：一个文档的 NaN 不从块的零头漏出去。

    同在一块 128 个键里的文档，键的梯度分不开（矩阵乘里 0 * NaN 是 NaN），所以这里的边界与块对齐。
    """
    case = attention(1, 300, 300, 2, DIMS[0], dtype=BF16).but(spans=documents(90, 128, 256, 300))
    check(case)
    tensors = {"latent": case.latent, "rope": case.rope, "q": case.q}
    grad = tensors["grad"] = randn(1, 300, 2, 128, dtype=BF16)
    clean = gradients(case, grad)
    dirty = tensors[poison].clone()
    dirty[0, 128:256] = torch.nan
    if poison == "grad":
        grad = dirty
    else:
        case = case.but(**{poison: dirty})
    for ours, before in zip(gradients(case, grad)[:3], clean[:3], strict=True):
        assert torch.equal(ours[0, :128], before[0, :128])
        assert torch.equal(ours[0, 256:], before[0, 256:])


@pytest.mark.parametrize("causal", [True, False])
def test_spans_may_share_keys(causal):
    """几个 span 看同一段键，有的什么都看不见。"""
    spans = torch.tensor(
        [[64, 150, 10, 280], [0, 30, 0, 300], [30, 64, 100, 164], [150, 150, 3, 3]]
    )
    check(attention(1, 160, 300, 2, DIMS[0], dtype=BF16, causal=causal).but(spans=spans))


def test_many_spans():
    """span 多于一个 warp：每块键只看与它有关的。"""
    case = attention(2, 300, 300, 1, DIMS[1], dtype=BF16)
    check(case.but(spans=documents(*sorted({*range(7, 600, 7), 300, 600}))))


def test_garbage_in_unused_slots():
    """缓存里没写过的、被遮住的槽位是 NaN，梯度不变。"""
    case = attention(2, 20, 200, 2, DIMS[0], dtype=BF16, end=[150, 131], masked=True)
    grad = randn(2, 20, 2, 128, dtype=BF16)
    clean = gradients(case, grad)
    latent, rope = case.latent.clone(), case.rope.clone()
    unused = ~case.kv_mask
    unused[0, 150:], unused[1, 131:] = True, True
    latent[unused], rope[unused] = torch.nan, torch.nan
    for ours, before in zip(
        gradients(case.but(latent=latent, rope=rope), grad), clean, strict=True
    ):
        assert torch.equal(ours, before)


def test_no_less_accurate_than_eager():
    case = attention(1, 200, 200, 4, DIMS[0], dtype=BF16)
    grad = randn(1, 200, 4, 128, dtype=BF16)
    ours = gradients(case, grad)
    leaves, exact = case.leaves(), case.leaves(torch.float64)
    eager = torch.autograd.grad(eager_attention(case.with_leaves(leaves)), leaves, grad)
    out = reference.mla_prefill(*case.with_leaves(exact).args())[0]
    for one, theirs, truth in zip(
        ours, eager, torch.autograd.grad(out, exact, grad.double()), strict=True
    ):
        assert_no_worse(one, theirs, truth)


@pytest.mark.parametrize("dims", DIMS[:2], ids=str)
def test_every_order_gives_the_same_bits(monkeypatch, dims):
    case = attention(1, 140, 300, 2, dims, dtype=BF16, masked=True)
    grad = randn(1, 140, 2, dims[3], dtype=BF16)
    same_in_every_order(monkeypatch, lambda: gradients(case, grad))


def test_shapes_that_do_not_fit_use_the_other_path():
    """太宽的维度、走不了 TMA 的步长：sm_80 的路径，结果照样对。"""
    check(attention(1, 70, 90, 2, (32, 32, 160, 136), dtype=BF16))
    case = attention(2, 70, 90, 2, DIMS[0], dtype=BF16)
    check(case.but(rope=case.rope[:1].expand(2, -1, -1)))
