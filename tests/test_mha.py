"""替换 nn.MultiheadAttention：调用方式、掩码辨认、nn.Transformer* 的快速路径、替换与恢复。"""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek_opt import MLAConfig
from deepseek_opt.errors import ConfigError, DeepSeekOptError, InputError, UnsupportedError
from deepseek_opt.layers import LatentMultiheadAttention, MLAAttention, replace_mha, restore_mha
from deepseek_opt.layers.masks import attention_kind
from tests.tolerances import tol

WIDTH = 32


def attention(seed: int = 0, **options) -> LatentMultiheadAttention:
    torch.manual_seed(seed)
    options = {"num_heads": 4, "batch_first": True, **options}
    return LatentMultiheadAttention(MLAConfig(), WIDTH, **options)


def tokens(batch: int, length: int, width: int = WIDTH, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def causal_mask(length: int) -> torch.Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


def encoder(batch_first=True, norm_first=False, dropout=0.0, layers=2, **options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        WIDTH, 4, 48, dropout=dropout, batch_first=batch_first, norm_first=norm_first, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(layer, layers)


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(actual, wanted, **tol(torch.float32))


# ---- 与 MLAAttention 一致（它已与 fp64 实现对照过） ----


@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_equals_mla_attention(causal):
    mine = attention()
    other = MLAAttention(MLAConfig(), WIDTH, num_heads=4, causal=causal)
    other.load_state_dict(mine.state_dict())
    x = tokens(3, 7)
    ignored = torch.zeros(3, 7, dtype=torch.bool)
    ignored[1, 5:] = True
    mask = causal_mask(7) if causal else None
    out, weights = mine(x, x, x, key_padding_mask=ignored, attn_mask=mask)
    assert weights is None
    close(out, other(x, key_padding_mask=ignored))


def cross_reference(layer, query, memory, visible, scale):
    """fp64 的交叉注意力；rope=False 时最后 dr 维是各头共享、不旋转的键。"""
    d, w = layer.dims, {k: v.double() for k, v in layer.state_dict().items()}
    q = (query.double() @ w["q_proj.weight"].T).unflatten(-1, (d.num_heads, -1))
    joint = memory.double() @ w["kv_a_proj_with_mqa.weight"].T
    latent, rope = joint.split((d.kv_lora_rank, d.qk_rope_head_dim), -1)
    latent = latent * torch.rsqrt(latent.pow(2).mean(-1, keepdim=True) + 1e-6)
    kv = (latent @ w["kv_b_proj.weight"].T).unflatten(-1, (d.num_heads, -1))
    key, value = kv.split((d.qk_nope_head_dim, d.v_head_dim), -1)
    key = torch.cat((key, rope.unsqueeze(2).expand(-1, -1, d.num_heads, -1)), -1)
    score = torch.einsum("bthd,bshd->bhts", q, key) * scale
    score = score.masked_fill(~visible[:, None, None, :], -math.inf)
    out = torch.einsum("bhts,bshd->bthd", score.softmax(-1), value).flatten(2)
    return (out @ w["o_proj.weight"].T).float()


@given(length=st.integers(1, 9), memory=st.integers(1, 12), kdim=st.sampled_from([WIDTH, 20]))
@settings(max_examples=15)
def test_cross_attention(length, memory, kdim):
    layer = attention(rope=False, kdim=kdim)
    x, source = tokens(2, length), tokens(2, memory, kdim, seed=2)
    ignored = torch.zeros(2, memory, dtype=torch.bool)
    ignored[0, 1:] = True
    out, _ = layer(x, source, source, key_padding_mask=ignored)
    close(out, cross_reference(layer, x, source, ~ignored, layer.softmax_scale))


@pytest.mark.parametrize("cross", [True, False])
def test_layouts_agree(cross):
    x = tokens(3, 6)
    source = tokens(3, 4, seed=3) if cross else x
    ignored = torch.zeros(3, source.shape[1], dtype=torch.bool)
    ignored[2, 2:] = True
    first, second = attention(), attention(batch_first=False)
    wanted, _ = first(x, source, source, key_padding_mask=ignored)
    flipped = x.transpose(0, 1)
    flipped_source = source.transpose(0, 1) if cross else flipped
    out, _ = second(flipped, flipped_source, flipped_source, key_padding_mask=ignored)
    close(out.transpose(0, 1), wanted)
    one = source[2] if cross else x[2]
    single, _ = second(x[2] if cross else one, one, one, key_padding_mask=ignored[2])
    close(single, wanted[2])


def test_fully_masked_query_gives_zero():
    layer, x = attention(), tokens(1, 3)
    out, _ = layer(x, x, x, key_padding_mask=torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(out, torch.zeros_like(out))


# ---- 掩码辨认 ----


def test_recognised_masks():
    square = causal_mask(5)
    assert attention_kind(None, False, 5, 5) == "full"
    assert attention_kind(None, True, 5, 8) == "causal"
    assert attention_kind(square, False, 5, 5) == "causal"
    assert attention_kind(square.isinf(), True, 5, 5) == "causal"
    assert attention_kind(square.expand(8, 5, 5), False, 5, 5) == "causal"
    assert attention_kind(torch.zeros(5, 7), False, 5, 7) == "full"
    later = torch.ones(3, 5, dtype=torch.bool).triu(3)
    assert attention_kind(later, False, 3, 5) == "causal"
    lowest = square.clamp(min=torch.finfo(torch.float32).min)
    assert attention_kind(lowest, False, 5, 5) == "causal"


def test_mask_changed_in_place_is_looked_at_again():
    mask = causal_mask(4)
    assert attention_kind(mask, False, 4, 4) == "causal"
    assert attention_kind(mask, False, 4, 4) == "causal"
    mask.zero_()
    assert attention_kind(mask, False, 4, 4) == "full"
    with torch.inference_mode():
        frozen = causal_mask(4)
        assert attention_kind(frozen, False, 4, 4) == "causal"
        frozen.zero_()
        assert attention_kind(frozen, False, 4, 4) == "full"


@pytest.mark.parametrize(
    ("mask", "is_causal", "error", "message"),
    [
        (torch.ones(4, 4, dtype=torch.bool).tril(-1), False, UnsupportedError, "既不是"),
        (torch.ones(4, 4, dtype=torch.bool).tril(-1), True, UnsupportedError, "既不是"),
        (torch.full((4, 4), 0.5), False, UnsupportedError, "加偏置"),
        (torch.zeros(4, 4, dtype=torch.int64), False, InputError, "bool 或浮点"),
        (torch.zeros(3, 4), False, InputError, "attn_mask 应为"),
        (torch.zeros(4), False, InputError, "attn_mask 应为"),
    ],
)
def test_refused_masks(mask, is_causal, error, message):
    layer, x = attention(), tokens(1, 4)
    with pytest.raises(error, match=message):
        layer(x, x, x, attn_mask=mask, is_causal=is_causal)


def test_causal_needs_enough_keys():
    key = tokens(1, 3)
    with pytest.raises(InputError, match="L <= S"):
        attention()(tokens(1, 4), key, key, is_causal=True)


def bad(**kwargs):
    return lambda layer, x: layer(x, x, x, **kwargs)


BAD_CALLS = {
    "权重": (bad(need_weights=True), UnsupportedError, "need_weights"),
    "值": (lambda m, x: m(x, x, x.clone()), UnsupportedError, "同一个张量"),
    "宽度": (lambda m, x: m(x[..., :4], x, x), InputError, "query"),
    "批": (lambda m, x: m(x[:1], x, x), InputError, "批大小"),
    "填充形状": (bad(key_padding_mask=torch.zeros(2, 3, dtype=torch.bool)), InputError, "形状"),
    "填充数值": (bad(key_padding_mask=torch.full((2, 5), 0.5)), UnsupportedError, "加偏置"),
    "类型": (lambda m, x: m(*[x.double()] * 3), InputError, "dtype"),
    "维数": (lambda m, x: m(*[x[None]] * 3), InputError, "张量"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input(name):
    run, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        run(attention(), tokens(2, 5))


# ---- 在 nn.TransformerEncoder / Decoder 里 ----


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_train_and_eval_agree(batch_first, norm_first):
    model = encoder(batch_first, norm_first)
    assert len(replace_mha(model, MLAConfig()).replaced) == 2
    x = tokens(2, 6)
    x = x if batch_first else x.transpose(0, 1)
    ignored = torch.zeros(2, 6, dtype=torch.bool)
    ignored[0, 4:] = True
    calls = ({}, {"src_key_padding_mask": ignored}, {"mask": causal_mask(6)})
    calls += ({"mask": causal_mask(6), "src_key_padding_mask": ignored}, {"is_causal": False})
    for kwargs in calls:
        wanted = model.train()(x, **kwargs)
        model.eval()
        close(model(x, **kwargs), wanted)
        with torch.no_grad():
            close(model(x, **kwargs), wanted)
        with torch.inference_mode():
            close(model(x, **kwargs), wanted)


def test_single_layer_fast_path_is_not_taken():
    layer = encoder(layers=1).layers[0]
    holder = nn.ModuleList([layer])
    replace_mha(holder, MLAConfig())
    layer.eval()
    seen = []
    original = layer.self_attn.forward
    layer.self_attn.forward = lambda *a, **k: seen.append(1) or original(*a, **k)
    with torch.no_grad():
        layer(tokens(2, 4))
    assert seen == [1]


def test_nested_tensors_from_a_hand_made_replacement():
    """不经 replace_mha、直接赋值时，nn.TransformerEncoder 仍会在 eval 模式产生嵌套张量。"""
    model = encoder()
    for index, layer in enumerate(model.layers):
        layer.self_attn = attention(seed=index)
    model.eval()
    x = tokens(3, 6)
    ignored = torch.zeros(3, 6, dtype=torch.bool)
    ignored[0, 3:] = True
    ignored[2, 5:] = True
    wanted = model(x, src_key_padding_mask=ignored)  # 记录梯度时不走嵌套路径
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert model.use_nested_tensor
        close(model(x, src_key_padding_mask=ignored)[~ignored], wanted[~ignored].detach())
        nested = torch.nested.nested_tensor([x[0, :3], x[1]])
        with pytest.raises(UnsupportedError, match="嵌套张量"):
            model.layers[0].self_attn(nested, nested, nested, attn_mask=causal_mask(6))


def test_frozen_parameters_in_a_hand_made_replacement():
    model = encoder()
    for layer in model.layers:
        layer.self_attn = attention()
    model.requires_grad_(False).eval()
    assert model(tokens(2, 4)).shape == (2, 4, WIDTH)


def test_decoder_with_cross_attention():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, 4, 48, dropout=0.0, batch_first=True)
    model = nn.TransformerDecoder(layer, 2)
    report = replace_mha(model, MLAConfig(q_lora_rank=12))
    assert [entry.name.rpartition(".")[2] for entry in report.replaced] == [
        "self_attn",
        "multihead_attn",
    ] * 2
    assert model.layers[0].self_attn.rotary_emb is not None
    assert model.layers[0].multihead_attn.rotary_emb is None
    assert "不旋转" in report.render() and "替换 4 个" in str(report)
    x, memory = tokens(2, 5), tokens(2, 8, seed=4)
    ignored = torch.zeros(2, 8, dtype=torch.bool)
    ignored[1, 6:] = True
    kwargs = {"tgt_mask": causal_mask(5), "memory_key_padding_mask": ignored}
    wanted = model(x, memory, **kwargs)
    with torch.no_grad():
        close(model.eval()(x, memory, **kwargs), wanted)
    changed = x.clone()
    changed[:, 3:] += 1
    close(model(changed, memory, **kwargs)[:, :3], wanted[:, :3])


def test_whole_transformer_learns_to_reverse():
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, 4, 1, 1, 64, dropout=0.0, batch_first=True)
    report = replace_mha(model, MLAConfig(), rope=True)
    assert len(report.replaced) == 3
    embed, head = nn.Embedding(8, WIDTH), nn.Linear(WIDTH, 8)
    params = [*model.parameters(), *embed.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(params, 3e-3)
    losses = []
    for _ in range(120):
        source = torch.randint(0, 8, (16, 5))
        target = source.flip(1)
        inputs = torch.cat((torch.zeros_like(target[:, :1]), target[:, :-1]), 1)
        logits = head(model(embed(source), embed(inputs), tgt_mask=causal_mask(5)))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in params)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_compile_with_a_causal_hint():
    model = encoder(layers=1)
    replace_mha(model, MLAConfig())
    x, mask = tokens(2, 6), causal_mask(6)
    compiled = torch.compile(model.layers[0], fullgraph=True, backend="aot_eager")
    close(compiled(x, src_mask=mask, is_causal=True), model.layers[0](x, src_mask=mask))
    with pytest.raises(Exception, match="is_causal=True"):
        compiled(x, src_mask=mask)


# ---- 替换与恢复 ----


def test_restore_is_bit_exact():
    model = encoder().eval()
    x = tokens(2, 6)
    ignored = torch.zeros(2, 6, dtype=torch.bool)
    before, names = model(x, src_key_padding_mask=ignored), list(model.state_dict())
    original = model.layers[0].self_attn
    replace_mha(model, MLAConfig())
    assert not model.use_nested_tensor
    assert not torch.equal(model(x), before)
    model.train()
    assert restore_mha(model) == 2
    assert model.use_nested_tensor and model.layers[0].self_attn is original
    assert original.training and list(model.state_dict()) == names
    assert torch.equal(model.eval()(x, src_key_padding_mask=ignored), before)


def test_skipped_with_reasons():
    model = nn.ModuleDict(
        {
            "dropout": nn.MultiheadAttention(WIDTH, 4, dropout=0.1),
            "bias_kv": nn.MultiheadAttention(WIDTH, 4, add_bias_kv=True),
            "zero": nn.MultiheadAttention(WIDTH, 4, add_zero_attn=True),
            "dims": nn.MultiheadAttention(WIDTH, 4, kdim=16, vdim=8),
            "child": type("Child", (nn.MultiheadAttention,), {})(WIDTH, 4),
            "unwanted": nn.MultiheadAttention(WIDTH, 4),
            "good": nn.MultiheadAttention(WIDTH, 4, kdim=16, vdim=16, bias=False),
        }
    )
    report = replace_mha(model, MLAConfig(), lambda name, _: name != "unwanted")
    reasons = {entry.name: entry.reason for entry in report.skipped}
    for name, words in {
        "dropout": "ignore_dropout",
        "bias_kv": "add_bias_kv",
        "zero": "add_zero_attn",
        "dims": "vdim",
        "child": "子类",
        "unwanted": "filter_fn",
    }.items():
        assert words in reasons[name]
    (good,) = report.replaced
    assert good.name == "good" and model["good"].kv_hidden_size == 16
    assert model["good"].o_proj.bias is None and model["good"].rotary_emb is None
    assert good.parameters_after != good.parameters_before
    restore_mha(model)
    again = replace_mha(model, MLAConfig(), ignore_dropout=True)
    entry = next(e for e in again.replaced if e.name == "dropout")
    assert "放弃了注意力 dropout 0.1" in entry.reason


def test_shared_module_stays_shared():
    shared = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
    model = nn.ModuleList([shared, shared])
    replace_mha(model, MLAConfig())
    assert model[0] is model[1] and isinstance(model[0], LatentMultiheadAttention)
    restore_mha(model)
    assert model[0] is shared and model[1] is shared


def test_errors_leave_the_model_unchanged():
    model = encoder()
    modules = dict(model.named_modules())
    with pytest.raises(ConfigError, match="压缩比率过大"):
        replace_mha(model, MLAConfig(kv_compression_ratio=1e4))
    with pytest.raises(DeepSeekOptError, match="没有替换过"):
        restore_mha(model)
    with pytest.raises(InputError, match="本身就是"):
        replace_mha(nn.MultiheadAttention(WIDTH, 4), MLAConfig())
    assert dict(model.named_modules()) == modules and model.use_nested_tensor
    replace_mha(model, MLAConfig())
    with pytest.raises(DeepSeekOptError, match="已经替换过"):
        replace_mha(model, MLAConfig())
    assert not replace_mha(nn.Linear(2, 2), MLAConfig())


def test_deepcopy_state_dict_and_dtype():
    model = encoder()
    replace_mha(model, MLAConfig())
    clone = copy.deepcopy(model)
    fresh = encoder()
    replace_mha(fresh, MLAConfig())
    fresh.load_state_dict(model.state_dict())
    x = tokens(2, 5)
    for other in (clone, fresh):
        torch.testing.assert_close(other(x), model(x))
    assert restore_mha(clone) == 2
    assert isinstance(clone.layers[0].self_attn, nn.MultiheadAttention)
    assert isinstance(model.layers[0].self_attn, LatentMultiheadAttention)
    half = model.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()
    built = encoder(dtype=torch.bfloat16)
    replace_mha(built, MLAConfig())
    assert built.layers[0].self_attn.o_proj.weight.dtype == torch.bfloat16
