"""deepseek-opt presets。"""

import pytest
from rich.console import Console

from deepseek_opt import cli
from deepseek_opt.cli import presets
from deepseek_opt.config import OptimizationProfile


def test_list_plain(capsys):
    assert cli.run(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert dict(line.split("\t") for line in lines) == OptimizationProfile.presets()


def test_list_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(presets, "Console", lambda: Console(force_terminal=True, width=120))
    assert cli.run(["presets"]) == 0
    out = capsys.readouterr().out
    assert "预设配置" in out
    assert "low_memory" in out


def test_show_is_loadable(capsys, tmp_path):
    assert cli.run(["presets", "low_memory"]) == 0
    path = tmp_path / "p.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert OptimizationProfile.from_file(path) == OptimizationProfile.preset("low_memory")


@pytest.mark.parametrize("suffix", [".yaml", ".json", ".toml"])
def test_save(capsys, tmp_path, suffix):
    path = tmp_path / f"p{suffix}"
    assert cli.run(["presets", "training", "-o", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    assert OptimizationProfile.from_file(path) == OptimizationProfile.preset("training")


def test_unknown(capsys):
    assert cli.run(["presets", "trainning"]) == 1
    assert "是不是想写 training？" in capsys.readouterr().err
