"""专家统计：数值的定义、找得到模块与补丁、显示。"""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deepseek_opt import ExpertStatistics, MOEConfig, MoEFeedForward, expert_statistics
from deepseek_opt.errors import InputError
from deepseek_opt.load import LoadCounter


def statistics(*counts):
    load = LoadCounter(len(counts))
    load.add(torch.tensor(counts))
    return ExpertStatistics.of(load)


def test_balanced_and_collapsed():
    even, one = statistics(5, 5, 5, 5), statistics(0, 20, 0, 0)
    assert (even.utilization, even.max_over_mean) == (1.0, 1.0)
    assert even.entropy == pytest.approx(1.0)
    assert (one.utilization, one.entropy, one.max_over_mean) == (0.25, 0.0, 4.0)
    assert one.tokens_per_expert == (0, 20, 0, 0)


def test_known_distribution():
    found = statistics(3, 1, 0, 0)
    want = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert found.entropy == pytest.approx(want)
    assert found.max_over_mean == pytest.approx(3.0) and found.utilization == 0.5


def test_nothing_yet_and_a_single_expert():
    empty = statistics(0, 0)
    assert (empty.utilization, empty.entropy, empty.max_over_mean) == (None, None, None)
    assert "—" in str(empty)
    assert statistics(7).entropy == 1.0


@settings(max_examples=100)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40).filter(any))
def test_ranges(counts):
    found = statistics(*counts)
    assert 0 <= found.entropy <= 1 and 0 < found.utilization <= 1
    assert 1 - 1e-9 <= found.max_over_mean <= len(counts) + 1e-9


def test_model_modules_and_patches_are_found():
    class Patch:
        def __init__(self):
            self.load_counter = LoadCounter(3)

        def __call__(self, x):
            self.load_counter.add_indices(torch.tensor([0, 1, 1]))
            return x

    config = MOEConfig(num_experts=4, num_experts_per_tok=2, capacity_factor=0.25)
    model = nn.Sequential(MoEFeedForward(config, 8, 4), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].__dict__["forward"] = Patch()
    x = torch.randn(6, 8)
    before = model(x)
    found = expert_statistics(model)
    assert list(found) == ["0", "2"]
    assert sum(found["0"].tokens_per_expert) == 12
    assert found["0"].dropped == sum(max(n - 1, 0) for n in found["0"].tokens_per_expert)
    assert found["2"].tokens_per_expert == (1, 2, 0)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)  # 读取不影响前向
    assert sum(expert_statistics(model)["0"].tokens_per_expert) == 24
    model[0].load_counter.reset()
    assert expert_statistics(model)["0"].tokens_per_expert == (0, 0, 0, 0)
    json.dumps({name: entry.to_dict() for name, entry in found.items()})


def test_shown_as_tables():
    load = LoadCounter(20)
    load.add(torch.arange(20))
    found = ExpertStatistics.of(load)
    text, page = str(found), found._repr_html_()
    assert "最大/平均" in text and "95.0%" in text and "…" in text
    assert page.startswith("<table>") and "95.0%" in page
    assert "没有" in str(expert_statistics(nn.Linear(2, 2)))


def test_only_modules():
    with pytest.raises(InputError, match="model"):
        expert_statistics("model")
