"""TokenPredictor：公式、递归、配置、transformers 自己的 MTP 作对照。"""

import copy

import pytest
import torch
from torch import nn

from deepseek_opt import (
    MLAConfig,
    MTPConfig,
    OptimizationProfile,
    TokenPredictor,
    attach_mtp,
    optimize,
)
from deepseek_opt.errors import InputError
from deepseek_opt.mtp import HFAdapter

from .mtp_models import attached, hidden_of, make, tokens_of
from .tolerances import tol


def test_the_module_is_the_published_formula():
    model, predictor = attached("llama")
    tokens, layer = tokens_of(), predictor.layers[0]
    hidden = hidden_of(model, tokens)
    made = predictor(tokens[:, 1:], hidden[:, :-1])
    embedded = model.model.embed_tokens(tokens[:, 1:])

    def norm(weight, x):
        return weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    joint = torch.cat(
        [norm(layer.enorm.weight, embedded), norm(layer.hnorm.weight, hidden[:, :-1])], dim=-1
    )
    x = joint @ layer.eh_proj.weight.t()
    positions = torch.arange(1, tokens.shape[1])[None]
    rotary = model.model.rotary_emb(x, position_ids=positions)
    mask = torch.full((9, 9), float("-inf")).triu(1)[None, None]
    x = layer.block(x, attention_mask=mask, position_embeddings=rotary)
    wanted = norm(layer.shared_head.norm.weight, x)
    torch.testing.assert_close(made.normed, wanted, **tol(torch.float32))
    torch.testing.assert_close(predictor.logits(made.normed), model.lm_head(made.normed))


def test_equals_the_mtp_model_of_transformers(tmp_path, monkeypatch):
    """同一份检查点，transformers 自己的 MtpModel 读得进去，两个深度的输出与起草的词元相同。"""
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    model, predictor = attached("deepseek_v3", depth=2, shared_layers=False)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(
        type(model), "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[23].*"]
    )
    theirs = MtpModel.from_pretrained(type(model).from_pretrained(tmp_path)).eval()
    tokens = tokens_of(1, 9)
    hidden = hidden_of(model, tokens)[:, :-1]
    cache = MtpCache(config=model.config.get_mtp_config())
    positions = torch.arange(1, 9)[None]
    with torch.no_grad():
        drafted, logits, _ = theirs(tokens[:, 1:], hidden, None, positions, cache)
        ours, ids = hidden, tokens[:, 1:]
        for depth in (1, 2):
            made = predictor(ids, ours, depth=depth)
            ours, last = made.hidden, predictor.logits(made.normed[:, -1:], depth)
            torch.testing.assert_close(last, logits[:, depth - 1 : depth], **tol(torch.float32))
            ids = torch.cat([ids[:, 1:], last.argmax(-1)], dim=1)
            assert torch.equal(ids[:, -1], drafted[:, depth - 1])


def test_one_layer_rolls_out_to_any_depth():
    model, predictor = attached("llama", depth=6)
    assert len(predictor.layers) == 1 and predictor.depth == 6
    tokens = tokens_of()
    hidden, seen = hidden_of(model, tokens), []
    for depth in range(1, 7):
        hidden = predictor(tokens[:, depth:], hidden[:, :-1], depth=depth).hidden
        seen.append(hidden)
    assert [h.shape[1] for h in seen] == [9, 8, 7, 6, 5, 4]
    assert all(bool(h.isfinite().all()) for h in seen)
    assert not torch.equal(seen[0][:, :4], seen[5])


def test_separate_layers_are_used_in_turn_and_the_last_one_goes_on():
    predictor = attached("llama", depth=3, shared_layers=False)[1]
    assert [predictor.layer_index(depth) for depth in (1, 2, 3, 4)] == [0, 1, 2, 2]
    assert [layer.block.self_attn.layer_idx for layer in predictor.layers] == [0, 1, 2]


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "mistral", "gpt2"])
def test_with_a_cache_the_tokens_can_come_one_by_one(name):
    model, predictor = attached(name, depth=1)
    tokens = tokens_of()
    hidden = hidden_of(model, tokens)[:, :-1]
    whole = predictor(tokens[:, 1:], hidden).normed
    cache, parts = predictor.adapter.make_cache(), []
    for begin, end in ((0, 4), (4, 5), (5, 9)):
        step = predictor(tokens[:, 1 + begin : 1 + end], hidden[:, begin:end], cache=cache)
        parts.append(step.normed)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **tol(torch.float32))


def test_pre_norm_and_chain_options_are_explicit():
    model = make("llama")
    adapter = HFAdapter(model, hidden_normed=False, chain_normed=False)
    assert adapter.captured is model.model.norm
    predictor = attach_mtp(model, config=MTPConfig(depth=2), fresh=True, adapter=adapter)
    tokens = tokens_of()
    made = predictor(tokens[:, 1:], torch.randn(2, 9, 32))
    norm = predictor.layers[0].shared_head.norm
    assert torch.equal(norm(made.hidden), made.normed) and not torch.equal(made.hidden, made.normed)


def test_own_head_and_embedding_are_used():
    predictor = attached("llama", shared_head=False, shared_embedding=False)[1]
    layer, tokens = predictor.layers[0], tokens_of()
    hidden = torch.randn(2, 10, 32)
    before = predictor(tokens, hidden).normed
    with torch.no_grad():
        layer.embed_tokens.weight.mul_(-1)
    assert not torch.allclose(predictor(tokens, hidden).normed, before)
    assert torch.equal(predictor.logits(before), layer.shared_head.head(before))


def test_deepcopy_belongs_to_the_copy():
    model, predictor = attached("llama")
    other = copy.deepcopy(model)
    assert other.mtp.adapter.model is other and predictor.adapter.model is model
    with torch.no_grad():
        other.lm_head.weight.zero_()
    hidden = torch.randn(1, 2, 32)
    assert not other.mtp.logits(hidden).any() and predictor.logits(hidden).any()


def test_optimize_also_reaches_the_mtp_layer():
    model, predictor = attached("deepseek_v3")
    tokens = tokens_of()
    hidden = hidden_of(model, tokens)[:, :-1]
    before = predictor(tokens[:, 1:], hidden).normed
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]] * 2)
    packed = predictor(tokens[:, 1:], hidden, document_ids=documents).normed
    report = optimize(model, OptimizationProfile(mla=MLAConfig()))
    assert "mtp.layers.0.block.self_attn" in [entry.name for entry in report.replaced]
    torch.testing.assert_close(
        predictor(tokens[:, 1:], hidden).normed, before, **tol(torch.float32)
    )
    again = predictor(tokens[:, 1:], hidden, document_ids=documents).normed
    torch.testing.assert_close(again, packed, **tol(torch.float32))


def test_bad_input():
    model, predictor = attached("llama", depth=2)
    tokens, hidden = tokens_of(), torch.randn(2, 10, 32)
    for bad in (tokens.float(), tokens[0]):
        with pytest.raises(InputError, match="tokens"):
            predictor(bad, hidden)
    with pytest.raises(InputError, match=r"hidden.*\[2, 10, 32\]"):
        predictor(tokens, hidden[:, :5])
    for depth in (0, True, 1.0):
        with pytest.raises(InputError, match="depth"):
            predictor(tokens, hidden, depth=depth)
    adapter = predictor.adapter
    with pytest.raises(InputError, match="adapter"):
        TokenPredictor(nn.Linear(2, 2))
    with pytest.raises(InputError, match="config"):
        TokenPredictor(adapter, {"depth": 1})
    for config, physical in (
        (MTPConfig(shared_layers=True), 2),
        (MTPConfig(depth=1), 2),
        (MTPConfig(depth=3, shared_layers=False), 2),
    ):
        with pytest.raises(InputError, match="物理层"):
            TokenPredictor(adapter, config, physical=physical)
    assert model.mtp is predictor
