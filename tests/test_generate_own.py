"""deepseek_opt.generate：自己的模型与 transformers 的模型，各种参数；坏输入各有一句中文。"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import deepseek_opt as dso
from deepseek_opt.errors import ConfigError, InputError, UnsupportedError

from .generation_cases import EOS, Kept, generator_model, optimized, prompts

EXAMPLE = Path(__file__).parent.parent / "examples" / "generate_mtp.py"


@pytest.fixture(name="example", scope="module")
def _example():
    spec = importlib.util.spec_from_file_location("generate_mtp", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(name="own")
def _own(example):
    torch.manual_seed(0)
    model = example.ByteModel().eval()
    adapter = example.ByteAdapter(
        model, embedding=model.embed, head=model.head, hidden_size=example.WIDTH
    )
    dso.attach_mtp(model, config=dso.MTPConfig(depth=2), fresh=True, adapter=adapter)
    return model


IDS = torch.tensor([[70, 71, 72], [90, 91, 92]])


def test_example_runs(example, capsys):
    assert example.main(["hf", "own", "--new", "12", "--steps", "3"]) == {"hf": True, "own": True}
    assert "完全相同" in capsys.readouterr().out


def test_greedy_equals_one_by_one(example, own):
    wanted = example.one_by_one(own, IDS, 20)
    for config in (None, dso.MTPConfig(draft_length=3, fixed_draft_length=True)):
        assert torch.equal(dso.generate(own, IDS, max_new_tokens=20, config=config), wanted)
    found = dso.metrics(own)
    assert found.spec_decode_num_drafts > 0


def test_padding_anywhere(own):
    """左、右、中间的填充都不影响：与没有填充的一行一行生成相同。"""
    rows = [[70, 71, 72, 73], [80, 81], [90]]
    ids, mask = torch.full((3, 5), 7), torch.zeros(3, 5, dtype=torch.long)
    for b, (row, places) in enumerate(zip(rows, ([1, 2, 3, 4], [0, 3], [2]), strict=True)):
        ids[b, places] = torch.tensor(row)
        mask[b, places] = 1
    together = dso.generate(own, ids, attention_mask=mask, max_new_tokens=9)
    for b, row in enumerate(rows):
        alone = dso.generate(own, torch.tensor([row]), max_new_tokens=9)
        assert torch.equal(together[b, 5:], alone[0, len(row) :])


def test_same_options_as_transformers():
    """同一个 transformers 模型，两个入口给出同样的结果。"""
    model, inputs = generator_model("llama"), prompts(4, 7, 3)
    for options in (
        {"min_new_tokens": 6, "repetition_penalty": 1.3},
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"do_sample": True, "top_k": 0, "repetition_penalty": 1.2, "num_return_sequences": 2},
    ):
        common = {"max_new_tokens": 14, "eos_token_id": EOS, "pad_token_id": 0, **options}
        torch.manual_seed(1)
        wanted = model.generate(**inputs, **{"do_sample": False, **common})
        torch.manual_seed(1)
        assert torch.equal(dso.generate(model, **inputs, **common), wanted)


def test_generator_argument_leaves_the_global_state_alone(own):
    found = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(5)
        before = torch.get_rng_state()
        found.append(dso.generate(own, IDS, max_new_tokens=12, do_sample=True, generator=generator))
        assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(*found)


def test_everything_returned(own):
    streamer = Kept()
    out = dso.generate(
        own,
        IDS,
        max_new_tokens=8,
        do_sample=True,
        top_k=5,
        streamer=streamer,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    assert out.sequences.shape == (2, 11) and out.drafted.shape == (2, 8)
    assert len(out.scores) == len(out.logits) == 8 and out.scores[0].shape == (2, 256)
    assert torch.equal(torch.tensor(streamer.values).T, out.sequences[:, 3:])
    assert streamer.ended == 1
    finite = torch.stack(out.scores).isfinite().sum(-1)
    assert bool((finite <= 5).all()) and bool((finite >= 1).all())


class Letters:
    """把词元当作字节的分词器。"""

    def decode(self, ids):
        return bytes(ids).decode("latin-1")


def test_stopping(own):
    free = dso.generate(own, IDS, max_new_tokens=12)[:, 3:]
    text = Letters().decode(free[0].tolist())
    stopped = dso.generate(
        own, IDS, max_new_tokens=12, stop_strings=text[2:5], tokenizer=Letters(), pad_token_id=0
    )
    assert text[: text.index(text[2:5]) + 3] in Letters().decode(stopped[0, 3:].tolist())
    eos = int(free[0, 4])
    ended = dso.generate(own, IDS[:1], max_new_tokens=12, eos_token_id=[eos, 300])
    first = free[0].tolist().index(eos)
    assert ended[0, 3:].tolist() == free[0, : first + 1].tolist()
    third = dso.generate(
        own, IDS, max_new_tokens=12, stopping_criteria=[lambda ids, _: ids.shape[1] >= 6]
    )
    assert third.shape == (2, 6)


def test_logits_processor_is_applied(own):
    def only_even(input_ids, scores):
        del input_ids
        scores = scores.clone()
        scores[:, 1::2] = -torch.inf
        return scores

    out = dso.generate(own, IDS, max_new_tokens=10, logits_processor=[only_even])
    assert bool((out[:, 3:] % 2 == 0).all())


BAD = [
    ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "input_ids：应为非空"),
    ({"input_ids": torch.zeros(3, dtype=torch.long)}, "input_ids"),
    ({"input_ids": torch.zeros(1, 3)}, "input_ids"),
    ({"input_ids": [[1, 2]]}, "input_ids"),
    ({"input_ids": torch.tensor([[1, 999]])}, r"词元 999 不在词表 \[0, 256\)"),
    ({"input_ids": torch.tensor([[-1, 2]])}, "词元 -1 不在词表"),
    ({"attention_mask": torch.ones(2, 4)}, "attention_mask"),
    ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "第 1 行全是填充"),
    ({"max_new_tokens": 0}, "max_new_tokens"),
    ({"max_new_tokens": True}, "max_new_tokens"),
    ({"min_new_tokens": -1}, "min_new_tokens"),
    ({"num_return_sequences": 0}, "num_return_sequences"),
    ({"eos_token_id": "end"}, "eos_token_id"),
    ({"temperature": 0.0}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"min_p": 1.5}, "min_p"),
    ({"repetition_penalty": -1.0}, "repetition_penalty"),
    ({"stop_strings": "a"}, "tokenizer"),
    ({"config": {"depth": 2}}, "config"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
def test_bad_input(own, change, message):
    with pytest.raises(InputError, match=message):
        dso.generate(own, **{"input_ids": IDS, "max_new_tokens": 4, **change})


def test_generator_on_another_device(own):
    class Elsewhere:
        device = torch.device("cuda", 0)

    with pytest.raises(InputError, match="generator：应为设备 cpu 上的，实际是cuda:0 上的"):
        dso.generate(own, IDS, max_new_tokens=4, do_sample=True, generator=Elsewhere())


@pytest.mark.parametrize("sample", [False, True])
def test_nan_logits_name_the_place(own, sample):
    with torch.no_grad():
        own.head.bias[5] = float("nan")
    with pytest.raises((ValueError, RuntimeError), match="NaN"):
        dso.generate(own, IDS, max_new_tokens=4, do_sample=sample)


def test_bad_configuration():
    for change, message in (
        ({"depth": 0}, "depth"),
        ({"draft_length": 0}, "draft_length"),
        ({"draft_length": 9}, "draft_length"),
        ({"fixed_draft_length": True}, "fixed_draft_length"),
        ({"draft_length": 4, "depth": 2, "shared_layers": False}, "draft_length"),
    ):
        with pytest.raises(ConfigError, match=message):
            dso.MTPConfig(**change)


def test_missing_methods_and_missing_predictor(own):
    class Half(dso.MTPAdapter):
        def make_layer(self):
            return nn.Linear(8, 8)

    model = nn.Module()
    model.embed, model.head = nn.Embedding(16, 8), nn.Linear(8, 16)
    adapter = Half(model, embedding=model.embed, head=model.head, hidden_size=8)
    dso.attach_mtp(model, fresh=True, adapter=adapter)
    with pytest.raises(UnsupportedError, match="make_model_cache"):
        dso.generate(model, torch.tensor([[1]]))
    with pytest.raises(InputError, match="没有装 MTP"):
        dso.generate(nn.Linear(2, 2), IDS)
    with pytest.raises(UnsupportedError, match="run_model"):
        adapter.run_model(IDS, IDS, None)
    report = dso.optimize(own, dso.OptimizationProfile(mtp=dso.MTPConfig()))
    assert "deepseek_opt.generate" in report.entries[-1].reason


def test_same_errors_through_transformers():
    model = generator_model("llama")
    with optimized(model, draft_length=2):
        ids = torch.tensor([[7, 8], [9, 10]])
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        with pytest.raises(InputError, match="第 0 行全是填充"):
            model.generate(ids, attention_mask=torch.tensor([[0, 0], [1, 1]]), **options)
        with pytest.raises(InputError, match="词元 4000 不在词表"):
            model.generate(ids + 3990, attention_mask=torch.ones_like(ids), **options)
        again = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(again, plain)


@pytest.mark.parametrize("tokens", [torch.tensor([]), torch.tensor([1, 1]), torch.tensor([300])])
def test_bad_draft_vocabulary(own, tokens):
    with pytest.raises(InputError, match="tokens"):
        own.mtp.set_draft_vocabulary(tokens)
    assert own.mtp.draft_vocabulary is None


def test_cache_of_ones_own():
    with pytest.raises(InputError, match="num_layers"):
        dso.KVCache(0)
    with pytest.raises(InputError, match="max_length"):
        dso.KVCache(1, max_length=True)
    cache = dso.KVCache(2)
    assert cache.lengths is None and cache.nbytes == 0
    cache.update(0, torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4))
    assert cache.lengths.tolist() == [3, 3] and cache.nbytes > 0 and cache.get_seq_length() == 3
    cache.crop_rows([1, 2])
    cache.select(torch.tensor([1]))
    assert cache.lengths.tolist() == [2]
    assert cache.mask(1, 2).tolist() == [[[[True, False], [True, True]]]]
    assert cache.mask(1, 2, window=1).tolist() == [[[[True, False], [False, True]]]]
