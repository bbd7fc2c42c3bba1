"""CUDA 核在主机模拟上与参考实现比较：没有 GPU 的机器也能发现算错、越界写与死锁。"""

from __future__ import annotations

import ctypes

import pytest
import torch

from deepseek_opt import reference
from tests.cuda import host_library as host
from tests.cuda.cases import CACHE_SHAPES, DTYPES, NORM_SHAPES, ROPE_SHAPES, randn
from tests.tolerances import tol

pytestmark = pytest.mark.skipif(host.compiler() is None, reason="没有主机 C++ 编译器")
EPS = 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, dim", NORM_SHAPES)
def test_rms_norm(rows, dim, dtype):
    x, weight = randn(rows, dim, dtype=dtype), randn(dim, dtype=dtype, seed=1)
    y, total = host.rms_norm(x, None, weight, EPS)
    assert total is None
    torch.testing.assert_close(y, reference.rms_norm(x, weight, EPS), **tol(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, dim", [(5, 64), (3, 2048), (7, 100)])
def test_add_rms_norm(rows, dim, dtype):
    x, residual = randn(rows, dim, dtype=dtype), randn(rows, dim, dtype=dtype, seed=2)
    weight = randn(dim, seed=1)  # 权重 fp32、激活 16 位也要能用
    y, total = host.rms_norm(x, residual, weight, EPS)
    expected, added = reference.add_rms_norm(x, residual, weight, EPS)
    torch.testing.assert_close(total, added, rtol=0, atol=0)
    torch.testing.assert_close(y, expected, **tol(dtype))


def test_rms_norm_strided_rows():
    """行距大于宽度（切出来的一段），起点不对齐时自动改用逐元素访存。"""
    wide = randn(6, 200, dtype=torch.bfloat16)
    weight = randn(64, dtype=torch.bfloat16, seed=1)
    for start in (0, 8, 3):
        x = wide[:, start : start + 64]
        y, _ = host.rms_norm(x, None, weight, EPS)
        torch.testing.assert_close(y, reference.rms_norm(x, weight, EPS), **tol(x.dtype))


def test_rms_norm_nan_and_inf():
    """一行里有 NaN 或无穷，只影响这一行，而且看得出来。"""
    x, weight = randn(4, 128), torch.ones(128)
    x[1, 5], x[2, 7] = torch.nan, torch.inf
    y, _ = host.rms_norm(x, None, weight, EPS)
    assert y[1].isnan().all() and y[2, 7].isnan()
    assert y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, dim", [*NORM_SHAPES, (150, 40)])
def test_rms_norm_backward(rows, dim, dtype):
    x, weight = randn(rows, dim, dtype=dtype), randn(dim, dtype=dtype, seed=1)
    grad = randn(rows, dim, dtype=dtype, seed=3)
    dx, dw = host.rms_norm_backward(grad, x, weight, EPS)
    wide, scale = x.double().requires_grad_(), weight.double().requires_grad_()
    reference.rms_norm(wide, scale, EPS).backward(grad.double())
    limits = tol(dtype)
    torch.testing.assert_close(dx, wide.grad.to(dtype), **limits)
    # dweight 是 rows 项之和，绝对误差随 √rows 增长。
    limits["atol"] *= rows**0.5
    torch.testing.assert_close(dw, scale.grad.to(dtype), **limits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", ROPE_SHAPES)
def test_rope(shape, inverse, interleaved, dtype):
    batch, steps, _, dim = shape
    x = randn(*shape, dtype=dtype)
    angle = randn(batch, steps, dim // 2, seed=4)
    for rows in (1, batch):
        cos, sin = angle[:rows].cos(), angle[:rows].sin()
        y = host.rope(x, cos, sin, interleaved, inverse)
        expected = reference.rope(x, cos, sin, interleaved, inverse)
        torch.testing.assert_close(y, expected, **tol(dtype))


def test_rope_strided_heads():
    """x 是 q 的后 dr 维（头距大于 d）。"""
    q = randn(2, 3, 4, 192, dtype=torch.bfloat16)
    angle = randn(1, 3, 32, seed=4)
    x = q[..., 128:]
    y = host.rope(x, angle.cos(), angle.sin(), True)
    expected = reference.rope(x, angle.cos(), angle.sin(), True)
    torch.testing.assert_close(y, expected, **tol(x.dtype))


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("shape", CACHE_SHAPES)
def test_mla_cache_write(shape, target, source):
    batch, steps, capacity, rank, rope_dim = shape
    keys = source if target == torch.int8 else target
    latent = randn(batch, steps, rank, dtype=source)
    rope = randn(batch, steps, rope_dim, dtype=source, seed=1)
    offsets = torch.arange(batch) % (capacity - steps + 1)

    def caches():
        scale = torch.full((batch, capacity), 9.0) if target == torch.int8 else None
        full = torch.full((batch, capacity, rank), 7).to(target)
        return full, torch.full((batch, capacity, rope_dim), 7).to(keys), scale

    mine, expected = caches(), caches()
    host.mla_cache_write(*mine, latent, rope, offsets)
    reference.mla_cache_write(*expected, latent, rope, offsets)
    for ours, theirs in zip(mine, expected, strict=True):
        if ours is not None:
            # 其余槽位原样不动；int8 只许差在舍入的平局上。
            limit = 1 if ours.dtype == torch.int8 else 0
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=limit)


def test_mla_cache_write_zero_and_nan_rows():
    """全零词元的尺度为 0；NaN 传进尺度，读出时看得见。"""
    latent = torch.zeros(1, 2, 32)
    latent[0, 1, 3] = torch.nan
    cache, scale = torch.zeros(1, 2, 32, dtype=torch.int8), torch.ones(1, 2)
    keys = torch.zeros(1, 2, 8)
    host.mla_cache_write(
        cache, keys, scale, latent, keys.clone(), torch.zeros(1, dtype=torch.int64)
    )
    assert scale[0, 0] == 0 and scale[0, 1].isnan()
    assert (cache[0, 0] == 0).all()


def test_order_of_threads_does_not_matter(monkeypatch):
    """纤程倒序运行结果逐位相同：核里没有漏掉屏障。"""
    x, weight = randn(9, 2048), randn(2048, seed=1)
    grad = randn(9, 2048, seed=2)
    forward = host.rms_norm(x, None, weight, EPS)[0]
    backward = host.rms_norm_backward(grad, x, weight, EPS)
    monkeypatch.setenv("DSO_HOST_REVERSE", "1")
    assert torch.equal(forward, host.rms_norm(x, None, weight, EPS)[0])
    for first, second in zip(backward, host.rms_norm_backward(grad, x, weight, EPS), strict=True):
        assert torch.equal(first, second)


def test_host_conversions_match_torch():
    """模拟里的 fp16、bf16 转换与 torch 一致（含非规格数、溢出与平局）。"""
    values = torch.cat((randn(500), randn(500) * 1e-6, randn(500) * 1e5, torch.tensor([0.0, -0.0])))
    for dtype in (torch.float16, torch.bfloat16):
        cache, keys = (
            torch.zeros(1, 1, values.numel(), dtype=dtype),
            torch.zeros(1, 1, 0, dtype=dtype),
        )
        source = values.reshape(1, 1, -1)
        offsets = torch.zeros(1, dtype=torch.int64)
        host.mla_cache_write(cache, keys, None, source, torch.zeros(1, 1, 0), offsets)
        assert torch.equal(cache.reshape(-1), values.to(dtype))


def test_emulation_reports_deadlock(tmp_path):
    """半个 warp 不参加洗牌：模拟报告失败而不是挂住。"""
    source = tmp_path / "deadlock.cu"
    source.write_text(
        "#include <algorithm>\n"
        "#include <cuda_runtime.h>\n"
        "static void broken() { if (threadIdx.x < 16) __shfl_xor_sync(~0u, 1.0f, 1); }\n"
        'extern "C" int run() { return DSO_LAUNCH(broken, dim3(1), dim3(32), nullptr); }\n',
        encoding="utf-8",
    )
    run = host.compile_shared([source], "deadlock").run
    run.restype = ctypes.c_int
    assert run() == 719
