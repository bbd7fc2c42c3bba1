"""examples/train_mtp.py 的两种写法照原样能运行：MTP 学到东西，存盘读回接受率不变。"""

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "train_mtp.py"


@pytest.fixture(name="example")
def example_module():
    spec = importlib.util.spec_from_file_location("train_mtp", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("threads")
def test_trainer_on_the_corpus(example, tmp_path):
    pytest.importorskip("transformers")
    words = ["trainer", "--steps", "12", "--stride", "200", "--out", str(tmp_path)]
    words += ["--threads", "1"]
    before, after, again = example.main(words)["trainer"]
    assert len(before) == 2 and after[0] > before[0] and again == after
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.usefixtures("threads")
def test_plain_loop_with_an_own_model(example, capsys):
    before, after = example.main(["own", "--steps", "25", "--stride", "200", "--threads", "1"])[
        "own"
    ]
    assert after[0] > before[0]
    assert "主损失" in capsys.readouterr().out
