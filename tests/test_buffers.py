"""大块内存的回收池：梯度与暂存释放之后给下一次用。"""

import gc

import pytest
import torch

import deepseek_opt as dso
from deepseek_opt import ops

_POOLED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
pytestmark = pytest.mark.skipif(not _POOLED, reason="torch 2.10 没有带删除函数的 from_blob")


def _gradient(weight, x):
    return torch.autograd.grad(ops.linear(x, weight).sum(), weight)[0]


@pytest.fixture(name="inputs")
def _inputs():
    gc.collect()
    dso.release_buffers()
    torch.manual_seed(0)
    return torch.randn(1500, 1024, requires_grad=True), torch.randn(3, 1024)  # 梯度 6 MiB


def test_freed_gradient_is_used_again(inputs):
    first = _gradient(*inputs)
    address, kept = first.data_ptr(), first.clone()
    del first
    second = _gradient(*inputs)
    assert second.data_ptr() == address
    assert torch.equal(second, kept)


def test_live_gradient_is_never_handed_out(inputs):
    first = _gradient(*inputs)
    kept = first.clone()
    view = first[3:5]
    second = _gradient(inputs[0], 2 * inputs[1])
    assert second.data_ptr() != first.data_ptr()
    assert torch.equal(first, kept)
    del first
    third = _gradient(inputs[0], 3 * inputs[1])
    assert torch.equal(view, kept[3:5]), "视图还活着，内存不能给别人"
    assert not torch.equal(third, second)


def test_release_returns_what_is_idle(inputs):
    first = _gradient(*inputs)
    assert dso.release_buffers() == 0
    del first
    assert dso.release_buffers() >= 1500 * 1024 * 4
    assert dso.release_buffers() == 0


def test_idle_never_exceeds_the_peak(inputs):
    x = inputs[1]
    for rows in (1500, 1700, 1900, 2100, 2300):
        _gradient(torch.randn(rows, 1024, requires_grad=True), x)
    assert dso.release_buffers() <= 3 * 2300 * 1024 * 4


def test_gradient_becomes_grad_without_copy(inputs):
    weight, x = inputs
    ops.linear(x, weight).sum().backward()
    address = weight.grad.data_ptr()
    weight.grad = None
    ops.linear(x, weight).sum().backward()
    assert weight.grad.data_ptr() == address
