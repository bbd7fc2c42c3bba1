"""算子与 torch 的约定：opcheck、fake、autocast、compile、inference_mode、检查点、DDP、线程数。"""

from __future__ import annotations

import gc
import os
import socket
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.checkpoint import checkpoint

from deepseek_opt import ops
from tests.moe_cases import Layout, experts
from tests.moe_list_cases import Lists
from tests.op_cases import FLOATS, QUANTIZED, attention, paged, randn
from tests.processes import leave

OPS = torch.ops.deepseek_opt
OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def leaf(*shape, dtype=torch.float32):
    return randn(*shape, dtype=dtype).requires_grad_()


def norm_inputs():
    return (leaf(3, 8), leaf(8), 1e-6)


def rope_inputs():
    return (leaf(2, 3, 4, 6), randn(1, 3, 3), randn(1, 3, 3), True)


def attention_inputs(grad=False, **options):
    case = attention(2, 3, 9, 2, (6, 2, 3, 4), **options)
    return (case.with_leaves(case.leaves()) if grad else case).args()


def write_inputs(dtype):
    caches = [torch.zeros(2, 8, 6).to(dtype), torch.zeros(2, 8, 2)]
    scale = torch.zeros(2, 8) if dtype in QUANTIZED else None
    return (*caches, scale, randn(2, 3, 6), randn(2, 3, 2), torch.tensor([0, 5]))


def layer_inputs(with_query):
    query = (randn(5, 8), randn(5), randn(5)) if with_query else (None, None, None)
    last, out = randn(2 * 5, 5 if with_query else 8), randn(8, 2 * 3)
    keys = (randn(6, 8), None, randn(4), 1e-6, randn(2 * 6, 4))
    cache = (torch.zeros(2, 8, 4), torch.zeros(2, 8, 2), None, torch.tensor([0, 5]))
    angles = (randn(2, 1, 1), randn(2, 1, 1), True)
    rest = (None, None, 0.5, 2)
    return (randn(2, 1, 8), *query, 1e-6, last, None, *keys, out, None, *angles, *cache, *rest)


def backward_inputs():
    args = attention_inputs(masked=True)
    q, latent, rope, _, kv_b, spans, mask, *options = args
    out, lse = OPS.mla_prefill(*args)
    return (torch.randn_like(out), q, latent, rope, kv_b, spans, mask, out, lse, *options)


def moe_inputs(grad=True, **options):
    case = experts((5, 6, 4, 7), 3, **options)
    return (case.leaves() if grad else case).args()


def moe_backward_inputs(*needs):
    args = moe_inputs(grad=False, bias=True, shared=4)
    return (randn(5, 7), *args, *needs)


def kept():
    """中间宽是 8 的倍数：留下的 gate、up 的行之间没有没写过的空隙，可以整个比较。"""
    return experts((5, 6, 8, 7), 3, bias=True, shared=4)


def moe_saved():
    return OPS.moe_experts(*moe_inputs(grad=False, bias=True, shared=4), True)[1]


def moe_into_inputs():
    args = moe_inputs(grad=False, bias=True, shared=4)
    return (randn(5, 7), *args, True, True, randn(*args[3].shape), randn(*args[5].shape))


def route_rule(**options):
    rule = {"score": "sigmoid", "normalize": True, "softmax_after": False}
    rule |= {"n_group": 3, "topk_group": 2, "group_score": "top2", "scaling": 2.5, "eps": 1e-20}
    return tuple((rule | options).values())


def list_inputs(joint=False, **options):
    return Lists.of(experts((3, 4, 5, 6), 2, **options), joint)


def list_backward_inputs(*needs):
    return (randn(3, 6), *list_inputs(bias=True, shared=4).args(), *needs)


def route_backward_inputs():
    logits, index = randn(4, 6), torch.tensor([[0, 5], [1, 2], [3, 4], [5, 0]])
    return (randn(4, 6), randn(4, 2), logits, index, "softmax", True, False, 2.5, 1e-20)


CASES = {
    "linear": lambda: (leaf(3, 5), leaf(4, 5), leaf(4)),
    "linear 无偏置": lambda: (leaf(2, 3, 5), leaf(4, 5)),
    "linear_backward": lambda: (randn(3, 4), randn(3, 5), randn(4, 5), True, False, True),
    "swiglu_mlp": lambda: (leaf(3, 5), leaf(4, 5), leaf(4, 5), leaf(6, 4)),
    "swiglu_mlp_backward": lambda: (randn(3, 6), *CASES["swiglu_mlp"]()),
    "rms_norm": norm_inputs,
    "rms_norm_backward": lambda: (randn(3, 8), randn(3, 8), randn(8), 1e-6),
    "add_rms_norm": lambda: (leaf(3, 8), *norm_inputs()),
    "rope": rope_inputs,
    "rope 逆": lambda: (*rope_inputs(), True),
    "rope 成对": lambda: (*rope_inputs()[:3], True, False, True),
    "rope_": lambda: (randn(2, 3, 4, 6), *rope_inputs()[1:]),
    "mla_layer_decode": lambda: layer_inputs(True),
    "mla_layer_decode 无 q": lambda: layer_inputs(False),
    "mla_cache_write": lambda: write_inputs(torch.float32),
    "mla_cache_write int8": lambda: write_inputs(torch.int8),
    "mla_cache_write fp8": lambda: write_inputs(torch.float8_e4m3fn),
    "mla_decode": attention_inputs,
    "mla_decode int8": lambda: attention_inputs(cache=torch.int8, masked=True),
    "mla_decode fp8": lambda: attention_inputs(cache=torch.float8_e4m3fn, masked=True),
    "mla_decode 分页": lambda: paged(attention(2, 3, 9, 2, (6, 2, 3, 4)), 3),
    "mla_prefill": lambda: attention_inputs(grad=True),
    "mla_prefill 遮盖": lambda: attention_inputs(grad=True, masked=True, causal=False),
    "mla_prefill_backward": backward_inputs,
    "moe_experts": moe_inputs,
    "moe_experts 偏置与共享": lambda: moe_inputs(bias=True, shared=4),
    "moe_experts 转置": lambda: moe_inputs(layout=Layout("clipped", True, True)),
    "moe_experts 无门": lambda: moe_inputs(layout=Layout("relu2", gated=False), bias=True),
    "moe_experts 留下 gate、up": lambda: (*kept().leaves().args(), True),
    "moe_experts_backward": lambda: moe_backward_inputs(True, True, True),
    "moe_experts_backward 有留下的": lambda: moe_backward_inputs(True, True, True, moe_saved()),
    "moe_experts_backward 只要 weights": lambda: moe_backward_inputs(False, False, False),
    "moe_experts_backward_into": moe_into_inputs,
    "moe_experts_list": lambda: list_inputs(bias=True, shared=4).leaves().args(),
    "moe_experts_list 上下相接": lambda: list_inputs(joint=True).leaves().args(),
    "moe_experts_list 留下 gate、up": lambda: (*Lists.of(kept()).args(), True),
    "moe_experts_list_backward": lambda: list_backward_inputs(True, True, True),
    "moe_experts_list_backward 只要 weights": lambda: list_backward_inputs(False, False, False),
    "moe_route": lambda: (leaf(4, 5), leaf(6, 5), leaf(6), randn(6), 2, *route_rule()),
    "moe_route 只有 logits": lambda: (leaf(4, 6), None, None, None, 2, *route_rule()),
    "moe_route_backward": route_backward_inputs,
    "moe_route_backward 只有权重": lambda: (None, *route_backward_inputs()[1:]),
}


def each_tensor(function, args):
    """function 作用于各张量，包括列表里的。"""
    return torch.utils._pytree.tree_map_only(torch.Tensor, function, tuple(args))


def detached(args):
    return each_tensor(torch.Tensor.detach, args)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    args = CASES[name]()
    if name.split()[0].endswith("_backward"):
        args = detached(args)
    checks = (
        OPCHECKS[1:] if name.endswith("fp8") else OPCHECKS
    )  # 核对 schema 要比较张量，torch 对 fp8 不会
    torch.library.opcheck(getattr(OPS, name.split()[0]).default, args, test_utils=checks)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "name", ["linear", "swiglu_mlp", "mla_decode", "mla_decode 分页", "mla_prefill"]
)
def test_autocast(name, dtype):
    """矩阵类算子在 autocast 里按它的 dtype 计算；其余不变。"""
    args = detached(CASES[name]())
    op = getattr(ops, name.split()[0])
    lower = tuple(
        a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )
    want = op(*lower)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        got = op(*args)
    for a, b in zip(torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("cache", QUANTIZED)
def test_autocast_keeps_quantized_latents_and_norms(cache):
    args = attention_inputs(cache=cache)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.mla_decode(*args).dtype == torch.bfloat16
        assert ops.rms_norm(randn(2, 4), randn(4), 1e-6).dtype == torch.float32


def test_autocast_keeps_routing_in_fp32():
    args = detached(CASES["moe_route"]())
    want = OPS.moe_route(*args)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(OPS.moe_route(*args), want, rtol=0, atol=0)


def test_autocast_gradients():
    x, weight = leaf(3, 5), leaf(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, weight)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == weight.grad.dtype == torch.float32


def block(x, weights, case):
    """一个小块：每个可求导的算子都在里面。"""
    norm, gate, up, down, proj = weights
    hidden = ops.swiglu_mlp(ops.rms_norm(x, norm, 1e-6), gate, up, down)
    y, total = ops.add_rms_norm(hidden, x, norm, 1e-6)
    q = ops.linear(y, proj).view(2, 3, 2, 5)
    cos, sin = torch.ones(1, 3, 1), torch.zeros(1, 3, 1)
    q = torch.cat((q[..., :3], ops.rope(q[..., 3:], cos, sin, True)), -1)
    out, _ = ops.mla_prefill(q, *case.args()[1:])
    return out.sum() + total.square().mean()


def block_inputs():
    weights = [leaf(8), leaf(12, 8), leaf(12, 8), leaf(8, 12), leaf(10, 8)]
    return leaf(2, 3, 8), weights, attention(2, 3, 9, 2, (6, 2, 3, 4))


def grads_of(function, x, weights, case):
    for tensor in (x, *weights):
        tensor.grad = None
    loss = function(x, weights, case)
    loss.backward()
    return [loss.detach(), *(tensor.grad.clone() for tensor in (x, *weights))]


def assert_same(first, second, **limits):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **limits)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_fullgraph(backend):
    inputs = block_inputs()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    assert_same(grads_of(compiled, *inputs), grads_of(block, *inputs))


def test_compile_fullgraph_inference():
    """解码路径：缓存写入（就地）与注意力在一个图里。"""
    args = attention_inputs()
    latent, rope = randn(2, 1, 6), randn(2, 1, 2)

    def step(cache, keys, offsets, q, kv_b):
        ops.mla_cache_write(cache, keys, None, latent, rope, offsets)
        spans = ops.make_spans(2, 3, 9)
        out = ops.mla_decode(q, cache, keys, None, kv_b, spans, None, 0.4, 4)
        ops.rope_(q[..., 3:], torch.ones(1, 3, 1), torch.zeros(1, 3, 1), False)
        return out

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for function in (step, compiled):
        cache, keys, q = args[1].clone(), args[2].clone(), args[0].clone()
        out = function(cache, keys, torch.tensor([8, 2]), q, args[4])
        results.append((out, cache, keys, q))
    assert_same(results[0], results[1])


def test_compile_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(ops.linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (2, 5, 9):
        x, weight = randn(rows, 5), randn(4, 5)
        torch.testing.assert_close(compiled(x, weight), ops.linear(x, weight))


def test_inference_mode_and_no_grad():
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            for name in ("linear", "swiglu_mlp", "rms_norm", "rope", "mla_decode", "mla_prefill"):
                got = getattr(ops, name)(*CASES[name]())
                assert not any(t.requires_grad for t in torch.utils._pytree.tree_leaves(got))
            ops.mla_cache_write(*write_inputs(torch.float32))


def test_gradient_checkpointing():
    inputs = block_inputs()

    def saved(*args):
        return checkpoint(block, *args, use_reentrant=False)

    assert_same(grads_of(saved, *inputs), grads_of(block, *inputs), rtol=0, atol=0)


def test_double_backward_is_refused():
    """没有二阶导数：再求导要报错，而不是给出错误的数。"""
    x, weight = leaf(3, 5), leaf(4, 5)
    (grad,) = torch.autograd.grad(ops.linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_backward 没有导数"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thread_count_does_not_change_results(threads, dtype):
    case = attention(2, 60, 700, 3, (40, 8, 16, 12), dtype=dtype)
    short = case.but(q=case.q[:, :1].contiguous(), spans=ops.make_spans(2, 1, 700))
    tensors = [randn(150, 70, dtype=dtype), *(randn(260, 70, dtype=dtype) for _ in range(2))]
    tensors.append(randn(70, 260, dtype=dtype))
    runs = []
    for count in (1, 2, 3):
        threads(count)
        leaves, dense = case.leaves(), [t.clone().requires_grad_() for t in tensors]
        out, lse = ops.mla_prefill(*case.with_leaves(leaves).args())
        mixed = ops.swiglu_mlp(*dense)
        norm = ops.rms_norm(mixed, dense[1][0], 1e-6)
        (out.float().square().sum() + norm.float().sum()).backward()
        grads = [t.grad for t in (*leaves, *dense)]
        runs.append([out.detach(), lse, norm.detach(), ops.mla_decode(*short.args()), *grads])
    for other in runs[1:]:
        assert_same(other, runs[0], rtol=0, atol=0)


def test_no_reference_is_kept():
    """算完之后不留引用：输入、输出、计算图都能回收。"""
    inputs = block_inputs()
    loss = block(*inputs)
    loss.backward()
    watched = [weakref.ref(t) for t in (loss, inputs[0], *inputs[1])]
    del loss, inputs
    gc.collect()
    assert all(ref() is None for ref in watched)


class Tiny(torch.nn.Module):
    """只用本库算子的小模型，DDP 测试用。"""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shapes = [(8,), (12, 8), (12, 8), (8, 12), (10, 8)]
        self.weights = torch.nn.ParameterList(torch.randn(s) for s in shapes)
        self.case = attention(2, 3, 9, 2, (6, 2, 3, 4))

    def forward(self, x):
        return block(x, list(self.weights), self.case)


def replica(rank: int, world: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    model = torch.nn.parallel.DistributedDataParallel(Tiny())
    generator = torch.Generator().manual_seed(rank)
    model(torch.randn(2, 3, 8, generator=generator)).backward()
    grads = [p.grad for p in model.module.weights]
    torch.save(grads, os.path.join(folder, f"{rank}.pt"))
    leave()


def test_ddp_averages_gradients(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(replica, args=(2, port, str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(results[0], results[1], rtol=0, atol=0)
    model, alone = Tiny(), []
    for rank in range(2):
        model.zero_grad()
        model(torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(rank))).backward()
        alone.append([p.grad.clone() for p in model.weights])
    assert_same(results[0], [(a + b) / 2 for a, b in zip(*alone, strict=True)])
