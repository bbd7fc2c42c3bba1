"""指令集：各条路径的结果与标量一致；环境变量强制某一条，写错时说明并照常运行。"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from deepseek_opt import _native, ops
from tests.op_cases import FLOATS, attention, randn
from tests.tolerances import tol


def everything(dtype: torch.dtype) -> list[torch.Tensor]:
    """每个算子各算一次（含反向），输入固定。"""
    torch.manual_seed(7)
    rows = randn(5, 40, dtype=dtype).requires_grad_()
    gate, up, down = (randn(33, 40, dtype=dtype, scale=0.2) for _ in range(3))
    weight = randn(40, dtype=dtype).requires_grad_()
    hidden = ops.rms_norm(rows, weight, 1e-6)
    mixed = ops.swiglu_mlp(hidden, gate, up, down.T.contiguous())
    cos, sin = torch.rand(1, 5, 20).cos(), torch.rand(1, 5, 20).sin()
    turned = ops.rope(ops.linear(mixed, up.T @ down)[None, :, None], cos, sin, True)
    turned.float().sum().backward()
    case = attention(2, 3, 130, 5, (33, 6, 9, 7), dtype=dtype, masked=True)
    leaves = case.leaves()
    out, lse = ops.mla_prefill(*case.with_leaves(leaves).args())
    out.float().square().sum().backward()
    decoded = ops.mla_decode(*case.args())
    grads = [rows.grad, weight.grad, *(leaf.grad for leaf in leaves)]
    return [turned.detach(), out.detach(), lse, decoded, *grads]


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
def test_agrees_with_scalar(dtype):
    ours = everything(dtype)
    _native.set_isa("scalar")
    for got, want in zip(ours, everything(dtype), strict=True):
        size = max(1.0, want.abs().max().item())
        torch.testing.assert_close(got.double() / size, want.double() / size, **tol(dtype))


@pytest.mark.usefixtures("isa")
def test_same_isa_gives_the_same_bits():
    for first, second in zip(everything(torch.bfloat16), everything(torch.bfloat16), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def run(code: str, isa: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DEEPSEEK_OPT_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )


SCRIPT = """
import torch
from deepseek_opt import _native, ops
x = torch.arange(12.0).view(3, 4)
print(_native.isa(), ops.linear(x, torch.eye(4)).sum().item())
"""


@pytest.mark.parametrize("name", _native.available_isas())
def test_environment_forces_each(name):
    done = run(SCRIPT, name)
    assert done.stdout.split() == [name, "66.0"], done.stderr
    assert done.stderr == ""


def test_unknown_environment_value():
    """写错不能让程序起不来，也不能不声不响。"""
    done = run(SCRIPT, "avx1024")
    best = _native.available_isas()[-1]
    assert done.stdout.split() == [best, "66.0"], done.stderr
    assert "DEEPSEEK_OPT_ISA=avx1024 不可用" in done.stderr and f"改用 {best}" in done.stderr


def test_empty_environment_value():
    done = run(SCRIPT, "")
    assert done.stdout.split() == [_native.available_isas()[-1], "66.0"] and done.stderr == ""
