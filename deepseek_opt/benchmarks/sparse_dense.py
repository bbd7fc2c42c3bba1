"""同样多的参数，稀疏对稠密：int4 的 MoE 模型与 int4 的稠密模型，解码的速度与内存。

``deepseek-opt bench moe --shape 13b-a1.3b``。两个模型的层数、宽度、注意力（MLA）相同，稠密的 FFN 与 MoE 的
全部专家（含共享专家）一样大。随机权重直接写成 int4，从来没有半精度的副本；各层都是真的。两个模型先后
建立、测量、释放，不同时占内存。
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt import ops
from deepseek_opt.benchmarks import counts, shapes, timing
from deepseek_opt.benchmarks.cases import Case, Env, Row
from deepseek_opt.benchmarks.process_memory import (
    release_free_memory,
    reset_peak,
    status_bytes,
)
from deepseek_opt.buffers import large_empty
from deepseek_opt.quantize import QuantizedExperts

_BF16 = torch.bfloat16
_CODE_STD = 4.6  # 均匀的 4 位码的标准差
_FASTER, _SMALLER = 1.3, 0.5  # 规范：快 30 %；8 GB 内存运行需要 16 GB 的模型
_MIB = 1 << 20


def random_int4(count: int, rows: int, columns: int, group: int) -> QuantizedExperts:
    """随机的 int4 权重 [count, rows, columns]，标准差与 :func:`shapes.fill_random` 相同。"""
    packed = large_empty((count, rows, columns // 2), torch.uint8)
    shapes.fill_bytes(packed)
    scale = torch.full((count, rows, columns // group), shapes.STD / _CODE_STD)
    return QuantizedExperts(packed, scale, None, 4, group, (count, rows, columns))


class Int4Ffn(nn.Module):
    """一个 int4 的稠密门控 FFN：与 MoE 同一个核，全部词元都归唯一的“专家”。"""

    def __init__(self, width: int, inner: int, group: int):
        super().__init__()
        self.gate_up = random_int4(1, 2 * inner, width, group)
        self.down = random_int4(1, width, inner, group)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., H]。"""
        flat = x.reshape(-1, x.shape[-1])
        chosen = torch.zeros(flat.shape[0], 1, dtype=torch.int64)
        weights = torch.ones(flat.shape[0], 1)
        out = ops.moe_experts_quantized(
            flat,
            chosen,
            weights,
            *self.gate_up[:3],
            *self.down[:3],
            group_size=self.gate_up.group_size,
        )
        return out.view(x.shape)


def build_sparse(shape: shapes.Shape) -> nn.Module:
    """int4 专家的 DeepseekV3ForCausalLM，注意力、路由、专家都由本库计算。"""
    from deepseek_opt import MLAConfig, MOEConfig, OptimizationProfile
    from deepseek_opt.integrations import expert_store, experts, moe_block, quantized
    from deepseek_opt.optimize import apply_profile

    model = shapes.build_on_meta(shapes.make_config(shape), _BF16)
    group, blocks = shape.int4_group, {}
    for name, module in model.named_modules():
        if experts.looks_like_experts(module):
            blocks[name] = (module, dict(module._parameters))
            module._parameters.clear()  # 留在 meta 上，不分配
    shapes.materialize(model)
    scheme, stores = expert_store.Scheme(4, group, True), {}
    for name, (module, parameters) in blocks.items():
        module._parameters.update(parameters)
        names = experts.weight_names(module)
        packed = {key: random_int4(*parameters[key].shape, group) for key in names}
        layout = experts.identify(module)
        stores[name] = expert_store.ExpertStore(scheme, layout, packed, module)
    for name, module in model.named_modules():
        spec = moe_block.find_block(module)
        if spec is None:
            continue
        paths = moe_block.shared_paths(module, spec)
        sizes = [expert_store.weight_at(module, path).shape for path in paths]
        packed = {p: random_int4(1, *size, group) for p, size in zip(paths, sizes, strict=True)}
        stores[name] = expert_store.ExpertStore(scheme, None, packed, module, paths)
    int4 = MOEConfig(
        quantization="int4", quantization_group_size=group, keep_original_weights=False
    )
    profile = OptimizationProfile(mla=MLAConfig(), moe=int4)
    apply_profile(model, profile, True, None, known=quantized.Known(stores, exclusive=True))
    return model


def dense_config(config: dict[str, Any]) -> dict[str, Any]:
    """与 config 同样多参数的稠密模型：每层的专家与共享专家合成一个 FFN（记成唯一的专家）。"""
    whole = config["n_routed_experts"] + config["n_shared_experts"]
    return {
        **config,
        "moe_intermediate_size": whole * config["moe_intermediate_size"],
        "n_routed_experts": 1,
        "num_experts_per_tok": 1,
        "n_shared_experts": 0,
    }


def build_dense(shape: shapes.Shape) -> nn.Module:
    """int4 FFN 的稠密 DeepseekV3ForCausalLM，注意力由本库计算。"""
    from deepseek_opt import MLAConfig, OptimizationProfile, optimize

    config = shapes.make_config(shape)
    config.first_k_dense_replace = config.num_hidden_layers
    model = shapes.build_on_meta(config, _BF16)
    inner = dense_config(shape.config)["moe_intermediate_size"]
    for layer in model.model.layers:
        layer.mlp = nn.Identity()
    shapes.materialize(model)
    for layer in model.model.layers:
        layer.mlp = Int4Ffn(config.hidden_size, inner, shape.int4_group)
    optimize(model, OptimizationProfile(mla=MLAConfig()), strict=True)
    return model


@dataclass(frozen=True)
class _Reading:
    """一个模型解码一步：seconds 最短，floor 为屋顶线规定的最短时间，read_bytes 为要读的字节。"""

    seconds: float
    floor: float
    read_bytes: float


class SparseDenseCase(Case):
    """MoE 与稠密各自解码 1 行、batch 行的速度，MoE 的内存峰值与半精度时要用的内存。"""

    key = "whole"
    title = "整个模型 int4：MoE 对同样大小的稠密模型"

    def run(self, env: Env) -> list[Row]:
        shape = env.shape
        release_free_memory()
        reset_peak()
        with torch.inference_mode():
            model = build_sparse(shape)
            _step(shape, model, 1)()
            peak = status_bytes("VmHWM")  # 计时用的缓冲还没有分配
            sparse = _decode_all(env, model, shape.config, _touched)
            del model
            release_free_memory()
            model = build_dense(shape)
            layers = shape.config["num_hidden_layers"]
            dense = _decode_all(env, model, dense_config(shape.config), lambda *_: layers)
            del model
            release_free_memory()
        sizes = parameter_counts(shape.config)
        rows = [_speed_row(shape, n, found, dense[n], sizes) for n, found in sparse.items()]
        return [*rows, _memory_row(peak, sizes)]


def parameter_counts(config: dict[str, Any]) -> tuple[int, int]:
    """(全部参数, 每个词元用到的参数)，都含词嵌入与 LM head，不计归一化。"""
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    one = counts.attention_decode(config, 1, 0, 1).read_bytes
    expert = 3 * width * config["moe_intermediate_size"]
    routed, shared = config["n_routed_experts"], config["n_shared_experts"]
    common = layers * (one + shared * expert + routed * width) + 2 * width * config["vocab_size"]
    total = common + layers * routed * expert
    return int(total), int(common + layers * config["num_experts_per_tok"] * expert)


def _step(shape: shapes.Shape, model: nn.Module, rows: int) -> Callable[[], Any]:
    """每行已缓存 batch_context 个词元，解码一步。"""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (rows, 1), generator=generator)
    layers = model.config.num_hidden_layers
    cache = shapes.make_cache(shape, rows, shape.batch_context, layers, _BF16)
    return lambda: model(ids, past_key_values=cache)


def _decode_all(
    env: Env, model: nn.Module, config: dict[str, Any], touched: Callable[..., int]
) -> dict[int, _Reading]:
    """行数 -> 读数。"""
    shape, found = env.shape, {}
    weight = 0.5 + 4 / shape.int4_group  # 每组另有一个 fp32 的尺度
    for rows in (1, shape.batch):
        step = _step(shape, model, rows)
        used = touched(model, step)
        _, best = timing.interleaved(None, step, rounds=env.rounds, seconds=env.seconds)
        cost = counts.model_decode(
            config, rows, shape.batch_context, 2, expert_itemsize=weight, touched=used
        )
        floor = env.roofline().floor_seconds(*cost, _BF16)
        found[rows] = _Reading(best.best, floor, cost.read_bytes)
    return found


def _touched(model: nn.Module, step: Callable[[], Any]) -> int:
    """这一步各层用到的专家数之和。"""
    from deepseek_opt.load import load_holders

    counters = [held.load_counter for m in model.modules() for held in load_holders(m)]
    for counter in counters:
        counter.reset()
    step()
    return sum(int((counter.snapshot() > 0).sum()) for counter in counters)


def _speed_row(
    shape: shapes.Shape, rows: int, sparse: _Reading, dense: _Reading, sizes: tuple[int, int]
) -> Row:
    speeds = [rows / side.seconds for side in (sparse, dense)]
    shares = [side.floor / side.seconds for side in (sparse, dense)]
    note = (
        f"每秒 {speeds[0]:.1f} 对 {speeds[1]:.1f} 个词元；稠密占屋顶线 {shares[1]:.0%}。"
        f"路由专家、共享专家、稠密 FFN 是 int4（{shape.int4_group} 个一组），其余两边都是 bf16"
    )
    details = {
        "parameters": sizes[0],
        "active_parameters": sizes[1],
        "tokens_per_second": speeds,
        "read_bytes": [side.read_bytes for side in (sparse, dense)],
        "peer_roofline": shares[1],
    }
    return Row(
        f"whole.decode.{rows}",
        f"int4 {sizes[0] / 1e9:.1f} B 的模型（每词元 {sizes[1] / 1e9:.1f} B）解码 {rows} 行 "
        f"已缓存 {shape.batch_context}",
        "speed",
        "ms",
        "同样大小的稠密模型",
        dense.seconds * 1e3,
        sparse.seconds * 1e3,
        _FASTER,
        shares[0],
        note,
        details,
    )


def _memory_row(peak: int, sizes: tuple[int, int]) -> Row:
    """peak 是整个进程的常驻内存峰值。"""
    note = "整个进程的常驻内存峰值，含 Python、torch 与缓存；对照只算权重"
    title, bf16 = "int4 MoE 模型的内存（建立、1 行解码）", 2 * sizes[0]
    sides = ("bf16 的权重（按参数算）", bf16 / _MIB, peak / _MIB)
    return Row("whole.memory", title, "saving", "MiB", *sides, _SMALLER, note=note)
