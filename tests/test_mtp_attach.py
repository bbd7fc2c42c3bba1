"""装上、取下：state_dict 的名字、配置、原样还原、自己的模型。"""

import copy

import pytest
import torch
from torch import nn

from deepseek_opt import MLAConfig, MTPConfig, OptimizationProfile, attach_mtp, detach_mtp, optimize
from deepseek_opt.errors import InputError
from deepseek_opt.mtp import predictor_of

from .mtp_models import OwnAdapter, OwnModel, attached, make, tokens_of


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gpt2"])
def test_detach_restores_the_model(name):
    model, tokens = make(name), tokens_of()
    config, logits = model.config.to_dict(), model(tokens).logits
    state = {key: value.clone() for key, value in model.state_dict().items()}
    predictor = attach_mtp(model, fresh=True)
    assert torch.equal(model(tokens).logits, logits)
    assert model.config.to_dict() != config or name == "deepseek_v3"
    assert detach_mtp(model) is predictor
    assert model.config.to_dict() == config and not hasattr(model, "mtp")
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert not model._state_dict_hooks and not model._load_state_dict_pre_hooks


def test_parameters_modes_and_types_follow_the_model():
    model = make("llama").train()
    predictor = attach_mtp(model, fresh=True)
    assert predictor.training and not model.eval().mtp.training
    assert {id(p) for p in predictor.parameters()} <= {id(p) for p in model.parameters()}
    assert {p.dtype for p in model.to(torch.bfloat16).mtp.parameters()} == {torch.bfloat16}


def test_state_dict_round_trip_in_the_checkpoint_s_names():
    model, predictor = attached("deepseek_v3")
    state = copy.deepcopy(model.state_dict())
    assert "model.layers.2.eh_proj.weight" in state and not any(k.startswith("mtp.") for k in state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert model.load_state_dict(state).missing_keys == []
    assert torch.equal(predictor.layers[0].eh_proj.weight, state["model.layers.2.eh_proj.weight"])
    wrapped = nn.ModuleDict({"inner": model})  # 被包在里面时带前缀
    names = wrapped.state_dict()
    assert "inner.model.layers.2.enorm.weight" in names
    wrapped.load_state_dict(names)
    assert predictor_of(wrapped) is predictor


def test_a_copy_can_be_detached_and_saved(tmp_path):
    other = copy.deepcopy(attached("llama")[0])
    other.save_pretrained(tmp_path)
    attach_mtp(make("llama"), tmp_path)
    detach_mtp(other)
    assert not any("eh_proj" in key for key in other.state_dict())


def test_generation_with_the_module_attached_is_unchanged():
    model, tokens = make("llama"), tokens_of()
    before = model.generate(tokens, max_new_tokens=5, do_sample=False)
    attach_mtp(model, fresh=True)
    assert torch.equal(model.generate(tokens, max_new_tokens=5, do_sample=False), before)


def test_own_model_round_trip():
    model = OwnModel()
    adapter = OwnAdapter(model, hidden_normed=False, layer_path="blocks", num_layers=1)
    predictor = attach_mtp(model, config=MTPConfig(depth=2), fresh=True, adapter=adapter)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert "blocks.1.qkv.weight" in state and "blocks.1.eh_proj.weight" in state
    detach_mtp(model)
    other = attach_mtp(model, state, adapter=adapter)
    for key, value in other.state_dict().items():
        assert torch.equal(value, predictor.state_dict()[key]), key
    plain = OwnModel()
    attach_mtp(plain, fresh=True, adapter=OwnAdapter(plain))
    assert "mtp.layers.0.qkv.weight" in plain.state_dict()


def test_mistakes_leave_the_model_alone():
    model = make("deepseek_v3")
    with pytest.raises(InputError, match="没有装过"):
        detach_mtp(model)
    with pytest.raises(InputError, match="attach_mtp"):
        predictor_of(model)
    with pytest.raises(InputError, match="config"):
        attach_mtp(model, config=3, fresh=True)
    with pytest.raises(InputError, match="fresh"):
        attach_mtp(model, {}, fresh=True)
    attach_mtp(model, fresh=True)
    with pytest.raises(InputError, match="已经装过"):
        attach_mtp(model, fresh=True)
    detach_mtp(model)
    model.mtp = nn.Identity()
    with pytest.raises(InputError, match="名为 mtp"):
        attach_mtp(model, fresh=True)
    del model.mtp
    optimize(model, OptimizationProfile(mla=MLAConfig()))
    with pytest.raises(InputError, match="先 attach_mtp 再 optimize"):
        attach_mtp(model, fresh=True)
