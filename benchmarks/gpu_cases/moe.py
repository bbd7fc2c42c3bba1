"""moe_experts 与 moe_route：词元多时看算力，1 到 64 个词元时看读权重的带宽；对照是 torch._grouped_mm 与 transformers，词元多时
另有一个 Triton 核。

形状是 E=128、H=2048、I=768、K=8（Qwen3-30B-A3B 的一层）；路由是 256 个专家、8 组（DeepSeek-V3）。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_cases.check import Pairs
from benchmarks.gpu_cases.environment import has_triton, setting
from benchmarks.gpu_cases.row import Target
from benchmarks.gpu_cases.runner import Case, Env, Row, Work, measure
from deepseek_opt import ops, reference
from deepseek_opt.quantize import QuantizedExperts, dequantize, quantize_experts

FORWARD = Target(500.0, "TFLOP/s")
SM80 = Target(300.0, "TFLOP/s")
BANDWIDTH = Target(0.75, "占拷贝带宽")
FASTER = Target(5.0, "倍于 transformers")
MANY, FEW = (4096, 32768), (1, 2, 4, 8, 16, 32, 64)
FORMS = {
    "bf16": None,
    "int8": {"bits": 8},
    "int4": {"bits": 4, "group_size": 64},
    "fp8": {"bits": 8, "group_size": 128, "floating": True},
}
MAJOR = "DEEPSEEK_OPT_CUDA_MAJOR"
RESIDENT = "本库，常驻的核"  # cuda/moe_codes_sm90.cu：Hopper 上、一块至多 8 个词元，否则同样
_CHECKED = 4  # 核对几个词元


@dataclass(frozen=True)
class Dims:
    """专家数、输入与输出宽、中间宽、每词元的专家数。"""

    experts: int = 128
    hidden: int = 2048
    inner: int = 768
    top_k: int = 8


@dataclass
class Weights:
    """一层的权重；量化的另有码。"""

    gate_up: Tensor
    down: Tensor
    up_codes: QuantizedExperts | None = None
    down_codes: QuantizedExperts | None = None

    def touched(self, experts: int) -> int:
        """experts 个专家占多少字节。"""
        if self.up_codes is None or self.down_codes is None:
            size = self.gate_up.nbytes + self.down.nbytes
        else:
            size = self.up_codes.nbytes + self.down_codes.nbytes
        return size * experts // self.gate_up.shape[0]


def cases(_: Env) -> list[Case]:
    """词元多的（连同强制的 sm_80 路径）、少的各种格式、路由。"""
    found = [Case(f"moe.forward.t{count}", partial(_forward, count)) for count in MANY]
    found += [Case(f"moe.sm80.t{count}", partial(_forward, count, sm80=True)) for count in MANY]
    found += [
        Case(f"moe.decode.{form}.t{count}", partial(_decode, count, form))
        for form in FORMS
        for count in FEW
    ]
    return found + [Case(f"moe.route.t{count}", partial(_route, count)) for count in (1, 64, 4096)]


# ---- 专家 ----


def dims_of(env: Env) -> Dims:
    return Dims(8, 64, 32, 2) if env.quick else Dims()


def make_weights(env: Env, dims: Dims, form: str) -> Weights:
    gate_up = env.randn(dims.experts, 2 * dims.inner, dims.hidden) * dims.hidden**-0.5
    down = env.randn(dims.experts, dims.hidden, dims.inner) * dims.inner**-0.5
    if FORMS[form] is None:
        return Weights(gate_up, down)
    up_codes, down_codes = (quantize_experts(w, **FORMS[form]) for w in (gate_up, down))
    # 对照用反量化之后的权重：同样的数，读的字节多
    gate_up, down = (dequantize(codes, torch.bfloat16) for codes in (up_codes, down_codes))
    return Weights(gate_up, down, up_codes, down_codes)


def make_inputs(env: Env, dims: Dims, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """x、下标、权重：每个词元随机的 K 个不同的专家。"""
    scores = torch.rand(count, dims.experts, device=env.device)
    weights, indices = scores.topk(dims.top_k, dim=-1)
    weights = (weights / weights.sum(-1, keepdim=True)).float()
    return env.randn(count, dims.hidden), indices, weights


def _work(env: Env, dims: Dims, count: int, form: str, key: str) -> Work:
    weights = make_weights(env, dims, form)
    used = dims.experts * (1 - (1 - dims.top_k / dims.experts) ** count)  # 期望碰到几个专家
    peers = _peers(weights, dims)
    if form == "int4":
        peers[RESIDENT] = partial(_resident, weights)
    if count > max(FEW):
        peers |= triton_peer(weights, env.device)
    return Work(
        key,
        torch.bfloat16,
        lambda: make_inputs(env, dims, count),
        partial(_ours, weights),
        peers,
        partial(_pairs, weights),
        bytes=weights.touched(1) * used,
        flops=6 * count * dims.top_k * dims.hidden * dims.inner,
        graph=True,
    )


def _ours(weights: Weights, x: Tensor, indices: Tensor, mix: Tensor) -> Tensor:
    if weights.up_codes is None or weights.down_codes is None:
        return ops.moe_experts(x, indices, mix, weights.gate_up, None, weights.down, None)
    codes = (*weights.up_codes[:3], *weights.down_codes[:3])
    return ops.moe_experts_quantized(
        x, indices, mix, *codes, group_size=weights.up_codes.group_size
    )


def _resident(weights: Weights, *args: Tensor) -> Tensor:
    with setting("DEEPSEEK_OPT_CUDA_CODES", "1"):
        return _ours(weights, *args)


def _pairs(weights: Weights, args: tuple, out: Tensor) -> Pairs:
    """几个词元，只算它们的专家。"""
    x, indices, mix = args
    for token in torch.linspace(0, len(x) - 1, min(_CHECKED, len(x))).long().tolist():
        chosen = indices[token]
        expected = reference.moe_experts(
            x[token : token + 1].double(),
            torch.arange(len(chosen), device=x.device)[None],
            mix[token : token + 1].double(),
            weights.gate_up[chosen].double(),
            None,
            weights.down[chosen].double(),
            None,
        )
        yield f"第 {token} 个词元", out[token : token + 1], expected


def _peers(weights: Weights, dims: Dims) -> dict[str, Callable]:
    return {
        "torch._grouped_mm": partial(grouped, weights),
        "transformers": partial(transformers_experts, weights, dims=dims),
    }


def triton_peer(weights: Weights, device: str) -> dict[str, Callable]:
    """装了 triton 时的一个对照（用 16 位的权重）。"""
    return {"Triton": partial(_triton, weights)} if has_triton(device) else {}


def _triton(weights: Weights, x: Tensor, indices: Tensor, mix: Tensor) -> Tensor:
    """用到时才导入，导入不了也只是没有这个对照。"""
    from benchmarks.gpu_cases.triton_moe import experts_forward

    return experts_forward(x, indices, mix, weights.gate_up, weights.down)


def grouped(weights: Weights, x: Tensor, indices: Tensor, mix: Tensor) -> Tensor:
    """排序、收集、两次 torch._grouped_mm、加权求和。"""
    count, top_k = indices.shape
    flat = indices.reshape(-1)
    order = flat.argsort(stable=True)
    experts = weights.gate_up.shape[0]
    counts = torch.zeros(experts, dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    ends = counts.cumsum(0, dtype=torch.int32)
    both = torch._grouped_mm(x[order // top_k], weights.gate_up.mT, offs=ends)
    gate, up = both.chunk(2, -1)
    out = torch._grouped_mm(F.silu(gate) * up, weights.down.mT, offs=ends)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=x.device)
    return (out[back].view(count, top_k, -1) * mix[..., None]).sum(1).to(x.dtype)


def transformers_experts(
    weights: Weights, x: Tensor, indices: Tensor, mix: Tensor, *, dims: Dims
) -> Tensor:
    """transformers 的 grouped_mm 实现，用它自己的 Experts 类。"""
    from transformers.integrations.moe import grouped_mm_experts_forward
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    if not hasattr(weights, "module"):
        config = Qwen3MoeConfig(  # pylint: disable=unexpected-keyword-arg  # 用装饰器生成的
            num_experts=dims.experts, hidden_size=dims.hidden, moe_intermediate_size=dims.inner
        )
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        del module.gate_up_proj, module.down_proj  # 换成普通的张量：训练的对照要对它们求导
        module.gate_up_proj, module.down_proj = weights.gate_up, weights.down
        weights.module = module  # type: ignore[attr-defined]
    return grouped_mm_experts_forward(weights.module, x, indices, mix.to(x.dtype))


def _forward(count: int, env: Env, sm80: bool = False) -> Iterator[Row]:
    dims, name = dims_of(env), "sm80" if sm80 else "forward"
    with setting(MAJOR, "8" if sm80 else None):  # 当作较早的卡：选 sm_80 的路径
        work = _work(
            env, dims, count // 256 if env.quick else count, "bf16", f"moe.{name}.t{count}"
        )
        row = measure(env, work)
    target = SM80 if sm80 else FORWARD
    yield row.judge(row.tflops, target.unit, target if count == max(MANY) else None)


def _decode(count: int, form: str, env: Env) -> Iterator[Row]:
    row = measure(env, _work(env, dims_of(env), count, form, f"moe.decode.{form}.t{count}"))
    yield row.judge(row.gbps / env.copy_gbps, BANDWIDTH.unit, BANDWIDTH)


# ---- 路由 ----


def _route(count: int, env: Env) -> Iterator[Row]:
    experts, hidden = (16, 32) if env.quick else (256, 7168)
    rule = {"top_k": 8, "n_group": 8, "topk_group": 4, "scaling": 2.5}
    weight = env.randn(experts, hidden) * hidden**-0.5
    bias = env.randn(experts, dtype=torch.float32) * 0.1

    def ours(x: Tensor) -> tuple[Tensor, ...]:
        return ops.moe_route(x, weight, None, bias, **rule)[:2]

    def pairs(args: tuple, out: Any) -> Pairs:
        logits = args[0].double() @ weight.double().T
        yield "logits", out[0], logits
        weights = reference.moe_route(
            out[0].double(),
            None,
            None,
            bias.double(),
            8,
            "sigmoid",
            True,
            False,
            8,
            4,
            "top2",
            2.5,
            1e-20,
        )[1]
        yield "权重", out[1].sort(-1).values, weights.sort(-1).values

    def peer(x: Tensor) -> tuple[Tensor, Tensor]:
        logits, weights, _ = router(x)
        return logits, weights

    router = _hf_router(env, weight, bias)
    work = Work(
        f"moe.route.t{count}",
        torch.float32,
        lambda: (env.randn(count, hidden),),
        ours,
        {"transformers": peer},
        pairs,
        bytes=(count * hidden + weight.numel()) * 2,
        flops=2 * count * hidden * experts,
        graph=True,
    )
    row = measure(env, work)
    speedup = row.peers[0].speedup
    yield row if speedup is None else row.judge(speedup, FASTER.unit, FASTER)


def _hf_router(env: Env, weight: Tensor, bias: Tensor) -> nn.Module:
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    experts, hidden = weight.shape
    config = DeepseekV3Config(  # pylint: disable=unexpected-keyword-arg  # 用装饰器生成的
        n_routed_experts=experts,
        num_local_experts=experts,
        hidden_size=hidden,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    router = DeepseekV3TopkRouter(config).to(env.device)
    router.weight = nn.Parameter(weight, requires_grad=False)
    router.e_score_correction_bias.copy_(bias)
    return router
