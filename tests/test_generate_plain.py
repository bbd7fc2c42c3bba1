"""没有用 MTP 的模型在 CUDA 上的 generate（录制用 CPU 上的替身）：与 transformers 逐个词元相同，录不了的照常。"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import deepseek_opt as dso
from deepseek_opt.errors import ConfigError
from deepseek_opt.generation import graphs, loop
from deepseek_opt.generation.hf_plain import PlainGeneratePatch

from .fake_graphs import Graph, install
from .generation_cases import EOS, FULL, Kept, prompts
from .mtp_models import make

pytestmark = pytest.mark.usefixtures("poisoned")
OPTIONS = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9}


def optimized(model: nn.Module, **parts) -> nn.Module:
    """优化过的副本。"""
    fast = copy.deepcopy(model)
    dso.optimize(fast, dso.OptimizationProfile(**(parts or FULL)))
    return fast


def dense_model(**sizes) -> nn.Module:
    """各层都是稠密 FFN 的 DeepSeek-V3。"""
    config = copy.deepcopy(make("deepseek_v3").config)
    config.first_k_dense_replace = config.num_hidden_layers
    for name, value in sizes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = type(make("deepseek_v3"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model


@pytest.fixture(name="model", scope="module")
def _model() -> nn.Module:
    model = make("deepseek_v3")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@pytest.fixture(name="fast")
def _fast(model, monkeypatch) -> nn.Module:
    install(monkeypatch)
    return optimized(model)


def both(model, fast, inputs, seed=1, **options):
    """(原来的结果, 优化过的结果, 重放了几次)；随机数发生器两边停在同一处。"""
    found, states = [], []
    before = Graph.replays
    for one in (model, fast):
        torch.manual_seed(seed)
        found.append(one.generate(**inputs, **{**OPTIONS, **options}))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    return found[0], found[1], Graph.replays - before


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("eos", [None, EOS], ids=["full", "eos"])
@pytest.mark.parametrize("rows", [1, 4])
def test_same_tokens_as_transformers(model, fast, rows, eos, options):
    """左填充、先后结束；第二次生成接着用录好的。"""
    for seed in (1, 2):
        inputs = prompts(rows, 6, seed)
        plain, out, replays = both(model, fast, inputs, seed, **options, eos_token_id=eos)
        assert torch.equal(plain, out)
        assert replays >= (20 if eos is None else 0)
    kept = fast.__dict__["generate"].predictor.__dict__[graphs._KEPT]
    assert list(kept._recorded) == [(0, 0)] and not kept.failed
    assert not dso.metrics(fast).spec_decode_num_drafts


def test_some_end_early_and_the_rest_go_on(model, fast):
    """各行在不同的时候结束：开头、中间、最后，包括读回之前下一步已经启动的。"""
    inputs = prompts(4, 6, 3)
    full, _, _ = both(model, fast, inputs)
    for row, place in enumerate((0, 3, 9, 23)):
        eos = int(full[row, 6 + place])
        for options in ({}, SAMPLED):
            plain, out, _ = both(model, fast, inputs, eos_token_id=eos, **options)
            assert torch.equal(plain, out), eos
    plain, out, _ = both(model, fast, inputs, eos_token_id=full[:, 10].tolist())
    assert torch.equal(plain, out)


def test_the_next_step_starts_before_this_one_is_read(model, fast, monkeypatch):
    """录好之后：启动第 n + 1 步在先，读回第 n 步在后；最后一步之后不再启动。"""
    events = []
    launch, finish = loop.Loop._launch, loop.Loop._finish
    monkeypatch.setattr(
        loop.Loop, "_launch", lambda self, ahead=0: events.append(ahead) or launch(self, ahead)
    )
    monkeypatch.setattr(
        loop.Loop, "_finish", lambda self, one: events.append("read") or finish(self, one)
    )
    both(model, fast, prompts(2, 6, 1))
    steps = OPTIONS["max_new_tokens"] - 1
    assert events.count("read") == steps and events[:4] == [0, "read", 0, 1]
    assert sum(isinstance(e, int) for e in events) == steps


def test_growing_the_cache_records_again(model, fast, monkeypatch):
    monkeypatch.setattr(graphs, "_GROW", 0)
    plain, out, replays = both(model, fast, prompts(2, 6, 1), max_new_tokens=90)
    assert torch.equal(plain, out) and replays > 70


def test_up_to_the_limit_of_the_cache(model, monkeypatch):
    """缓存的上限就是生成的长度：最后几步放不下“随便哪一种步”，不录，也不多写。"""
    install(monkeypatch)
    fast = optimized(model, **{**FULL, "mla": dso.MLAConfig(max_cache_length=29)})
    plain, out, replays = both(model, fast, prompts(2, 6, 1))
    assert torch.equal(plain, out) and replays > 5


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantized_caches(model, monkeypatch, dtype):
    """与同样量化、不录的相同。"""
    install(monkeypatch)
    fast, slow = (
        optimized(model, **{**FULL, "mla": dso.MLAConfig(cache_dtype=dtype, cuda_graphs=on)})
        for on in (True, False)
    )
    plain, out, replays = both(slow, fast, prompts(3, 6, 1))
    assert torch.equal(plain, out) and 20 <= replays <= 23


def test_quantized_experts_are_recorded_too(model, monkeypatch):
    install(monkeypatch)
    fast, slow = (
        optimized(
            model,
            mla=dso.MLAConfig(cuda_graphs=on),
            moe=dso.MOEConfig(quantization="int8"),
            dense=dso.DenseConfig(),
        )
        for on in (True, False)
    )
    plain, out, replays = both(slow, fast, prompts(3, 6, 1))
    assert torch.equal(plain, out) and replays >= 20


@pytest.mark.parametrize("parts", [{"mla": dso.MLAConfig()}, FULL], ids=["mla", "full"])
def test_dense_models_without_the_dense_part(monkeypatch, parts):
    """只换注意力：FFN 还是 transformers 的，照样录。"""
    install(monkeypatch)
    model = dense_model()
    plain, out, replays = both(model, optimized(model, **parts), prompts(2, 6, 1))
    assert torch.equal(plain, out) and replays >= 20


# ---- 录不了的照常由 transformers 生成 ----


def test_original_experts_are_not_recorded(model, monkeypatch):
    install(monkeypatch)
    plain, out, replays = both(model, optimized(model, mla=dso.MLAConfig()), prompts(2, 6, 1))
    assert torch.equal(plain, out) and not replays


@pytest.mark.parametrize(
    "options",
    [{"repetition_penalty": 1.2}, {**SAMPLED, "repetition_penalty": 1.2}, {"num_beams": 2}],
)
def test_what_looks_at_tokens_is_not_recorded(model, fast, options, caplog):
    with caplog.at_level("INFO", logger="deepseek_opt"):
        plain, out, replays = both(model, fast, prompts(2, 6, 1), **options)
    assert torch.equal(plain, out) and not replays
    assert "没有录成 CUDA graph" in caplog.text


def test_scores_and_caches_of_several_rows_come_from_transformers(model, fast):
    """要返回的与原来一样齐全。"""
    inputs = prompts(2, 6, 1)
    for extra in ({}, {"output_scores": True, "output_logits": True}):
        options = {**extra, "return_dict_in_generate": True}
        plain, out, replays = both(model, fast, inputs, **options)
        assert torch.equal(plain.sequences, out.sequences) and not replays
        assert out.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
        assert (out.scores is None) == (plain.scores is None)


def test_the_cache_of_one_row_can_be_continued(model, fast):
    """多轮对话：上一轮返回的缓存接着用。"""
    ids = torch.randint(6, 90, (1, 7), generator=torch.Generator().manual_seed(0))
    found = []
    for one in (model, fast):
        first = one.generate(ids, **OPTIONS, return_dict_in_generate=True)
        more = torch.cat((first.sequences, ids[:, :3]), 1)
        found.append(one.generate(more, **OPTIONS, past_key_values=first.past_key_values))
    assert torch.equal(*found) and Graph.replays >= 20
    assert first.past_key_values.get_seq_length() == more.shape[1] + OPTIONS["max_new_tokens"] - 1


def test_switched_off_and_on(model, monkeypatch):
    install(monkeypatch)
    mla = dso.MLAConfig()
    fast = optimized(model, **{**FULL, "mla": mla})
    inputs = prompts(2, 6, 1)
    mla.cuda_graphs = False
    plain, out, replays = both(model, fast, inputs)
    assert torch.equal(plain, out) and not replays
    mla.cuda_graphs = True
    assert both(model, fast, inputs)[2] >= 20
    with pytest.raises(ConfigError):
        mla.cuda_graphs = "也许"


def test_mtp_is_not_recorded_when_switched_off(monkeypatch):
    from .generation_cases import generator_model

    install(monkeypatch)
    model = copy.deepcopy(generator_model("deepseek_v3"))
    mtp = dso.MTPConfig(draft_length=3, fixed_draft_length=True)
    parts = {**FULL, "mla": dso.MLAConfig(cuda_graphs=False)}
    dso.optimize(model, dso.OptimizationProfile(mtp=mtp, **parts))
    model.generate(**prompts(2, 6, 1), **OPTIONS)
    assert model.mtp.draft_statistics.steps and not Graph.replays


@pytest.mark.parametrize(
    "name", ["lm_head", "model", "model.rotary_emb", "model.norm", "model.layers.0", "所有的"]
)
def test_hooks_still_run(model, fast, name):
    """钩子次次都触发；取下之后又能录，录下的里没有它。"""
    inputs, calls = prompts(2, 6, 1), []
    both(model, fast, inputs)
    if name == "所有的":
        handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    else:
        handle = fast.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    fast.generate(**inputs, **OPTIONS)
    assert len(calls) >= OPTIONS["max_new_tokens"]
    handle.remove()
    plain, out, replays = both(model, fast, inputs)
    assert torch.equal(plain, out) and replays >= 20


def _new_head(model):
    model.lm_head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)


def _new_embedding(model):
    model.set_input_embeddings(nn.Embedding(model.config.vocab_size, model.config.hidden_size))


def _new_norm(model):
    model.model.norm = copy.deepcopy(model.model.norm)
    model.model.norm.weight.data.mul_(torch.linspace(0.5, 2, model.config.hidden_size))


def _one_expert(model):
    model.model.layers[-1].mlp.gate.top_k = 1


def _slower_angles(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)


def _other_scaling(model):
    model.model.layers[0].self_attn.scaling *= 0.5


@pytest.mark.parametrize(
    "change",
    [_new_head, _new_embedding, _new_norm, _one_expert, _slower_angles, _other_scaling],
)
def test_changes_between_generations_are_seen(model, fast, change):
    inputs = prompts(2, 6, 1)
    before, _, _ = both(model, fast, inputs)
    changed = copy.deepcopy(model)
    for one in (changed, fast):
        torch.manual_seed(5)
        change(one)
    plain, out, replays = both(changed, fast, inputs)
    assert torch.equal(plain, out) and not torch.equal(plain, before) and replays >= 20


def test_switching_and_restoring_let_go(model, fast):
    """换了配置就是另一组补丁与计数：录好的不能接着用，缓存也不留着。"""
    inputs = prompts(2, 6, 1)
    both(model, fast, inputs)
    predictor = fast.__dict__["generate"].predictor
    assert graphs._KEPT in predictor.__dict__
    mla = dso.MLAConfig()
    dso.switch(fast, dso.OptimizationProfile(**{**FULL, "mla": mla}))
    assert graphs._KEPT not in predictor.__dict__
    plain, out, replays = both(model, fast, inputs)
    assert torch.equal(plain, out) and replays >= 20
    predictor = fast.__dict__["generate"].predictor
    mla.cuda_graphs = False
    fast.generate(**inputs, **OPTIONS)
    assert graphs._KEPT not in predictor.__dict__


def test_counters_moved_to_another_device_are_recorded_again(model, fast):
    from deepseek_opt.load import load_holders

    inputs = prompts(2, 6, 1)
    both(model, fast, inputs)
    counter = next(h for m in fast.modules() for h in load_holders(m)).load_counter
    counter._table = counter._table.clone()
    counter._total = counter._table[0]
    before = counter.snapshot().sum()
    both(model, fast, inputs)
    assert counter.snapshot().sum() - before >= 2 * 2 * (OPTIONS["max_new_tokens"] - 1)


def test_one_failed_recording_is_tried_again(model, fast, monkeypatch):
    inputs = prompts(2, 6, 1)
    with monkeypatch.context() as patch:

        def broken(*_args, **_kwargs):
            raise RuntimeError("out of memory")

        patch.setattr(torch.cuda, "graph", broken)
        patch.setattr(torch.cuda, "set_stream", lambda *_: None)
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        plain, out, replays = both(model, fast, inputs)
        assert torch.equal(plain, out) and not replays
    plain, out, replays = both(model, fast, inputs)
    assert torch.equal(plain, out) and replays >= 20


def test_right_padding_and_short_answers_are_left_to_transformers(model, fast):
    inputs = prompts(2, 6, 1)
    right = {k: v.flip(1) for k, v in inputs.items()}
    plain, out, replays = both(model, fast, right)
    assert torch.equal(plain, out) and not replays
    plain, out, replays = both(model, fast, inputs, max_new_tokens=5)
    assert torch.equal(plain, out) and not replays


def test_models_the_loop_does_not_know(monkeypatch):
    """输出头之前另有缩放的：核对不过，照常生成。"""
    install(monkeypatch)

    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (2.0 if x.shape[1] > 1 else 1.0)

    model = dense_model()
    head = Scaled(model.config.hidden_size, model.config.vocab_size, bias=False)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head
    fast = optimized(model, mla=dso.MLAConfig())
    plain, out, _ = both(model, fast, prompts(2, 6, 1))
    assert torch.equal(plain, out)


# ---- 与别的一起 ----


def test_streamer_and_stopping_criteria(model, fast):
    from transformers import StoppingCriteria, StoppingCriteriaList

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 17, dtype=torch.bool)

    inputs, kept = prompts(1, 6, 1), [Kept(), Kept()]
    found = []
    for one, streamer in zip((model, fast), kept, strict=True):
        criteria = StoppingCriteriaList([After()])
        out = one.generate(**inputs, **OPTIONS, streamer=streamer, stopping_criteria=criteria)
        found.append(out)
    assert torch.equal(*found) and found[0].shape[1] == 17
    assert kept[0].values == kept[1].values and kept[1].ended == 1 and Graph.replays


def test_metrics_count_only_the_users_calls(model, fast):
    both(model, fast, prompts(2, 6, 1))
    found = dso.metrics(fast)
    assert found.prefill_calls == 1 and found.decode_calls == OPTIONS["max_new_tokens"] - 1


def test_probing_does_not_count_experts(model, monkeypatch):
    """核对接口用的几个词元不进专家的负载。"""
    from deepseek_opt.load import load_holders

    def counts(one):
        held = (h for module in one.modules() for h in load_holders(module))
        return sum(int(holder.load_counter.snapshot().sum()) for holder in held)

    ids = torch.randint(6, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    slow = optimized(model)
    slow.generate(ids, **OPTIONS)
    install(monkeypatch)
    fast = optimized(model)
    fast.generate(ids, **OPTIONS)
    assert Graph.replays and counts(slow) > 0
    # 替身录制时真的算了一遍：多一步的 2 个
    assert counts(fast) - counts(slow) in (0, 2)


def test_copies_restore_and_cpu(model, fast, monkeypatch):
    inputs = prompts(2, 6, 1)
    plain, out, _ = both(model, fast, inputs)
    twin = copy.deepcopy(fast)
    assert twin.__dict__["generate"].predictor is None
    assert torch.equal(twin.generate(**inputs, **OPTIONS), plain)
    dso.restore(fast)
    assert "generate" not in fast.__dict__
    monkeypatch.undo()  # 真的 CPU：调用原来的 generate，什么都不建立
    patch = twin.__dict__["generate"]
    assert isinstance(patch, PlainGeneratePatch)
    patch.predictor = None
    assert torch.equal(twin.generate(**inputs, **OPTIONS), out) and patch.predictor is None


def test_several_threads(model, fast):
    """各线程各录各的，结果都对。"""
    wanted = [model.generate(**prompts(2, 6, seed), **OPTIONS) for seed in range(4)]
    found: dict[int, torch.Tensor] = {}

    def work(seed):
        found[seed] = fast.generate(**prompts(2, 6, seed), **OPTIONS)

    # 替身的录制记下本线程的算子，各线程不相干
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], wanted[seed]) for seed in range(4))


def test_weights_changed_in_place_are_seen(model, fast):
    inputs = prompts(2, 6, 1)
    both(model, fast, inputs)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for one in (changed, fast):
            one.lm_head.weight.neg_()
    plain, out, replays = both(changed, fast, inputs)
    assert torch.equal(plain, out) and replays >= 20


@pytest.mark.parametrize("first", [True, False])
def test_inference_mode_and_back(model, fast, first):
    """推理模式里的张量出了它不能原地改：各录各的。"""
    inputs = prompts(2, 6, 1)
    wanted = model.generate(**inputs, **OPTIONS)
    for mode in (first, not first, first):
        with torch.inference_mode(mode):
            assert torch.equal(fast.generate(**inputs, **OPTIONS), wanted)


def test_autocast_is_left_to_transformers(model, fast):
    inputs = prompts(2, 6, 1)
    both(model, fast, inputs)
    before = Graph.replays
    with torch.autocast("cpu", torch.bfloat16):
        fast.generate(**inputs, **OPTIONS)
    assert Graph.replays == before
    assert both(model, fast, inputs)[2] >= 20


def test_nan_is_reported_with_its_row(fast):
    inputs = prompts(2, 6, 1)
    fast.generate(**inputs, **OPTIONS)
    with torch.no_grad():
        fast.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        fast.generate(**inputs, **OPTIONS)
    with torch.no_grad():
        fast.lm_head.weight[3] = 0.0
    assert fast.generate(**inputs, **OPTIONS).shape == (2, 30)


def test_lora_added_afterwards(model, fast):
    """优化之后加上 LoRA：有的投影不再是普通的 nn.Linear，照常生成。"""
    from peft import LoraConfig, get_peft_model

    inputs = prompts(2, 6, 1)
    both(model, fast, inputs)
    before = Graph.replays
    tuned = get_peft_model(fast, LoraConfig(target_modules=["o_proj"], r=2))
    assert torch.equal(
        tuned.generate(**inputs, **OPTIONS), model.generate(**inputs, **OPTIONS)
    )  # 新的 LoRA 是 0
    assert Graph.replays == before
