"""用 MTP 生成的一步在（假的）CUDA 上：都在该在的设备上，一步之内不等设备，读回来只有一次。"""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

import deepseek_opt as dso
from deepseek_opt.generation.choose import Greedy, Sampled
from deepseek_opt.generation.lossy import Lossy
from deepseek_opt.generation.plain import PlainPredictor
from deepseek_opt.generation.rows import Rows
from deepseek_opt.generation.scores import Scores
from deepseek_opt.generation.step import Found, Step
from deepseek_opt.mtp import steady

from .fake_cuda import CUDA, Watch, fake_cuda, move
from .generation_cases import FULL, generator_model
from .mtp_models import make

ROWS, PROMPT = 3, 7
OPTIONS = {"temperature": 0.8, "top_k": 5, "top_p": 0.9}


def on_cuda(name: str, monkeypatch):
    """优化过的模型，各种核对已在 CPU 上做过。"""
    model = copy.deepcopy(generator_model(name))
    dso.optimize(
        model,
        dso.OptimizationProfile(mtp=dso.MTPConfig(draft_length=4, fixed_draft_length=True), **FULL),
    )
    model.generate(torch.ones(1, 3, dtype=torch.int64), max_new_tokens=4, do_sample=False)
    monkeypatch.setattr(steady, "_agrees", lambda *_: True)
    return model


def chooser_of(kind: str, model, rows: Rows):
    if kind == "sampled":
        return Sampled(Scores([], dict(OPTIONS)), rows, model.mtp, torch.Generator("cpu"))
    greedy = Greedy(Scores([]), rows, model.mtp)
    return greedy if kind == "greedy" else Lossy(greedy, kind, None)


@pytest.mark.parametrize("kind", ["greedy", "lossy_typical", "lossy_relaxed"])
@pytest.mark.parametrize("name", ["deepseek_v3", "llama"])
def test_a_step_never_waits(monkeypatch, name, kind):
    """起草、核对、截去，行数参差，有停住的行，落下几步再补上：都不读回主机，也不从主机送。"""
    model = on_cuda(name, monkeypatch)
    with fake_cuda(monkeypatch):
        move(model)
        tokens = torch.zeros(ROWS, PROMPT, dtype=torch.int64, device=CUDA)
        step = Step(model.mtp, ROWS, CUDA)
        step.chooser = chooser_of(kind, model, Rows(tokens, None, 40, 8, 0))
        with model.mtp.adapter.generating():
            assert model.mtp.adapter.capturable(ROWS, 5) == (name == "deepseek_v3")
            with Watch() as watch:
                step.prefill(tokens, [7, 5, 7])
            assert not watch.reads  # 送过去的：各行的长度，第一次用到的专家计数
            step.run(1)  # MTP 层的专家计数第一次用到
            step.settle([1, 1, 1])
            step.alive = torch.ones(ROWS, dtype=torch.int64, device=CUDA)
            for length, moved in ((4, [5, 1, 2]), (4, [1, 0, 3]), (0, [1, 1, 0]), (0, [1] * 3)):
                with Watch() as watch:
                    found = step.run(length)
                assert not watch.waits, (length, watch.waits)
                assert found.packed.shape == (ROWS, 2 + length) and found.packed.device == CUDA
                step.settle(moved)
            with Watch() as watch:
                step.run(3)  # 合并落下的几段
            assert not watch.waits
            step.settle([4, 1, 1])
            assert step.target.lengths == [7 + 13, 5 + 5, 7 + 8]
            lengths = [layer.row_lengths() for layer in step.target.cache.layers]
            assert lengths == [step.target.lengths] * len(lengths)


PLAIN = {
    "v3": ("deepseek_v3", {}),
    "v2": ("deepseek_v2", {}),
    "int8 缓存": ("deepseek_v3", {"mla": dso.MLAConfig(cache_dtype="int8")}),
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_step_without_mtp_never_waits(monkeypatch, name):
    """没有 MTP 的模型：一步里各算子都在设备上，不读回主机；行数参差，有停住的行。"""
    family, parts = PLAIN[name]
    model = make(family)
    dso.optimize(model, dso.OptimizationProfile(**{**FULL, **parts}))
    predictor = PlainPredictor(model)
    model.generate(torch.ones(1, 3, dtype=torch.int64), max_new_tokens=4, do_sample=False)
    monkeypatch.setattr(steady, "_agrees", lambda *_: True)
    with fake_cuda(monkeypatch):
        move(model)
        tokens = torch.zeros(ROWS, PROMPT, dtype=torch.int64, device=CUDA)
        step = Step(predictor, ROWS, CUDA)
        step.chooser = Greedy(Scores([]), Rows(tokens, None, 40, 8, 0), predictor)
        with predictor.adapter.generating():
            assert predictor.adapter.capturable(ROWS, 1)
            step.prefill(tokens, [7, 5, 7])
            step.run(0)
            step.settle([1, 1, 1])
            step.alive = torch.ones(ROWS, dtype=torch.int64, device=CUDA)
            for moved in ([1, 0, 1], [1, 1, 1]):
                with Watch() as watch:
                    found = step.run(0)
                assert not watch.waits and found.packed.shape == (ROWS, 2), watch.waits
                step.settle(moved)
            assert step.target.lengths == [10, 7, 10]


def test_reading_is_one_copy(monkeypatch):
    with fake_cuda(monkeypatch):
        packed = torch.zeros(2, 5, dtype=torch.int64, device=CUDA)
        with Watch() as watch, pytest.raises(DataDependentOutputException):
            Found(packed).read()
        assert len(watch.reads) == 1


def test_bad_results_are_named_when_read():
    """设备上的核把出错记在结果里；读回来的地方说清是哪一行、哪个位置。"""
    good = Found(torch.tensor([[1, 7, 3, 4], [0, 9, 5, 6]]))
    assert good.read() == ([1, 0], [7, 9], [[3, 4], [5, 6]])
    with pytest.raises(ValueError, match="mtp_draft_head：第 1 行的分数含 NaN"):
        Found(torch.tensor([[1, 7, 3, 4], [0, 9, 5, -1]])).read()
    with pytest.raises(ValueError, match="第 0 行第 2 个位置的.*NaN"):
        Found(torch.tensor([[0, -3, 3, 4], [0, 9, 5, 6]])).read()
    with pytest.raises(ValueError, match="第 1 行第 0 个位置的.*draft_probs"):
        Found(torch.tensor([[0, 2], [1, -1]])).read()


def test_rows_are_written_when_needed(monkeypatch):
    """生成的词元记在主机上，要看的时候一次送到设备。"""
    with fake_cuda(monkeypatch):
        rows = Rows(torch.zeros(2, 3, dtype=torch.int64, device=CUDA), None, 8, 4, 0)
        with Watch() as watch:
            rows.commit([[5, 6], [7]], [1, 0])
            rows.commit([[8], [9, 4]], [0, 1])
        assert not watch.waits
        with Watch() as watch:
            assert rows.sequences(3).shape == (2, 6)
        assert watch.copies == ["aten._to_copy"] and not watch.reads


def test_rows_hold_what_was_committed():
    rows = Rows(torch.tensor([[1, 2], [3, 4]]), None, 4, 2, 0)
    rows.commit([[5, 6], [7]], [1, 0])
    rows.commit([[8], [9, 4]], [0, 1])
    assert rows.sequences(3).tolist() == [[1, 2, 5, 6, 8], [3, 4, 7, 9, 4]]
    rows.commit([[1], [2]], [0, 0])
    assert rows.tokens[:, :6].tolist() == [[1, 2, 5, 6, 8, 1], [3, 4, 7, 9, 4, 2]]
