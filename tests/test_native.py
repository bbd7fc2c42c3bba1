"""本地库的加载、指令集查询与切换。"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepseek_opt import _native
from deepseek_opt.errors import InputError, UnsupportedError

ORDER = ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"]


@pytest.fixture
def fresh():
    """清掉加载结果的缓存，测试后恢复。"""

    def clear():
        _native._load_cpu.cache_clear()
        _native._load_cuda.cache_clear()

    clear()
    yield
    clear()


def run_python(code: str, **env: str) -> subprocess.CompletedProcess:
    """在新进程里运行：指令集由环境变量决定，只在加载时读一次。"""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_load():
    assert _native.load() and _native.loaded()
    assert _native.load_error() is None


def test_isas_are_ordered_and_consistent():
    compiled, available = _native.compiled_isas(), _native.available_isas()
    assert compiled == ORDER[: len(compiled)]
    assert available == compiled[: len(available)] and available[0] == "scalar"
    assert _native.isa() in available
    if platform.machine() not in ("x86_64", "AMD64"):
        assert compiled == ["scalar"]


def test_set_isa_round_trip():
    before = _native.isa()
    try:
        for name in _native.available_isas():
            _native.set_isa(name)
            assert _native.isa() == name
    finally:
        _native.set_isa(before)


def test_set_isa_rejects_unknown():
    before = _native.isa()
    with pytest.raises(InputError, match="neon.*可选：scalar"):
        _native.set_isa("neon")
    assert _native.isa() == before


def test_op_rejects_unknown_isa():
    with pytest.raises(Exception, match="指令集"):
        torch.ops.deepseek_opt._set_isa("neon")


def test_environment_forces_isa():
    code = "from deepseek_opt import _native; print(_native.isa())"
    done = run_python(code, DEEPSEEK_OPT_ISA="scalar")
    assert done.stdout.strip() == "scalar", done.stderr


def test_every_isa_computes_the_same():
    """同一个算子在每个指令集上结果相近（细致的比较在各算子的测试里）。"""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 37, generator=generator)
    weight = torch.randn(11, 37, generator=generator)
    before, results = _native.isa(), []
    try:
        for name in _native.available_isas():
            _native.set_isa(name)
            results.append(torch.ops.deepseek_opt.linear(x, weight, None))
    finally:
        _native.set_isa(before)
    for result in results:
        torch.testing.assert_close(result, x @ weight.T, rtol=2e-5, atol=2e-5)


def test_build_info():
    info = _native.build_info()
    assert info["error"] is None and info["isa"] in info["available_isas"]
    assert info["torch"] == torch.__version__
    assert info["library"].endswith(".so")
    if torch.version.cuda is None:
        assert info["cuda_library"] is None and "不带 CUDA" in info["cuda_error"]


@pytest.mark.usefixtures("fresh")
def test_missing_library(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPSEEK_OPT_LIBRARY", str(tmp_path / "absent.so"))
    assert not _native.load()
    assert "没有找到本地库 absent.so" in _native.load_error()
    assert "--no-build-isolation" in _native.load_error()
    with pytest.raises(UnsupportedError, match="没有找到本地库"):
        _native.isa()
    info = _native.build_info()
    assert info["library"] is None and info["compiled_isas"] == []


@pytest.mark.usefixtures("fresh")
def test_broken_library(monkeypatch, tmp_path):
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv("DEEPSEEK_OPT_LIBRARY", str(broken))
    assert not _native.load()
    assert "broken.so 加载失败" in _native.load_error()


@pytest.mark.usefixtures("fresh")
def test_old_torch(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    assert not _native.load()
    assert _native.load_error() == "需要 torch >= 2.10，装着的是 2.9.1。"


@pytest.mark.usefixtures("fresh")
def test_cuda_library_missing(monkeypatch):
    """torch 带 CUDA 而 CUDA 库没有编译：CPU 照常，原因说得清。"""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_native, "CUDA_LIBRARY", "absent_cuda.so")
    assert _native.load() and not _native.cuda_loaded()
    assert "absent_cuda.so" in _native.cuda_load_error()


def test_cuda_library_finds_torch_cuda():
    """取当前流的函数在 libtorch_cuda.so 里：CUDA 库经 libtorch.so 依赖它，少了这个依赖到用户那里才载入失败。"""
    library = Path(_native.__file__).with_name(_native.CUDA_LIBRARY)
    if not library.is_file():
        pytest.skip("没有编译 CUDA 部分")
    assert b"\0libtorch.so\0" in library.read_bytes()


def test_extension_module_imports():
    """有 Python.h 时编译出的 PyInit：import deepseek_opt._C 也能加载（新进程：只能登记一次）。"""
    done = run_python("import torch, deepseek_opt._C as c; print(c.__doc__)")
    if "PyInit" in done.stderr:
        pytest.skip("构建时没有 Python.h")
    assert "torch.ops.deepseek_opt" in done.stdout, done.stderr


def test_import_without_library(tmp_path):
    """没有本地库，包仍能导入。"""
    code = "import deepseek_opt; from deepseek_opt import _native; print(_native.load_error())"
    done = run_python(code, DEEPSEEK_OPT_LIBRARY=str(tmp_path / "none.so"))
    assert done.returncode == 0, done.stderr
    assert "没有找到本地库 none.so" in done.stdout
