"""量化专家的基准：与自己的 bf16 专家比，同一次运行里交替计时。属于 ``moe`` 套件。"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from deepseek_opt.benchmarks import counts
from deepseek_opt.benchmarks.cases import Env, SpeedCase, Work
from deepseek_opt.buffers import large_empty

_PEER = "本库 bf16"
# （格式，组大小，要求的倍数）；组小则尺度多，只报告。fp8 没有整数点积可用，也只报告。
_FORMATS = (
    ("int8", 0, 1.7),
    ("fp8", 0, None),
    ("fp8", 128, None),
    ("int4", 128, 2.8),
    ("int4", 32, None),
)


def _stack(count: int, rows: int, columns: int) -> Tensor:
    """[count, rows, columns] bf16；各专家的值相同（时间与值无关），内存不同。"""
    one = torch.randn(rows, columns).to(torch.bfloat16)
    return one.expand(count, rows, columns).contiguous()


def _repeated(one: Tensor, count: int) -> Tensor:
    """[rows, columns] 重复成 [count, rows, columns]，内存像 ``quantize_experts`` 那样分配。"""
    return large_empty((count, *one.shape), one.dtype).copy_(one)


def _codes(kind: str, group: int, count: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """随机的码与尺度（对称），形状同 ``quantize_experts`` 的结果。"""
    groups = -(-columns // group) if group else 1
    scale = torch.full((count, rows, groups) if group else (count, rows), 1e-3)
    if kind == "int4":
        one = torch.randint(0, 256, (rows, groups * group // 2), dtype=torch.uint8)
    else:
        one = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        one = one.to(torch.float8_e4m3fn) if kind == "fp8" else one
    return _repeated(one, count), scale


def _experts(env: Env, tokens: int, kind: str, group: int) -> Work:
    """路由专家与共享专家都量化；不含路由。"""
    from deepseek_opt import ops

    config = env.shape.config
    width, inner = config["hidden_size"], config["moe_intermediate_size"]
    routed, top = config["n_routed_experts"], config["num_experts_per_tok"]
    common = inner * config["n_shared_experts"]
    x = torch.randn(tokens, width).to(torch.bfloat16)
    index = torch.rand(tokens, routed).argsort(-1)[:, :top].contiguous()
    mix = torch.rand(tokens, top)
    sizes = ((common, width), (common, width), (width, common))
    gate_up, down = _stack(routed, 2 * inner, width), _stack(routed, width, inner)
    shared = [_stack(1, *size)[0] for size in sizes]
    up, last = (
        _codes(kind, group, routed, 2 * inner, width),
        _codes(kind, group, routed, width, inner),
    )
    packed = [_codes(kind, group, 1, *size) for size in sizes]
    scales = [scale[0] for _, scale in packed]

    def ours() -> Tensor:
        return ops.moe_experts_quantized(
            *(x, index, mix, *up, None, *last, None, [codes[0] for codes, _ in packed], group),
            shared_scale=scales,
        )

    def peer() -> Tensor:
        return ops.moe_experts(x, index, mix, gate_up, None, down, None, shared)

    bits = 4 if kind == "int4" else 8
    cost = counts.quantized_experts(config, tokens, index.unique().numel(), bits, group)
    return Work(ours, peer, *cost, torch.bfloat16)


def build() -> list[SpeedCase]:
    """各种格式各在 1、8 个词元上。"""
    return [
        SpeedCase(
            f"experts.{kind}{f'-g{group}' if group else ''}.{tokens}",
            f"专家 {tokens} 个词元 {kind}{f' 组 {group}' if group else ''}",
            partial(_experts, tokens=tokens, kind=kind, group=group),
            target,
            _PEER,
        )
        for kind, group, target in _FORMATS
        for tokens in (1, 8)
    ]
