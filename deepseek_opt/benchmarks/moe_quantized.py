"""量化专家的基准：与自己的 bf16 专家比，同一次运行里交替计时。属于 ``moe`` 套件。"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from deepseek_opt.benchmarks import counts
from deepseek_opt.benchmarks.cases import Env, SpeedCase, Work
from deepseek_opt.buffers import large_empty

_PEER = "本库 bf16"
# （位数，组大小，要求的倍数）；组小则尺度多，只报告。
_FORMATS = ((8, 0, 1.7), (4, 128, 2.8), (4, 32, None))


def _stack(count: int, rows: int, columns: int) -> Tensor:
    """[count, rows, columns] bf16；各专家的值相同（时间与值无关），内存不同。"""
    one = torch.randn(rows, columns).to(torch.bfloat16)
    return one.expand(count, rows, columns).contiguous()


def _repeated(one: Tensor, count: int) -> Tensor:
    """[rows, columns] 重复成 [count, rows, columns]，内存像 ``quantize_experts`` 那样分配。"""
    return large_empty((count, *one.shape), one.dtype).copy_(one)


def _codes(bits: int, group: int, count: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """随机的码与尺度（对称），形状同 ``quantize_experts`` 的结果。"""
    groups = -(-columns // group) if group else 1
    if bits == 8:
        one = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
        return _repeated(one, count), torch.full((count, rows), 1e-3)
    one = torch.randint(0, 256, (rows, groups * group // 2), dtype=torch.uint8)
    return _repeated(one, count), torch.full((count, rows, groups), 1e-3)


def _experts(env: Env, tokens: int, bits: int, group: int) -> Work:
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
        _codes(bits, group, routed, 2 * inner, width),
        _codes(bits, group, routed, width, inner),
    )
    packed = [_codes(bits, group, 1, *size) for size in sizes]
    scales = [scale[0] for _, scale in packed]

    def ours() -> Tensor:
        return ops.moe_experts_quantized(
            *(x, index, mix, *up, None, *last, None, [codes[0] for codes, _ in packed], group),
            shared_scale=scales,
        )

    def peer() -> Tensor:
        return ops.moe_experts(x, index, mix, gate_up, None, down, None, shared)

    cost = counts.quantized_experts(config, tokens, index.unique().numel(), bits, group)
    return Work(ours, peer, *cost, torch.bfloat16)


def build() -> list[SpeedCase]:
    """int8、int4 各在 1、8 个词元上。"""
    return [
        SpeedCase(
            f"experts.int{bits}{f'-g{group}' if group else ''}.{tokens}",
            f"专家 {tokens} 个词元 int{bits}{f' 组 {group}' if group else ''}",
            partial(_experts, tokens=tokens, bits=bits, group=group),
            target,
            _PEER,
        )
        for bits, group, target in _FORMATS
        for tokens in (1, 8)
    ]
