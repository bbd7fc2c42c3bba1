"""model.generate 的各种参数：用 MTP 时与原版 transformers 相同；不能用的走原来的路，报告写明原因。"""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteriaList

import deepseek_opt as dso
from deepseek_opt.demo import data

from .generation_cases import EOS, Kept, both, generator_model, optimized, oracle, prompts
from .tolerances import tol

BASE = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": EOS, "pad_token_id": 0}
LENGTHS = {"draft_length": 3}


@pytest.fixture(name="model", params=["llama", "deepseek_v3"])
def _model(request):
    return generator_model(request.param)


def same(model, options, inputs=None, **config):
    inputs = prompts(4, 7, 11) if inputs is None else inputs
    plain, fast = both(model, inputs, {**BASE, **options}, **{**LENGTHS, **config})
    assert torch.equal(plain, fast)
    return fast


@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 9},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7], [8, 9]]},
        {"repetition_penalty": 1.4, "do_sample": True, "temperature": 0.7},
        {"do_sample": True, "top_k": 8, "typical_p": 0.9, "min_p": 0.02},
        {"do_sample": True, "top_p": 0.8, "epsilon_cutoff": 1e-3, "renormalize_logits": True},
        {"forced_eos_token_id": EOS},
        {"exponential_decay_length_penalty": (4, 1.2)},
        {"eos_token_id": None},
        {"max_time": 100.0},
        {"sequence_bias": [[[10], 3.0], [[11, 12], -2.0]]},
        {"suppress_tokens": [13, 14], "begin_suppress_tokens": [15]},
        {"max_new_tokens": 1},
    ],
    ids="-".join,
)
def test_same_options(model, options):
    same(model, options)


def test_num_return_sequences(model):
    out = same(model, {"do_sample": True, "num_return_sequences": 3, "top_k": 0})
    assert len(out) == 12


@pytest.mark.parametrize("sample", [False, True])
def test_returned_scores_and_logits(model, sample):
    options = {
        **BASE,
        "do_sample": sample,
        "top_k": 12,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    plain, fast = both(model, prompts(4, 7, 2), options, **LENGTHS)
    assert torch.equal(plain.sequences, fast.sequences)
    assert type(plain) is type(fast)
    new = fast.sequences[:, 7:]
    ended = ((new == EOS).cumsum(1) - (new == EOS).long()) > 0
    for name in ("scores", "logits"):
        wanted, got = (torch.stack(getattr(out, name), 1) for out in (plain, fast))
        assert got.shape == wanted.shape
        torch.testing.assert_close(got[~ended], wanted[~ended].float(), **tol(torch.float32))
        assert bool((got[ended].argmax(-1) == 0).all())  # 结束之后一定是 pad


def test_streamer_gets_each_column_once(model):
    for rows, sample in ((1, False), (3, False), (3, True)):
        inputs = prompts(rows, 6, rows)
        plain, fast = Kept(), Kept()
        options = {**BASE, "do_sample": sample}
        torch.manual_seed(0)
        truth = model.generate(**inputs, **options, streamer=plain)
        with optimized(model, **LENGTHS), oracle(truth[:, 6:], 0.8):
            torch.manual_seed(0)
            model.generate(**inputs, **options, streamer=fast)
        assert fast.values == plain.values
        assert fast.ended == plain.ended == 1


class RowProcessor:
    """各行、各长度不同的处理：认行号，也看已有的词元。"""

    def __call__(self, input_ids, scores):
        rows = torch.arange(len(scores))
        scores = scores.clone()
        scores[rows, (rows * 3 + input_ids[:, -1] + input_ids.shape[1]) % scores.shape[1]] += 9.0
        return scores


def test_custom_logits_processor(model):
    from transformers import LogitsProcessorList

    for sample in (False, True):
        same(
            model, {"logits_processor": LogitsProcessorList([RowProcessor()]), "do_sample": sample}
        )


def test_prefix_allowed_tokens(model):
    def allowed(row, ids):
        return [6 + row, 20 + int(ids[-1]) % 30, EOS]

    same(model, {"prefix_allowed_tokens_fn": allowed})


def _stops_on(residue):
    def stop(input_ids, _scores, **_):
        return (input_ids[:, -1] % 7 == residue) & (input_ids.shape[1] > 9)

    return StoppingCriteriaList([stop])


@pytest.mark.parametrize("eos", [None, EOS])
def test_custom_stopping_criteria(model, eos):
    for residue in range(3):
        same(model, {"stopping_criteria": _stops_on(residue), "eos_token_id": eos})


def test_stopping_criteria_see_scores(model):
    seen = []

    def stop(input_ids, scores, **_):
        seen.append((input_ids.shape[1], len(scores)))
        return torch.zeros(len(input_ids), dtype=torch.bool)

    options = {**BASE, "eos_token_id": None, "stopping_criteria": StoppingCriteriaList([stop])}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    with optimized(model, **LENGTHS):
        model.generate(**prompts(3, 7, 1), **options)
    assert {length - count for length, count in seen} == {7}
    assert {count for _, count in seen} == set(range(1, 17))


def test_stop_strings():
    model = data.load_model(data.MODEL_FOLDER, torch.float32)
    tokenizer = data.load_tokenizer(data.MODEL_FOLDER)
    inputs = tokenizer(
        ["def f(self):\n", "import os\nimport sys\n"], return_tensors="pt", padding=True
    )
    inputs = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    dso.attach_mtp(model, config=dso.MTPConfig(depth=2), fresh=True)
    options = {"max_new_tokens": 30, "do_sample": False, "tokenizer": tokenizer}
    for strings in (["return"], [" ", "\n"], ["self", "import"]):
        plain, fast = both(model, inputs, {**options, "stop_strings": strings}, draft_length=4)
        assert torch.equal(plain, fast)
    with optimized(model, draft_length=2), pytest.raises(ValueError, match="tokenizer"):
        model.generate(**inputs, max_new_tokens=4, stop_strings=["a"])


def test_returned_cache_can_be_continued(model):
    ids = prompts(1, 6, 4)["input_ids"]
    options = {**BASE, "eos_token_id": None, "return_dict_in_generate": True}
    plain = model.generate(ids, **options)
    with optimized(model, **LENGTHS):
        first = model.generate(ids, **{**options, "max_new_tokens": 7})
        assert first.past_key_values.get_seq_length() == 12
        longer = model.generate(
            first.sequences,
            past_key_values=first.past_key_values,
            **{**options, "max_new_tokens": 9},
        )
        several = model.generate(**prompts(3, 6, 4), **options)
    assert torch.equal(longer.sequences, plain.sequences)
    assert several.past_key_values is None


def test_inputs_are_not_changed(model):
    inputs = prompts(3, 7, 8)
    kept = {name: value.clone() for name, value in inputs.items()}
    same(model, {}, inputs)
    assert all(torch.equal(inputs[name], kept[name]) for name in kept)


def test_generation_config_object_and_defaults(model):
    config = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = model.generate(**prompts(2, 5, 3), generation_config=config)
    with optimized(model) as report:
        fast = model.generate(**prompts(2, 5, 3), generation_config=config)
        assert not report.fallbacks
    assert torch.equal(plain, fast)


def test_use_mtp_argument(model):
    """use_mtp=True 由本库的 MTP 做（transformers 自己的只支持一行）；False 就是不用，不算退回。"""
    inputs, options = prompts(2, 5, 3), {**BASE, "eos_token_id": None}
    with optimized(model, **LENGTHS) as report:
        on = model.generate(**inputs, **options, use_mtp=True)
        steps = model.mtp.draft_statistics.steps
        off = model.generate(**inputs, **options, use_mtp=False)
        assert torch.equal(on, off) and steps == model.mtp.draft_statistics.steps > 0
        config = GenerationConfig(use_mtp=True, **options)
        assert torch.equal(model.generate(**inputs, generation_config=config), on)
        assert not report.fallbacks
        assert config.use_mtp is True


REFUSED = [
    ({"num_beams": 2}, "束搜索"),
    ({"return_dict_in_generate": True, "output_hidden_states": True}, "hidden_states"),
    ({"use_cache": False}, "use_cache=False"),
    ({"past_key_values": "fresh"}, "past_key_values"),
    ({"cache_implementation": "static"}, "cache_implementation"),
    ({"prompt_lookup_num_tokens": 2}, "辅助解码"),
    ({"prefill_chunk_size": 4}, "prefill_chunk_size"),
    ({"custom_generate": "callable"}, "custom_generate"),
    ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidance"),
]


@pytest.mark.parametrize("options, reason", REFUSED, ids=[reason for _, reason in REFUSED])
def test_ordinary_path_and_its_reason(options, reason):
    model = generator_model("llama")
    inputs = {"input_ids": prompts(1, 6, 5)["input_ids"]}
    options = {**BASE, **options}

    def filled():
        given = dict(options)
        if given.get("past_key_values") == "fresh":
            given["past_key_values"] = DynamicCache()
        if given.get("custom_generate") == "callable":
            given["custom_generate"] = lambda model, input_ids, **_: input_ids
        return given

    plain = model.generate(**inputs, **filled())
    with optimized(model, full=False, **LENGTHS) as report:
        fast = model.generate(**inputs, **filled())
        reasons = [why for (name, why), count in report.fallbacks.items() if name == "generate"]
        assert len(reasons) == 1 and reason in reasons[0], report.fallbacks
        assert reason in str(report)
    first, second = (x if isinstance(x, torch.Tensor) else x.sequences for x in (plain, fast))
    assert torch.equal(first, second)


def test_hooks_and_embeddings_go_the_ordinary_path(model):
    ids = prompts(1, 6, 5)["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    with optimized(model, **LENGTHS) as report:
        out = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **BASE)
        assert any("inputs_embeds" in why for _, why in report.fallbacks)
        calls = []
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        try:
            model.generate(ids, **BASE)
        finally:
            handle.remove()
        assert calls and any("钩子" in why for _, why in report.fallbacks)
    assert out.shape[1] <= 16


def test_dropout_in_train_mode_goes_the_ordinary_path():
    model = copy.deepcopy(generator_model("gpt2")).train()
    with optimized(model, full=False, **LENGTHS) as report:
        model.generate(prompts(1, 6, 5)["input_ids"], **BASE)
        assert any("dropout" in why for _, why in report.fallbacks)
