"""MLAAttention：与 fp64 直白实现、与 transformers 的 DeepseekV3Attention 对照；掩码、打包、缓存、训练。"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepseek_opt import LatentCache
from tests.mla_layer_cases import HIDDEN, YARN, assert_like, expected, hidden, layer
from tests.op_cases import QUANTIZED
from tests.processes import one_process


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
@settings(max_examples=30)
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
@settings(max_examples=20)
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
@settings(max_examples=20)
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
    with one_process(tmp_path):
        model = nn.parallel.DistributedDataParallel(layer(bias=True))
        for _ in range(2):  # 第二次前向时，DDP 会因上一次没用到的参数而报错
            model(hidden(1, 4)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        del model


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
