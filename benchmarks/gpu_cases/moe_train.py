"""moe_experts 的前向加反向：算力与显存，对照是 torch._grouped_mm 与 transformers（都用 autograd）。"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_cases import moe
from benchmarks.gpu_cases.check import Pairs
from benchmarks.gpu_cases.memory import Meter
from benchmarks.gpu_cases.row import Target
from benchmarks.gpu_cases.runner import Case, Env, Row, Work, free, measure, ratio_row
from deepseek_opt import ops, reference

SPEED = Target(400.0, "TFLOP/s")
SAVING = Target(0.40, "省下的比例")
COUNTS = (4096, 32768)
_EXPERT = 1  # 核对哪个专家的权重梯度
_TOKENS = 3


def cases(_: Env) -> list[Case]:
    """两种词元数。"""
    return [Case(f"moe.train.t{count}", partial(_train, count)) for count in COUNTS]


def _train(count: int, env: Env) -> Iterator[Row]:
    key, dims = f"moe.train.t{count}", moe.dims_of(env)
    if env.quick:
        count //= 256
    weights = moe.make_weights(env, dims, "bf16")
    peers = {
        "torch._grouped_mm": moe.grouped,
        "transformers": partial(moe.transformers_experts, dims=dims),
    }
    work = Work(
        key,
        torch.bfloat16,
        lambda: (*moe.make_inputs(env, dims, count), env.randn(count, dims.hidden)),
        partial(_step, _ours, weights),
        {name: partial(_step, call, weights) for name, call in peers.items()},
        partial(_pairs, weights),
        bytes=weights.touched(dims.experts),
        flops=18 * count * dims.top_k * dims.hidden * dims.inner,
        grad=True,
    )
    row = measure(env, work)
    last = count == max(COUNTS)
    yield row.judge(row.tflops, SPEED.unit, SPEED if last else None)
    again = partial(_step, partial(_ours, recompute=True), weights)
    yield measure(env, dataclasses.replace(work, key=f"{key}.recompute", ours=again, peers={}))
    if env.device == "cuda":
        yield _memory(env, work, f"{key}.memory", SAVING if last else None)


def _memory(env: Env, work: Work, key: str, target: Target | None) -> Row:
    """前向加反向的峰值（输入与权重之外，含梯度），同 torch._grouped_mm 比。"""
    peaks = []
    for call in (work.ours, work.peers["torch._grouped_mm"]):
        inputs, meter = work.make(), Meter(env.device)
        meter.start()
        call(*inputs)
        torch.cuda.synchronize()
        meter.stop()
        peaks.append(meter.peak)
        del inputs
        free(env.device)
    details = {"ours_mib": peaks[0] >> 20, "grouped_mm_mib": peaks[1] >> 20}
    return ratio_row(key, 1 - peaks[0] / max(peaks[1], 1), SAVING.unit, target, details)


def _ours(
    weights: moe.Weights, x: Tensor, indices: Tensor, mix: Tensor, *, recompute: bool = False
) -> Tensor:
    experts = (weights.gate_up, None, weights.down, None)
    return ops.moe_experts(x, indices, mix, *experts, recompute=recompute)


def _step(
    call: Callable, weights: moe.Weights, x: Tensor, indices: Tensor, mix: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """x、混合权重、两个权重的梯度。"""
    leaves = [t.detach().requires_grad_() for t in (x, mix, weights.gate_up, weights.down)]
    out = call(moe.Weights(*leaves[2:]), leaves[0], indices, leaves[1])
    return torch.autograd.grad(out, leaves, grad)


def _pairs(weights: moe.Weights, args: tuple, found: tuple[Tensor, ...]) -> Pairs:
    """几个词元的 dx、dw 只要它们的专家；一个专家的权重梯度要它的全部词元。"""
    x, indices, mix, grad = args
    for token in torch.linspace(0, len(x) - 1, _TOKENS).long().tolist():
        chosen, one = indices[token], slice(token, token + 1)
        leaves = [t[one].double().requires_grad_() for t in (x, mix)]
        local = torch.arange(len(chosen), device=x.device)[None]
        out = _exact(leaves[0], local, leaves[1], weights, chosen)[0]
        wanted = torch.autograd.grad(out, leaves, grad[one].double())
        yield f"dx[{token}]", found[0][one], wanted[0]
        yield f"dw[{token}]", found[1][one].to(x.dtype), wanted[1]  # 误差是 16 位的
    token, place = torch.where(indices == _EXPERT)
    local = torch.zeros(len(token), 1, dtype=torch.int64, device=x.device)
    out, leaves = _exact(
        x[token].double(), local, mix[token, place, None].double(), weights, [_EXPERT]
    )
    wanted = torch.autograd.grad(out, leaves, grad[token].double())
    yield "dgate_up", found[2][_EXPERT], wanted[0][0]
    yield "ddown", found[3][_EXPERT], wanted[1][0]


def _exact(x, indices, mix, weights: moe.Weights, chosen) -> tuple[Tensor, list[Tensor]]:
    leaves = [w[chosen].double().requires_grad_() for w in (weights.gate_up, weights.down)]
    return reference.moe_experts(x, indices, mix, leaves[0], None, leaves[1], None), leaves
