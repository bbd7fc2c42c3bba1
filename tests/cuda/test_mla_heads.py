"""词元不多时 mla_decode 前后各头的矩阵乘（mla_heads.cu）：对照 fp64，各种边界与步长；任何线程次序逐位相同。"""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from deepseek_opt import ops
from tests.cuda.device import ON_GPU, marks
from tests.cuda.simulation import MODES
from tests.cuda.test_gpu import on_device
from tests.op_cases import attention, flipped, randn
from tests.tolerances import tol

pytestmark = marks
on_host = pytest.mark.skipif(ON_GPU, reason="直接调用核：主机模拟的库才导出")
HALVES = [torch.bfloat16, torch.float16]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # dso_dtype
# (词元, 头, k, n)：不满一块行、多一行、几块；k 不满一段、几段、覆盖在用的缓冲；n 不满一块、多 8 列。
SHAPES = [
    (9, 1, 8, 8),
    (17, 3, 72, 24),
    (33, 16, 24, 72),
    (64, 1, 512, 128),
    (100, 3, 128, 512),
    (128, 1, 648, 72),
    (128, 3, 136, 64),
]
ORDERED = [(17, 3, 72, 24), (33, 4, 24, 72), (64, 1, 512, 128), (128, 1, 648, 72)]
SHAPE_IDS = ["x".join(map(str, shape)) for shape in SHAPES]


class Params(ctypes.Structure):
    """dso_cuda_heads_params。"""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("m", "heads", "k", "n")),
        *((name, ctypes.c_void_p) for name in ("x", "w")),
        *((name, ctypes.c_int64) for name in ("x_ms", "x_hs", "w_rs", "w_hs")),
        ("y", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("y_ms", "y_hs")),
        *((name, ctypes.c_int) for name in ("dtype", "by_row", "settled")),
    ]


def params(x: Tensor, w: Tensor, y: Tensor, by_row: bool, settled: bool = False) -> Params:
    """x [M, H, k]，w [H, k, n] 或 [H, n, k]，y [M, H, n]。"""
    return Params(
        *(*x.shape, y.shape[2]),
        *(x.data_ptr(), w.data_ptr()),
        *(*x.stride()[:2], w.stride(1), w.stride(0)),
        *(y.data_ptr(), *y.stride()[:2]),
        *(CODES[x.dtype], by_row, settled),
    )


def library() -> ctypes.CDLL:
    # 只在主机模拟里：没有 GPU 时才有这个库
    from tests.cuda import host_library

    return host_library.load()


def run(p: Params) -> int:
    assert library().dso_cuda_heads_fits(ctypes.byref(p)) == 1
    return library().dso_cuda_heads(ctypes.byref(p), None)


def wider(tensor: Tensor, extra: int) -> Tensor:
    """数值相同、各行之后另有 extra 个 NaN 的视图。"""
    full = torch.full((*tensor.shape[:-1], tensor.shape[-1] + extra), torch.nan, dtype=tensor.dtype)
    full[..., : tensor.shape[-1]] = tensor
    return full[..., : tensor.shape[-1]]


def product(shape, by_row: bool, dtype: torch.dtype, extra: int = 0):
    """输入、fp64 的结果、全是 7 的输出（连同各行之后的 extra 个）。"""
    m, heads, k, n = shape
    x, w = randn(m, heads, k, dtype=dtype), randn(heads, k, n, dtype=dtype, scale=k**-0.5)
    want = torch.einsum("mhk,hkn->mhn", x.double(), w.double())
    w = w.mT.contiguous() if by_row else w
    return wider(x, extra), wider(w, extra), torch.full((m, heads, n + extra), 7.0).to(dtype), want


@on_host
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("by_row", [False, True], ids=["吸收", "W_UV"])
@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_products(shape, by_row, dtype):
    """连续的与行距更大的（其间是 NaN，不读；输出的不写）。"""
    for extra in (0, 8, 24):
        x, w, y, want = product(shape, by_row, dtype, extra)
        assert run(params(x, w, y[..., : shape[3]], by_row)) == 0
        torch.testing.assert_close(y[..., : shape[3]].double(), want, **tol(dtype))
        assert (y[..., shape[3] :] == 7).all()


def not_early() -> None:
    """一个不在 grid_wait 之前放行的核。"""
    x = torch.ones(1, 8)
    torch.ops.deepseek_opt.rms_norm_backward(x, x, x[0], 1e-6)


@on_host
@pytest.mark.parametrize("by_row", [False, True], ids=["吸收", "W_UV"])
@pytest.mark.parametrize("shape", ORDERED, ids=["x".join(map(str, shape)) for shape in ORDERED])
def test_same_bits_in_any_order(monkeypatch, shape, by_row):
    """线程与异步完成的次序、一块几行、权重在 grid_wait 之前还是之后读：逐位相同；没有库冲突。"""
    x, w, first, _ = product(shape, by_row, torch.bfloat16)
    assert run(params(x, w, first, by_row)) == 0
    library().dso_host_reset_counts()
    for order, timing in MODES:
        monkeypatch.setenv("DSO_HOST_ORDER", order)
        monkeypatch.setenv("DSO_HOST_ASYNC", timing)
        for sms, settled in (("1", True), ("1", False), ("400", True)):
            monkeypatch.setenv("DSO_HOST_SMS", sms)
            y = torch.zeros_like(first)
            not_early()
            assert run(params(x, w, y, by_row, settled)) == 0
            assert torch.equal(y, first), (order, timing, sms, settled)
    assert library().dso_host_conflicts() == 0


@on_host
def test_weights_are_not_read_before_they_are_settled():
    """前两个核都在 grid_wait 之前放行时，说权重已经写好是错的。"""
    x, w, y, _ = product(ORDERED[0], True, torch.bfloat16)
    not_early()
    codes = [run(params(x, w, y, True, settled=True)) for _ in range(3)]
    assert codes == [0, 0, 719]
    assert "都在 grid_wait 之前放行" in library().dso_host_failure().decode()


@on_host
@pytest.mark.parametrize(
    "m, k, n, step", [(4097, 8, 8, 0), (16, 60, 64, 0), (16, 64, 60, 0), (16, 64, 64, 4)]
)
def test_shapes_that_do_not_fit(m, k, n, step):
    x, w, y, _ = product((m, 2, k, n), True, torch.bfloat16, step)
    p = params(x, w, y[..., :n], True)
    assert library().dso_cuda_heads_fits(ctypes.byref(p)) == 0


@on_host
def test_single_precision_does_not_fit():
    p = params(*product((16, 2, 64, 64), True, torch.float32)[:3], True)
    assert library().dso_cuda_heads_fits(ctypes.byref(p)) == 0


@on_host
def test_small_shared_memory(monkeypatch):
    """99 KiB 的卡：一块只用 32 行，结果逐位不变。"""
    x, w, first, _ = product((70, 2, 512, 64), True, torch.bfloat16)
    monkeypatch.setenv("DSO_HOST_SMS", "1")
    assert run(params(x, w, first, True)) == 0
    monkeypatch.setenv("DSO_HOST_SHARED", str(99 << 10))
    y = torch.zeros_like(first)
    assert run(params(x, w, y, True)) == 0 and torch.equal(y, first)


@on_host
@pytest.mark.parametrize("shape", [(0, 2, 8, 8), (9, 0, 8, 8)], ids=str)
def test_nothing_to_compute(shape):
    x, w, y, _ = product(shape, False, torch.bfloat16)
    assert run(params(x, w, y, False)) == 0


# ---- 经由 mla_decode ----

# (B, T, H, (r, dr, dn, dv))：dn、dv 不是 8 的倍数的是 cuBLAS。
DECODES = [
    (17, 1, 3, (128, 32, 24, 72)),
    (33, 1, 16, (64, 16, 128, 64)),
    (16, 4, 1, (512, 64, 128, 128)),
    (25, 4, 3, (136, 16, 8, 24)),
    (43, 3, 2, (64, 0, 40, 8)),
    (20, 1, 2, (64, 16, 9, 5)),
]


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("batch, steps, heads, dims", DECODES, ids=str)
def test_decode(batch, steps, heads, dims, dtype):
    case = attention(batch, steps, 40, heads, dims, dtype=dtype)
    got = ops.mla_decode(*on_device(case, True).args())
    torch.testing.assert_close(got.cpu().double(), case.exact()[0], **tol(dtype))


def test_decode_without_spans():
    """没有 span 时没有注意力的核：全是 0。"""
    case = attention(20, 1, 40, 2, (64, 16, 16, 16), dtype=torch.bfloat16)
    case = case.but(spans=case.spans[:0])
    assert not ops.mla_decode(*on_device(case, True).args()).any()


def test_decode_with_converted_weights():
    """kv_b_weight 不连续：先复制，两个核都用复制的。"""
    case = attention(20, 1, 40, 2, (64, 16, 16, 16), dtype=torch.bfloat16)
    got = ops.mla_decode(*on_device(case.but(kv_b=flipped(case.kv_b)), True).args())
    assert torch.equal(got, ops.mla_decode(*on_device(case, True).args()))


@pytest.mark.skipif(ON_GPU, reason="用主机模拟的失败看有没有启动")
@pytest.mark.parametrize(
    "tokens, width, launches", [(8, 16, 4), (9, 16, 4), (128, 16, 4), (9, 12, 2)]
)
def test_number_of_kernels(monkeypatch, tokens, width, launches):
    """没有别人的核：吸收、注意力、合并、W_UV；对不齐时前后两个是 cuBLAS。"""
    case = attention(tokens, 1, 40, 1, (64, 16, width, width), dtype=torch.bfloat16)
    for last, fails in ((launches, True), (launches + 1, False)):
        monkeypatch.setenv("DSO_HOST_FAIL", str(last))
        if fails:
            with pytest.raises(RuntimeError, match="mla_decode 启动失败"):
                ops.mla_decode(*case.args())
        else:
            ops.mla_decode(*case.args())
        monkeypatch.delenv("DSO_HOST_FAIL")
        ops.mla_decode(*case.args())
