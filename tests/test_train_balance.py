"""examples/train_balance.py：照原样能运行，读数齐全，同样的种子结果相同，图与文档的表由读数画出。"""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "train_balance.py"
RESULTS = ROOT / "benchmarks" / "results" / "balance.json"


@pytest.fixture(scope="module", name="run")
def _run():
    return runpy.run_path(str(EXAMPLE), run_name="train_balance")["main"]


@pytest.fixture(autouse=True)
def _threads():
    """例子把线程数设为 1。"""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_quick_run(run, tmp_path):
    path = tmp_path / "balance.json"
    quick = ["--steps", "4", "--every", "2", "--stride", "40", "--json", str(path)]
    document = run([*quick, "--strategies", "none", "bias_update"])
    assert json.loads(path.read_text(encoding="utf-8")) == document
    for found in document["runs"].values():
        assert [entry["step"] for entry in found["history"]] == [2, 4]
        for entry in found["history"]:
            assert all(1 <= value <= 16 for value in entry["max_over_mean"])
            assert all(0 <= value <= 1 for value in entry["entropy"])
            assert len(entry["max_over_mean"]) == document["model"]["layers"]
    none, bias = (found["history"] for found in document["runs"].values())
    assert none[0]["train_loss"] == pytest.approx(bias[0]["train_loss"], rel=1e-3)
    assert none[1]["held_out_loss"] < none[0]["held_out_loss"]


def test_figures(run, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("balance.png", "balance.svg"):
        run(["--from-json", str(RESULTS), "--figure", str(tmp_path / name)])
        assert (tmp_path / name).stat().st_size > 10_000
    text = (tmp_path / "balance.svg").read_text(encoding="utf-8")
    assert "偏置更新" in text and "留出损失" in text


def test_recorded_run_shows_what_the_documentation_says():
    """提交的读数：偏置更新与辅助损失都明显比不均衡的均衡。"""
    runs = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
    worst = {name: max(found["history"][-1]["max_over_mean"]) for name, found in runs.items()}
    assert worst["none"] > 2 * max(worst["bias_update"], worst["global_aux_loss"])
