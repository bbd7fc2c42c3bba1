"""optimize(mtp=...)：从检查点装上、还原时取下；坏的权重不改动模型；与切换、深拷贝、PEFT、线程、指标一起。"""

from __future__ import annotations

import copy
import importlib
import threading
from contextlib import nullcontext

import pytest
import torch

import deepseek_opt as dso
from deepseek_opt import MTPConfig, OptimizationProfile
from deepseek_opt.errors import InputError, UnsupportedError
from deepseek_opt.generation.hf import GeneratePatch
from deepseek_opt.mtp.hf import HFAdapter
from deepseek_opt.optimize import find_state

from .generation_cases import FULL, generator_model, optimized, prompts
from .mtp_models import make

OPTIONS = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def profile(**config):
    return OptimizationProfile(mtp=MTPConfig(**config), **FULL)


@pytest.fixture(name="folder", params=["deepseek_v3", "llama"])
def _folder(request, tmp_path):
    """带 MTP 权重的检查点。"""
    model = make(request.param)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    dso.attach_mtp(model, config=MTPConfig(depth=2), fresh=True)
    model.save_pretrained(tmp_path)
    return tmp_path


def drafts(model):
    """generate 是不是换成了用 MTP 的。"""
    return getattr(model.__dict__.get("generate"), "kind", None) == "mtp"


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_declared_layers_are_attached_and_detached(folder):
    model = load(folder)
    keys, config = set(model.state_dict()), model.config.to_dict()
    plain = model.generate(**prompts(2, 5, 1), **OPTIONS)
    report = dso.optimize(model, OptimizationProfile(mtp=MTPConfig()), strict=True)
    assert any(entry.part == "mtp" and entry.replaced for entry in report.entries)
    assert isinstance(model.__dict__["generate"], GeneratePatch)
    assert torch.equal(plain, model.generate(**prompts(2, 5, 1), **OPTIONS))
    assert model.mtp.draft_statistics.steps > 0
    found = dso.metrics(model)
    assert found.spec_decode_num_drafts and found.spec_decode_tokens_per_step >= 1
    assert found.decode_calls and found.prefill_calls == 1
    assert len(found.spec_decode_acceptance_per_depth) >= 1
    dso.restore(model)
    assert set(model.state_dict()) == keys and not hasattr(model, "mtp")
    assert "generate" not in model.__dict__ and model.config.to_dict() == config
    assert torch.equal(plain, model.generate(**prompts(2, 5, 1), **OPTIONS))


def test_what_the_user_attached_stays(folder):
    model = load(folder)
    predictor = dso.attach_mtp(model, folder)
    dso.optimize(model, profile())
    dso.restore(model)
    assert model.mtp is predictor


def test_bad_weights_are_named_and_nothing_changes(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if name.endswith("eh_proj.weight"))
    save_file({k: v for k, v in tensors.items() if k != gone}, file, metadata={"format": "pt"})
    model = load(folder)
    keys = set(model.state_dict())
    report = dso.optimize(model, profile())
    entry = next(e for e in report.entries if e.part == "mtp")
    assert not entry.replaced and gone in entry.reason and "没有" in entry.reason
    assert set(model.state_dict()) == keys and not drafts(model)
    dso.restore(model)
    with pytest.raises(UnsupportedError, match="eh_proj"):
        dso.optimize(model, OptimizationProfile(mtp=MTPConfig()), strict=True)
    assert set(model.state_dict()) == keys and not hasattr(model, "mtp")


def test_failure_after_attaching_is_rolled_back(folder, monkeypatch):
    module = importlib.import_module("deepseek_opt.optimize")

    def fail(*_):
        raise RuntimeError("坏了")

    model = load(folder)
    monkeypatch.setattr(module.quantized, "release_where", fail)
    with pytest.raises(RuntimeError, match="坏了"):
        dso.optimize(model, profile())
    assert not hasattr(model, "mtp") and "generate" not in model.__dict__


def test_switch_keeps_the_attached_layers(folder):
    model = load(folder)
    plain = model.generate(**prompts(2, 5, 1), **OPTIONS)
    dso.optimize(model, profile(draft_length=2))
    layer = model.mtp
    dso.switch(model, OptimizationProfile(**FULL))
    assert not drafts(model) and model.mtp is layer
    dso.switch(model, profile(draft_length=3))
    assert torch.equal(plain, model.generate(**prompts(2, 5, 1), **OPTIONS))
    dso.restore(model)
    assert not hasattr(model, "mtp")


def test_deepcopy_and_save(folder, tmp_path):
    model = load(folder)
    dso.optimize(model, profile())
    plain = model.generate(**prompts(2, 5, 1), **OPTIONS)
    again = copy.deepcopy(model)
    assert again.__dict__["generate"].module is again
    assert torch.equal(plain, again.generate(**prompts(2, 5, 1), **OPTIONS))
    assert again.mtp.draft_statistics.steps > 0
    model.save_pretrained(tmp_path / "again")
    once_more = load(tmp_path / "again")
    dso.optimize(once_more, OptimizationProfile(mtp=MTPConfig()), strict=True)
    assert torch.equal(plain, once_more.generate(**prompts(2, 5, 1), **OPTIONS))


def test_peft(folder):
    peft = pytest.importorskip("peft")
    model = load(folder)
    config = peft.LoraConfig(target_modules=["o_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, config).eval()
    plain = wrapped.generate(**prompts(2, 5, 1), **OPTIONS)
    report = dso.optimize(wrapped, profile())
    assert any(e.part == "mtp" and e.replaced for e in report.entries), report
    fast = wrapped.generate(**prompts(2, 5, 1), **OPTIONS)
    assert torch.equal(plain, fast)
    dso.restore(wrapped)


def test_threads_do_not_disturb_each_other():
    model = generator_model("deepseek_v3")
    with optimized(model, draft_length=3):
        alone = [model.generate(**prompts(3, 6, n), **OPTIONS) for n in range(4)]
        found = together(lambda n: model.generate(**prompts(3, 6, n), **OPTIONS), 4)
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


def test_threads_with_hidden_states_before_the_norm(monkeypatch):
    """取归一化之前的隐藏状态要用钩子：各线程只收自己的。"""
    model = make("qwen2_sliding")
    model.generation_config.pad_token_id = 0
    adapter = HFAdapter(model, hidden_normed=False)
    dso.attach_mtp(model, config=MTPConfig(depth=2), fresh=True, adapter=adapter)
    alone = [model.generate(**prompts(2 + n, 6, n), **OPTIONS) for n in range(3)]
    monkeypatch.setattr(adapter, "_steady", NoParts())
    with optimized(model, full=False, draft_length=3):
        found = together(lambda n: model.generate(**prompts(2 + n, 6, n), **OPTIONS), 3)
    assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


class NoParts:
    """不直接调用算子，总是经过各模块。"""

    def during(self, _adapter):
        return nullcontext()

    def find(self, *_):
        return None


def together(work, count, times=3):
    """count 个线程各做 times 遍 work(n)：各自最后的结果。"""
    found = [None] * count

    def run(n):
        for _ in range(times):
            found[n] = None
            found[n] = work(n)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(one is not None for one in found)  # 没有哪个线程出错
    return found


@pytest.mark.parametrize("sample", [False, True])
def test_attention_that_falls_back_after_optimize(sample):
    """优化之后才加上的 DoRA 使注意力退回原实现：各行参差时也照样相同。"""
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(generator_model("deepseek_v3"))
    lora = {"target_modules": ["kv_b_proj"], "r": 2, "init_lora_weights": False, "use_dora": True}
    inputs, options = prompts(3, 6, 1), {**OPTIONS, "do_sample": sample}
    with optimized(model, draft_length=3) as report:
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**lora)).eval()
        torch.manual_seed(1)
        found = wrapped.generate(**inputs, **options)
        assert any("DoRA" in why for _, why in report.fallbacks)
        assert model.mtp.draft_statistics.steps > 0
    torch.manual_seed(1)
    assert torch.equal(found, wrapped.generate(**inputs, **options))


def test_layers_in_use_cannot_be_detached(folder):
    model = load(folder)
    dso.optimize(model, OptimizationProfile(mtp=MTPConfig()), strict=True)
    with pytest.raises(InputError, match="先 restore"):
        dso.detach_mtp(model)
    assert model.generate(**prompts(2, 5, 1), **OPTIONS).shape[0] == 2
    dso.restore(model)
    assert not hasattr(model, "mtp")


def test_misshaped_weights_are_named(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    wrong = next(name for name in tensors if name.endswith("eh_proj.weight"))
    tensors[wrong] = tensors[wrong][:-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    model = load(folder)
    dso.optimize(model, OptimizationProfile(**FULL))
    state = find_state(model)
    with pytest.raises(UnsupportedError, match=f"{wrong}：应为"):
        dso.switch(model, profile(), strict=True)
    assert find_state(model) is state and not hasattr(model, "mtp")
    report = dso.switch(model, profile())
    entry = next(e for e in report.entries if e.part == "mtp")
    assert not entry.replaced and wrong in entry.reason and not hasattr(model, "mtp")


def test_half_precision_and_train_mode():
    model = copy.deepcopy(generator_model("deepseek_v3")).to(torch.bfloat16)
    with optimized(model, draft_length=3) as report:
        out = model.generate(**prompts(3, 6, 1), **OPTIONS)
        assert out.shape[0] == 3 and not report.fallbacks
    model = copy.deepcopy(generator_model("llama")).train()
    plain = model.generate(**prompts(3, 6, 1), **OPTIONS)
    with optimized(model, draft_length=3):
        assert torch.equal(plain, model.generate(**prompts(3, 6, 1), **OPTIONS))
        assert model.training


def test_cache_limit_and_learned_positions():
    """缓存的上限、学得的位置用完之前不再起草，恰好生成到头。"""
    model = generator_model("gpt2")
    inputs = {"input_ids": prompts(1, 7, 1)["input_ids"]}
    options = {**OPTIONS, "max_new_tokens": 64 - 7}
    plain = model.generate(**inputs, **options)
    with optimized(model, draft_length=8):
        assert torch.equal(plain, model.generate(**inputs, **options))
    model = generator_model("deepseek_v3")
    plain = model.generate(**inputs, **OPTIONS)
    limited = OptimizationProfile(
        mla=dso.MLAConfig(max_cache_length=18),
        mtp=MTPConfig(draft_length=8, fixed_draft_length=True),
    )
    with dso.optimized(model, limited):
        assert torch.equal(plain, model.generate(**inputs, **OPTIONS))


def test_reduced_draft_vocabulary_does_not_change_the_text():
    for name in ("llama", "deepseek_v3"):
        model = generator_model(name)
        for options in (OPTIONS, {**OPTIONS, "do_sample": True, "top_k": 30}):
            torch.manual_seed(3)
            plain = model.generate(**prompts(3, 6, 1), **options)
            model.mtp.set_draft_vocabulary(torch.arange(10, 60, 2))
            try:
                with optimized(model, draft_length=3):
                    torch.manual_seed(3)
                    assert torch.equal(plain, model.generate(**prompts(3, 6, 1), **options))
            finally:
                model.mtp.set_draft_vocabulary(None)
