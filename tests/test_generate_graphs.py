"""一步录成 CUDA graph（CPU 上的替身）：重放的结果与逐个词元相同，留到下一次生成，换了参数、行数就重录。"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

import deepseek_opt as dso
from deepseek_opt import device_memory
from deepseek_opt.benchmarks import mtp_models
from deepseek_opt.errors import DeviceMemoryError
from deepseek_opt.generation import graphs
from deepseek_opt.generation.adaptive import DraftLength
from deepseek_opt.generation.plan import keep_length
from deepseek_opt.optimize import find_state

from .fake_graphs import Graph, install
from .faults import MESSAGE, failing_allocation
from .generation_cases import EOS, FULL, generator_model, prompts

pytestmark = pytest.mark.usefixtures("poisoned")
OPTIONS = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(name="model")
def _model(monkeypatch):
    """优化过的，每步固定起草 3 个；生成时录制。"""
    model = copy.deepcopy(generator_model("deepseek_v3"))
    config = dso.MTPConfig(draft_length=3, fixed_draft_length=True)
    dso.optimize(model, dso.OptimizationProfile(mtp=config, **FULL))
    install(monkeypatch)
    return model


def plain(model, inputs, **options):
    return model.generate(**inputs, **{**OPTIONS, **options}, use_mtp=False)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("eos", [None, EOS])
def test_replays_give_the_same_tokens(model, rows, eos):
    """各行接受的个数不同、先后结束；第二次生成接着用录好的。"""
    for seed in (1, 2):
        inputs = prompts(rows, 6, seed)
        before = Graph.replays
        out = model.generate(**inputs, **{**OPTIONS, "eos_token_id": eos})
        assert torch.equal(out, plain(model, inputs, eos_token_id=eos))
        if eos is None:
            assert Graph.replays - before >= 3
    kept = model.mtp.__dict__[graphs._KEPT]
    assert len(kept._recorded) >= 1 and not kept.failed


def test_accepted_drafts_are_replayed_too(monkeypatch):
    """随包的模型，草稿多半被接受，各行快慢不一。"""
    install(monkeypatch)
    original = mtp_models.original(torch.float32)
    config = dso.MTPConfig(draft_length=4, fixed_draft_length=True)
    fast = mtp_models.optimized(original, config)
    ids = mtp_models.prompts(3, 24)
    out = mtp_models.run(fast, ids, 40)
    assert torch.equal(out, mtp_models.run(original, ids, 40))
    found = fast.mtp.draft_statistics
    assert Graph.replays > 5 and found.num_accepted_tokens > 20


def test_adaptive_length_uses_several_graphs(model):
    """起草几个逐步换：不起草的步、补上落下的步、各种宽的窗口夹在一起。"""
    dso.switch(model, dso.OptimizationProfile(mtp=dso.MTPConfig(draft_length=4), **FULL))
    lengths = iter([0, 2, 2, 2, 0, 0, 0, 3, 3, 3, 3, 1, 1, 1, 2, 2, 2] * 20)

    class Given(DraftLength):
        def choose(self, *_):
            return next(lengths)

    inputs = prompts(3, 6, 5)
    given = Given(4)
    for _ in range(2):
        keep_length(model.mtp, given)
        out = model.generate(**inputs, **{**OPTIONS, "max_new_tokens": 40})
        assert torch.equal(out, plain(model, inputs, max_new_tokens=40))
    assert len(model.mtp.__dict__[graphs._KEPT]._recorded) >= 4


def test_growing_the_cache_records_again(model, monkeypatch):
    monkeypatch.setattr(graphs, "_GROW", 0)
    inputs = prompts(2, 6, 1)
    long = {"max_new_tokens": 150}
    assert torch.equal(
        model.generate(**inputs, **{**OPTIONS, **long}), plain(model, inputs, **long)
    )


def test_another_batch_or_new_weights_record_again(model):
    inputs = prompts(2, 6, 1)
    model.generate(**inputs, **OPTIONS)
    first = model.mtp.__dict__[graphs._KEPT]
    model.generate(**inputs, **OPTIONS)
    assert model.mtp.__dict__[graphs._KEPT] is first
    model.generate(**prompts(3, 6, 1), **OPTIONS)
    second = model.mtp.__dict__[graphs._KEPT]
    assert second is not first
    head = model.lm_head
    head.weight = torch.nn.Parameter(-head.weight.detach(), requires_grad=False)
    out = model.generate(**prompts(3, 6, 1), **OPTIONS)
    assert model.mtp.__dict__[graphs._KEPT] is not second
    assert torch.equal(out, plain(model, prompts(3, 6, 1)))


@pytest.mark.parametrize("name", ["lm_head", "model", "model.rotary_emb"])
def test_hooks_are_not_recorded(model, name):
    inputs, calls = prompts(2, 6, 1), []
    model.generate(**inputs, **OPTIONS)
    handle = model.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    before = Graph.replays
    out = model.generate(**inputs, **OPTIONS)
    assert calls and Graph.replays == before
    handle.remove()
    assert torch.equal(out, plain(model, inputs))
    model.generate(**inputs, **OPTIONS)
    assert Graph.replays > before


def test_a_replaced_part_is_noticed(model):
    """输出头换成了别的：MTP 还接在原来的上，交给 transformers。"""
    inputs = prompts(2, 6, 1)
    model.generate(**inputs, **OPTIONS)
    torch.manual_seed(3)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    out = model.generate(**inputs, **OPTIONS)
    assert torch.equal(out, plain(model, inputs))
    reasons = [reason for name, reason in find_state(model).report.fallbacks if name == "generate"]
    assert len(reasons) == 1 and "装上 MTP 之后被换掉了" in reasons[0]


def test_inference_mode_and_back(model):
    inputs = prompts(2, 6, 1)
    wanted = plain(model, inputs)
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            assert torch.equal(model.generate(**inputs, **OPTIONS), wanted)


def test_weights_changed_in_place_are_seen(model):
    inputs = prompts(2, 6, 1)
    model.generate(**inputs, **OPTIONS)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert torch.equal(model.generate(**inputs, **OPTIONS), plain(model, inputs))


def test_recording_that_fails_goes_on_without(model, monkeypatch, caplog):
    def broken(*_args, **_kwargs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", broken)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    inputs = prompts(3, 6, 2)
    with caplog.at_level("WARNING", logger="deepseek_opt"):
        out = model.generate(**inputs, **OPTIONS)
    assert torch.equal(out, plain(model, inputs)) and "录不成 CUDA graph" in caplog.text


def test_copies_and_returned_caches_do_not_share(model):
    inputs = prompts(1, 6, 1)
    del inputs["attention_mask"]
    model.generate(**inputs, **OPTIONS)
    assert copy.deepcopy(model.mtp).__dict__[graphs._KEPT] is None
    out = model.generate(**inputs, **OPTIONS, return_dict_in_generate=True)
    assert out.past_key_values is not None and graphs._KEPT not in model.mtp.__dict__


SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("eos", [None, EOS])
def test_sampled_replays_give_the_same_tokens(model, rows, eos):
    """随机数在录好的一步之外取：与逐个词元的采样相同，发生器也停在同一处。"""
    options = {**SAMPLED, "eos_token_id": eos}
    for seed in (1, 2):
        inputs = prompts(rows, 6, seed)
        before = Graph.replays
        torch.manual_seed(seed)
        out = model.generate(**inputs, **{**OPTIONS, **options})
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.equal(out, plain(model, inputs, **options))
        assert torch.equal(state, torch.get_rng_state())
        if eos is None:
            assert Graph.replays - before >= 3


def test_other_sampling_options_record_again(model):
    inputs = prompts(2, 6, 1)
    for options in (SAMPLED, {**SAMPLED, "temperature": 1.3}, {}):
        torch.manual_seed(1)
        out = model.generate(**inputs, **{**OPTIONS, **options})
        torch.manual_seed(1)
        assert torch.equal(out, plain(model, inputs, **options))
        assert len(model.mtp.__dict__[graphs._KEPT]._recorded) >= 1


def test_accepted_samples_are_replayed_too(monkeypatch):
    """随包的模型，温度低：草稿多半被接受，各行快慢不一，随机数各取各的。"""
    install(monkeypatch)
    original = mtp_models.original(torch.float32)
    config = dso.MTPConfig(draft_length=4, fixed_draft_length=True)
    fast = mtp_models.optimized(original, config)
    ids = mtp_models.prompts(3, 24)
    options = {"do_sample": True, "temperature": 0.5, "max_new_tokens": 40, "pad_token_id": 0}
    torch.manual_seed(3)
    out = fast.generate(ids, **options, eos_token_id=None)
    torch.manual_seed(3)
    assert torch.equal(out, original.generate(ids, **options, eos_token_id=None))
    assert Graph.replays > 5 and fast.mtp.draft_statistics.num_accepted_tokens > 20


def test_processors_are_not_recorded(model):
    inputs = prompts(2, 6, 1)
    for options in ({"repetition_penalty": 1.2}, {"do_sample": True, "repetition_penalty": 1.2}):
        before = Graph.replays
        torch.manual_seed(1)
        out = model.generate(**inputs, **{**OPTIONS, **options})
        torch.manual_seed(1)
        assert torch.equal(out, plain(model, inputs, **options)) and Graph.replays == before


def test_out_of_memory_lets_go_of_what_is_kept(model):
    """内存不足（哪一次前向、哪一次生成都算）：留着的放掉；之后照常，重新录。"""
    inputs = prompts(2, 6, 1)
    wanted = plain(model, inputs)
    other = copy.deepcopy(model)
    for failing in (other.model, other, model.model):  # 别的模型的也算
        model.generate(**inputs, **OPTIONS)
        assert graphs._KEPT in model.mtp.__dict__
        with failing_allocation(1), pytest.raises(DeviceMemoryError), torch.no_grad():
            failing(inputs["input_ids"][:, :1])
        assert graphs._KEPT not in model.mtp.__dict__
    assert torch.equal(model.generate(**inputs, **OPTIONS), wanted)


@pytest.mark.parametrize("ours", [True, False])
def test_out_of_memory_in_a_generation(model, monkeypatch, ours):
    """录好之后的一步放不下：一句中文，什么都不留着；再生成一次结果不变。"""
    inputs = prompts(2, 6, 1)
    wanted = model.generate(**inputs, **OPTIONS)
    kept = weakref.ref(model.mtp.__dict__[graphs._KEPT])

    def fail(*_args):
        if ours:
            raise device_memory.out_of_memory("算子", torch.device("cpu"), RuntimeError())
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr(Graph, "replay", fail)
    with pytest.raises(DeviceMemoryError, match="算子" if ours else r"生成，词元 \[2, \d+\]"):
        model.generate(**inputs, **OPTIONS)
    monkeypatch.undo()
    gc.collect()
    assert graphs._KEPT not in model.mtp.__dict__ and kept() is None
    install(monkeypatch)
    assert torch.equal(model.generate(**inputs, **OPTIONS), wanted)
