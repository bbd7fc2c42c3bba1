"""CUDA 核在主机模拟上：线程、warp 与异步完成的次序怎样打乱，结果都逐位相同；没有共享内存的库冲突。"""

from __future__ import annotations

import os

import pytest
import torch

from deepseek_opt import ops
from tests.cuda import host_library
from tests.op_cases import QUANTIZED, attention, bits, paged, randn
from tests.test_mla_layer_decode import arguments, fresh
from tests.test_mtp_input import inputs
from tests.test_mtp_verify import chain, sampled

pytestmark = pytest.mark.skipif(
    os.environ.get("DSO_HOST") != "1", reason="要在 scripts/cuda_host.sh 里"
)
MODES = [("reverse", "lazy"), ("random:1", "lazy"), ("random:2", "eager"), ("random:3", "lazy")]
BF16 = torch.bfloat16
# 一个块多于一个键块、几个 CTA 分一行、各行长短不一。
DECODE = {
    "16 行": (2, 1, 150, 4, (128, 32, 8, 8)),
    "32 行": (1, 2, 150, 15, (256, 64, 8, 8)),
    "64 行": (1, 3, 100, 20, (512, 0, 8, 8)),
    "48 个词元": (16, 3, 40, 3, (136, 24, 72, 40)),  # 吸收与 W_UV 另有核
    "通用": (2, 2, 90, 3, (33, 6, 9, 5)),
}


def same_in_every_order(monkeypatch, run):
    """在默认次序下的结果；换各种次序都逐位相同。"""
    expected = run()
    for order, timing in MODES:
        monkeypatch.setenv("DSO_HOST_ORDER", order)
        monkeypatch.setenv("DSO_HOST_ASYNC", timing)
        for one, other in zip(expected, run(), strict=True):
            assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), (order, timing)


@pytest.fixture(autouse=True)
def _no_bank_conflicts():
    library = host_library.load()
    library.dso_host_reset_counts()
    yield
    assert library.dso_host_conflicts() == 0


@pytest.mark.parametrize("dim", [64, 2048, 1031])
def test_norms(monkeypatch, dim):
    x, weight, grad = randn(9, dim), randn(dim), randn(9, dim)
    backward = torch.ops.deepseek_opt.rms_norm_backward
    same_in_every_order(
        monkeypatch, lambda: (ops.rms_norm(x, weight, 1e-6), *backward(grad, x, weight, 1e-6))
    )


@pytest.mark.parametrize("kind", QUANTIZED)
def test_rope_and_cache_write(monkeypatch, kind):
    x, angle = randn(2, 3, 4, 64, dtype=BF16), randn(1, 3, 32)
    latent, keys = randn(2, 3, 64), randn(2, 3, 16)

    def run():
        cache = torch.zeros(2, 8, 64).to(kind), torch.zeros(2, 8, 16), torch.zeros(2, 8)
        ops.mla_cache_write(*cache, latent, keys, torch.tensor([0, 5]))
        return ops.rope(x, angle.cos(), angle.sin(), True), *(bits(t) for t in cache)

    same_in_every_order(monkeypatch, run)


@pytest.mark.parametrize("cache", [None, *QUANTIZED], ids=["同类型", "int8", "fp8"])
@pytest.mark.parametrize("shape", DECODE.values(), ids=DECODE)
def test_decode(monkeypatch, shape, cache):
    case = attention(*shape, dtype=BF16, cache=cache or BF16, masked=True)
    same_in_every_order(monkeypatch, lambda: (ops.mla_decode(*case.args()),))
    args = paged(case, 10)
    same_in_every_order(monkeypatch, lambda: (ops.mla_decode(*args),))


@pytest.mark.parametrize(
    "dims", [(64, 16, 32, 64), (32, 64, 128, 128), (33, 6, 9, 5)], ids=["96/64", "192/128", "通用"]
)
def test_prefill_and_backward(monkeypatch, dims):
    case = attention(1, 150, 170, 2, dims, dtype=BF16, masked=True)
    grad = randn(1, 150, 2, dims[3], dtype=BF16)

    def run():
        leaves = case.leaves()
        out, lse = ops.mla_prefill(*case.with_leaves(leaves).args())
        out.backward(grad)
        return out.detach(), lse, *(leaf.grad for leaf in leaves)

    same_in_every_order(monkeypatch, run)


@pytest.mark.parametrize("cache", QUANTIZED)
def test_layer(monkeypatch, cache):
    args = arguments(2, 3, 33, 7, 64, 16, BF16, cache=cache)

    def run():
        mine = fresh(args)
        return ops.mla_layer_decode(*mine), *(bits(t) for t in mine[17:20])

    same_in_every_order(monkeypatch, run)


def test_swiglu(monkeypatch):
    tensors = randn(3, 16), randn(24, 16), randn(24, 16), randn(8, 24)
    backward = torch.ops.deepseek_opt.swiglu_mlp_backward
    same_in_every_order(
        monkeypatch, lambda: (ops.swiglu_mlp(*tensors), *backward(randn(3, 8) * 0 + 1, *tensors))
    )


@pytest.mark.parametrize("vocab", [96, 5003])
def test_verify(monkeypatch, vocab):
    greedy, args = chain(3, 4, vocab, BF16), sampled(3, 4, vocab, BF16)
    sample = torch.ops.deepseek_opt.mtp_verify_sample
    same_in_every_order(monkeypatch, lambda: (*ops.mtp_verify_greedy(*greedy), *sample(*args)))


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 90, "top_p": 0.7, "min_p": 0.01}, {"top_p": 0.9}]
)
def test_sampling(monkeypatch, options):
    """直方图用整数的原子加，与次序无关；分数多有相同的。"""
    logits, uniform = randn(2, 1, 5003).mul(4).round().div(2), torch.rand(2)

    def run():
        probs = ops.sample_filter(logits, **options)
        return probs, ops.sample_tokens(probs[:, 0], uniform)

    same_in_every_order(monkeypatch, run)


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("width", [64, 33])
def test_draft_head_and_input(monkeypatch, rows, width):
    x, weight, ids = randn(rows, width, dtype=BF16), randn(200, width, dtype=BF16), torch.arange(99)
    args = inputs((rows,), width, 24, BF16)
    same_in_every_order(
        monkeypatch,
        lambda: (
            ops.mtp_draft_head(x, weight),
            ops.mtp_draft_head(x, weight, None, ids),
            ops.mtp_input(*args, 1e-6),
        ),
    )
