"""内存估算：与实测的常驻内存峰值对照；预算、分块、最大长度、错误。"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek_opt import (
    LatentCache,
    MLAAttention,
    MLAConfig,
    OptimizationProfile,
    estimate_memory,
)
from deepseek_opt.config import DenseConfig
from deepseek_opt.errors import InputError, MemoryBudgetError, UnsupportedError
from deepseek_opt.memory import (
    FIXED_BYTES,
    MIN_CHUNK,
    TOLERANCE,
    budget_bytes,
    check_budget,
    largest_length,
    plan_prefill,
)
from tests.memory_probe import OwnModel

ROOT = Path(__file__).parent.parent
CLEAR_REFS = Path("/proc/self/clear_refs")


def own(**changes) -> OwnModel:
    base = {"num_attention_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 8}
    return OwnModel(MLAConfig(**{**base, **changes}), 64)


def hf_config(**changes):
    transformers = pytest.importorskip("transformers")
    base = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    }
    return transformers.DeepseekV3Config(**{**base, **changes})


def test_estimates_match_measured_peaks():
    if not CLEAR_REFS.exists() or not os.access(CLEAR_REFS, os.W_OK):
        pytest.skip("需要 Linux 的 /proc/self/clear_refs 来重置峰值")
    # 让释放的内存立即还给系统，否则先前的空闲内存会掩盖峰值。
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.memory_probe"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found
    wrong = {}
    for name, (measured, guess) in found.items():
        fixed = FIXED_BYTES if "bfloat16" in name else FIXED_BYTES // 4
        if abs(guess - measured) > max(TOLERANCE * measured, fixed):
            wrong[name] = f"实测 {measured / 2**20:.1f} MiB，估算 {guess / 2**20:.1f} MiB"
    assert not wrong, wrong


def test_cache_bytes_equal_the_real_cache():
    model, length = own(), 128
    for kind, stored in (
        ("auto", "auto"),
        ("int8", "int8"),
        ("float8_e4m3fn",) * 2,
        ("bfloat16",) * 2,
    ):
        profile = OptimizationProfile(mla=MLAConfig(cache_dtype=kind))
        cache = LatentCache(2, max_length=length, dtype=stored)
        with torch.no_grad():
            model(torch.zeros(3, length, dtype=torch.long), cache=cache)
        estimate = estimate_memory(model, 3, length, profile=profile)
        assert estimate.cache_bytes == cache.nbytes


def test_weights_and_dtype():
    model = own()
    size = sum(p.numel() * 4 for p in model.parameters()) + model.attention[0].rotary_emb.dim * 4
    assert estimate_memory(model, 1, 8).weight_bytes == size
    half = estimate_memory(model, 1, 64, dtype=torch.bfloat16)
    full = estimate_memory(model, 1, 64)
    assert half.weight_bytes * 2 == full.weight_bytes
    assert half.cache_bytes * 2 == full.cache_bytes
    assert half.dtype == torch.bfloat16 and full.dtype == torch.float32


def test_transformers_model_and_config_agree():
    settings_ = hf_config()
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM(settings_)
    assert estimate_memory(model, 2, 100) == estimate_memory(settings_, 2, 100, dtype=None)
    estimate = estimate_memory(model, 1, 100)
    assert estimate.cache_bytes == 3 * 100 * 40 * 4
    assert estimate.against("transformers_sdpa").cache_bytes == estimate.cache_bytes
    assert estimate.against("standard_eager").cache_bytes == 3 * 100 * 4 * 40 * 4


def test_the_reference_shape_saves_what_the_specification_asks():
    shape = hf_config(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_attention_heads=16,
        num_key_value_heads=16,
        n_shared_experts=2,
        n_routed_experts=64,
        num_experts_per_tok=6,
        kv_lora_rank=512,
        q_lora_rank=768,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    )
    profile = OptimizationProfile(mla=MLAConfig(prefill_chunk_size=1024))
    estimate = estimate_memory(shape, 1, 8192, dtype=torch.bfloat16, profile=profile)
    assert estimate.chunk == 1024
    automatic = estimate_memory(shape, 1, 8192, dtype=torch.bfloat16)
    assert automatic.chunk == 2048
    for entry in estimate.alternatives:
        assert estimate.saving(entry.name) >= automatic.saving(entry.name) >= 0.4, entry.title
    assert estimate.cache_bytes <= 0.15 * estimate.against("standard_sdpa").cache_bytes
    double = estimate_memory(shape, 1, 16384, dtype=torch.bfloat16, profile=profile)
    assert double.working_bytes <= estimate.against("standard_sdpa").working_bytes
    layer = MLAAttention(
        MLAConfig(
            num_attention_heads=16,
            q_lora_rank=768,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
        ),
        2048,
        device="meta",
        dtype=torch.bfloat16,
    )
    alone = estimate_memory(layer, 1, 8192, chunk_size=1024)
    assert min(alone.saving(entry.name) for entry in alone.alternatives) >= 0.4


def test_dense_profile_counts_the_fused_ffn():
    settings_ = hf_config(first_k_dense_replace=3, num_experts_per_tok=None, intermediate_size=4096)
    plain = OptimizationProfile(mla=MLAConfig())
    fused = OptimizationProfile(mla=MLAConfig(), dense=DenseConfig())
    kept = OptimizationProfile(mla=MLAConfig(), dense=DenseConfig(ffn=False))
    sizes = [
        estimate_memory(settings_, 1, 512, profile=p).prefill_bytes for p in (plain, fused, kept)
    ]
    assert sizes[1] < sizes[0] == sizes[2]


# ---- 预算 ----


@given(
    batch=st.integers(1, 4),
    budget=st.integers(100_000, 50_000_000),
    share=st.floats(0.01, 1.0),
)
@settings(max_examples=40)
def test_plans_fit_and_are_maximal(batch, budget, share):
    model = own()
    longest = largest_length(model, batch, budget)
    if longest == 0:
        with pytest.raises(MemoryBudgetError):
            plan_prefill(model, batch, 1, budget)
        return
    length = max(1, int(longest * share))
    chunk = plan_prefill(model, batch, length, budget)
    assert estimate_memory(model, batch, length, chunk_size=chunk).working_bytes <= budget
    if chunk < length:
        assert chunk % MIN_CHUNK == 0
        more = estimate_memory(model, batch, length, chunk_size=chunk + MIN_CHUNK)
        assert more.working_bytes > budget
    with pytest.raises(MemoryBudgetError) as caught:
        check_budget(model, batch, longest + 1, budget)
    assert caught.value.max_length == longest
    assert caught.value.required_bytes > caught.value.budget_bytes == budget


def test_error_names_the_largest_length():
    model = own()
    longest = largest_length(model, 2, "1MiB")
    with pytest.raises(MemoryBudgetError, match=f"每行最多 {longest} 词元"):
        check_budget(model, 2, 10 * longest, "1MiB")
    check_budget(model, 2, longest, "1MiB")
    assert largest_length(model, 1, "4GiB") > largest_length(model, 2, "4GiB") > 0
    int8 = OptimizationProfile(mla=MLAConfig(cache_dtype="int8"))
    assert largest_length(model, 2, "1MiB", profile=int8) > longest


def test_budget_in_the_profile_gives_the_chunk():
    settings_ = hf_config()
    need = estimate_memory(settings_, 1, 4096).working_bytes
    profile = OptimizationProfile(mla=MLAConfig(memory_budget_bytes=need // 2))
    estimate = estimate_memory(settings_, 1, 4096, profile=profile)
    assert estimate.chunk < 2048 and estimate.working_bytes <= need // 2
    roomy = OptimizationProfile(mla=MLAConfig(memory_budget_bytes=4 * need))
    assert estimate_memory(settings_, 1, 4096, profile=roomy).chunk == 2048
    assert estimate_memory(settings_, 1, 2048, profile=roomy).chunk == 2048
    assert estimate_memory(settings_, 64, 4096).chunk == MIN_CHUNK
    assert estimate_memory(own(), 1, 4096).chunk == 4096


# ---- 显示与错误 ----


def test_render_and_html():
    estimate = estimate_memory(own(), 1, 4096, chunk_size=512)
    text = str(estimate)
    assert "每块 512 词元" in text and "标准注意力（SDPA）" in text and "MiB" in text
    assert f"{estimate.saving('standard_eager'):.1%}" in text
    html = estimate._repr_html_()
    assert html.count("<tr>") == 6 and "标准注意力" in html
    assert "不分块" in estimate_memory(own(), 1, 16).render()
    assert estimate.total_bytes == estimate.weight_bytes + estimate.working_bytes


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda m: estimate_memory(nn.Linear(2, 2), 1, 8), UnsupportedError, "看不出 MLA"),
        (lambda m: estimate_memory(object(), 1, 8), UnsupportedError, "看不出 MLA"),
        (lambda m: estimate_memory(m, 0, 8), InputError, "batch"),
        (lambda m: estimate_memory(m, 1, True), InputError, "length"),
        (lambda m: estimate_memory(m, 1, 8, chunk_size=-1), InputError, "chunk_size"),
        (lambda m: estimate_memory(m, 1, 8, dtype=torch.int8), InputError, "dtype"),
        (lambda m: estimate_memory(m, 1, 8).against("x"), InputError, "standard_eager"),
        (lambda m: largest_length(m, 1, "2 大"), InputError, "budget"),
        (lambda m: largest_length(m, 1, -5), InputError, "budget"),
    ],
)
def test_bad_input(run, error, message):
    with pytest.raises(error, match=message):
        run(own())


def test_budget_text():
    assert (
        budget_bytes("1KiB") == 1024 and budget_bytes("2MB") == 2_000_000 and budget_bytes(7) == 7
    )
