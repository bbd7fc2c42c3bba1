"""Hopper 的反向（TMA、wgmma）在主机模拟上：四个梯度对照 fp64，跨过块边，NaN 不外泄，次序无关。"""

from __future__ import annotations

import os

import pytest
import torch

from deepseek_opt import ops
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
# (T, S)：不满一块、正好、多一个、几块键、长的缓存接短的查询、短的缓存接长的查询。
LENGTHS = [(1, 1), (64, 64), (129, 129), (130, 400), (3, 257), (200, 90)]


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
