"""examples/own_moe.py 照原样能运行：没有登记时给出建议，登记后替换，两次训练的损失相同。"""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from deepseek_opt.integrations import moe_adapter

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_moe.py"


def test_runs_and_learns_the_same(capsys, monkeypatch):
    monkeypatch.setattr(moe_adapter, "ADAPTERS", {})
    main = runpy.run_path(str(EXAMPLE), run_name="own_moe")["main"]
    curves = main(["--steps", "8"])
    assert curves["ours"] == pytest.approx(curves["plain"], rel=2e-3)
    assert curves["ours"][-1] < 0.9 * curves["ours"][0]
    out = capsys.readouterr().out.replace("\n", "").replace(" ", "")
    assert "像是MoE" in out and "register_moe" in out and "已替换" in out
    assert "还原之后" in out
