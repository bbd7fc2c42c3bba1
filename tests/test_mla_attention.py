"""MLAAttention：与 fp64 直白实现、与 transformers 的 DeepseekV3Attention 对照；缓存、打包、错误。"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepseek_opt import LatentCache, MLAAttention, MLAConfig
from deepseek_opt.errors import ConfigError, InputError, MemoryBudgetError, UnsupportedError
from deepseek_opt.layers.dims import resolve_dims
from deepseek_opt.layers.rotary import RotaryEmbedding, checked_scaling, softmax_scale
from tests.op_cases import QUANTIZED
from tests.tolerances import tol

HIDDEN = 32
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.8,
    "mscale_all_dim": 0.7,
}


def config(**changes) -> MLAConfig:
    base = {
        "num_attention_heads": 3,
        "q_lora_rank": 20,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
    }
    return MLAConfig(**{**base, **changes})


def layer(seed: int = 0, dtype=torch.float32, settings_=None, **options) -> MLAAttention:
    torch.manual_seed(seed)
    return MLAAttention(config(**(settings_ or {})), HIDDEN, dtype=dtype, **options)


def hidden(batch: int, steps: int, dtype=torch.float32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, steps, HIDDEN, generator=generator).to(dtype)


def expected(attention: MLAAttention, x: torch.Tensor, visible=None, positions=None):
    """fp64 的直白实现：展开 K、V，逐对旋转，softmax。visible [B, S]（True 可见）。"""
    d, w = attention.dims, {k: v.double() for k, v in attention.state_dict().items()}
    w.update({k: v.double() for k, v in attention.named_parameters()})
    x = x.double()
    batch, steps = x.shape[:2]
    if positions is None:
        positions = torch.arange(steps)[None]

    def norm(t, name):
        eps = getattr(attention, name).eps
        return t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + eps) * w[f"{name}.weight"]

    def project(t, name):
        y = t @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def rotate(t):  # [B, T, H, dr]
        if attention.rotary_emb is None:
            return t
        cos, sin = (v.double().unsqueeze(2) for v in attention.rotary_emb(positions))
        if attention.rope_interleaved:
            a, b = t[..., 0::2], t[..., 1::2]
        else:
            a, b = t.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    if d.q_lora_rank is None:
        q = project(x, "q_proj")
    else:
        q = project(norm(project(x, "q_a_proj"), "q_a_layernorm"), "q_b_proj")
    q = q.view(batch, steps, d.num_heads, d.qk_head_dim)
    split = (d.qk_nope_head_dim, d.qk_rope_head_dim)
    q = torch.cat((q.split(split, -1)[0], rotate(q.split(split, -1)[1])), -1)
    latent, rope = project(x, "kv_a_proj_with_mqa").split((d.kv_lora_rank, d.qk_rope_head_dim), -1)
    kv = project(norm(latent, "kv_a_layernorm"), "kv_b_proj")
    kv = kv.view(batch, steps, d.num_heads, -1)
    key, value = kv.split((d.qk_nope_head_dim, d.v_head_dim), -1)
    key = torch.cat((key, rotate(rope.unsqueeze(2)).expand(-1, -1, d.num_heads, -1)), -1)
    score = torch.einsum("bthd,bshd->bhts", q, key) * attention.softmax_scale
    allowed = torch.ones(steps, steps, dtype=torch.bool)
    allowed = (allowed.tril() if attention.causal else allowed)[None, None]
    if visible is not None:
        allowed = allowed & visible[:, None, None, :]
    weights = score.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)
    out = torch.einsum("bhts,bshd->bthd", weights, value)
    return project(out.flatten(2), "o_proj")


def assert_like(actual: torch.Tensor, wanted: torch.Tensor, dtype=None) -> None:
    dtype = dtype or actual.dtype
    torch.testing.assert_close(actual.double(), wanted.double(), **tol(dtype))


# ---- 数值 ----


@given(
    heads=st.integers(1, 5),
    rank=st.integers(1, 40),
    nope=st.integers(1, 12),
    rope=st.sampled_from([0, 2, 4, 10]),
    value=st.integers(1, 12),
    q_rank=st.one_of(st.none(), st.integers(1, 24)),
    batch=st.integers(1, 3),
    steps=st.integers(1, 20),
    causal=st.booleans(),
    interleaved=st.booleans(),
    bias=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_matches_reference(
    heads, rank, nope, rope, value, q_rank, batch, steps, causal, interleaved, bias
):
    dims = {
        "num_attention_heads": heads,
        "kv_lora_rank": rank,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "q_lora_rank": q_rank,
        "rope_interleaved": interleaved,
    }
    attention = layer(settings_=dims, causal=causal, bias=bias)
    x = hidden(batch, steps)
    assert_like(attention(x), expected(attention, x))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("q_rank", [None, 20])
def test_gradients_match_reference(causal, q_rank):
    attention = layer(settings_={"q_lora_rank": q_rank}, causal=causal, bias=True)
    nn.init.normal_(attention.o_proj.bias)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    weight = torch.randn(2, 9, HIDDEN)
    results = []
    for function in (lambda x: attention(x, attention_mask=mask), None):
        x = hidden(2, 9).requires_grad_()
        y = function(x) if function else expected(attention, x, mask)
        grads = torch.autograd.grad((y * weight).sum(), [x, *attention.parameters()])
        results.append(grads)
    for mine, wanted in zip(*results, strict=True):
        scale = wanted.abs().max().clamp(min=1)  # 权重梯度是许多项之和，按其大小衡量
        assert_like(mine / scale, wanted / scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    attention = layer(dtype=dtype)
    x = hidden(2, 17, dtype)
    y = attention(x)
    assert y.dtype == dtype
    assert_like(y, expected(attention, x))


def test_yarn_matches_transformers():
    v3 = pytest.importorskip("transformers.models.deepseek_v3")
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    settings_ = v3.DeepseekV3Config(
        hidden_size=HIDDEN,
        num_attention_heads=3,
        num_key_value_heads=3,
        q_lora_rank=20,
        kv_lora_rank=24,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        max_position_embeddings=64,
        rope_parameters={**YARN, "rope_theta": 5000.0},
        attn_implementation="eager",
    )
    theirs = modeling.DeepseekV3Attention(settings_, 0)
    rotary = modeling.DeepseekV3RotaryEmbedding(settings_)
    ours = layer(rope_theta=5000.0, rope_scaling=YARN, eps=settings_.rms_norm_eps)
    ours.load_state_dict(theirs.state_dict())
    x = hidden(2, 30)
    positions = torch.arange(30)[None]
    mask = torch.full((30, 30), -math.inf).triu(1)[None, None]
    wanted = theirs(x, rotary(x, positions), mask)[0]
    assert_like(ours(x), wanted)
    cos, _ = ours.rotary_emb(positions)
    torch.testing.assert_close(cos, rotary(x, positions)[0][..., :2])


# ---- 掩码、打包、缓存 ----


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_conventions(side):
    attention = layer()
    x = hidden(3, 7)
    keep = torch.ones(3, 7, dtype=torch.bool)
    hide = slice(0, 3) if side == "left" else slice(4, 7)
    keep[1, hide] = False
    wanted = expected(attention, x, keep)
    for call in ({"attention_mask": keep.long()}, {"key_padding_mask": ~keep}):
        assert_like(attention(x, **call), wanted)
    alone = attention(x[1:2, 3:] if side == "left" else x[1:2, :4])
    assert_like(attention(x, attention_mask=keep)[1:2][:, keep[1]], alone)


def test_query_that_sees_nothing_is_zero():
    attention = layer()
    mask = torch.tensor([[0, 0, 1, 1]])
    y = attention(hidden(1, 4), attention_mask=mask)
    assert torch.equal(y[:, :2], torch.zeros(1, 2, HIDDEN))


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5), causal=st.booleans())
@settings(max_examples=20, deadline=None)
def test_packed_equals_separate(lengths, causal):
    lengths = lengths if sum(lengths) else [*lengths, 3]
    attention = layer(causal=causal)
    x = hidden(1, sum(lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    packed = attention(x, cu_seqlens=ends.int())
    parts = [attention(part) for part in x.split(lengths, 1) if part.shape[1]]
    assert_like(packed, torch.cat(parts, 1))


def test_packed_gradients_equal_separate():
    attention = layer()
    x = hidden(1, 8).requires_grad_()
    weight = hidden(1, 8, seed=5)
    ends = torch.tensor([0, 3, 8])
    params = [x, *attention.parameters()]
    packed = torch.autograd.grad((attention(x, cu_seqlens=ends) * weight).sum(), params)
    parts = torch.cat([attention(x[:, :3]), attention(x[:, 3:])], 1)
    for mine, wanted in zip(packed, torch.autograd.grad((parts * weight).sum(), params)):
        assert_like(mine, wanted)


@given(pieces=st.lists(st.integers(1, 20), min_size=1, max_size=4), chunk=st.integers(1, 9))
@settings(max_examples=20, deadline=None)
def test_cache_in_pieces_equals_whole(pieces, chunk):
    attention = layer(layer_idx=1).eval()
    x = hidden(2, sum(pieces))
    wanted = expected(attention, x)
    with torch.no_grad():
        attention.config.prefill_chunk_size = chunk
        cache = LatentCache(2)
        parts = [attention(part, cache=cache) for part in x.split(pieces, 1)]
    assert_like(torch.cat(parts, 1), wanted)
    assert cache.get_seq_length(1) == sum(pieces)


def test_cache_with_left_padding_and_growing_mask():
    attention = layer()
    x = hidden(2, 9)
    keep = torch.ones(2, 9, dtype=torch.long)
    keep[0, :4] = 0
    cache = LatentCache(1)
    with torch.inference_mode():
        parts = [attention(x[:, :6], attention_mask=keep[:, :6], cache=cache)]
        parts += [
            attention(x[:, i : i + 1], attention_mask=keep[:, : i + 1], cache=cache)
            for i in (6, 7, 8)
        ]
    assert_like(torch.cat(parts, 1), expected(attention, x, keep.bool()))


def test_ragged_cache_rows_continue_from_their_own_length():
    attention = layer()
    x, more = hidden(2, 6), hidden(2, 3, seed=9)
    cache = LatentCache(1)
    with torch.no_grad():
        attention(x, cache=cache)
        cache.crop_rows([4, 6])
        y = attention(more, cache=cache)
        rows = [attention(torch.cat((x[i, :n], more[i]))[None])[0, n:] for i, n in ((0, 4), (1, 6))]
    assert_like(y, torch.stack(rows))


def test_cache_keeps_gradients_of_new_tokens():
    attention = layer()
    x = hidden(1, 7)
    cache = LatentCache(1)
    with torch.no_grad():
        attention(x[:, :4], cache=cache)
    new = x[:, 4:].clone().requires_grad_()
    mine = torch.autograd.grad(attention(new, cache=cache).sum(), new)[0]
    wanted = torch.autograd.grad(attention(torch.cat((x[:, :4], new), 1))[:, 4:].sum(), new)[0]
    assert_like(mine, wanted)


@pytest.mark.parametrize("dtype", QUANTIZED)
def test_quantized_cache(dtype):
    attention = layer()
    x = hidden(2, 12)
    cache = LatentCache(1, dtype=dtype)
    with torch.no_grad():
        parts = [attention(part, cache=cache) for part in x.split((8, 4), 1)]
    assert_like(torch.cat(parts, 1), expected(attention, x), dtype)


def test_position_ids_are_relative():
    attention = layer()
    x = hidden(2, 5)
    shifted = torch.arange(5)[None] + 7
    assert_like(attention(x, position_ids=shifted), attention(x))
    spread = torch.tensor([[0, 2, 3, 7, 9], [0, 1, 2, 3, 4]])
    assert_like(attention(x, position_ids=spread), expected(attention, x, positions=spread))


# ---- 训练环境 ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    attention = layer()
    x = hidden(2, 6)
    with torch.autocast("cpu", dtype):
        y = attention(x)
    assert_like(y, expected(attention, x), dtype)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in attention.parameters())


def test_gradient_checkpointing():
    attention = layer()
    results = []
    for run in (attention, lambda x: checkpoint(attention, x, use_reentrant=False)):
        x = hidden(2, 6).requires_grad_()
        results.append(torch.autograd.grad(run(x).sum(), [x, *attention.parameters()]))
    for plain, saved in zip(*results, strict=True):
        torch.testing.assert_close(plain, saved)


def test_compile_fullgraph():
    attention = layer()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    x = hidden(2, 6)
    torch.testing.assert_close(compiled(x), attention(x))
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(compiled(x, attention_mask=mask), attention(x, attention_mask=mask))
    ends = torch.tensor([0, 2, 6])
    packed = compiled(x[:1], cu_seqlens=ends)
    torch.testing.assert_close(packed, attention(x[:1], cu_seqlens=ends))
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in attention.parameters())


def test_ddp_uses_every_parameter(tmp_path):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(layer(bias=True))
        for _ in range(2):  # 第二次前向时，DDP 会因上一次没用到的参数而报错
            model(hidden(1, 4)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    finally:
        dist.destroy_process_group()


def test_trains_from_scratch():
    torch.manual_seed(0)
    attention, head = layer(), nn.Linear(HIDDEN, HIDDEN)
    optimizer = torch.optim.AdamW([*attention.parameters(), *head.parameters()], 1e-2)
    x = hidden(4, 12)
    target = x.roll(1, 1)  # 抄前一个词元：只有注意力能做到
    losses = []
    for _ in range(150):
        loss = (head(attention(x)) - target)[:, 1:].pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_state_dict_deepcopy_and_dtype_changes():
    attention = layer()
    names = {"q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm"}
    names |= {"kv_b_proj", "o_proj"}
    assert {key.rpartition(".")[0] for key in attention.state_dict()} == names
    clone = copy.deepcopy(attention)
    x = hidden(1, 5)
    torch.testing.assert_close(clone(x), attention(x))
    frequencies = attention.rotary_emb.inv_freq.clone()
    clone.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(clone.rotary_emb.inv_freq, frequencies)
    empty = layer(device="meta").to_empty(device="cpu")
    empty.load_state_dict(attention.state_dict())
    torch.testing.assert_close(empty(x), attention(x))
    assert "num_heads=3" in repr(attention)


def test_lora_on_every_projection():
    peft = pytest.importorskip("peft")
    targets = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
    settings_ = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    attention = layer()
    x = hidden(2, 5)
    before = attention(x)
    wrapped = peft.get_peft_model(attention, settings_)
    with torch.no_grad():
        adapted = wrapped(x)
        merged = wrapped.merge_and_unload()(x)
    assert not torch.allclose(adapted, before, atol=1e-3)
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)


def test_projection_hooks_still_run():
    attention = layer()
    seen = []
    attention.o_proj.register_forward_hook(lambda *_: seen.append(1))
    attention(hidden(1, 3))
    assert seen == [1]


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
