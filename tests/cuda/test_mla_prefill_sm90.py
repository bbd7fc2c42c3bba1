"""Hopper 的前向（TMA、wgmma）在主机模拟上：对照 fp64，与 sm_80 的路径一致，跨过块边，NaN 不外泄，次序无关。"""

from __future__ import annotations

import os

import pytest
import torch

from deepseek_opt import ops
from tests.cuda.test_orders import same_in_every_order
from tests.op_cases import assert_no_worse, attention, eager_attention, flipped, strided
from tests.tolerances import tol

pytestmark = pytest.mark.skipif(
    os.environ.get("DSO_HOST") != "1", reason="要在 scripts/cuda_host.sh 里"
)
HALF = [torch.bfloat16, torch.float16]
# (r, dr, dn, dv)：两种块宽，没有旋转部分，各维不满一块。
DIMS = [(64, 64, 128, 128), (32, 16, 32, 64), (32, 0, 64, 40), (16, 8, 96, 104)]
# (T, S)：不满一块、正好、多一个、几块键、长的缓存接短的查询。
LENGTHS = [(1, 1), (64, 64), (129, 129), (130, 400), (3, 257)]


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """模拟一块 Hopper 的卡。"""
    monkeypatch.setenv("DSO_HOST_MAJOR", "9")


def check(case):
    out, lse = ops.mla_prefill(*case.args())
    exact = case.exact()
    torch.testing.assert_close(out.double(), exact[0], **tol(case.q.dtype))
    torch.testing.assert_close(lse.double(), exact[1], **tol(case.q.dtype))
    return out


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_against_fp64(dims, lengths, dtype):
    check(attention(2, *lengths, 2, dims, dtype=dtype))


@pytest.mark.parametrize("causal", [True, False])
def test_masks_spans_and_views(causal):
    """填充、空洞、不等长的 span、不连续的输入。"""
    options = {"dtype": torch.bfloat16, "causal": causal}
    check(attention(2, 70, 200, 2, DIMS[0], masked=True, **options))
    check(attention(3, 40, 150, 2, DIMS[1], begin=[0, 17, 100], end=[150, 140, 149], **options))
    case = attention(2, 70, 140, 2, DIMS[0], **options)
    check(case.but(q=strided(case.q), rope=strided(case.rope), kv_b=strided(case.kv_b)))
    check(case.but(q=flipped(case.q), latent=flipped(case.latent)))


def test_packed_documents():
    """一行里几个文档：各看各的，一个文档的 NaN 不外泄（也不从块的零头漏进来）。"""
    case = attention(1, 300, 300, 2, DIMS[0], dtype=torch.bfloat16)
    ends = [0, 90, 91, 230, 300]
    spans = torch.tensor([[a, b, a, b] for a, b in zip(ends, ends[1:], strict=False)])
    case = case.but(spans=spans)
    clean = check(case)
    latent = case.latent.clone()
    latent[0, 91:230] = torch.nan
    out = ops.mla_prefill(*case.but(latent=latent).args())[0]
    assert torch.equal(out[0, :91], clean[0, :91]) and torch.equal(out[0, 230:], clean[0, 230:])
    assert out[0, 91:230].isnan().all()


def test_garbage_in_unused_slots():
    """缓存里没写过的、被遮住的槽位是 NaN，结果不变。"""
    case = attention(2, 20, 200, 2, DIMS[0], dtype=torch.bfloat16, end=[150, 131], masked=True)
    clean = check(case)
    latent, rope = case.latent.clone(), case.rope.clone()
    unused = ~case.kv_mask
    unused[0, 150:], unused[1, 131:] = True, True
    latent[unused], rope[unused] = torch.nan, torch.nan
    assert torch.equal(ops.mla_prefill(*case.but(latent=latent, rope=rope).args())[0], clean)


def test_no_less_accurate_than_eager():
    case = attention(1, 200, 200, 4, DIMS[0], dtype=torch.bfloat16)
    ours = ops.mla_prefill(*case.args())[0]
    assert_no_worse(ours, eager_attention(case), case.exact()[0])


def test_every_order_gives_the_same_bits(monkeypatch):
    case = attention(1, 140, 400, 2, DIMS[0], dtype=torch.bfloat16, masked=True)
    same_in_every_order(monkeypatch, lambda: ops.mla_prefill(*case.args()))


def test_shapes_that_do_not_fit_use_the_other_path():
    """太宽的维度、走不了 TMA 的步长：sm_80 的路径，结果照样对。"""
    check(attention(1, 70, 90, 2, (32, 32, 160, 136), dtype=torch.bfloat16))
    case = attention(2, 70, 90, 2, DIMS[0], dtype=torch.bfloat16)
    check(case.but(rope=case.rope[:1].expand(2, -1, -1)))
