"""transformers 各架构：建层、嵌入、掩码、打包；不认得的给出原因。"""

import pytest
import torch

from deepseek_opt import MTPAdapter, MTPConfig, attach_mtp
from deepseek_opt.errors import InputError, UnsupportedError
from deepseek_opt.mtp import HFAdapter

from .mtp_models import NAMES, SIZES, OwnModel, attached, hidden_of, make, tokens_of, transformers
from .tolerances import tol


@pytest.mark.parametrize("name", NAMES)
def test_layer_is_of_the_model_s_own_class(name):
    model, predictor = attached(name)
    adapter, layer = predictor.adapter, predictor.layers[0]
    assert type(layer.block) is type(adapter.template)
    mine = {k: (v.shape, v.dtype) for k, v in layer.block.state_dict().items()}
    assert mine == {k: (v.shape, v.dtype) for k, v in adapter.template.state_dict().items()}
    before = adapter.template.state_dict()
    assert not any(
        v.data_ptr() == before[k].data_ptr() for k, v in layer.block.state_dict().items()
    )
    assert type(layer.enorm) is type(adapter.final_norm) and model.mtp is predictor


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_equal_separate_ones(name):
    model, predictor = attached(name)
    first, second = tokens_of(1, 7, seed=2), tokens_of(1, 5, seed=3)
    separate = []
    for tokens in (first, second):
        hidden = hidden_of(model, tokens)
        separate.append(predictor(tokens[:, 1:], hidden[:, :-1]).normed)
    hidden = torch.cat([hidden_of(model, tokens) for tokens in (first, second)], dim=1)
    tokens = torch.cat([first, second], dim=1)
    positions = torch.tensor([[*range(7), *range(5)]])
    documents = torch.tensor([[0] * 7 + [1] * 5])[:, :-1]
    made = predictor(
        tokens[:, 1:], hidden[:, :-1], position_ids=positions[:, 1:], document_ids=documents
    ).normed
    torch.testing.assert_close(made[:, :6], separate[0], **tol(torch.float32))
    torch.testing.assert_close(made[:, 7:], separate[1], **tol(torch.float32))


@pytest.mark.parametrize("name", ["mistral", "qwen2_sliding"])
def test_sliding_window_of_the_model_is_kept(name):
    model, predictor = attached(name)
    tokens = tokens_of(1, 10)
    hidden = hidden_of(model, tokens)[:, :-1]
    changed = hidden.clone()
    changed[:, 0] += 1.0
    a, b = (predictor(tokens[:, 1:], h).normed for h in (hidden, changed))
    assert not torch.allclose(a[:, 3], b[:, 3]) and torch.equal(a[:, 4:], b[:, 4:])


def test_bf16_and_fp32_parts_keep_their_types():
    model = make("deepseek_v3", torch.bfloat16)
    model.model.layers[1].mlp.gate.e_score_correction_bias.data = torch.zeros(4)
    layer = attach_mtp(model, fresh=True).layers[0]
    assert layer.block.mlp.gate.e_score_correction_bias.dtype == torch.float32
    others = {v.dtype for k, v in layer.state_dict().items() if "correction" not in k}
    assert others == {torch.bfloat16}


def test_fresh_weights_are_the_model_s_initialisation():
    model = make("mixtral")
    state = attach_mtp(model, config=MTPConfig(depth=1), fresh=True).state_dict()
    for name, value in state.items():
        assert value.isfinite().all(), name
        if value.dim() > 1:
            assert 0.015 < float(value.std()) < 0.025, name
        else:
            assert torch.equal(value, torch.ones_like(value)), name


def test_checking_leaves_the_modes_and_hooks_alone():
    model = make("llama").train()
    model.model.layers[0].eval()
    HFAdapter(model)
    assert model.training and model.model.layers[1].training
    assert not model.model.layers[0].training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("prefix", "extra", "part"),
    [
        ("Cohere", {"logit_scale": 0.5, "eos_token_id": 2}, "输出头"),
        ("Granite", {"embedding_multiplier": 3.0}, "词嵌入"),
    ],
)
def test_models_that_compute_differently_are_refused(prefix, extra, part):
    config = getattr(transformers, prefix + "Config")(**{**SIZES, **extra})
    model = getattr(transformers, prefix + "ForCausalLM")(config)
    with pytest.raises(UnsupportedError, match=part):
        attach_mtp(model, fresh=True)
    assert not hasattr(model, "mtp")


def test_a_model_without_data_is_refused():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    with pytest.raises(InputError, match="meta"):
        attach_mtp(model, fresh=True)


def test_models_without_the_interface_are_refused():
    config = transformers.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, is_decoder=True
    )
    with pytest.raises(UnsupportedError, match="没有找到"):
        attach_mtp(transformers.BertLMHeadModel(config), fresh=True)
    with pytest.raises(UnsupportedError, match="MTPAdapter"):
        attach_mtp(OwnModel(), fresh=True)
    model = make("qwen2")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedError, match="linear_attention"):
        attach_mtp(model, fresh=True)


def test_adapter_arguments():
    model = OwnModel()
    with pytest.raises(InputError, match="final_norm"):
        MTPAdapter(
            model, embedding=model.embed, head=model.head, hidden_size=8, hidden_normed=False
        )
    for name, value in (("embedding", None), ("head", 3), ("hidden_size", 0)):
        parts = {"embedding": model.embed, "head": model.head, "hidden_size": 8, name: value}
        with pytest.raises(InputError, match=name):
            MTPAdapter(model, **parts)


def test_the_default_adapter_says_what_it_cannot_do():
    model = OwnModel()
    adapter = MTPAdapter(model, embedding=model.embed, head=model.head, hidden_size=8)
    with pytest.raises(NotImplementedError, match="make_layer"):
        adapter.make_layer()
    with pytest.raises(UnsupportedError, match="make_cache"):
        adapter.make_cache()

    class Plain(MTPAdapter):
        def make_layer(self):
            return torch.nn.Linear(8, 8)

    parts = {"embedding": model.embed, "head": model.head, "hidden_size": 8}
    predictor = attach_mtp(model, fresh=True, adapter=Plain(model, **parts))
    tokens, hidden = tokens_of(1, 4), torch.randn(1, 4, 8)
    assert predictor(tokens, hidden).normed.shape == (1, 4, 8)
    with pytest.raises(UnsupportedError, match="run_layer"):
        predictor(tokens, hidden, document_ids=torch.tensor([[0, 0, 1, 1]]))
