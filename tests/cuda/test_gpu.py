"""CUDA 算子在真正的 GPU 上与参考实现比较；没有 GPU 就跳过（主机模拟见 test_host.py）。"""

from __future__ import annotations

import pytest
import torch

from deepseek_opt import _native, ops, reference
from tests.cuda.cases import CACHE_SHAPES, DTYPES, NORM_SHAPES, ROPE_SHAPES, randn
from tests.tolerances import tol

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="没有 CUDA 设备"),
]
EPS = 1e-6


def test_library_is_loaded():
    assert _native.cuda_loaded(), _native.cuda_load_error()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, dim", [*NORM_SHAPES, (4096, 7168), (100_003, 512)])
def test_rms_norm(rows, dim, dtype):
    x = randn(rows, dim, dtype=dtype).cuda()
    weight = randn(dim, dtype=dtype, seed=1).cuda()
    expected = reference.rms_norm(x, weight, EPS)
    torch.testing.assert_close(ops.rms_norm(x, weight, EPS), expected, **tol(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, dim", NORM_SHAPES)
def test_add_rms_norm(rows, dim, dtype):
    x, residual = randn(rows, dim, dtype=dtype).cuda(), randn(rows, dim, dtype=dtype, seed=2).cuda()
    weight = randn(dim, dtype=dtype, seed=1).cuda()
    y, total = ops.add_rms_norm(x, residual, weight, EPS)
    expected, added = reference.add_rms_norm(x, residual, weight, EPS)
    torch.testing.assert_close(total, added, rtol=0, atol=0)
    torch.testing.assert_close(y, expected, **tol(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, dim", [*NORM_SHAPES, (1000, 2048)])
def test_rms_norm_backward(rows, dim, dtype):
    """经过 autograd：输入与权重的梯度对 fp64 参考。"""
    x = randn(rows, dim, dtype=dtype).cuda().requires_grad_()
    weight = randn(dim, dtype=dtype, seed=1).cuda().requires_grad_()
    grad = randn(rows, dim, dtype=dtype, seed=3).cuda()
    ops.rms_norm(x, weight, EPS).backward(grad)
    wide = x.detach().double().requires_grad_()
    scale = weight.detach().double().requires_grad_()
    reference.rms_norm(wide, scale, EPS).backward(grad.double())
    limits = tol(dtype)
    torch.testing.assert_close(x.grad, wide.grad.to(dtype), **limits)
    limits["atol"] *= rows**0.5  # rows 项之和
    torch.testing.assert_close(weight.grad, scale.grad.to(dtype), **limits)


def test_rms_norm_backward_is_deterministic():
    x, weight, grad = (
        randn(*s, seed=i).cuda() for i, s in enumerate([(999, 512), (512,), (999, 512)])
    )
    first = torch.ops.deepseek_opt.rms_norm_backward(grad, x, weight, EPS)
    for _ in range(5):
        again = torch.ops.deepseek_opt.rms_norm_backward(grad, x, weight, EPS)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [*ROPE_SHAPES, (2, 1000, 16, 64)])
def test_rope(shape, inverse, interleaved, dtype):
    batch, steps, _, dim = shape
    x = randn(*shape, dtype=dtype).cuda()
    angle = randn(batch, steps, dim // 2, seed=4).cuda()
    for rows in (1, batch):
        cos, sin = angle[:rows].cos(), angle[:rows].sin()
        y = ops.rope(x, cos, sin, interleaved, inverse)
        expected = reference.rope(x, cos, sin, interleaved, inverse)
        torch.testing.assert_close(y, expected, **tol(dtype))


def test_rope_strided_heads():
    q = randn(2, 30, 4, 192, dtype=torch.bfloat16).cuda()
    angle = randn(1, 30, 32, seed=4).cuda()
    x = q[..., 128:]
    expected = reference.rope(x, angle.cos(), angle.sin(), True)
    torch.testing.assert_close(
        ops.rope(x, angle.cos(), angle.sin(), True), expected, **tol(x.dtype)
    )


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("where", ["cpu", "cuda"])
@pytest.mark.parametrize("shape", CACHE_SHAPES)
def test_mla_cache_write(shape, where, target, source):
    batch, steps, capacity, rank, rope_dim = shape
    keys = source if target == torch.int8 else target
    latent = randn(batch, steps, rank, dtype=source).cuda()
    rope = randn(batch, steps, rope_dim, dtype=source, seed=1).cuda()
    offsets = torch.arange(batch, device=where) % (capacity - steps + 1)

    def caches():
        quantized = target == torch.int8
        scale = torch.full((batch, capacity), 9.0, device="cuda") if quantized else None
        full = torch.full((batch, capacity, rank), 7, device="cuda").to(target)
        return full, torch.full((batch, capacity, rope_dim), 7, device="cuda").to(keys), scale

    mine, expected = caches(), caches()
    ops.mla_cache_write(*mine, latent, rope, offsets)
    reference.mla_cache_write(*expected, latent, rope, offsets)
    for ours, theirs in zip(mine, expected, strict=True):
        if ours is not None:
            limit = 1 if ours.dtype == torch.int8 else 0
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=limit)


def test_mla_cache_write_out_of_range():
    """CPU 上的 offsets 先检查：消息说清是哪一行，缓存不变。"""
    cache, keys = torch.ones(1, 4, 8, device="cuda"), torch.ones(1, 4, 2, device="cuda")
    latent, rope = torch.zeros(1, 3, 8, device="cuda"), torch.zeros(1, 3, 2, device="cuda")
    with pytest.raises(Exception, match="槽位"):
        ops.mla_cache_write(cache, keys, None, latent, rope, torch.tensor([2]))
    assert (cache == 1).all() and (keys == 1).all()


def test_mixed_devices():
    with pytest.raises(Exception, match="weight|device|设备"):
        torch.ops.deepseek_opt.rms_norm(torch.ones(2, 8, device="cuda"), torch.ones(8), EPS)


def test_side_stream():
    """在当前流上启动：换一条流，结果一样且不必等默认流。"""
    x, weight = randn(64, 512).cuda(), randn(512, seed=1).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = ops.rms_norm(x, weight, EPS)
    stream.synchronize()
    torch.testing.assert_close(y, reference.rms_norm(x, weight, EPS), **tol(x.dtype))


def test_compile_and_graph():
    """torch.compile(fullgraph=True) 与 CUDA graph 都能用。"""
    x, weight = randn(64, 512, dtype=torch.bfloat16).cuda(), torch.ones(512).cuda().bfloat16()
    angle = randn(1, 4, 32, seed=4).cuda()

    def step(value):
        y = ops.rms_norm(value, weight, EPS)
        return ops.rope(y.view(4, 4, 32, 64), angle.cos(), angle.sin(), True)

    expected = step(x)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(x), expected, **tol(x.dtype))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)
