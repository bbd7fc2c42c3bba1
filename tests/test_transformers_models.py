"""每个 transformers MLA 架构：替换后的输出与它自己的 eager 前向相同；新架构必须登记或说明。"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from deepseek_opt import MLAConfig, OptimizationProfile, optimize, restore
from deepseek_opt.integrations import specs
from tests.tiny_models import MODELS, available, make_inputs, make_model, transformers
from tests.tolerances import tol

SUPPORTED = [name for name in MODELS if available(name)]
VARIANTS = [
    ("deepseek_v3", {"rope_interleave": False}),
    ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True}),
    ("deepseek_v2", {"q_lora_rank": None}),
    (
        "deepseek_v3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32,
                "beta_slow": 1,
            }
        },
    ),
    (
        "mistral4",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.3,
                "beta_fast": 32,
                "beta_slow": 1,
            }
        },
    ),
]


def profile(**fields):
    return OptimizationProfile(mla=MLAConfig(**fields))


def steps(model):
    """预填充（左填充）、单步解码、3 词元续写、无缓存前向的 logits。"""
    ids, mask = make_inputs(left_pad=4)
    more, _ = make_inputs(length=4, seed=5)
    full = torch.cat([mask, torch.ones(2, 4, dtype=mask.dtype)], 1)
    with torch.no_grad():
        first = model(ids, attention_mask=mask, use_cache=True)
        cache = first.past_key_values
        second = model(
            more[:, :1], attention_mask=full[:, :13], past_key_values=cache, use_cache=True
        )
        third = model(more[:, 1:], attention_mask=full, past_key_values=cache, use_cache=True)
        alone = model(ids, use_cache=False)
    return first.logits[mask.bool()], second.logits, third.logits, alone.logits


def check(model):
    expected = steps(model)
    report = optimize(model, profile(), strict=True)
    actual = steps(model)
    for old, new in zip(expected, actual, strict=True):
        torch.testing.assert_close(new, old, **tol(torch.float32))
    assert not report.fallbacks
    restore(model)
    for old, again in zip(expected, steps(model), strict=True):
        assert torch.equal(old, again)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_matches_eager(model_type):
    check(make_model(model_type, attn_implementation="eager"))


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS)
def test_variants_match_eager(model_type, overrides):
    check(make_model(model_type, attn_implementation="eager", **overrides))


@pytest.mark.parametrize("model_type", ["deepseek_v3", "deepseek_v2", "longcat_flash"])
def test_greedy_tokens_match_sdpa(model_type):
    model = make_model(model_type, attn_implementation="sdpa")
    ids, mask = make_inputs(batch=3, left_pad=5)
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids, **options)
    optimize(model, profile())
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_gradients_match_eager(model_type):
    model = make_model(model_type, attn_implementation="eager").train()
    ids, mask = make_inputs(left_pad=3)
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 3] = -100  # 否则损失会取填充位置的输出，它什么都看不见，没有意义

    def gradients():
        model.zero_grad()
        model(ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    report = optimize(model, profile())
    actual = gradients()
    assert not report.fallbacks and actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_every_mla_model_file_is_known():
    """transformers 里凡是带 kv_lora_rank 的注意力类，要么登记，要么列为跳过并说明原因。"""
    root = Path(transformers.__file__).parent / "models"
    unknown = []
    for path in sorted(root.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        for block in re.split(r"(?m)^(?=class )", text):
            name = re.match(r"class (\w+)\(", block)
            if name and "def forward" in block and re.search(r"self\.kv_b_proj\b", block):
                key = f"transformers.models.{path.parent.name}.{path.stem}.{name[1]}"
                if key not in specs.SPECS and key not in specs.SKIPPED:
                    unknown.append(key)
        if "kv_lora_rank" in text:
            prefix = f"transformers.models.{path.parent.name}."
            known = [*specs.SPECS, *specs.SKIPPED]
            assert any(key.startswith(prefix) for key in known), f"{path.name} 没有登记"
    assert not unknown


def test_skipped_classes_have_reasons():
    for key, reason in specs.SKIPPED.items():
        assert reason and re.search(r"[\u4e00-\u9fff]", reason), key


@pytest.mark.skipif(
    importlib.util.find_spec("transformers.models.deepseek_v32") is None, reason="这个版本没有"
)
def test_sparse_attention_is_reported():
    package = importlib.import_module("transformers.models.deepseek_v32")
    from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention

    fields = {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_head_dim": 16,
        "index_n_heads": 2,
        "index_topk": 4,
    }
    layer = torch.nn.ModuleList([DeepseekV32Attention(package.DeepseekV32Config(**fields), 0)])
    report = optimize(layer, profile())
    assert not report.replaced
    assert "DSA" in report.skipped[0].reason
    restore(layer)


def test_mixed_layers_replace_what_they_can():
    """dots3_note：全注意力层替换，滑动窗口层说明原因并留给原实现，输出不变。"""
    if not available("dots3_note"):
        pytest.skip("这个版本没有 dots3_note")
    model = make_model(
        "dots3_note",
        attn_implementation="eager",
        layer_types=["full_attention", "sliding_attention"],
        sliding_window=4,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=4,
        swa_q_lora_rank=24,
        swa_kv_lora_rank=32,
        swa_head_dim=40,
        swa_qk_nope_head_dim=24,
        swa_v_head_dim=20,
    )
    expected = steps(model)
    report = optimize(model, profile())
    assert [len(report.replaced), len(report.skipped)] == [1, 1]
    assert "滑动窗口" in report.skipped[0].reason
    for old, new in zip(expected, steps(model), strict=True):
        torch.testing.assert_close(new, old, **tol(torch.float32))
