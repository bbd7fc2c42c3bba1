"""MLAAttention 的维度、旋转、运行中改的配置；坏输入的中文说明。"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from deepseek_opt import LatentCache, MLAAttention, MLAConfig
from deepseek_opt.errors import ConfigError, InputError, MemoryBudgetError, UnsupportedError
from deepseek_opt.layers.dims import resolve_dims
from deepseek_opt.layers.rotary import RotaryEmbedding, checked_scaling, softmax_scale
from tests.mla_layer_cases import YARN, hidden, layer


# ---- 维度与旋转 ----


def test_dims_from_width_and_ratio():
    dims = resolve_dims(MLAConfig(), 512, 8)
    assert (dims.num_heads, dims.qk_nope_head_dim, dims.qk_rope_head_dim) == (8, 64, 32)
    assert (dims.v_head_dim, dims.kv_lora_rank, dims.q_lora_rank) == (64, 256, None)
    half = resolve_dims(MLAConfig(kv_compression_ratio=8.0), 512, 8)
    assert half.standard_width / half.latent_width == pytest.approx(8, rel=0.05)
    assert resolve_dims(MLAConfig(), 128).num_heads == 2


def test_dims_errors():
    with pytest.raises(ConfigError, match="压缩比率过大"):
        MLAAttention(MLAConfig(kv_compression_ratio=1000.0), 64)
    with pytest.raises(InputError, match="MLAConfig"):
        MLAAttention({"num_attention_heads": 2}, 64)
    with pytest.raises(InputError, match="hidden_size"):
        MLAAttention(MLAConfig(), 0)


def test_changing_config_on_a_live_layer():
    attention = layer()
    x = hidden(1, 6)
    with torch.no_grad():
        before = attention(x)
        attention.config.prefill_chunk_size = 2
        torch.testing.assert_close(attention(x), before)
        attention.config.kv_lora_rank = 12
        with pytest.raises(ConfigError, match="kv_lora_rank"):
            attention(x)
        attention.config.kv_lora_rank = 24
        torch.testing.assert_close(attention(x), before)


def test_cache_settings_of_the_config_are_live():
    attention = layer()
    x = hidden(2, 6)
    with torch.no_grad():
        attention.config.cache_dtype = "int8"
        cache = LatentCache(2)
        attention(x, cache=cache)
        assert cache.layers[0].latent.dtype == torch.int8
        kept = LatentCache(1, dtype="float32")
        attention(x, cache=kept)
        assert kept.layers[0].latent.dtype == torch.float32
        attention.config.max_cache_length = 7
        with pytest.raises(InputError, match="max_cache_length=7"):
            attention(x[:, :2], cache=cache)
        attention(x[:, :1], cache=cache)
        attention.config.max_cache_length = None
        per_token = (24 + 4 * 2 + 4) * 2 * 2  # int8 潜变量、bf16 旋转键、scale；2 行、2 层
        attention.config.memory_budget_bytes = 8 * per_token
        with pytest.raises(MemoryBudgetError, match="最多 8 个词元") as caught:
            attention(x[:, :2], cache=cache)
        assert caught.value.required_bytes == 9 * per_token
        attention(x[:, :1], cache=cache)
    assert cache.get_seq_length() == 8


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "llama3"}, "rope_type"),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0.5}, "不小于 1"),
        ({"rope_type": "linear", "factor": 2.0, "beta": 1}, "beta"),
    ],
)
def test_bad_rope_scaling(scaling, message):
    with pytest.raises(ConfigError, match=message):
        layer(rope_scaling=scaling)


def test_rope_tables():
    with pytest.raises(ConfigError, match="偶数"):
        RotaryEmbedding(3)
    with pytest.raises(ConfigError, match="rope_theta"):
        RotaryEmbedding(4, theta=0.0)
    positions = torch.arange(8)[None]
    linear = RotaryEmbedding(4, scaling={"rope_type": "linear", "factor": 2.0})
    torch.testing.assert_close(linear(2 * positions)[0], RotaryEmbedding(4)(positions)[0])
    plain = {**YARN, "mscale": None, "mscale_all_dim": None}
    assert RotaryEmbedding(4, scaling=plain).attention_factor == pytest.approx(1.1386, abs=1e-4)
    given_factor = RotaryEmbedding(4, scaling={**plain, "attention_factor": 1.5})
    assert given_factor.attention_factor == 1.5
    assert checked_scaling({"type": "default", "rope_theta": 1.0}) == {"rope_type": "default"}
    assert softmax_scale(4, None) == 0.5
    assert softmax_scale(4, {**YARN, "factor": 1.0}) == 0.5


# ---- 坏输入：中文说明，什么都不变 ----


def call(**kwargs):
    return lambda attention, x: attention(x, **kwargs)


BAD_CALLS = {
    "形状": (lambda a, x: a(x[0]), InputError, r"\[B, T, 32\]"),
    "宽度": (lambda a, x: a(x[..., :5]), InputError, "最后一维"),
    "类型": (lambda a, x: a(x.double()), InputError, "dtype"),
    "混合": (lambda a, x: a(x.bfloat16()), InputError, "autocast"),
    "不是张量": (lambda a, x: a([1, 2]), InputError, "list"),
    "设备": (lambda a, x: a(x.to("meta")), InputError, "设备"),
    "权重": (call(need_weights=True), UnsupportedError, "need_weights"),
    "掩码形状": (call(attention_mask=torch.ones(2, 4)), InputError, "attention_mask"),
    "掩码设备": (call(attention_mask=torch.ones(2, 5, device="meta")), InputError, "同一设备"),
    "填充类型": (call(key_padding_mask=torch.ones(2, 5)), InputError, "bool"),
    "两种掩码": (
        call(attention_mask=torch.ones(2, 5), key_padding_mask=torch.zeros(2, 5, dtype=torch.bool)),
        InputError,
        "只能给其中一个",
    ),
    "位置形状": (call(position_ids=torch.arange(4)[None]), InputError, "position_ids"),
    "位置类型": (call(position_ids=torch.zeros(2, 5)), InputError, "整数"),
    "位置设备": (
        call(position_ids=torch.zeros(1, 5, dtype=torch.long, device="meta")),
        InputError,
        "meta",
    ),
    "打包多行": (call(cu_seqlens=torch.tensor([0, 5])), InputError, "B = 1"),
    "打包终点": (lambda a, x: a(x[:1], cu_seqlens=torch.tensor([0, 4])), InputError, "T = 5"),
    "打包递减": (lambda a, x: a(x[:1], cu_seqlens=torch.tensor([0, 4, 3, 5])), InputError, "递增"),
    "打包负数": (lambda a, x: a(x[:1], cu_seqlens=torch.tensor([-1, 5])), InputError, "从 0"),
    "打包类型": (lambda a, x: a(x[:1], cu_seqlens=torch.tensor([0.0, 5.0])), InputError, "整数"),
    "打包与缓存": (
        lambda a, x: a(x[:1], cu_seqlens=torch.tensor([0, 5]), cache=LatentCache(1)),
        InputError,
        "不能与 cache",
    ),
    "缓存类型": (call(cache={}), InputError, "LatentCache"),
    "缓存层数": (lambda a, x: layer(layer_idx=3)(x, cache=LatentCache(2)), InputError, "第 3 层"),
    "非因果缓存": (
        lambda a, x: layer(causal=False)(x, cache=LatentCache(1)),
        InputError,
        "causal=False",
    ),
    "缓存上限": (call(cache=LatentCache(1, max_length=4)), InputError, "max_length=4"),
    "缓存预算": (
        call(cache=LatentCache(1, memory_budget_bytes=600)),
        MemoryBudgetError,
        "最多 2 个词元",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name):
    run, error, message = BAD_CALLS[name]
    attention, x = layer(), hidden(2, 5)
    before = copy.deepcopy(attention.state_dict())
    with torch.no_grad(), pytest.raises(error, match=message):
        run(attention, x)
    assert all(torch.equal(v, before[k]) for k, v in attention.state_dict().items())


def test_cache_of_another_model_is_left_alone():
    attention, x = layer(), hidden(2, 5)
    other = LatentCache(1)
    with torch.no_grad():
        layer(settings_={"kv_lora_rank": 8})(x, cache=other)
        kept = other.layers[0].latent[:, :5].clone()
        with pytest.raises(InputError, match="另一个模型"):
            attention(x, cache=other)
        with pytest.raises(InputError, match="2 行"):
            layer(settings_={"kv_lora_rank": 8})(x[:1], cache=other)
    assert other.get_seq_length() == 5
    assert torch.equal(other.layers[0].latent[:, :5], kept)


def test_cache_for_a_model_of_own_layers():
    model = nn.ModuleList([layer(layer_idx=i) for i in range(3)])
    cache = LatentCache.for_model(model, batch_size=2, max_length=8)
    assert len(cache) == 3 and cache.nbytes == 3 * 2 * 8 * (24 + 4) * 4
    model[2].layer_idx = 0
    with pytest.raises(InputError, match="layer_idx 都是 0"):
        LatentCache.for_model(model)


def test_ragged_cache_refuses_gradients():
    attention, x = layer(), hidden(2, 5)
    cache = LatentCache(1)
    with torch.no_grad():
        attention(x, cache=cache)
    cache.crop_rows([2, 5])
    with pytest.raises(InputError, match="no_grad"):
        attention(x, cache=cache)
    assert cache.lengths.tolist() == [2, 5]


def test_nan_input_gives_nan_where_it_is_seen():
    attention, x = layer(), hidden(1, 6)
    x[0, 3, 0] = math.nan
    y = attention(x)
    assert torch.isnan(y[:, 3:]).all()
