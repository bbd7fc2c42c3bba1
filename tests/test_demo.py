"""演示：小的随机模型上走完全部步骤，检查不通过、没有运行、没有输入等各条路。"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("transformers")
# pylint: disable=wrong-import-position

from deepseek_opt import ExpertStatistics, cli  # noqa: E402
from deepseek_opt.benchmarks.probe import IMPLEMENTATIONS, ProbeError, ProbeReading  # noqa: E402
from deepseek_opt.cli import demo as command  # noqa: E402
from deepseek_opt.demo import (  # noqa: E402
    DemoOptions,
    chart,
    compare,
    data,
    drafting,
    experts,
    heatmap,
    lengths,
    page,
    run,
)
from deepseek_opt.errors import InputError, UnsupportedError  # noqa: E402
from deepseek_opt.optimize import is_optimized  # noqa: E402
from tests.tiny_models import make_model  # noqa: E402

_VOCABULARY = 96


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory):
    """一个小的随机模型，连同按字符切分的分词器，HF 格式。"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    make_model("deepseek_v3", max_position_embeddings=2048).save_pretrained(path)
    characters = ["<unk>", *map(chr, range(32, 32 + _VOCABULARY - 2)), "\n"]
    words = {c: i for i, c in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
    return path


def _options(folder: Path, output: Path) -> DemoOptions:
    return DemoOptions(
        folder=folder,
        output=output,
        threads=1,
        windows=2,
        window=24,
        batches=(1, 2),
        contexts=(8,),
        steps=3,
        lengths=(32, 64),
        prompt=16,
        continuation=4,
        expert_tokens=(1, 6),
        draft_rows=2,
        draft_prompt=8,
        draft_new=6,
    )


class FakeProbe:
    """不开子进程的读数：内存与时间随长度增长，逐步计算平方增长。"""

    def __init__(self, name: str, fail_at: int | None = None, ours_bytes: int = 100):
        self.name, self.fail_at, self.ours_bytes = name, fail_at, ours_bytes

    def measure(self, batch: int, length: int, *, decode: int, repeats: int) -> ProbeReading:
        assert decode and repeats
        if length == self.fail_at:
            raise ProbeError("子进程退出了")
        unit = self.ours_bytes if self.name == "optimized" else 1000
        if self.name.endswith("eager"):
            unit *= length
        return ProbeReading(batch, length, length / 1e4, length * unit, length, 0.001, "VmHWM")


@pytest.fixture(scope="module", name="result")
def _result(folder, tmp_path_factory):
    """用假的读数、真的模型走一遍。"""
    output = tmp_path_factory.mktemp("out") / "report"
    patch = pytest.MonkeyPatch()
    patch.setattr(lengths, "start_probes", lambda *_: {n: FakeProbe(n) for n in IMPLEMENTATIONS})
    ticks: list[str] = []
    threads = torch.get_num_threads()
    try:
        options = _options(folder, output)
        found = run.run_demo(options, ticks.append)
    finally:
        patch.undo()
        torch.set_num_threads(threads)
    assert len(ticks) == options.ticks
    return found


def test_everything_passes(result):
    assert result.passed, [c for c in result.checks if not c.passed]
    names = " ".join(check.name for check in result.checks)
    assert "准确率" in names and "贪心" in names and "续写" in names
    for entry in result.accuracies:
        assert set(entry.values) == {compare.EAGER, compare.SDPA, compare.OURS}
    assert {c.dtype for c in result.comparisons} == {"float32", "bfloat16"}


def test_original_is_untouched_and_ours_is_really_optimized(folder):
    variants = compare.Variants(data.load_model(folder, torch.float32))
    assert variants.report.replaced
    original, ours = variants.model(compare.EAGER), variants.model(compare.OURS)
    assert original is not ours and original.config._attn_implementation == "eager"
    assert variants.model(compare.SDPA).config._attn_implementation == "sdpa"
    assert not any("forward" in module.__dict__ for module in original.modules())
    pairs = zip(original.parameters(), ours.parameters(), strict=True)
    assert all(a is b for a, b in pairs)


def test_files(result):
    names = {path.name for path in result.files}
    assert {"report.html", "chart.svg", "experts.svg", "results.json"} <= names
    document = json.loads(next(p for p in result.files if p.suffix == ".json").read_text())
    assert document["passed"] is True and len(document["lengths"]["measurements"]) == 10
    assert set(document["versions"]) >= {"torch", "transformers", "deepseek_opt"}
    moe = document["experts"]
    assert set(moe["readings"]) == set(experts.VARIANTS)
    assert all(sum(load["tokens_per_expert"]) == 2 * 24 * 2 for load in moe["loads"].values())
    text = json.dumps(document)
    assert "/" + "home" not in text and str(result.options.output) not in text


class _Checker(HTMLParser):
    """标签配对；收集引用外部资源的属性。"""

    def __init__(self):
        super().__init__()
        self.stack: list[str] = []
        self.external: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.external += [v for k, v in attrs if k in ("src", "href") and v]
        if tag not in ("meta", "br"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag


def test_html_is_self_contained(result):
    text = next(p for p in result.files if p.name == "report.html").read_text(encoding="utf-8")
    checker = _Checker()
    checker.feed(text)
    assert not checker.stack and not checker.external
    assert {"svg", "table", "style", "pre"} <= checker.seen and "script" not in checker.seen
    assert 'lang="zh-CN"' in text and "全部检查通过" in text and "url(" not in text
    assert text.count("http") == text.count("http://www.w3.org/2000/svg")


def test_svg_is_valid_xml_with_one_line_per_series(result):
    root = ElementTree.fromstring(chart.svg(result.table))
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}polyline")) == len(IMPLEMENTATIONS) * len(chart.PANELS)
    assert len(root.findall(f"{space}circle")) == 2 * len(IMPLEMENTATIONS) * len(chart.PANELS)


def test_experts_of_every_variant(result, folder):
    found = result.experts
    assert found.dtype == run._fast_dtype() and len(found.loads) == 1
    sizes = {name: reading.weight_bytes for name, reading in found.readings.items()}
    assert sizes["transformers"] == sizes["none"] > sizes["int8"] > sizes["int4"]
    for reading in found.readings.values():
        assert set(reading.seconds) == {1, 6} and min(reading.seconds.values()) > 0
    names = [check.name for check in result.checks]
    assert {f"{kind} 专家的准确率" for kind in (found.dtype, "int8", "int4")} <= set(names)
    table = next(t for t in result.tables if "专家" in t.title)
    assert len(table.rows) == 4 and len(table.columns) == len(table.rows[0])
    model = data.load_model(folder, torch.float32)
    windows = torch.arange(16).view(2, 8)
    experts.study(model, windows, 0.5, (2,), lambda _: None)
    assert not is_optimized(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_expert_accuracy_check_fails_beyond_half_a_point(result):
    found = result.experts
    readings = {name: replace(each, accuracy=0.5) for name, each in found.readings.items()}
    readings["int4"] = replace(readings["int4"], accuracy=0.494)
    checks = {check.name: check for check in replace(found, readings=readings).checks()}
    assert [c.passed for c in checks.values()] == [True, True, False]
    assert "0.600 个百分点" in checks["int4 专家的准确率"].detail
    assert not replace(result, experts=replace(found, readings=readings)).passed


def test_model_without_experts_has_no_expert_part(result):
    dense = make_model("deepseek_v3", first_k_dense_replace=8)
    ticks: list[str] = []
    assert experts.study(dense, torch.arange(8)[None], 0.5, (1,), ticks.append) is None
    assert len(ticks) == len(experts.VARIANTS)
    without = replace(result, experts=None)
    assert len(without.charts) == 1 and len(without.tables) == len(result.tables) - 1
    assert without.to_dict()["experts"] is None and without.headline()


@pytest.mark.parametrize("count", [4, 200])
def test_heatmap_is_valid_xml_with_one_cell_per_expert(count):
    busy = ExpertStatistics((10 * count, *[0] * (count - 1)), 1 / count, 0.0, float(count))
    idle = ExpertStatistics((0,) * count, None, None, None)
    root = ElementTree.fromstring(heatmap.svg({"a<b": busy, "c": idle}))
    space = "{http://www.w3.org/2000/svg}"
    cells = [r for r in root.iter(f"{space}rect") if r.find(f"{space}title") is not None]
    assert len(cells) == 2 * count and cells[0].get("fill") == heatmap.color(9.0)
    assert {cell.get("fill") for cell in cells[1:]} == {heatmap.color(0.0)}
    assert "100.0%" in cells[0].find(f"{space}title").text
    labels = [text.text for text in root.iter(f"{space}text")]
    assert ("100.0%" in labels) == (count == 4) and "—" in labels
    assert ElementTree.fromstring(heatmap.svg({})) is not None


def test_svg_without_readings():
    empty = lengths.LengthTable("float32", (lengths.Measurement("optimized", 8, None, "未运行"),))
    assert ElementTree.fromstring(chart.svg(empty)) is not None


def test_ticks_cover_the_values():
    for low, high in ((0.02, 5.0), (1.0, 1.0), (30.0, 30.0), (7.0, 2000.0)):
        ticks = chart._ticks(low, high)
        assert ticks[0] <= low * 1.001 and ticks[-1] >= high * 0.999


def test_accuracy_check_fails_beyond_half_a_point():
    good = compare.Accuracy("float32", 1000, {compare.EAGER: 0.5, compare.OURS: 0.496})
    bad = compare.Accuracy("float32", 1000, {compare.EAGER: 0.5, compare.OURS: 0.494})
    assert good.check().passed and not bad.check().passed
    assert "0.600 个百分点" in bad.check().detail


def _generation(tokens: list[list[int]]) -> compare.Generation:
    ids = torch.tensor(tokens)
    return compare.Generation(0.1, 0.01, ids, torch.full(ids.shape, 0.25))


def test_greedy_check_names_the_first_difference():
    runs = {compare.EAGER: _generation([[1, 2, 3]]), compare.OURS: _generation([[1, 9, 3]])}
    check = compare.Comparison("float32", 1, 8, runs).check()
    assert check.passed is False and check.mark == "✗"
    assert "第 0 行从第 1 个起不同" in check.detail and "2.50e-01" in check.detail


def test_failing_check_is_red_everywhere(result, monkeypatch):
    from rich.console import Console

    broken = replace(result, continuation=replace(result.continuation, optimized="另一段"))
    assert not broken.passed
    stream = io.StringIO()
    console = Console(file=stream, width=150, force_terminal=True, color_system="standard")
    command.print_result(broken, console)
    text = stream.getvalue()
    assert "\x1b[1;31m✗" in text and "有检查没有通过" in text
    html = page.render(
        passed=False,
        headline=broken.headline(),
        checks=broken.checks,
        tables=broken.tables,
        charts=[],
        continuation=broken.continuation,
        environment=[],
        notes=[],
    )
    assert '<p class="fail">有检查没有通过</p>' in html and "两边不同" in html
    monkeypatch.setattr(run, "run_demo", lambda *_: broken)
    monkeypatch.setattr("deepseek_opt.demo.run_demo", lambda *_: broken)
    assert cli.run(["demo"]) == 1


def test_memory_check(result):
    readings = []
    for name in ("standard_eager", "standard_sdpa", "optimized"):
        probe = FakeProbe(name, ours_bytes=700)
        reading = probe.measure(1, lengths.JUDGED, decode=1, repeats=1)
        readings.append(lengths.Measurement(name, lengths.JUDGED, reading))
    table = lengths.LengthTable("bfloat16", tuple(readings))
    checks = table.checks()
    assert len(checks) == 2
    eager, sdpa = checks[0], checks[1]
    assert eager.passed and sdpa.passed is False and "少 30.0%" in sdpa.detail
    missing = replace(table, measurements=(replace(readings[1], reading=None, note="未运行"),))
    assert len(missing.checks()) == 1
    check = missing.checks()[0]
    assert check.passed is None and check.mark == "–"
    assert not replace(result, table=table).passed
    assert replace(result, table=missing).passed


def _measure(planner, fail_at=None):
    probes = {name: FakeProbe(name, fail_at) for name in IMPLEMENTATIONS}
    return lengths.measure_lengths(probes, (32, 64), torch.float32, planner, lambda _: None)


def _config():
    return make_model("deepseek_v3").config


def test_planner_skips_what_does_not_fit(monkeypatch):
    config = _config()
    monkeypatch.setattr(lengths, "available_bytes", lambda: 1)
    table = _measure(lengths.Planner(config, torch.float32, None))
    assert all(m.reading is None and "约需" in m.note for m in table.measurements)


def test_planner_skips_what_takes_too_long(monkeypatch):
    monkeypatch.setattr(lengths.time, "monotonic", lambda: 100.0)
    table = _measure(lengths.Planner(_config(), torch.float32, 100.001))
    assert all(m.reading is not None for m in table.measurements if m.length == 32)
    late = [m for m in table.measurements if m.length == 64]
    assert late and all("超出时间" in m.note for m in late)
    assert [m.implementation for m in late] == list(IMPLEMENTATIONS)


def test_late_comparisons_are_listed_as_not_checked(folder):
    options = replace(_options(folder, Path("unused")), contexts=(4, 6))
    with torch.inference_mode():
        found = run._compare_all(options, data.load_tokenizer(folder), -1.0, lambda _: None)
    assert len(found["comparisons"]) == 2  # 每种类型至少一项
    assert len(found["skipped"]) == 6 and all(c.passed is None for c in found["skipped"])


def test_failed_probe_is_reported_not_hidden():
    table = _measure(lengths.Planner(_config(), torch.float32, None), fail_at=32)
    assert all(m.note == "子进程退出了" for m in table.measurements)
    assert table.saving("standard_sdpa", 32) is None


def test_held_out_input_is_real(folder):
    tokenizer = data.load_tokenizer(folder)
    ids = data.prompts(tokenizer, 3, 50)
    assert ids.shape == (3, 50) and len({tuple(row) for row in ids.tolist()}) == 3
    name, text = data.continuation_source()
    assert name == "textwrap.py" and compare.cut_after_def(text).endswith(":\n")
    assert compare.cut_after_def("x = 1\n" * 10) == "x = 1\n" * 5


def test_no_standard_library_sources(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "stdlib_root", lambda: tmp_path)
    monkeypatch.setattr(data, "held_out_files", list)
    with pytest.raises(UnsupportedError, match="没有标准库的源文件"):
        data.held_out_stream(data.load_tokenizer(folder), 10)
    with pytest.raises(UnsupportedError, match="没有标准库的源文件"):
        data.continuation_source()


def test_bad_model_folder(tmp_path):
    with pytest.raises(InputError, match="没有 config.json"):
        data.load_model(tmp_path, torch.float32)


def test_png_needs_matplotlib(result, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert chart.write_png(result.table, tmp_path / "x.png") is False


def test_png(result, tmp_path):
    pytest.importorskip("matplotlib")
    assert chart.write_png(result.table, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_command_rejects_bad_threads(capsys):
    assert cli.run(["demo", "--threads", "0"]) == 1
    assert "--threads" in capsys.readouterr().err


def test_model_without_mtp_layers_is_said(result):
    check = next(c for c in result.checks if c.name.startswith("MTP"))
    assert check.passed is None and "MTP" in check.detail
    assert not result.drafts.runs and drafting.section(result.drafts) == ""


def test_drafting(folder, tmp_path):
    """带 MTP 层的模型：两种类型各一行，fp32 的词元相同；续写按来源着色，转义过。"""
    from deepseek_opt import MTPConfig, attach_mtp

    model = data.load_model(folder, torch.float32)
    attach_mtp(model, config=MTPConfig(depth=2), fresh=True)
    model.save_pretrained(tmp_path)
    models = {"float32": data.load_model(tmp_path, torch.float32)}
    models["bfloat16"] = data.load_model(tmp_path, torch.bfloat16)
    ticks = []
    tokenizer = data.load_tokenizer(folder)
    with torch.inference_mode():
        found = drafting.study(models, tokenizer, 2, 8, 12, ticks.append)
    shapes = [(run.dtype, run.rows) for run in found.runs]
    assert len(ticks) == 2 and shapes == [(d, n) for d in models for n in (1, 2)]
    assert all(check.passed for check in found.checks()) and len(found.checks()) == 2
    assert found.runs[0].speedup > 0 and len(found.table().rows) == 4
    assert all(len(run.acceptance) == drafting.DRAFTS for run in found.runs)
    kinds = {kind for _, kind in found.pieces}
    assert "prompt" in kinds and kinds <= {"prompt", "draft", "main"}
    assert all("generate" not in m.__dict__ and not hasattr(m, "mtp") for m in models.values())
    made = drafting.DraftStudy(found.runs, (("a<b&", "prompt"), ("\n  x", "draft"), ("c", "main")))
    html = drafting.section(made)
    assert "a&lt;b&amp;" in html and '<span class="draft">\n  x</span>' in html
    ElementTree.fromstring(f"<div>{html}</div>")
