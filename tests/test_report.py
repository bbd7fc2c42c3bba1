"""OptimizationReport：表格、HTML、字典。"""

from __future__ import annotations

import json
from collections import Counter

from deepseek_opt.report import OptimizationReport, ReportEntry


def report():
    entries = [
        ReportEntry("layers.0.attn", "mla", "DeepseekV3Attention", True),
        ReportEntry("layers.1.attn", "mla", "DeepseekV3Attention", True),
        ReportEntry("layers.2.attn", "mla", "Odd", False, "不认识 [x] <b>", True),
        ReportEntry("", "moe", "", False, "还没有提供", False),
    ]
    counts = Counter({("layers.0.attn", "双向注意力"): 3})
    return OptimizationReport("模型", entries, counts)


def test_lists():
    r = report()
    assert [e.name for e in r.replaced] == ["layers.0.attn", "layers.1.attn"]
    assert len(r.skipped) == 2 and [e.name for e in r.unmet] == ["layers.2.attn"]


def test_render_groups_rows_and_keeps_brackets():
    text = report().render(width=160)
    assert str(report())
    for word in (
        "layers.0.attn … layers.1.attn",
        "已替换",
        "未替换",
        "不认识 [x] <b>",
        "双向注意力",
        "3",
    ):
        assert word in text, word
    assert "由原实现计算" not in str(OptimizationReport("空"))


def test_html_is_escaped():
    page = report()._repr_html_()
    assert page.count("<table>") == 2 and "&lt;b&gt;" in page and "<b>" not in page


def test_dictionary_is_json():
    data = json.loads(json.dumps(report().to_dict(), ensure_ascii=False))
    assert len(data["replaced"]) == 2 and data["skipped"][0]["reason"].startswith("不认识")
    assert data["fallbacks"] == [{"name": "layers.0.attn", "reason": "双向注意力", "count": 3}]
