"""deepseek-opt verify：参数、坏输入、退出码。"""

import sys
import types

import pytest
import torch

import deepseek_opt
from deepseek_opt import cli
from deepseek_opt.cli import verify


class _Report:
    def __init__(self, text, passed=True):
        self.text = text
        self.passed = passed

    def render(self):
        return self.text


class _Tokenizer:
    """一个字符一个 token。"""

    def __call__(self, text, return_tensors, truncation, max_length):
        assert return_tensors == "pt" and truncation
        ids = torch.tensor([[ord(c) for c in text[:max_length]]], dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": ids}


@pytest.fixture
def calls(monkeypatch):
    """换掉读模型、optimize 和 verify；记录它们收到什么。"""
    seen = {"passed": True}

    def optimize(model, profile):
        seen.update(model=model, profile=profile)
        return _Report("优化报告")

    def check(model, inputs):
        assert model is seen["model"]
        seen["inputs"] = inputs
        return _Report("核对报告", seen["passed"])

    def load(folder, dtype):
        seen.update(folder=folder, dtype=dtype)
        return object(), seen.get("tokenizer", _Tokenizer())

    monkeypatch.setattr(deepseek_opt, "optimize", optimize, raising=False)
    monkeypatch.setattr(deepseek_opt, "verify", check, raising=False)
    monkeypatch.setattr(verify, "load_model", load)
    return seen


def test_passes(calls, capsys, tmp_path):
    assert cli.run(["verify", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "优化报告\n核对报告\n"
    assert calls["profile"].name == "compatible"
    assert (calls["folder"], calls["dtype"]) == (tmp_path, "float32")
    assert set(calls["inputs"]) == {"input_ids", "attention_mask"}


def test_fails(calls, tmp_path):
    calls["passed"] = False
    assert cli.run(["verify", str(tmp_path)]) == 1


def test_options(calls, tmp_path):
    profile = tmp_path / "p.json"
    profile.write_text('{"mla": {"cache_dtype": "int8"}}')
    prompt = tmp_path / "t.txt"
    prompt.write_text("你好，世界", encoding="utf-8")
    args = ["--profile", profile, "--prompt-file", prompt, "--dtype", "bfloat16", "--max-tokens", 3]
    assert cli.run(["verify", str(tmp_path), *map(str, args)]) == 0
    assert calls["profile"].mla.cache_dtype == "int8"
    assert calls["dtype"] == "bfloat16"
    assert calls["inputs"]["input_ids"].tolist() == [[ord(c) for c in "你好，"]]


def test_preset_option(calls, tmp_path):
    assert cli.run(["verify", str(tmp_path), "--preset", "fast_decode"]) == 0
    assert calls["profile"].name == "fast_decode"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--dtype", "int3"],
            "参数 --dtype：应为auto、float32、bfloat16、float16 之一，实际是int3",
        ),
        (["--max-tokens", "0"], "参数 --max-tokens：应为大于 0 的整数，实际是0"),
        (["--preset", "x"], "没有名为 'x' 的预设"),
        (["--profile", "none.yaml"], "文件不存在"),
        (["--prompt-file", "none.txt"], "读不了 --prompt-file none.txt"),
    ],
)
def test_bad_options(calls, capsys, tmp_path, args, message):
    assert cli.run(["verify", str(tmp_path), *args]) == 1
    assert message in capsys.readouterr().err
    assert "model" not in calls


def test_empty_prompts(calls, capsys, tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(" \n")
    assert cli.run(["verify", str(tmp_path), "--prompt-file", str(path)]) == 1
    assert "是空的" in capsys.readouterr().err
    empty = {"input_ids": torch.zeros(1, 0, dtype=torch.int64)}
    calls["tokenizer"] = lambda *_, **__: empty
    assert cli.run(["verify", str(tmp_path)]) == 1
    assert "没有任何 token" in capsys.readouterr().err


def test_not_a_model_folder(capsys, tmp_path):
    assert cli.run(["verify", str(tmp_path)]) == 1
    assert "没有 config.json" in capsys.readouterr().err


def test_without_transformers(capsys, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert cli.run(["verify", str(tmp_path)]) == 1
    assert "需要 transformers" in capsys.readouterr().err


def test_unknown_architecture(capsys, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    assert cli.run(["verify", str(tmp_path)]) == 1
    assert f"读不了模型 {tmp_path}" in capsys.readouterr().err


def test_corrupt_checkpoint(capsys, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    assert cli.run(["verify", str(tmp_path)]) == 1
    assert f"读不了模型 {tmp_path}" in capsys.readouterr().err


def test_load_model(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    asked = {}

    class Model:
        training = True

        @classmethod
        def from_pretrained(cls, folder, **options):
            asked[folder] = options
            return cls()

        def eval(self):
            self.training = False
            return self

    fake = types.SimpleNamespace(AutoModelForCausalLM=Model, AutoTokenizer=Model)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    model, _ = verify.load_model(tmp_path, "float16")
    assert not model.training
    # 不联网；不执行模型目录里的代码（trust_remote_code 保持默认的关闭）。
    assert asked[tmp_path]["local_files_only"]
    assert "trust_remote_code" not in asked[tmp_path]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """一个极小的 DeepSeek-V3 模型和字节级分词器，存成目录。"""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = transformers.DeepseekV3Config(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    )
    torch.manual_seed(0)
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("preset", ["compatible", "fast_decode"])
def test_a_real_model(tiny_model, capsys, preset):
    args = ["verify", str(tiny_model), "--preset", preset, "--max-tokens", "20"]
    code = cli.run(args)
    out = capsys.readouterr().out
    assert code == 0, out
    assert "self_attn" in out
    assert "通过" in out
