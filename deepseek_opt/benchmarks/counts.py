"""各项工作至少要做的浮点运算与要读的字节，供屋顶线比较（一次乘加算 2 次运算）。"""

from __future__ import annotations

from typing import Any, NamedTuple


class Cost(NamedTuple):
    """flops 与 read_bytes。"""

    flops: float
    read_bytes: float


class _Dims(NamedTuple):
    heads: int
    rank: int
    rope: int
    nope: int
    value: int
    projections: int  # 除 kv_b 之外的投影权重个数
    kv_b: int


def _dims(config: dict[str, Any]) -> _Dims:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    q_rank, rank = config["q_lora_rank"], config["kv_lora_rank"]
    rope, nope = config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    value = config["v_head_dim"]
    projections = (
        width * q_rank
        + q_rank * heads * (nope + rope)
        + width * (rank + rope)
        + heads * value * width
    )
    return _Dims(heads, rank, rope, nope, value, projections, rank * heads * (nope + value))


def attention_decode(
    config: dict[str, Any], rows: int, cached: int, itemsize: int, cache_itemsize: float = 0
) -> Cost:
    """一层注意力、每行一个新词元：吸收式，读一遍权重与缓存。"""
    d = _dims(config)
    weights = d.projections + d.kv_b
    scores = 2 * rows * cached * d.heads * (2 * d.rank + d.rope)
    cache = rows * cached * (d.rank + d.rope) * (cache_itemsize or itemsize)
    return Cost(2 * rows * weights + scores, weights * itemsize + cache)


def attention_prefill(
    config: dict[str, Any], tokens: int, itemsize: int, backward: bool = False
) -> Cost:
    """一层注意力、从头预填充：展开式、因果；反向按前向的 2 倍计。"""
    d = _dims(config)
    weights = d.projections + d.kv_b
    scores = tokens * tokens * d.heads * (d.nope + d.rope + d.value)
    times = 3 if backward else 1
    return Cost(times * (2 * tokens * weights + scores), times * weights * itemsize)


def gated_ffn(width: int, inner: int, rows: int, itemsize: int) -> Cost:
    """门控 FFN：三个矩阵各读一遍。"""
    weights = 3 * width * inner
    return Cost(2 * rows * weights, weights * itemsize)


def model_decode(  # pylint: disable=too-many-arguments
    config: dict[str, Any],
    rows: int,
    cached: int,
    itemsize: int,
    *,
    expert_itemsize: float | None = None,
    touched: int | None = None,
) -> Cost:
    """整个模型、每行一个新词元：注意力、稠密 FFN、被选中的专家、共享专家、路由、LM head。

    expert_itemsize 为路由专家与共享专家每个权重的字节数，默认同 itemsize；touched 为各层用到的专家数之和，默认按各行
    选的专家都不同计。
    """
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    dense = config["first_k_dense_replace"]
    one = attention_decode(config, rows, cached, itemsize)
    expert = 3 * width * config["moe_intermediate_size"]
    top, routed = config["num_experts_per_tok"], config["n_routed_experts"]
    shared, sparse = config["n_shared_experts"], layers - dense
    common = dense * 3 * width * config["intermediate_size"] + width * config["vocab_size"]
    common += sparse * routed * width
    if touched is None:
        touched = sparse * min(routed, top * rows)
    flops = layers * one.flops + 2 * rows * (common + (top + shared) * sparse * expert)
    reads = layers * one.read_bytes + common * itemsize
    return Cost(flops, reads + (touched + sparse * shared) * expert * (expert_itemsize or itemsize))


def moe_layer(
    config: dict[str, Any], tokens: int, itemsize: int, touched: int, backward: bool = False
) -> Cost:
    """一个 MoE 块（路由、被选中的专家、共享专家）；touched 为这批词元用到的专家数。反向按前向的 2 倍计。"""
    width = config["hidden_size"]
    expert = 3 * width * config["moe_intermediate_size"]
    routed, shared = config["n_routed_experts"], config["n_shared_experts"]
    each = config["num_experts_per_tok"] * expert + shared * expert + routed * width
    times = 3 if backward else 1
    weights = touched * expert + shared * expert + routed * width
    return Cost(times * 2 * tokens * each, times * weights * itemsize)


def quantized_experts(
    config: dict[str, Any], tokens: int, touched: int, bits: int, group: int
) -> Cost:
    """量化的路由专家与共享专家（不含路由）：码与 fp32 的尺度；group 为 0 时每输出通道一个尺度。"""
    width, inner = config["hidden_size"], config["moe_intermediate_size"]
    shared, top = config["n_shared_experts"], config["num_experts_per_tok"]
    expert = 3 * width * inner
    weights = (touched + shared) * expert
    rows = (touched + shared) * 2 * inner + (touched + 1) * width
    scales = weights / group if group else rows
    return Cost(2 * tokens * (top + shared) * expert, weights * bits / 8 + scales * 4)


def model_prefill(config: dict[str, Any], tokens: int, itemsize: int) -> Cost:
    """整个模型从头预填充一行；LM head 只算最后一个词元。"""
    layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    width = config["hidden_size"]
    attention = attention_prefill(config, tokens, itemsize)
    ffn = gated_ffn(width, config["intermediate_size"], tokens, itemsize)
    moe = moe_layer(config, tokens, itemsize, config["n_routed_experts"])
    head = width * config["vocab_size"]
    parts = ((layers, attention), (dense, ffn), (layers - dense, moe))
    flops = sum(n * cost.flops for n, cost in parts) + 2 * head
    return Cost(flops, sum(n * cost.read_bytes for n, cost in parts) + head * itemsize)
