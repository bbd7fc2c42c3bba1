"""mla_prefill 的前向与反向：8K 因果；对照是 torch SDPA 的 flash 与 cuDNN 后端。

我们的核从潜变量开始，K、V 的展开算在时间里；对照各量两次：连同展开的，和只算已展开的 K、V 的。
flops 两边都只数注意力（因果的一半），展开不计。
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_cases import mla_inputs
from benchmarks.gpu_cases.check import Pairs
from benchmarks.gpu_cases.mla_inputs import Dims
from benchmarks.gpu_cases.row import Peer, Row, Target
from benchmarks.gpu_cases.runner import Case, Env, Work, fill, measure
from deepseek_opt import ops

LENGTH, HEADS = 8192, (16, 128)
FORWARD, BACKWARD = Target(550.0, "TFLOP/s"), Target(400.0, "TFLOP/s")
BACKWARD_FLOPS = 2.5  # 反向的乘法是前向的 2.5 倍（含重算得分）
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
QUERIES = 16  # 核对时每处看这么多个查询
EXPANSION = "本库含 K、V 的展开；对照注明“含展开”的也含，注明“已展开”的不含"


def cases(_: Env) -> list[Case]:
    """一行，bf16，dn + dr = 192、dv = 128。"""
    return [
        Case(f"mla_prefill.h{heads}.s{LENGTH}", partial(_run, Dims(1, LENGTH, LENGTH, heads)))
        for heads in HEADS
    ]


def _run(dims: Dims, env: Env) -> Iterator[Row]:
    key = f"mla_prefill.h{dims.heads}.s{dims.slots}"
    if env.quick:
        dims = mla_inputs.small(dims)
    forward = measure(env, work(dims, env, f"{key}.forward"))
    yield forward.judge(forward.tflops, FORWARD.unit, FORWARD)
    both = measure(env, training_work(dims, env, f"{key}.forward_backward"))
    yield both
    yield backward_row(env, f"{key}.backward", forward, both, BACKWARD_FLOPS * flops(dims))


def backward_row(env: Env, key: str, forward: Row, both: Row, work_flops: float) -> Row:
    """反向 = 前向加反向 - 前向；各对照同样相减。"""
    us = max(both.us - forward.us, 1e-3)
    row = Row(key, dtype=both.dtype, details=both.details)
    fill(env, row, us, both.mode, 0, work_flops)
    before = {peer.name: peer.us for peer in forward.peers}
    for peer in both.peers:
        start = before.get(peer.name)
        if peer.us is None or start is None:
            row.peers.append(Peer(peer.name, note=peer.note or "前向没有读数"))
            continue
        spent = max(peer.us - start, 1e-3)
        row.peers.append(Peer(peer.name, spent, spent / us, peer.mode))
    return row.judge(row.tflops, BACKWARD.unit, BACKWARD)


def flops(dims: Dims) -> float:
    """因果注意力前向的运算次数：两个矩阵乘法的一半。"""
    width = dims.nope + dims.rope + dims.value
    return dims.batch * dims.heads * dims.slots * dims.slots * width


def work(dims: Dims, env: Env, key: str) -> Work:
    """只算前向，不建图。"""
    return Work(
        key,
        torch.bfloat16,
        _maker(dims, env),
        partial(_ours, dims),
        _peers(dims, lambda function, inputs, _: function(*inputs)),
        partial(_output_pairs, dims),
        bytes=_bytes(dims),
        flops=flops(dims),
        details={"expansion": EXPANSION},
    )


def training_work(dims: Dims, env: Env, key: str) -> Work:
    """前向加反向：对 q、latent、rope、kv_b_weight（已展开的对照：对 q、k、v）求导。"""

    def step(function: Callable, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        return torch.autograd.grad(function(*leaves), leaves, grad)

    def ours(*args: Tensor) -> tuple[Tensor, ...]:
        *inputs, spans, grad = args[:6]
        return step(lambda *leaves: _ours(dims, *leaves, spans), inputs, grad)

    return Work(
        key,
        torch.bfloat16,
        _maker(dims, env),
        ours,
        _peers(dims, step),
        partial(_gradient_pairs, dims),
        bytes=_bytes(dims),
        flops=(1 + BACKWARD_FLOPS) * flops(dims),
        checked=partial(_sparse_gradient, dims),
        grad=True,
        details={"expansion": EXPANSION},
    )


def _bytes(dims: Dims) -> float:
    """q、潜变量、旋转键、权重与输出各一遍。"""
    per_token = dims.heads * (dims.nope + dims.rope + dims.value) + dims.rank + dims.rope
    return 2 * (dims.slots * per_token + dims.heads * (dims.nope + dims.value) * dims.rank)


def _maker(dims: Dims, env: Env) -> Callable[[], tuple[Tensor, ...]]:
    """(q, latent, rope, kv_b_weight, spans, 输出的梯度, 已展开的 q、k、v)。"""
    spans = mla_inputs.make_spans(env, dims, _first_output)

    def make() -> tuple[Tensor, ...]:
        inputs = mla_inputs.make(env, dims, spans)
        grad = env.randn(dims.batch, dims.steps, dims.heads, dims.value)
        return (*inputs, grad, *_expand(dims, *inputs[:4]))

    return make


def _first_output(*args: Any) -> Tensor:
    return ops.mla_prefill(*args)[0]


def _ours(dims: Dims, q, latent, rope, weight, spans, *_: Tensor) -> Tensor:
    return _first_output(q, latent, rope, None, weight, spans, None, dims.scale, dims.value)


# ---- 对照 ----


def _expand(dims: Dims, q, latent, rope, weight) -> tuple[Tensor, Tensor, Tensor]:
    """q、k [B, H, S, dn + dr]，v [B, H, S, dv]。"""
    both = F.linear(latent, weight).unflatten(-1, (dims.heads, dims.nope + dims.value))
    nope, value = both.split((dims.nope, dims.value), -1)
    turned = rope[:, :, None].expand(-1, -1, dims.heads, -1)
    key = torch.cat((nope, turned), -1)
    return q.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _peers(dims: Dims, step: Callable) -> dict[str, Callable]:
    """step(函数, 输入, 输出的梯度) 跑一次；函数给出 [B, S, H, dv]。"""
    found: dict[str, Callable] = {}
    for name, backend in BACKENDS.items():
        attend = partial(_sdpa, dims, backend)

        def whole(*args: Tensor, attend: Callable = attend) -> Any:
            return step(lambda *inputs: attend(*_expand(dims, *inputs)), args[:4], args[5])

        def inner(*args: Tensor, attend: Callable = attend) -> Any:
            return step(attend, args[6:9], args[5])

        found[f"SDPA {name}（含展开）"], found[f"SDPA {name}（已展开）"] = whole, inner
    return found


def _sdpa(dims: Dims, backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """后端要求 v 与 k 同宽的，v 补零。"""
    if _needs_padding(dims, backend, q.device.type, q.requires_grad):
        v = F.pad(v, (0, dims.nope + dims.rope - dims.value))
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=dims.scale)
    return out.transpose(1, 2)[..., : dims.value]


@cache
def _needs_padding(dims: Dims, backend: SDPBackend, device: str, grad: bool) -> bool:
    """这个后端接不接受 v 比 k 窄（很短的一段试一次；cuDNN 前向与反向的限制不同）。"""
    width = dims.nope + dims.rope
    options = {"device": device, "dtype": torch.bfloat16, "requires_grad": grad}
    q, k = (torch.zeros(1, 1, 64, width, **options) for _ in range(2))
    v = torch.zeros(1, 1, 64, dims.value, **options)
    try:
        with warnings.catch_warnings(), sdpa_kernel(backend):
            warnings.simplefilter("ignore")
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            if grad:
                torch.autograd.grad(out.sum(), (q, k, v))
    except RuntimeError:
        return True
    return False


# ---- 核对 ----


def _ranges(dims: Dims) -> list[tuple[int, int]]:
    """开头、中间、结尾各一段查询。"""
    count = min(QUERIES, dims.steps // 3)
    starts = (0, (dims.steps - count) // 2, dims.steps - count)
    return [(start, start + count) for start in starts]


def _sparse_gradient(dims: Dims, args: tuple) -> tuple:
    """输出的梯度只留要核对的头与查询，其余为零：参考才能只算那一部分。"""
    grad, heads = torch.zeros_like(args[5]), mla_inputs.spread(dims.heads)
    for begin, end in _ranges(dims):
        grad[:, begin:end, heads] = args[5][:, begin:end, heads]
    return (*args[:5], grad, *args[6:])


def _output_pairs(dims: Dims, args: tuple, out: Tensor) -> Pairs:
    heads = mla_inputs.spread(dims.heads)
    tensors = (*args[:3], mla_inputs.pick_heads(dims, heads, args[3]))
    for begin, end in _ranges(dims):
        wanted = mla_inputs.expected(dims, tensors, 0, heads, begin, end)
        yield f"查询 {begin} 至 {end}", out[0, begin:end][:, heads], wanted


def _gradient_pairs(dims: Dims, args: tuple, found: tuple[Tensor, ...]) -> Pairs:
    """从潜变量起的（4 个梯度）与 fp64 比；已展开的（3 个）只比 dq：它的 K、V 已舍入。"""
    heads = mla_inputs.spread(dims.heads)
    leaves = [tensor.detach().double().requires_grad_() for tensor in args[:4]]
    part = mla_inputs.pick_heads(dims, heads, leaves[3])
    grad, total = args[5], 0.0
    for begin, end in _ranges(dims):
        out = mla_inputs.expected(dims, (*leaves[:3], part), 0, heads, begin, end)
        total = total + (out * grad[0, begin:end][:, heads].double()).sum()
    wanted = torch.autograd.grad(total, leaves)
    if len(found) == 3:
        return [("dq", found[0].transpose(1, 2), wanted[0])]
    return zip(("dq", "dlatent", "drope", "dkv_b_weight"), found, wanted, strict=True)
