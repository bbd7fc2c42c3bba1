"""采样的分布：用 MTP 得到的前三个词元的联合分布与模型自己的相同（卡方检验）；有意做偏的核对通不过。"""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import deepseek_opt as dso
from deepseek_opt.generation import choose

VOCABULARY, NEW, SAMPLES = 6, 3, 4000
OPTIONS = {"do_sample": True, "temperature": 1.3, "top_k": 5, "max_new_tokens": NEW}
LIMIT = 1e-4


@pytest.fixture(name="model", scope="module")
def _model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=2, **sizes)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    dso.attach_mtp(model, config=dso.MTPConfig(depth=2), fresh=True)
    return model


def exact(model, prompt) -> torch.Tensor:
    """前三个词元的联合概率 [V, V, V]。"""
    every = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * NEW)
    ids = torch.cat((prompt.expand(len(every), -1), every), 1)
    with torch.no_grad():
        logits = model(ids).logits[:, prompt.shape[1] - 1 : -1].double() / OPTIONS["temperature"]
    worst = logits.topk(OPTIONS["top_k"]).values[..., -1:]
    probs = logits.masked_fill(logits < worst, -math.inf).softmax(-1)
    return probs.gather(2, every[..., None])[..., 0].prod(1).view([VOCABULARY] * NEW)


def p_value(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """卡方检验；期望不到 5 的格并成一格。"""
    expected = probs.flatten() * counts.sum()
    small = expected < 5
    pairs = [(counts.flatten()[~small], expected[~small])]
    if expected[small].sum() > 0:
        pairs.append((counts.flatten()[small].sum()[None], expected[small].sum()[None]))
    statistic = sum(float(((c - e) ** 2 / e).sum()) for c, e in pairs)
    freedom = sum(len(e) for _, e in pairs) - 1
    # Wilson–Hilferty 近似
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def sampled(model, seed: int) -> torch.Tensor:
    """SAMPLES 次采样的前三个词元的频数 [V, V, V]。"""
    torch.manual_seed(seed)
    prompt = torch.tensor([[1, 2, 3]])
    config = dso.MTPConfig(draft_length=2, fixed_draft_length=True)
    with dso.optimized(model, dso.OptimizationProfile(mtp=config)):
        model.mtp.draft_statistics.reset()
        out = model.generate(prompt.expand(SAMPLES // 2, -1), num_return_sequences=2, **OPTIONS)
        assert model.mtp.draft_statistics.num_accepted_tokens > SAMPLES // 20  # 确有草稿被接受
    place = (out[:, -NEW:] * torch.tensor([VOCABULARY**2, VOCABULARY, 1])).sum(1)
    return torch.bincount(place, minlength=VOCABULARY**NEW).view([VOCABULARY] * NEW).double()


@pytest.mark.parametrize("seed", range(3))
def test_joint_distribution_is_the_models_own(model, seed):
    probs = exact(model, torch.tensor([[1, 2, 3]]))
    assert float(probs.sum()) == pytest.approx(1)
    assert p_value(sampled(model, seed), probs) > LIMIT


def test_a_biased_verifier_fails(model, monkeypatch):
    """每五个不该接受的草稿放过一个，检验就要发现。"""
    honest = choose._verified

    def biased(scores, races, drafts):
        if drafts.shape[1]:
            lucky = torch.rand(drafts.shape) < 0.2
            races = races.clone()
            top = races[:, :-1].amax(-1, keepdim=True) + 1
            extra = torch.where(lucky[..., None], top, races[:, :-1].gather(2, drafts[..., None]))
            races[:, :-1].scatter_(2, drafts[..., None], extra)
        return honest(scores, races, drafts)

    monkeypatch.setattr(choose, "_verified", biased)
    probs = exact(model, torch.tensor([[1, 2, 3]]))
    assert p_value(sampled(model, 0), probs) < LIMIT


def test_same_seed_same_text_whatever_the_threads_and_the_draft_length(model):
    prompt = torch.tensor([[1, 2, 3]] * 4)
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        for length in (1, 2, 5):
            torch.set_num_threads(threads)
            config = dso.MTPConfig(draft_length=length, fixed_draft_length=True)
            with dso.optimized(model, dso.OptimizationProfile(mtp=config)):
                torch.manual_seed(7)
                found.append(model.generate(prompt, **{**OPTIONS, "max_new_tokens": 20}))
    torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.parametrize("rule", ["lossy_typical", "lossy_relaxed"])
def test_lossy_rules_accept_more_and_say_so(model, rule):
    prompt = torch.tensor([[1, 2, 3]] * 8)
    steps, texts = [], []
    for config in (
        {},
        {"acceptance": rule, "acceptance_threshold": 0.001},
        {"acceptance": rule, "acceptance_threshold": 1.0},
    ):
        config = dso.MTPConfig(draft_length=3, fixed_draft_length=True, **config)
        with dso.optimized(model, dso.OptimizationProfile(mtp=config)):
            model.mtp.draft_statistics.reset()
            texts.append(model.generate(prompt, do_sample=False, max_new_tokens=24))
            steps.append(model.mtp.draft_statistics.tokens_per_step)
    assert steps[1] > steps[0]
    if rule == "lossy_relaxed":  # 阈值 1：只放行概率最大的，与贪心相同
        assert torch.equal(texts[0], texts[2]) and steps[2] == steps[0]
