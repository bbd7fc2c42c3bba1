"""examples/train_stdlib_mtp.py：几步训练、续训、导出；主模型的张量逐位不变，读回能用。"""

import importlib.util
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.usefixtures("threads")
def test_a_few_steps(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from safetensors.torch import load_file

    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    spec = importlib.util.spec_from_file_location("train_mtp_", EXAMPLES / "train_stdlib_mtp.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "NEW", 16)
    monkeypatch.setattr(example, "BATCH", 4)
    # 看一次钟过一秒：走几步与机器的快慢无关
    monkeypatch.setattr(example, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    words = ["--state", str(tmp_path / "state"), "--out", str(tmp_path / "out")]
    words += ["--rows", "8", "--stride", "400", "--log-seconds", "0"]
    before = torch.load
    example.main([*words, "--minutes", "0.1"])
    steps = before(tmp_path / "state" / "checkpoint.pt")["progress"][0]
    found = example.main([*words, "--minutes", "0.2"])  # 续训
    assert before(tmp_path / "state" / "checkpoint.pt")["progress"][0] > steps > 0
    assert len(found["acceptance"]) == 4 and found["tokens_per_step"] >= 1
    folder = example.data.MODEL_FOLDER
    same = "model.safetensors"
    assert (folder / same).read_bytes() == (tmp_path / "out" / same).read_bytes()
    old, new = (load_file(f / "mtp.safetensors") for f in (folder, tmp_path / "out"))
    assert set(old) == set(new) and any(not torch.equal(old[k], new[k]) for k in old)
