"""没有 MTP 的模型在真卡上的 generate：录成 CUDA graph，与 transformers 逐个词元相同，录好之后每步只等一次。"""

from __future__ import annotations

import copy

import pytest
import torch

import deepseek_opt as dso
from deepseek_opt.generation import graphs
from tests.cuda.device import DEVICE, marks, needs_gpu, reads_of
from tests.mtp_models import make

pytestmark = [*marks, needs_gpu]
PARTS = {"mla": dso.MLAConfig(), "moe": dso.MOEConfig(), "dense": dso.DenseConfig()}
NEW = 40


def pair(family, dtype=torch.float32, **parts):
    """(原来的, 优化过的)，在设备上。"""
    model = make(family, dtype).to(DEVICE)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    fast = copy.deepcopy(model)
    dso.optimize(fast, dso.OptimizationProfile(**{**PARTS, **parts}))
    return model, fast


def prompt(rows, seed):
    ids = torch.randint(6, 90, (rows, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, :4] = 0
    return ids.to(DEVICE), mask.to(DEVICE)


def recorded(model):
    return model.__dict__["generate"].predictor.__dict__[graphs._KEPT]


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 20}])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_same_tokens_as_transformers(family, rows, options):
    model, fast = pair(family)
    for seed in (1, 2):
        ids, mask = prompt(rows, seed)
        found = []
        for one in (model, fast):
            torch.cuda.manual_seed(seed)
            found.append(one.generate(ids, attention_mask=mask, max_new_tokens=NEW, **options))
        assert bool((found[0] == found[1]).all(1).float().mean() >= 0.8), (family, seed)
    kept = recorded(fast)
    assert list(kept._recorded) == [(0, 0)] and not kept.failed


@pytest.mark.parametrize(
    "parts",
    [{"mla": dso.MLAConfig(cache_dtype="int8")}, {"moe": dso.MOEConfig(quantization="int8")}],
    ids=["缓存", "专家"],
)
def test_quantized(parts):
    """与同样量化、不录的相同。"""
    _, fast = pair("deepseek_v3", torch.bfloat16, **parts)
    ids, mask = prompt(3, 1)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    for _ in range(2):
        out = fast.generate(ids, **options)
    assert not recorded(fast).failed
    mla = fast.__dict__["generate"].runtime.profile.mla
    mla.cuda_graphs = False
    same = (out == fast.generate(ids, **options)).float().mean()
    assert float(same) > 0.6
    assert graphs._KEPT not in fast.__dict__["generate"].predictor.__dict__  # 关掉之后不再留着


def test_rows_end_at_different_times():
    model, fast = pair("deepseek_v3")
    ids, mask = prompt(4, 3)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    full = model.generate(ids, **options)
    for eos in full[:, 12:20].flatten().unique().tolist():
        want = model.generate(ids, **options, eos_token_id=eos)
        got = fast.generate(ids, **options, eos_token_id=eos)
        width = min(want.shape[1], got.shape[1])
        assert float((want[:, :width] == got[:, :width]).all(1).float().mean()) >= 0.75, eos


def test_only_the_read_waits():
    """录好之后除了读回都不等设备，每一步都是重放。"""
    _, fast = pair("deepseek_v3", torch.bfloat16)
    ids, mask = prompt(4, 1)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    fast.generate(ids, **options)
    read, computed, where = reads_of(lambda: fast.generate(ids, **options))
    assert len(read) > 5 and all(read[1:]) and not computed, where
