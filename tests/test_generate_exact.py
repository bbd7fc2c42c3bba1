"""用 MTP 生成的结果与原版 transformers 逐个词元相同：各架构、批量、起草的个数、填充、贪心与采样。"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .generation_cases import EOS, both, generator_model, prompts

FAMILIES = ["deepseek_v3", "llama", "qwen2_sliding", "gpt2"]
OTHERS = ["deepseek_v2", "qwen3", "qwen3_moe", "mistral", "mixtral", "glm4_moe", "llama_tied"]
_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
GREEDY = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": EOS}
SAMPLED = {**GREEDY, "do_sample": True, "top_k": 20, "temperature": 0.9, "top_p": 0.95}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rows", [1, 2, 8, 32])
def test_every_draft_length(name, rows):
    model = generator_model(name)
    lengths = range(1, 9) if rows < 32 else (1, 4, 8)
    for length in lengths:
        plain, fast = both(model, prompts(rows, 9, rows), GREEDY, seed=length, draft_length=length)
        assert torch.equal(plain, fast), f"起草 {length} 个"


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=12, suppress_health_check=_SLOW)
def test_any_prompt(name, data):
    draw = data.draw
    model = generator_model(name, draw(st.sampled_from(["sdpa", "eager"])))
    inputs = prompts(draw(st.integers(1, 8)), draw(st.integers(1, 12)), draw(st.integers(0, 99)))
    options = {
        "max_new_tokens": draw(st.integers(1, 24)),
        "eos_token_id": draw(st.sampled_from([None, EOS, [EOS, 7, 9, 11]])),
        "pad_token_id": 0,
        "do_sample": draw(st.booleans()),
    }
    if options["do_sample"]:
        options |= {"top_k": draw(st.sampled_from([0, 5, 50])), "temperature": 0.8}
    else:
        options["repetition_penalty"] = draw(st.sampled_from([1.0, 1.3]))
    plain, fast = both(
        model,
        inputs,
        options,
        full=draw(st.booleans()),
        share=draw(st.sampled_from([0.0, 0.6, 0.9, 1.0])),
        seed=draw(st.integers(0, 999)),
        draft_length=draw(st.integers(1, 8)),
    )
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_other_families(name, options):
    plain, fast = both(generator_model(name), prompts(4, 9, 3), options, seed=3, draft_length=3)
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("threads", [1, 2])
def test_sampling_equals_transformers(name, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        plain, fast = both(generator_model(name), prompts(6, 9, 5), SAMPLED, seed=9, draft_length=4)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(plain, fast)


@pytest.mark.parametrize("name", FAMILIES)
def test_adaptive_is_exact_too(name):
    model = generator_model(name)
    for options in (GREEDY, SAMPLED):
        plain, fast = both(model, prompts(5, 9, 7), {**options, "max_new_tokens": 40}, seed=2)
        assert torch.equal(plain, fast)


def test_separate_layers():
    """各深度一个物理层：起草的个数不超过层数，结果照样相同。"""
    import deepseek_opt as dso

    from .mtp_models import make

    for name in ("llama", "deepseek_v3"):
        model = make(name)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0
        config = dso.MTPConfig(depth=3, shared_layers=False)
        dso.attach_mtp(model, config=config, fresh=True)
        for length in (1, 2, 3, 8):
            plain, fast = both(
                model, prompts(4, 6, 1), {**GREEDY, "eos_token_id": None}, draft_length=length
            )
            assert torch.equal(plain, fast)
            assert len(model.mtp.draft_statistics.acceptance) == min(length, 3)


def test_repeated_layer_after_separate_ones():
    """两个物理层、起草五个：后面的深度反复用最后一层。"""
    import deepseek_opt as dso

    from .mtp_models import make

    model = make("llama")
    model.generation_config.pad_token_id = 0
    source = dso.attach_mtp(
        make("llama"), config=dso.MTPConfig(depth=2, shared_layers=False), fresh=True
    )
    names = source.checkpoint_names()
    weights = {names[key]: value for key, value in source.state_dict().items()}
    model.config.num_nextn_predict_layers = 2
    predictor = dso.attach_mtp(model, weights)
    assert len(predictor.layers) == 2
    plain, fast = both(model, prompts(4, 6, 1), {**GREEDY, "eos_token_id": None}, draft_length=5)
    assert torch.equal(plain, fast)
    assert len(model.mtp.draft_statistics.acceptance) == 5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_layers_that_fall_back_see_the_ragged_rows(monkeypatch, implementation):
    """各行参差时，有的 MLA 层由原实现计算：掩码也要按各行的长度。"""
    from deepseek_opt.integrations.transformers import AttentionPatch

    model = generator_model("deepseek_v3", implementation)
    honest = AttentionPatch._refusal

    def refuse(self, hidden, kwargs):
        reason = honest(self, hidden, kwargs)
        return reason or ("试验" if getattr(self.module, "layer_idx", 0) == 1 else None)

    monkeypatch.setattr(AttentionPatch, "_refusal", refuse)
    monkeypatch.setattr(AttentionPatch, "steady_projections", lambda *_: None)
    plain, fast = both(model, prompts(6, 9, 2), GREEDY, draft_length=4)
    assert torch.equal(plain, fast)
