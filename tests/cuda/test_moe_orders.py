"""MoE 的 CUDA 核在主机模拟上：线程、warp 与异步完成的次序怎样打乱，结果都逐位相同；没有共享内存的库冲突。"""

from __future__ import annotations

import os

import pytest
import torch

from deepseek_opt import ops
from tests import quantized_cases as quantized
from tests.cuda import host_library
from tests.cuda.test_gpu_moe import skewed
from tests.cuda.test_orders import same_in_every_order
from tests.moe_cases import Layout, experts

pytestmark = pytest.mark.skipif(
    os.environ.get("DSO_HOST") != "1", reason="要在 scripts/cuda_host.sh 里"
)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _no_bank_conflicts():
    library = host_library.load()
    library.dso_host_reset_counts()
    yield
    assert library.dso_host_conflicts() == 0


@pytest.mark.parametrize(
    "tokens, width, dtype", [(3, 33, torch.float32), (50, 33, torch.float32), (50, 520, BF16)]
)
def test_route(monkeypatch, tokens, width, dtype):
    """宽 520 的 bf16 由 mma 分成几份算。"""
    x, weight = torch.randn(tokens, width).to(dtype), torch.randn(24, width).to(dtype)
    bias = torch.randn(24)
    options = {"top_k": 5, "n_group": 6, "topk_group": 3}
    same_in_every_order(monkeypatch, lambda: ops.moe_route(x, weight, bias, bias, **options))


@pytest.mark.parametrize("tokens", [3, 20, 150, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_experts(monkeypatch, tokens, dtype):
    """不排序、一个 CTA 排序、几个 CTA 排序；词元少、多的路径；通用路径。"""
    ways = (Layout(), Layout("clipped", transposed=True, interleaved=True))
    for way in ways if tokens < 1000 else ():
        case = experts((tokens, 72, 40, 48), 6, dtype=dtype, layout=way, bias=True)
        same_in_every_order(monkeypatch, lambda case=case: (case.run(),))
    if tokens == 1000:
        case = experts((tokens, 8, 8, 8), 6, 5, dtype=dtype)
        same_in_every_order(monkeypatch, lambda: (case.run(),))


@pytest.mark.parametrize("tokens", [4, 5, 150])
@pytest.mark.parametrize("form", [quantized.INT8, quantized.INT4, *quantized.FP8_FORMATS], ids=str)
def test_quantized(monkeypatch, tokens, form):
    case = quantized.make((tokens, 96, 48, 40), form, dtype=BF16, count=5)
    case = case.but(indices=skewed(tokens, 5))
    same_in_every_order(monkeypatch, lambda: (case.run(),))


@pytest.mark.parametrize("tokens, dtype", [(20, torch.float32), (20, BF16), (150, BF16)], ids=str)
def test_experts_backward(monkeypatch, tokens, dtype):
    """按行的三步、权重的梯度、偏置、混合权重；中间宽与 K 都跨过一块。"""
    ways = (Layout(), Layout("clipped", transposed=True, interleaved=True))
    for way in ways:
        shared = 0 if way.transposed else 4
        sizes = (tokens, 136, 31 if shared else 72, 48)
        case = experts(sizes, 5, dtype=dtype, layout=way, bias=True, shared=shared)
        if shared:  # 路由专家的宽度另取，都对齐
            case = case.but(
                gate_up=case.gate_up[:, :48].contiguous(),
                gate_up_bias=case.gate_up_bias[:, :48].contiguous(),
                down=case.down[..., :24].contiguous(),
            )
        grad = torch.randn(tokens, 48).to(dtype)
        case = case.but(indices=skewed(tokens, 5))
        same_in_every_order(monkeypatch, lambda c=case, g=grad: tuple(c.gradients(g).values()))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_route_backward(monkeypatch, score):
    logits, index = torch.randn(50, 37), torch.randint(37, (50, 5))
    given = torch.randn(50, 37), torch.randn(50, 5)
    backward = torch.ops.deepseek_opt.moe_route_backward
    same_in_every_order(
        monkeypatch, lambda: (backward(*given, logits, index, score, True, False, 2.0, 1e-20),)
    )
