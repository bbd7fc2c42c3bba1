"""moe_experts 与 torch 的约定：autocast、compile、inference_mode、检查点、二阶导、不留引用。"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from deepseek_opt import ops
from tests.moe_cases import Experts, Layout, close, experts
from tests.op_cases import FLOATS

SIZES = (9, 8, 6, 7)


def make(**options) -> Experts:
    return experts(SIZES, 4, bias=True, shared=4, **options)


def names_and_loss(case: Experts, wrap=lambda f: f):
    """（名字，以张量为参数的损失函数）。"""
    names = list(case.tensors())

    def loss(indices, *values):
        named = dict(zip(names, values, strict=True))
        shared = tuple(named.pop(n) for n in names if n.startswith("shared"))
        return case.but(indices=indices, shared=shared, **named).run().square().sum()

    return names, wrap(loss)


def grads_of(case: Experts, wrap=lambda f: f):
    _, loss = names_and_loss(case, wrap)
    leaves = list(case.leaves().tensors().values())
    value = loss(case.indices, *leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_same(first, second, **limits):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **limits)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("layout", [Layout(), Layout("clipped", True, True)])
def test_compile_fullgraph(backend, layout):
    case = experts(SIZES, 4, bias=True, shared=0 if layout.transposed else 4, layout=layout)
    torch._dynamo.reset()
    compiled = grads_of(case, lambda f: torch.compile(f, fullgraph=True, backend=backend))
    assert_same(compiled, grads_of(case))


def test_compile_dynamic_tokens():
    """词元数是动态的，一个图服务各种长度。"""
    torch._dynamo.reset()
    whole, graphs = make(), []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph

    def run(x, indices, weights, scale):
        shared = (*whole.shared[:3], scale)
        return whole.but(x=x, indices=indices, weights=weights, shared=shared).run()

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for tokens in (9, 5, 3):
        args = [t[:tokens].clone() for t in (whole.x, whole.indices, whole.weights)]
        args.append(whole.shared[3][:tokens].clone())
        assert torch.equal(compiled(*args), run(*args))
    assert len(graphs) == 1


def test_compile_shapes_of_partial_gradients():
    """编译的反向：不要的梯度是空张量，形状推导要一致。"""
    case = make()
    torch._dynamo.reset()
    compiled = torch.compile(Experts.run, fullgraph=True, backend="aot_eager")
    for wanted in ("x", "weights", "down"):
        leaf = getattr(case, wanted).clone().requires_grad_()
        got = torch.autograd.grad(compiled(case.but(**{wanted: leaf})).sum(), leaf)
        want = torch.autograd.grad(case.but(**{wanted: leaf}).run().sum(), leaf)
        assert torch.equal(got[0], want[0])


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_inference(mode):
    case = make()
    with mode():
        got = case.leaves().run()
    assert not got.requires_grad and torch.equal(got, case.run())


def test_gradient_checkpointing():
    case = make()
    saved = grads_of(case, lambda f: lambda *args: checkpoint(f, *args, use_reentrant=False))
    assert_same(saved, grads_of(case), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_autocast(dtype):
    """按 autocast 的 dtype 计算；混合权重保持 fp32；梯度回到原来的 dtype。"""
    case = make()
    lower = case.map(lambda t: t.to(dtype)).but(weights=case.weights)
    leaves = case.leaves()
    with torch.autocast("cpu", dtype):
        got = leaves.run()
    assert got.dtype == dtype and torch.equal(got, lower.run())
    got.float().sum().backward()
    want = lower.gradients(torch.ones_like(got))
    for name, tensor in leaves.tensors().items():
        assert tensor.grad.dtype == torch.float32
        close(tensor.grad, want[name].double(), torch.float32, name)


@pytest.mark.parametrize("wanted", ["x", "weights", "gate_up"])
def test_double_backward_is_refused(wanted):
    case = make()
    leaf = getattr(case, wanted).clone().requires_grad_()
    y = case.but(**{wanted: leaf}).run().square().sum()
    (grad,) = torch.autograd.grad(y, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="moe_experts_backward 没有导数，不能再求导"):
        grad.sum().backward()


def test_no_reference_is_kept():
    case = make().leaves()
    loss = case.run().sum()
    loss.backward()
    watched = [weakref.ref(t) for t in (loss, *case.tensors().values())]
    del loss, case
    gc.collect()
    assert all(ref() is None for ref in watched)


def test_gradient_accumulates_over_calls():
    """同一份专家用两次：梯度相加。"""
    case, other = make(), make()
    leaf = case.gate_up.clone().requires_grad_()
    both = case.but(gate_up=leaf)
    (both.run() + both.but(x=other.x).run()).sum().backward()
    ones = torch.ones(9, 7)
    want = case.gradients(ones)["gate_up"] + case.but(x=other.x).gradients(ones)["gate_up"]
    torch.testing.assert_close(leaf.grad, want)


def test_meta_tensors():
    case = make()
    moved = case.map(lambda t: t.to("meta")).but(indices=case.indices.to("meta"))
    got = moved.run()
    assert got.device.type == "meta" and got.shape == (9, 7)


def test_defaults_match_the_schema():
    """省略可选参数与逐个写出的结果相同。"""
    case = experts(SIZES, 4)
    short = ops.moe_experts(*case.args()[:7])
    assert torch.equal(short, case.run())
    assert torch.equal(short, torch.ops.deepseek_opt.moe_experts(*case.args())[0])
