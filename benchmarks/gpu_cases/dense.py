"""RMS 归一化、旋转位置编码、缓存写入、行极少的矩阵乘：只受带宽限制，没有要求，对照是 torch 的写法。"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_cases.check import Pairs
from benchmarks.gpu_cases.runner import Case, Env, Row, Work, measure
from deepseek_opt import ops, reference
from deepseek_opt.reference.mla import quantize

EPS = 1e-6
DTYPES = (torch.bfloat16, torch.float32)
NORMS = [(1, 2048), (64, 7168), (4096, 2048), (16384, 7168), (65536, 512)]
ROPES = [(1, 1, 16, 64), (8, 1, 128, 64), (4, 4096, 16, 64), (1, 8192, 128, 64)]
WRITES = [(1, 1), (64, 1), (1, 4096), (8, 4096)]
# 行、列、K：V2-Lite 解码一步的投影与输出头；稠密 FFN 是行、中间宽、K
LINEARS = [(m, n, 2048) for m in (1, 8) for n in (576, 2048, 3072, 102400)]
FFNS = [(1, 10944, 2048), (8, 10944, 2048)]
RANK, ROPE_DIM, CAPACITY = 512, 64, 8192


def cases(env: Env) -> list[Case]:
    """全部项；quick 时只用很小的形状。"""
    norms, ropes, writes = (
        ([(4, 64)], [(1, 4, 2, 64)], [(1, 4)]) if env.quick else (NORMS, ROPES, WRITES)
    )
    found = []
    for rows, dim in norms:
        found += [_case(partial(build, rows, dim), dtype) for build in _NORMS for dtype in DTYPES]
    for shape in ropes:
        found += [_case(partial(rope, shape), dtype) for dtype in DTYPES]
    for batch, steps in writes:
        found += [
            _case(partial(cache_write, batch, steps), dtype)
            for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
        ]
    linears, ffns = ([(2, 24, 16)], [(2, 24, 16)]) if env.quick else (LINEARS, FFNS)
    found += [_case(partial(linear, *shape), torch.bfloat16) for shape in linears]
    return found + [_case(partial(swiglu, *shape), torch.bfloat16) for shape in ffns]


def _case(build: partial, dtype: torch.dtype) -> Case:
    """build(dtype, env) 造 Work。"""
    shape = "x".join(
        str(n) for arg in build.args for n in (arg if isinstance(arg, tuple) else (arg,))
    )
    key = f"{build.func.__name__}.{shape}.{str(dtype).removeprefix('torch.')}"

    def run(env: Env) -> Iterator[Row]:
        yield measure(env, build(dtype=dtype, env=env, key=key))

    return Case(key, run)


# ---- 归一化 ----


def _norm_inputs(env: Env, rows: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """x、weight、另一个 x 形状的张量（残差或输出的梯度）。"""
    x, other = (env.randn(rows, dim, dtype=dtype) for _ in range(2))
    return x, 1 + 0.1 * env.randn(dim, dtype=dtype), other


def _eager_norm(x: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
    """transformers 的 RMSNorm 逐步写法。"""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def rms_norm(rows: int, dim: int, *, dtype: torch.dtype, env: Env, key: str) -> Work:
    """前向。"""

    def pairs(args: tuple, y: Tensor) -> Pairs:
        return [("y", y, reference.rms_norm(args[0].double(), args[1].double(), EPS))]

    return Work(
        key,
        dtype,
        lambda: _norm_inputs(env, rows, dim, dtype),
        lambda x, w, _: ops.rms_norm(x, w, EPS),
        {
            "F.rms_norm": lambda x, w, _: F.rms_norm(x, (dim,), w, EPS),
            "transformers 的写法": _eager_norm,
        },
        pairs,
        bytes=2 * rows * dim * dtype.itemsize,
    )


def add_rms_norm(rows: int, dim: int, *, dtype: torch.dtype, env: Env, key: str) -> Work:
    """加残差再归一化。"""

    def peer(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (dim,), weight, EPS), total

    def pairs(args: tuple, out: tuple[Tensor, Tensor]) -> Pairs:
        x, weight, residual = args
        y = reference.rms_norm((x + residual).double(), weight.double(), EPS)
        return [("y", out[0], y), ("x + residual", out[1], x + residual)]

    return Work(
        key,
        dtype,
        lambda: _norm_inputs(env, rows, dim, dtype),
        lambda x, w, residual: ops.add_rms_norm(x, residual, w, EPS),
        {"相加再 F.rms_norm": peer},
        pairs,
        bytes=4 * rows * dim * dtype.itemsize,
    )


def rms_norm_backward(rows: int, dim: int, *, dtype: torch.dtype, env: Env, key: str) -> Work:
    """反向；torch 一侧含前向：autograd 没有单独的反向入口。"""

    def grads(function, x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
        return torch.autograd.grad(function(*leaves), leaves, grad)

    def pairs(args: tuple, out: tuple[Tensor, ...]) -> Pairs:
        expected = grads(lambda x, w: reference.rms_norm(x, w, EPS), *(a.double() for a in args))
        return zip(("dx", "dweight"), out, expected, strict=True)

    return Work(
        key,
        dtype,
        lambda: _norm_inputs(env, rows, dim, dtype),
        lambda x, w, grad: torch.ops.deepseek_opt.rms_norm_backward(grad, x, w, EPS),
        {"F.rms_norm 前向加反向": partial(grads, lambda x, w: F.rms_norm(x, (dim,), w, EPS))},
        pairs,
        bytes=3 * rows * dim * dtype.itemsize,
        grad=True,
    )


_NORMS = (rms_norm, add_rms_norm, rms_norm_backward)


# ---- 旋转、缓存 ----


def _eager_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """transformers 的逐步写法。"""
    b, t, h, d = x.shape
    x = x.view(b, t, h, d // 2, 2).transpose(4, 3).reshape(b, t, h, d)
    full_cos = torch.cat((cos, cos), -1)[:, :, None].to(x.dtype)
    full_sin = torch.cat((sin, sin), -1)[:, :, None].to(x.dtype)
    half = torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1)
    return x * full_cos + half * full_sin


def rope(shape: tuple[int, ...], *, dtype: torch.dtype, env: Env, key: str) -> Work:
    """x 的形状 [B, T, H, d]。"""
    b, t, h, d = shape

    def make() -> tuple[Tensor, ...]:
        angle = env.randn(1, t, d // 2, dtype=torch.float32)
        return env.randn(b, t, h, d, dtype=dtype), angle.cos(), angle.sin()

    def pairs(args: tuple, y: Tensor) -> Pairs:
        return [("y", y, reference.rope(*(a.double() for a in args), True))]

    size = 2 * b * t * h * d * dtype.itemsize + t * d * 4
    peers = {"transformers 的写法": _eager_rope}
    return Work(key, dtype, make, lambda *args: ops.rope(*args, True), peers, pairs, bytes=size)


def _slice_write(cache, keys, scale, latent, turned, _start) -> None:
    """切片赋值。"""
    steps = latent.shape[1]
    keys[:, :steps] = turned
    if scale is None:
        cache[:, :steps] = latent
        return
    cache[:, :steps], scale[:, :steps] = quantize(latent, cache.dtype)


def cache_write(batch: int, steps: int, *, dtype: torch.dtype, env: Env, key: str) -> Work:
    """batch 行各写 steps 个新词元（从槽位 0 起）；dtype 为潜变量缓存的类型。"""
    capacity = max(steps, 16) if env.quick else CAPACITY

    def make() -> tuple[Tensor | None, ...]:
        quantized = dtype.itemsize == 1
        return (
            torch.zeros(batch, capacity, RANK, device=env.device, dtype=dtype),
            torch.zeros(batch, capacity, ROPE_DIM, device=env.device, dtype=torch.bfloat16),
            torch.zeros(batch, capacity, device=env.device) if quantized else None,
            env.randn(batch, steps, RANK),
            env.randn(batch, steps, ROPE_DIM),
            torch.zeros(batch, dtype=torch.int64, device=env.device),
        )

    def pairs(args: tuple, _: None) -> Pairs:
        cache, keys, scale, latent, turned, _start = args
        stored, wanted = cache[:, :steps].float(), latent
        if scale is not None:  # 量化本身的误差不算：与参考的码比较
            codes, step = quantize(latent, dtype)
            stored, wanted = stored * scale[:, :steps, None], codes.float() * step[..., None]
        return [("潜变量", stored.to(latent.dtype), wanted), ("旋转键", keys[:, :steps], turned)]

    size = batch * steps * (RANK * (2 + dtype.itemsize) + ROPE_DIM * 4)
    peers = {"切片赋值": _slice_write}
    return Work(key, dtype, make, ops.mla_cache_write, peers, pairs, bytes=size)


# ---- 行极少的矩阵乘 ----


def linear(m: int, n: int, k: int, *, dtype: torch.dtype, env: Env, key: str) -> Work:
    """y [m, n] = x [m, k] Wᵀ。"""

    def make() -> tuple[Tensor, ...]:
        return env.randn(m, k, dtype=dtype), env.randn(n, k, dtype=dtype) * k**-0.5

    def pairs(args: tuple, y: Tensor) -> Pairs:
        return [("y", y, F.linear(*(a.double() for a in args)))]

    size = (n * k + m * (n + k)) * dtype.itemsize
    peers = {"F.linear": F.linear}
    return Work(
        key, dtype, make, ops.linear, peers, pairs, bytes=size, flops=2 * m * n * k, graph=True
    )


def _eager_ffn(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """transformers 的写法。"""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def swiglu(m: int, inner: int, k: int, *, dtype: torch.dtype, env: Env, key: str) -> Work:
    """稠密的门控 FFN。"""

    def make() -> tuple[Tensor, ...]:
        gate, up = (env.randn(inner, k, dtype=dtype) * k**-0.5 for _ in range(2))
        return (
            env.randn(m, k, dtype=dtype),
            gate,
            up,
            env.randn(k, inner, dtype=dtype) * inner**-0.5,
        )

    def pairs(args: tuple, y: Tensor) -> Pairs:
        return [("y", y, _eager_ffn(*(a.double() for a in args)))]

    size, flops = (3 * inner * k + 2 * m * k) * dtype.itemsize, 6 * m * inner * k
    peers = {"transformers 的写法": _eager_ffn}
    return Work(key, dtype, make, ops.swiglu_mlp, peers, pairs, bytes=size, flops=flops, graph=True)
