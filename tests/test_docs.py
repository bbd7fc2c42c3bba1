"""文档：例子能运行，链接与命令存在，表与代码一致，公共名字都有中文说明和例子。"""

import contextlib
import importlib.util
import inspect
import io
import json
import logging
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

import deepseek_opt
from deepseek_opt import ops
from deepseek_opt.benchmarks import Row, suite_names
from deepseek_opt.cli import COMMANDS
from deepseek_opt.integrations import specs

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + PAGES
NOTEBOOK = ROOT / "examples" / "快速上手.ipynb"
CHINESE = re.compile("[\u4e00-\u9fff]")
EXAMPLE = re.compile(r">>> |示例|Example")
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def read(path):
    return path.read_text(encoding="utf-8")


def blocks(text, language):
    return [code for kind, code in FENCE.findall(text) if kind == language]


def name_of(path):
    return str(path.relative_to(ROOT))


# ---- 例子 ----


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """例子在空目录里运行；它们登记的类、改动的日志设置在结束后还原。"""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(specs, "SPECS", dict(specs.SPECS))
    logger = logging.getLogger("deepseek_opt")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers


def run_all(codes, label):
    """同一页的各段依次在一个命名空间里运行，如同读者照抄；返回打印的内容。"""
    namespace, printed = {"__name__": "example"}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        for index, code in enumerate(codes):
            exec(compile(code, f"{label}#{index}", "exec"), namespace)  # pylint: disable=exec-used
    return printed.getvalue()


WITH_CODE = [path for path in TEXTS if blocks(read(path), "python")]


@pytest.mark.usefixtures("sandbox")
@pytest.mark.parametrize("path", WITH_CODE, ids=name_of)
def test_python_examples_run(path):
    run_all(blocks(read(path), "python"), name_of(path))


def test_readme_example_is_short_and_says_what_it_did():
    (code,) = blocks(read(ROOT / "README.md"), "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 13
    assert "assert (before == after).all()" in code and "stdlib_model" in code


@pytest.mark.usefixtures("sandbox")
def test_notebook_runs_and_its_outputs_are_clean():
    cells = [c for c in json.loads(read(NOTEBOOK))["cells"] if c["cell_type"] == "code"]
    for cell in cells:
        assert all(out["output_type"] != "error" for out in cell["outputs"])
        assert all(out.get("name") != "stderr" for out in cell["outputs"])
    assert any(cell["outputs"] for cell in cells), "笔记本应带着输出提交"
    printed = run_all(["".join(cell["source"]) for cell in cells], NOTEBOOK.name)
    assert "与优化时的贪心生成相同： True" in printed
    assert not re.search(r"/(?:home|root|Users|tmp|opt|usr)/", read(NOTEBOOK))


# ---- 链接、路径、命令 ----


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_links_point_to_existing_files(path):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", FENCE.sub("", read(path))):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / unquote(target)).exists(), target


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_paths_in_the_text_exist(path):
    folders = "csrc|cuda|deepseek_opt|tests|scripts|docs|benchmarks|examples"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", FENCE.sub("", read(path))):
        generated = name.startswith("benchmarks/results/") or re.search(r"/x\.|_x\.", name)
        assert generated or (ROOT / name).exists(), name


def test_every_page_is_in_the_table_of_contents():
    listed = re.findall(r"^(?:.*<(.+)>|([^\s:`{][^<\n]*))$", read(ROOT / "docs" / "index.md"), re.M)
    names = {first or second for first, second in listed}
    for path in PAGES:
        assert path.stem == "index" or path.stem in names, path.stem
    assert (ROOT / "docs" / NOTEBOOK.name).resolve() == NOTEBOOK.resolve()


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_commands_exist(path):
    targets = set(re.findall(r"^([a-z]+):", read(ROOT / "Makefile"), re.MULTILINE))
    text = read(path)
    code = "\n".join(blocks(text, "bash")) + "\n".join(re.findall(r"`([^`\n]+)`", text))
    for target in re.findall(r"^make ([a-z]+)", code, re.MULTILINE):
        assert target in targets, target
    for command in re.findall(r"^deepseek-opt ([a-z]+)", code, re.MULTILINE):
        assert command in COMMANDS, command
    for suite in re.findall(r"deepseek-opt bench (\w+)", code):
        assert suite in suite_names(), suite


# ---- 表与代码一致 ----


def test_model_tables_agree_with_the_specs():
    text = read(ROOT / "docs" / "支持的模型.md")
    rows = dict(re.findall(r"^\| (\w+) \| `(\w+)` \|", text, re.MULTILINE))
    known = [*specs.SPECS, *specs.SKIPPED]
    assert rows == {path.split(".")[2]: path.rsplit(".", 1)[1] for path in known}
    for path, reason in specs.SKIPPED.items():
        assert f"`{path.rsplit('.', 1)[1]}` | {reason} |" in text
    assert f"{len(specs.SPECS)} 种 MLA 注意力类" in read(ROOT / "README.md")
    (version,) = set(re.findall(r'"transformers(>=[\d.]+)"', read(ROOT / "pyproject.toml")))
    assert version.replace(">=", "transformers >= ") in text


@pytest.mark.parametrize(
    ("said", "source", "pattern"),
    [
        ("词元不多于 256 个", "deepseek_opt/integrations/transformers.py", r"FUSED_ROWS = 256\n"),
        ("按 2048 个查询", "deepseek_opt/integrations/transformers.py", r"QUERY_TOKENS = 2048\n"),
        ("至多 4096 个查询", "csrc/mla_prefill.c", r"SEGMENT =\s+4096,"),
        ("每 48 个查询", "csrc/mla_prefill.c", r"TILE = 48 "),
        ("每 256 个键", "csrc/mla_prefill.h", r"DSO_KV_CHUNK = 256,"),
        ("64 个查询", "csrc/mla_decode.c", r"GROUP = 64,"),
        ("64 个槽位", "csrc/mla_decode.c", r"BLOCK = 64,"),
        ("至多 32 段", "csrc/mla_decode.c", r"MAX_SPLITS = 32,"),
        ("至 96 行", "csrc/gemm.h", r"DSO_DOT_MAX_M = 96,"),
        ("看每 64 个分数", "csrc/sample_filter.c", r"BLOCK = 64,"),
        ("128 列", "csrc/gemm.h", r"DSO_NB = 128,"),
        ("词元 x 头不多于 2048", "cuda/config.cuh", r"HEADS_PRODUCTS = 2048,"),
        ("16 列一个面板", "csrc/isa/isa.h", r"DSO_PANEL 16 "),
    ],
)
def test_numbers_in_the_architecture_page_are_the_code_s(said, source, pattern):
    assert said in read(ROOT / "docs" / "architecture.md")
    assert re.search(pattern, read(ROOT / source)), source


# ---- 读数 ----


@pytest.fixture(name="results")
def results_script():
    spec = importlib.util.spec_from_file_location("results", ROOT / "docs" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_results_in_the_documents_are_the_recorded_ones(results):
    assert results.main(["--check"]) == 0, "请运行 python docs/results.py"


def reading(date="2026-01-02T00:00:00", quick=False):
    rows = [
        Row("a", "解码", "speed", "ms", "对照", 120.0, 2.0, 50.0, 0.5),
        Row("b", "内存", "saving", "MiB", "对照", 100.0, 70.0, 0.4),
        Row("c", "开销", "info", "us", "", None, 4.5),
        Row("d", "缺席", "speed", "ms", "对照", None, None, None, note="没有 | 指令"),
    ]
    return {
        "suite": "mla",
        "date": date,
        "shape": "形状",
        "quick": quick,
        "threads": 2,
        "machine": {"cpu": "某 CPU", "cores": 2, "memory_gib": 24.0, "isa": "avx2"},
        "versions": {"torch": "2.13"},
        "roofline": [{"threads": 2, "read_gbps": 36.0, "gflops": {"float32": 200.0}}],
        "rows": [row.to_dict() for row in rows],
    }


def test_results_table_shows_readings_and_misses(results):
    short, full = (results.table(reading(), everything) for everything in (False, True))
    assert "| 解码 | 对照：120.0 ms | 2.00 ms | 60.0x | ≥ 50.0x，达到 | 50% |" in short
    assert "| 内存 | 对照：100.0 MiB | 70.0 MiB | 省 30.0% | ≥ 省 40.0%，**未达到** | — |" in short
    assert "达到 1 / 2" in short and "开销" not in short
    assert "| 开销 | — | 4.50 us | — |  | — |" in full and "没有 \\| 指令" in full


def test_results_prefer_complete_and_recent_readings(results, tmp_path):
    other = {**reading("2026-02-01"), "shape": "另一种"}
    stored = {"a": reading(), "b": reading("2026-03-01"), "c": reading("2026-04-01", quick=True)}
    stored["d"] = other
    for name, document in {**stored, "gpu": {"device": "GPU"}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    assert [d["date"] for d in results.load(tmp_path)] == ["2026-02-01", "2026-03-01"]
    text = f"前\n{results.BEGIN}\n旧\n{results.END}\n后"
    assert "旧" not in results.updated(text, results.load(tmp_path), True)
    assert results.NONE_YET in results.updated(text, [], False)
    with pytest.raises(ValueError, match="恰好有一个"):
        results.updated("没有区块", [], False)


# ---- 公共名字的说明 ----


PUBLIC = [name for name in deepseek_opt.__all__ if not name.startswith("__")]
OPS = [
    name
    for name, value in vars(ops).items()
    if inspect.isfunction(value)
    and value.__module__.startswith(ops.__name__)
    and not name.startswith("_")
]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_a_chinese_docstring_with_an_example(name):
    text = inspect.getdoc(getattr(deepseek_opt, name)) or ""
    assert CHINESE.search(text), f"{name} 没有中文说明"
    assert EXAMPLE.search(text), f"{name} 的说明没有例子"


@pytest.mark.parametrize("name", OPS)
def test_ops_have_a_chinese_docstring_with_an_example(name):
    text = inspect.getdoc(getattr(ops, name)) or ""
    assert CHINESE.search(text) and EXAMPLE.search(text), name


def own_members(cls):
    for name, member in vars(cls).items():
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if not name.startswith("_") and inspect.isfunction(function) and name != "model_post_init":
            yield name


@pytest.mark.parametrize("name", [n for n in PUBLIC if inspect.isclass(getattr(deepseek_opt, n))])
def test_public_methods_have_a_chinese_docstring(name):
    cls = getattr(deepseek_opt, name)
    texts = {member: inspect.getdoc(getattr(cls, member)) or "" for member in own_members(cls)}
    missing = [member for member, text in texts.items() if not CHINESE.search(text)]
    assert not missing
