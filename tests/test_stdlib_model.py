"""随包小模型与标准库语料：能载入、大小合规、真的会预测，留出模块没有混进训练集。"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepseek_opt
from deepseek_opt import corpus

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(deepseek_opt.__file__).parent / "assets" / "stdlib_model"
# 随机初始化约 0.02 %；训练得当的模型远高于此，门槛只挡坏掉的权重，不随 Python 版本波动。
MIN_ACCURACY = 0.40
transformers = pytest.importorskip("transformers", reason="随包小模型的测试需要 transformers")


@pytest.fixture(scope="module")
def tokenizer():
    """用 AutoTokenizer 离线载入的分词器。"""
    return transformers.AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    """用 AutoModelForCausalLM 离线载入的 fp32 模型，载入信息不得有缺漏。"""
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "mismatched_keys", "unexpected_keys")), info
    return loaded.eval()


@pytest.fixture(scope="module")
def training():
    """examples/ 里训练脚本的部件。"""
    pytest.importorskip("tokenizers", reason="训练部件需要 tokenizers（随 transformers 安装）")
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from stdlib_model import architecture, data, fast_forward, optimizer
    finally:
        sys.path.remove(str(ROOT / "examples"))
    return {
        "architecture": architecture,
        "data": data,
        "fast_forward": fast_forward,
        "optimizer": optimizer,
    }


def _held_out_ids(tokenizer, name: str, count: int) -> torch.Tensor:
    path = corpus.stdlib_root() / name
    ids = tokenizer(corpus.read_text(path), verbose=False)["input_ids"]
    return torch.tensor([tokenizer.bos_token_id, *ids[:count]])


def test_files_and_size():
    """HF 目录齐全，主模型的权重不超过 13.5 MB，连同 MTP 层整个目录不到 16 MB。"""
    for name in ("config.json", "generation_config.json", "tokenizer.json", "README.md"):
        assert (FOLDER / name).is_file(), name
    assert (FOLDER / "model.safetensors").stat().st_size <= 13.5e6
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 16e6


def test_config_is_deepseek_v3():
    """结构是带 q_lora、共享专家、首层稠密的 DeepSeek-V3，长度够演示用。"""
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["max_position_embeddings"] >= 16384
    assert config["first_k_dense_replace"] == 1
    assert config["n_shared_experts"] >= 1 and config["n_routed_experts"] >= 4
    for name in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"):
        assert config[name] % 16 == 0, name


def test_card_names_every_held_out_module():
    """模型卡列出全部留出模块。"""
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in corpus.HELD_OUT_MODULES:
        assert f"`{name}`" in card, name


def test_plain_load_keeps_bf16_and_router_bias():
    """不指定类型时按 bf16 载入；路由修正偏置留在 fp32 且经训练不为零。"""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(FOLDER)
    assert loaded.dtype == torch.bfloat16
    for layer in loaded.model.layers[1:]:
        bias = layer.mlp.gate.e_score_correction_bias
        assert bias.dtype == torch.float32
        assert bias.abs().max() > 0


@settings(max_examples=200)
@given(text=st.text(max_size=200))
def test_tokenizer_round_trips_any_text(tokenizer, text):
    """任意文本编码再解码不变。"""
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_round_trips_source(tokenizer):
    """真实源码往返不变，而且压缩得动：平均每 token 两个字符以上。"""
    text = corpus.read_text(corpus.stdlib_root() / "argparse.py")
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(text) / len(ids) > 2
    assert max(ids) < tokenizer.vocab_size <= 4096


@torch.no_grad()
def test_held_out_accuracy(model, tokenizer):
    """在没见过的模块上，下一 token 准确率高于门槛。"""
    hits = total = 0
    for name in ("argparse.py", "dataclasses.py", "statistics.py"):
        ids = _held_out_ids(tokenizer, name, 2048)
        predicted = model(ids[None, :-1], use_cache=False).logits[0].argmax(-1)
        hits += int((predicted == ids[1:]).sum())
        total += ids.numel() - 1
    assert hits / total > MIN_ACCURACY, f"准确率 {hits / total:.2%}"


@torch.no_grad()
def test_greedy_continuation_is_text(model, tokenizer):
    """留出源码的贪心续写不是单个 token 的重复。"""
    ids = _held_out_ids(tokenizer, "textwrap.py", 600)
    out = model.generate(ids[None], max_new_tokens=48, do_sample=False)[0, ids.numel() :]
    assert out.unique().numel() > 8


def test_held_out_files_never_train():
    """留出与训练没有交集，合起来无重复，留出文本够长。"""
    held, train = corpus.held_out_files(), corpus.training_files()
    assert held and train and not set(held) & set(train)
    assert held == sorted(held, key=lambda p: p.relative_to(corpus.stdlib_root()).as_posix())
    names = {path.name for path in train}
    for module in corpus.HELD_OUT_MODULES:
        assert f"{module}.py" not in names
        assert f"test_{module}.py" not in names
    assert max(path.stat().st_size for path in held) > 80_000


@pytest.mark.parametrize(
    ("relative", "expected"),
    [
        ("json/decoder.py", True),
        ("test/test_json/test_scanstring.py", True),
        ("test/test_zipfile64.py", True),
        ("heapq.py", True),
        ("jsonlike.py", False),
        ("zipimport.py", False),
        ("test/test_zipimport.py", False),
    ],
)
def test_is_held_out(relative, expected):
    """按模块名判断，不误伤名字相近的模块。"""
    assert corpus.is_held_out(Path(relative)) is expected


def test_corpus_skips_third_party_and_broken_files(tmp_path):
    """第三方包、编码表与读不出的文件都不在语料里；声明的编码被遵守。"""
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("x = 1\n", encoding="utf-8")
    (tmp_path / "encodings").mkdir()
    (tmp_path / "encodings" / "cp437.py").write_text("x = 1\n", encoding="utf-8")
    (tmp_path / "broken.py").write_bytes(b"x = '\xff\xfe'\n")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\nx = '\xe9'\n")
    (tmp_path / "heapq.py").write_text("y = 2\n", encoding="utf-8")
    assert [path.name for path in corpus.training_files(tmp_path)] == ["latin.py"]
    assert [path.name for path in corpus.held_out_files(tmp_path)] == ["heapq.py"]
    assert "é" in corpus.read_text(tmp_path / "latin.py")


def test_training_forward_matches_transformers(model, training):
    """训练用前向与原版的 logits 与梯度一致，所以训练出来的就是原版模型。"""
    fast = training["fast_forward"].FastForward(model, torch.float32)
    tokens = torch.randint(0, 4096, (2, 96), generator=torch.Generator().manual_seed(0))
    reference = model(tokens, labels=tokens, use_cache=False)
    reference.loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    hidden, chosen = fast(tokens, torch.arange(96).expand(2, -1))
    logits = torch.nn.functional.linear(hidden, model.lm_head.weight).view(2, 96, -1)
    torch.testing.assert_close(logits, reference.logits, rtol=1e-4, atol=1e-4)
    assert len(chosen) == 3
    shifted = logits[:, :-1].reshape(-1, logits.shape[-1])
    torch.nn.functional.cross_entropy(shifted, tokens[:, 1:].reshape(-1)).backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, want[name], rtol=1e-3, atol=1e-5, msg=name)
    model.zero_grad()


def test_head_loss_matches_cross_entropy(training):
    """按块合算的交叉熵与梯度等于一次算完的，末块不满也一样。"""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2500, 16, generator=generator).requires_grad_()
    weight = torch.randn(40, 16, generator=generator).requires_grad_()
    target = torch.randint(0, 40, (2500,), generator=generator)
    with torch.compiler.set_stance("force_eager"):
        loss = training["fast_forward"]._HeadLoss.apply(x, weight, target)
    want = torch.nn.functional.cross_entropy(x @ weight.t(), target)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(loss, (x, weight))
    for grad, expected in zip(grads, torch.autograd.grad(want, (x, weight)), strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-6)


def test_orthogonalize_flattens_singular_values(training):
    """Newton-Schulz 之后奇异值都在 1 附近，横竖两种形状都行。"""
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 32, 96), (2, 96, 32)):
        matrix = torch.randn(shape, generator=generator)
        values = torch.linalg.svdvals(training["optimizer"].orthogonalize(matrix).float())
        assert values.min() > 0.3 and values.max() < 1.6


def test_batches_cover_the_stream_without_overlap(training):
    """一遍之内窗口互不重叠；目标是下一个 token；带空隙的位置单调且不越界。"""
    import numpy as np

    stream = np.arange(4000, dtype=np.uint16)
    batches = training["data"].Batches(stream, seed=0)
    seen = []
    for _ in range(10):
        tokens, target, positions = batches.next(3, 100, gaps=True)
        assert torch.equal(target.view(3, 100), tokens + 1)
        assert (positions.diff(dim=1) > 0).all()
        assert positions.max() < training["architecture"].MAX_LENGTH
        seen.extend(tokens[:, 0].tolist())
    starts = sorted(seen)
    assert all(later - earlier >= 100 for earlier, later in zip(starts, starts[1:], strict=False))


def test_router_bias_moves_against_load(training):
    """选得多的专家偏置下降，选得少的上升。"""
    small = training["architecture"].build_model()
    chosen = [torch.zeros(10, 2, dtype=torch.int64) for _ in small.model.layers[1:]]
    ratios = training["fast_forward"].update_router_bias(small, chosen, 0.01)
    bias = small.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias[0] < 0 and (bias[1:] > 0).all()
    assert ratios[0] == pytest.approx(small.config.n_routed_experts)
