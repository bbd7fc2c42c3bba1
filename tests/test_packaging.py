"""打包与仓库的约定：导入轻、标签对、没有机器相关的路径、构建逻辑的边角。"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import deepseek_opt

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="不在源码仓库里")
sys.path.insert(0, str(ROOT))
import build_native  # noqa: E402  # pylint: disable=wrong-import-position


def tracked_files() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("不是 git 仓库")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    """import deepseek_opt 不导入 torch 以外的大件，更不导入 transformers。"""
    code = (
        "import sys, deepseek_opt;"
        "print([n for n in ('transformers', 'matplotlib', 'peft') if n in sys.modules])"
    )
    assert run(code) == "[]"


def test_works_without_transformers():
    """没有安装 transformers 时，除 transformers 接入外的公共名字都能用。"""
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import deepseek_opt as dso\n"
        "for name in dso.__all__: getattr(dso, name)\n"
        "print('ok')"
    )
    assert run(code) == "ok"


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", deepseek_opt.__version__)
    assert "version" in project()["dynamic"]


def test_metadata():
    meta = project()
    assert meta["requires-python"] == ">=3.11"
    assert "torch>=2.10" in meta["dependencies"]
    # 没有 transformers 也要能装：它只在附加依赖里。
    assert not any(name.startswith("transformers") for name in meta["dependencies"])
    assert meta["scripts"]["deepseek-opt"].startswith("deepseek_opt.cli")
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:200]


def test_no_machine_paths():
    """仓库里没有某台机器的绝对路径。"""
    pattern = re.compile(r"(?<![\w./])/(?:home|root|Users|tmp|work|opt)/[\w.-]+")
    kinds = {".py", ".c", ".h", ".cpp", ".cu", ".cuh", ".md", ".toml", ".sh", ".yaml", ".json"}
    found = []
    for path in tracked_files():
        if path.suffix not in kinds or path == Path(__file__).resolve():
            continue
        text = path.read_text(encoding="utf-8")
        found += [f"{path.relative_to(ROOT)}: {hit}" for hit in pattern.findall(text)]
    assert not found


def test_no_compiled_files_tracked():
    suffixes = {".so", ".o", ".a", ".pyc", ".gcda", ".gcno"}
    assert not [path for path in tracked_files() if path.suffix in suffixes]


@pytest.mark.parametrize(
    "name, isa",
    [
        ("csrc/isa/avx512bf16.c", "avx512bf16"),
        ("csrc/isa/avx512vnni.c", "avx512vnni"),
        ("csrc/isa/avx512_gemm.c", "avx512"),
        ("csrc/isa/avx2.c", "avx2"),
        ("csrc/isa/select.c", "scalar"),
        ("csrc/avx2_like_name.c", "scalar"),
    ],
)
def test_isa_of_file(name, isa):
    assert build_native.Builder._isa_of(Path(name)) == isa


@pytest.fixture
def tree(tmp_path):
    """csrc 的一份副本：构建测试不碰真正的 build/。"""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    return tmp_path


def units(tree, monkeypatch, isas):
    monkeypatch.setenv("DEEPSEEK_OPT_BUILD_ISAS", isas)
    return build_native.Builder(tree).c_units()


def test_scalar_only_build(tree, monkeypatch):
    """只编译标量：没有任何 -m 标志，也没有其他指令集的文件。"""
    names = {unit.source.name for unit in units(tree, monkeypatch, "scalar")}
    assert {"scalar.c", "select.c"} <= names and not {n for n in names if n.startswith("avx")}
    for unit in units(tree, monkeypatch, "scalar"):
        assert not [flag for flag in unit.command if flag.startswith("-mavx")]
        assert "-march=native" not in unit.command and "-ffast-math" not in unit.command


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="只有 x86-64 有多个指令集")
def test_isa_flags_stay_in_their_files(tree, monkeypatch):
    """AVX 标志只给自己的文件：基础代码在没有 AVX 的机器上也能跑。"""
    for unit in units(tree, monkeypatch, "scalar,avx2,avx512,avx512_vnni,avx512_bf16"):
        has = "-mavx2" in unit.command
        assert has == unit.source.name.startswith("avx"), unit.source
        if unit.source.name == "select.c":
            assert "-DDSO_HAVE_AVX2=1" in unit.command


def test_unknown_isa_is_an_error(tree, monkeypatch):
    with pytest.raises(build_native.BuildError, match="不认识的指令集：neon"):
        units(tree, monkeypatch, "scalar,neon")


def test_builds_without_python_headers(tree, monkeypatch, capsys):
    """没有 Python.h（没装 python3-dev）：略去 module.c，其余照常。"""
    monkeypatch.setattr(build_native.Builder, "_try_compile", staticmethod(lambda *_: False))
    assert not build_native.Builder(tree)._module_unit()
    assert "没有找到 Python.h" in capsys.readouterr().out


def test_missing_nvcc(tree, monkeypatch, capsys):
    (tree / "cuda").mkdir()
    (tree / "cuda" / "x.cu").write_text("")
    monkeypatch.setattr(build_native, "find_nvcc", lambda: None)
    monkeypatch.delenv("DEEPSEEK_OPT_CUDA", raising=False)
    assert not build_native.wants_cuda(tree)
    assert "没有找到 nvcc" in capsys.readouterr().out
    monkeypatch.setenv("DEEPSEEK_OPT_CUDA", "1")
    with pytest.raises(build_native.BuildError, match="找不到 nvcc"):
        build_native.wants_cuda(tree)


def test_header_change_rebuilds_only_users(tmp_path, monkeypatch):
    """改头文件只重编译包含它的源文件；什么都没改时什么都不编译。"""
    monkeypatch.setenv("DEEPSEEK_OPT_BUILD_ISAS", "scalar")
    source = tmp_path / "csrc"
    source.mkdir()
    (source / "a.h").write_text("int a(void);\n")
    (source / "a.c").write_text('#include "a.h"\nint a(void) { return 1; }\n')
    (source / "b.c").write_text("int b(void);\nint b(void) { return 2; }\n")
    builder = build_native.Builder(tmp_path)

    def stale():
        return [unit.source.name for unit in builder.c_units() if not builder._fresh(unit)]

    assert stale() == ["a.c", "b.c"]
    builder._compile_all(builder.c_units())
    assert stale() == []
    later = (builder.out / "csrc_a.o").stat().st_mtime + 5
    os.utime(source / "a.h", (later, later))
    assert stale() == ["a.c"]


def test_what_compiled_without_warnings_serves_the_strict_build(tmp_path, monkeypatch):
    """make lint 只重新编译上次有警告的，警告当错误；没有警告的与 make build 是同一份。"""
    monkeypatch.setenv("DEEPSEEK_OPT_BUILD_ISAS", "scalar")
    monkeypatch.delenv("DEEPSEEK_OPT_WERROR", raising=False)
    source = tmp_path / "csrc"
    source.mkdir()
    (source / "clean.c").write_text("int a(void);\nint a(void) { return 1; }\n")
    (source / "warns.c").write_text("int b(void);\nint b(void) { int unused; return 2; }\n")

    def stale(builder):
        return [unit.source.name for unit in builder.c_units() if not builder._fresh(unit)]

    plain = build_native.Builder(tmp_path)
    plain._compile_all(plain.c_units())
    assert not stale(plain)
    monkeypatch.setenv("DEEPSEEK_OPT_WERROR", "1")
    strict = build_native.Builder(tmp_path)
    assert stale(strict) == ["warns.c"]
    with pytest.raises(build_native.BuildError, match="编译失败.*warns.c"):
        strict._compile_all(strict.c_units())
    assert stale(plain) == ["warns.c"]
    (source / "warns.c").write_text("int b(void);\nint b(void) { return 2; }\n")
    strict._compile_all(strict.c_units())
    assert not stale(strict) and not stale(plain)


def test_compile_error_names_command(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_OPT_BUILD_ISAS", "scalar")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "bad.c").write_text("int broken(\n")
    builder = build_native.Builder(tmp_path)
    with pytest.raises(build_native.BuildError, match="编译失败.*bad.c"):
        builder._compile_all(builder.c_units())


def test_wheel(tmp_path):
    """轮子：cp311-abi3 标签，含本地库与随包资源，不含源码与测试。"""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-build-isolation"),
            *("--no-deps", "-q", "-w", str(tmp_path)),
        ],
        env={**os.environ, "DEEPSEEK_OPT_CUDA": "0", "DEEPSEEK_OPT_COVERAGE": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "deepseek_opt/_C.abi3.so" in names
    assert not [n for n in names if n.startswith(("tests/", "csrc/", "build_"))]
    assets = ROOT / "deepseek_opt" / "assets"
    for path in assets.rglob("*") if assets.is_dir() else ():
        if path.is_file():
            assert path.relative_to(ROOT).as_posix() in names
