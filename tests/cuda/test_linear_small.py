"""行极少的 linear、swiglu_mlp 在 CUDA 上的核：对照 fp64，各种边界；任何线程次序逐位相同。"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deepseek_opt import ops
from tests.cuda.device import DEVICE, ON_GPU, marks
from tests.cuda.test_gpu import on_device
from tests.op_cases import attention, randn
from tests.tolerances import tol

pytestmark = marks
HALVES = [torch.bfloat16, torch.float16]
# (行, 列, K)：9 行起是 cuBLAS；列不满一块、正好一块、几块；K 不满一步、几步、超过一轮。
SHAPES = [(1, 1, 8), (8, 16, 40), (5, 23, 256), (3, 100, 1032), (8, 33, 2088), (9, 16, 64)]


def inputs(m, n, k, dtype):
    x, weight = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, scale=k**-0.5)
    return x.to(DEVICE), weight.to(DEVICE), randn(n, dtype=dtype).to(DEVICE)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_linear(m, n, k, dtype):
    x, weight, bias = inputs(m, n, k, dtype)
    for extra in (None, bias):
        want = F.linear(x.double(), weight.double(), None if extra is None else extra.double())
        torch.testing.assert_close(ops.linear(x, weight, extra).double(), want, **tol(dtype))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_swiglu(m, n, k, dtype):
    x, gate, _ = inputs(m, n, k, dtype)
    up, down = randn(n, k, dtype=dtype).to(DEVICE), randn(k, n, dtype=dtype).to(DEVICE)
    h = F.silu(F.linear(x.double(), gate.double())) * F.linear(x.double(), up.double())
    want = F.linear(h, down.double())
    scale = max(1.0, want.abs().max().item())
    got = ops.swiglu_mlp(x, gate, up, down).double()
    torch.testing.assert_close(got / scale, want / scale, **tol(dtype))


def test_strides():
    """行距比行宽大的、不是 8 的倍数的（不能宽访存）、一维与三维的 x、转置的权重。"""
    dtype = torch.bfloat16
    x, weight = randn(4, 80, dtype=dtype).to(DEVICE), randn(24, 88, dtype=dtype).to(DEVICE)
    for width, rows in ((64, weight[:, :64]), (63, weight[:, 1:64]), (72, weight[:, 8:80])):
        want = F.linear(x[:, :width].double(), rows.double())
        torch.testing.assert_close(ops.linear(x[:, :width], rows).double(), want, **tol(dtype))
    square = randn(64, 64, dtype=dtype).to(DEVICE)
    want = F.linear(x[:, :64].double(), square.T.double())
    torch.testing.assert_close(ops.linear(x[:, :64], square.T).double(), want, **tol(dtype))
    whole = ops.linear(x[:, :64].contiguous(), square)
    assert torch.equal(ops.linear(x[:, :64].contiguous().view(2, 2, 64), square).view(4, 64), whole)
    assert torch.equal(ops.linear(x[0, :64], square), whole[0])  # 各行与行数无关


@pytest.mark.skipif(ON_GPU, reason="用主机模拟的失败看有没有启动")
def test_few_rows_use_our_kernel(monkeypatch):
    x, weight, _ = inputs(9, 16, 64, torch.bfloat16)
    monkeypatch.setenv("DSO_HOST_FAIL", "1")
    for rows in (x[:8], x[:1]):
        with pytest.raises(RuntimeError, match="linear 启动失败"):
            ops.linear(rows, weight)
    for rows, other in ((x, weight), (x.float(), weight.float()), (x[:, :63], weight[:, :63])):
        ops.linear(rows, other)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "batch, steps, heads, dims",
    [
        (1, 1, 3, (136, 16, 150, 24)),
        (1, 2, 2, (64, 0, 24, 8)),
        (4, 2, 2, (64, 0, 24, 8)),
        (3, 3, 2, (64, 16, 16, 16)),
    ],
)
def test_absorb_and_values_of_few_rows(batch, steps, heads, dims, dtype):
    """吸收与 W_UV 各头一起算：r、dn 不满一块与超过一块；吸收 3 行起、W_UV 9 行起是 mla_heads.cu。"""
    case = attention(batch, steps, 40, heads, dims, dtype=dtype)
    got = ops.mla_decode(*on_device(case, True).args())
    torch.testing.assert_close(got.cpu().double(), case.exact()[0], **tol(dtype))


def test_nothing_to_compute():
    x = torch.zeros(0, 16, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.zeros(3, 16, device=DEVICE, dtype=torch.bfloat16)
    assert ops.linear(x, weight).shape == (0, 3)
    assert ops.linear(weight, weight[:0]).shape == (3, 0)


@pytest.mark.parametrize("order", ["reverse", "random:1", "random:2"])
def test_same_bits_in_any_order(monkeypatch, order):
    x, weight, bias = inputs(7, 37, 520, torch.bfloat16)
    up, down = weight.flip(0).contiguous(), weight.T.contiguous()
    want = ops.linear(x, weight, bias), ops.swiglu_mlp(x, weight, up, down)
    monkeypatch.setenv("DSO_HOST_ORDER", order)
    got = ops.linear(x, weight, bias), ops.swiglu_mlp(x, weight, up, down)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
