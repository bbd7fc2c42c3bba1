"""生成期间直接调用算子：用得上时不经过各模块；有钩子、LoRA、不认得的结构时照常，结果都相同。"""

from __future__ import annotations

import copy

import pytest
import torch

import deepseek_opt as dso
from deepseek_opt.integrations import steady

from .generation_cases import both, generator_model, optimized, prompts

OPTIONS = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def parts(model):
    """此刻能直接算的部分。"""
    with optimized(model, draft_length=2):
        adapter = model.mtp.adapter
        with torch.no_grad():
            return adapter._steady.current(adapter)


def test_deepseek_is_steady_and_modules_are_not_called(monkeypatch):
    model = generator_model("deepseek_v3")
    assert len(parts(model)) == 2  # 主模型与 MTP 层
    calls = []
    layer = type(model.model.layers[0])
    real = layer.forward
    with optimized(model, draft_length=2):
        model.generate(**prompts(2, 5, 1), **OPTIONS)  # 第一次要核对
        monkeypatch.setattr(layer, "forward", lambda *a, **k: calls.append(1) or real(*a, **k))
        model.generate(**prompts(2, 5, 1), **OPTIONS)
    assert len(calls) <= 2 * len(model.model.layers)  # 预填充至多一次，之后不再经过


@pytest.mark.parametrize("name", ["llama", "gpt2", "deepseek_v2"])
def test_other_structures_go_through_their_modules(name):
    assert parts(generator_model(name)) == {} or name == "deepseek_v2"


def test_hooks_inside_are_still_called():
    model = copy.deepcopy(generator_model("deepseek_v3"))
    calls = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    assert parts(model) == {}
    plain, fast = both(model, prompts(3, 6, 1), OPTIONS, draft_length=3)
    assert torch.equal(plain, fast) and len(calls) > 16


def test_wrong_arithmetic_is_noticed(monkeypatch):
    """核对不过就不用：把其中的归一化改坏。"""
    model = copy.deepcopy(generator_model("deepseek_v3"))
    monkeypatch.setattr(steady.Norm, "__call__", lambda self, x: x * 1.5)
    assert parts(model) == {}


def test_quantized_experts_go_through_their_modules():
    model = copy.deepcopy(generator_model("deepseek_v3"))
    profile = dso.OptimizationProfile(
        mla=dso.MLAConfig(),
        moe=dso.MOEConfig(quantization="int8"),
        mtp=dso.MTPConfig(draft_length=3, fixed_draft_length=True),
    )
    with dso.optimized(model, profile) as report:
        out = model.generate(**prompts(2, 5, 1), **OPTIONS)
        again = model.generate(**prompts(2, 5, 1), **OPTIONS, use_mtp=False)
        assert torch.equal(out, again) and not report.fallbacks


def test_long_positions_grow_the_table():
    model = generator_model("deepseek_v3")
    with optimized(model, draft_length=2):
        table = model.mtp.adapter._angles
        model.generate(**prompts(1, 5, 1), **OPTIONS)
        before = table._halves[torch.float32][0].shape[0]
        places = torch.tensor([[before + 7]])
        cos, sin = table.halves(places, torch.float32, before + 8)
        assert table._halves[torch.float32][0].shape[0] > before + 7
        wanted = model.model.rotary_emb(torch.zeros(1), places)
        half = cos.shape[-1]
        assert torch.equal(cos, wanted[0][..., :half]) and torch.equal(sin, wanted[1][..., :half])
