"""套件 quant：每种量化一行，准确率与 bf16 相差的百分点，损失与大小。"""

from __future__ import annotations

import pytest

from deepseek_opt.benchmarks import quant, runner
from deepseek_opt.benchmarks.cases import Row

pytest.importorskip("transformers")


def test_suite_reports_accuracy_loss_and_size(monkeypatch):
    monkeypatch.setattr(quant, "_WINDOW", 96)
    quant._windows.cache_clear()
    quant._baseline.cache_clear()
    only = ("quant.none", "quant.int8", "quant.int4.64")
    result = runner.run_suite("quant", quick=True, only=only)
    quant._windows.cache_clear()
    quant._baseline.cache_clear()
    assert result.document["shape"] == "随包的 stdlib_model"
    rows = {row.key: row for row in result.rows}
    assert set(rows) == {
        "quant.none",
        "quant.int8",
        "quant.int4.64.symmetric",
        "quant.int4.64.zero",
    }
    bits = [row.details["bits_per_weight"] for row in result.rows]
    assert bits[0] == 16 and 8 < bits[1] < 8.3 and bits[2] == 4.5 and bits[3] == 4.625
    for row in result.rows:
        assert row.kind == "accuracy" and row.ratio == row.ours - row.peer
        assert row.details["tokens"] == 95 and row.details["loss"] > 0
    assert rows["quant.int4.64.zero"].target is None and "个百分点" in result.render()


@pytest.mark.parametrize(("ours", "met"), [(52.6, True), (52.4, False)])
def test_target_is_a_difference(ours, met):
    row = Row("k", "t", "accuracy", "%", "p", 53.0, ours, target=-0.5)
    assert row.met is met
