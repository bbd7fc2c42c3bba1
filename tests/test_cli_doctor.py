"""deepseek-opt doctor：正常、缺各种东西、各种指令集。"""

import json
import types
import warnings

import pytest
from rich.console import Console

from deepseek_opt import cli
from deepseek_opt.cli import checks, doctor
from deepseek_opt.errors import UnsupportedError

ISAS = ("scalar", "avx2", "avx512", "avx512vnni", "avx512bf16")


def make_native(isa="avx512bf16", compiled=ISAS, available=ISAS, error=None, **extra):
    """假的 _native 模块。"""
    info = {
        "library": "/x/_C.abi3.so",
        "isa": isa,
        "compiled_isas": compiled,
        "available_isas": available,
    }
    values = {
        "__file__": "/x/_native.py",
        "CUDA_LIBRARY": "_C_cuda.so",
        "load_error": lambda: error,
        "build_info": lambda: info,
        "cuda_loaded": lambda: False,
        "cuda_load_error": lambda: "装着的 torch 不带 CUDA。",
        **extra,
    }
    module = types.ModuleType("_native")
    module.__dict__.update(values)
    return module


def make_torch(version="2.13.0", cuda=None, devices=()):
    """假的 torch 模块：devices 是（名字, 能力）。"""
    module = types.ModuleType("torch")
    module.__version__ = version
    module.version = types.SimpleNamespace(cuda=cuda)
    module.get_num_threads = lambda: 1
    module.cuda = types.SimpleNamespace(
        is_available=lambda: bool(devices),
        device_count=lambda: len(devices),
        get_device_name=lambda i: devices[i][0],
        get_device_capability=lambda i: devices[i][1],
    )
    return module


@pytest.fixture
def fake(monkeypatch):
    """换上假的 torch、_native 和机器；返回按项目名取结果的函数。"""

    def _fake(torch=None, native=None, machine=ISAS, versions=None):
        modules = {"torch": torch or make_torch(), "deepseek_opt._native": native or make_native()}
        monkeypatch.setattr(checks, "_import", modules.get)
        monkeypatch.setattr(checks, "_machine_isas", lambda: machine)
        if versions is not None:
            monkeypatch.setattr(checks, "_version", versions.get)
        return {check.name: check for check in checks.collect()}

    monkeypatch.delenv("DEEPSEEK_OPT_ISA", raising=False)
    monkeypatch.delenv("DEEPSEEK_OPT_BUILD_ISAS", raising=False)
    return _fake


def test_runs_on_this_machine(capsys):
    code = cli.run(["doctor", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["usable"] == (code == 0)
    names = {check["name"] for check in document["checks"]}
    assert {"Python", "torch", "本地库", "CUDA", "transformers", "stdlib_model"} <= names
    assert {check["status"] for check in document["checks"]} <= {"ok", "warn", "bad"}


def test_everything_present(fake, capsys):
    found = fake()
    assert found["本地库"].status == found["使用的指令集"].status == "ok"
    assert found["使用的指令集"].value == "AVX-512-BF16"
    assert cli.run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "✓ torch：2.13.0" in out
    assert "结论：可以使用。" in out


def test_isa_spelling(fake):
    spelled = [*ISAS[:-2], "avx512_vnni", "avx512_bf16"]
    found = fake(native=make_native(isa="avx512_bf16", compiled=spelled, available=spelled))
    assert found["使用的指令集"].value == "AVX-512-BF16"
    assert found["指令集"].status == "ok"


def test_terminal_table(fake, capsys, monkeypatch):
    fake(versions={})
    monkeypatch.setattr(doctor, "Console", lambda: Console(force_terminal=True, width=200))
    assert cli.run(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "环境检查" in out
    assert "pip install 'transformers>=5.17'" in out


def test_markup_in_values_is_shown_as_it_is(capsys):
    rows = [checks.Check("组", "名", "ok", "pip install 'a[b]'")]
    Console(width=100).print(doctor._table(rows))
    assert "pip install 'a[b]'" in capsys.readouterr().out


@pytest.mark.parametrize("reason", ["没有找到本地库：请运行 pip install .", "GLIBC 太旧"])
def test_native_missing(fake, capsys, reason):
    found = fake(native=make_native(error=reason))
    assert found["本地库"].status == "bad"
    assert reason in found["本地库"].value
    assert ("pip install" in reason) != ("pip install" in found["本地库"].hint)
    assert "AVX-512-BF16" in found["本机指令集"].value
    assert cli.run(["doctor"]) == 1
    assert "✗ 本地库" in capsys.readouterr().out


def test_native_module_cannot_be_imported(fake):
    found = fake(native="ImportError: 坏了")
    assert "坏了" in found["本地库"].value
    assert found["CUDA 内核"].status == "warn"


@pytest.mark.parametrize("error", [AttributeError("_isa"), UnsupportedError("旧")])
def test_native_of_another_version(fake, error):
    def broken():
        raise error

    found = fake(native=make_native(build_info=broken))
    assert found["本地库"].status == "bad"
    assert "重新编译" in found["本地库"].hint


def test_torch_missing(fake):
    found = fake(torch="ImportError: No module named torch")
    assert found["torch"].status == "bad"
    assert found["本地库"].status == "bad"
    assert "CUDA" not in found


def test_torch_too_old(fake):
    found = fake(torch=make_torch("2.9.1+cpu"))
    assert (found["torch"].status, found["torch"].hint) == ("bad", "需要 torch ≥ 2.10，请升级")


def test_python_too_old(fake, monkeypatch):
    monkeypatch.setattr(checks.platform, "python_version", lambda: "3.10.4")
    assert fake()["Python"].hint == "需要 Python ≥ 3.11"


def test_too_many_threads():
    assert checks._thread_check(8, 2).status == "warn"
    assert "OMP_NUM_THREADS=2" in checks._thread_check(8, 2).hint
    assert checks._thread_check(2, 2).status == "ok"


def test_isa_forced_by_environment(fake, monkeypatch):
    monkeypatch.setenv("DEEPSEEK_OPT_ISA", "avx2")
    check = fake(native=make_native(isa="avx2"))["使用的指令集"]
    assert check.status == "warn"
    assert "取消环境变量 DEEPSEEK_OPT_ISA" in check.hint
    monkeypatch.setenv("DEEPSEEK_OPT_ISA", "avx512bf16")
    assert fake()["使用的指令集"].status == "ok"


def test_isa_slower_than_available(fake):
    check = fake(native=make_native(isa="scalar"))["使用的指令集"]
    assert check.hint == "这台机器可用更快的 AVX-512-BF16"


def test_isa_not_compiled_in(fake, monkeypatch):
    few = ["scalar", "avx2"]
    native = make_native(isa="avx2", compiled=few, available=few)
    check = fake(native=native)["指令集"]
    assert check.status == "warn"
    assert "GCC ≥ 10" in check.hint
    monkeypatch.setenv("DEEPSEEK_OPT_BUILD_ISAS", "scalar,avx2")
    assert "DEEPSEEK_OPT_BUILD_ISAS" in fake(native=native)["指令集"].hint
    assert fake(native=native, machine=few)["指令集"].status == "ok"


@pytest.mark.parametrize(
    ("text", "isas"),
    [
        ("flags\t\t: fma avx f16c avx2\n", ["scalar", "avx2"]),
        (
            "flags : avx2 fma f16c avx512f avx512bw avx512vl avx512dq\n",
            ["scalar", "avx2", "avx512"],
        ),
        (
            "flags : avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni\n",
            list(ISAS[:-1]),
        ),
        (
            "flags : avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni avx512_bf16\n",
            list(ISAS),
        ),
        ("Features : asimd\n", ["scalar"]),
        (None, ["scalar"]),
    ],
)
def test_machine_isas(monkeypatch, text, isas):
    def read_text(*_, **__):
        if text is None:
            raise FileNotFoundError
        return text

    monkeypatch.setattr(checks.Path, "read_text", read_text)
    assert checks._machine_isas() == isas


@pytest.mark.parametrize(
    ("version", "status", "text"),
    [
        (None, "warn", "没有安装"),
        ("4.57.1", "warn", "过旧"),
        ("5.16.9", "warn", "过旧"),
        ("5.17.0", "ok", "支持 5.17"),
        ("5.23.0", "ok", "支持 5.17"),
        ("5.99.0.dev0", "ok", "deepseek-opt verify"),
        ("6", "ok", "测试过 5.17"),
    ],
)
def test_transformers_versions(fake, version, status, text):
    found = fake(versions={"transformers": version})
    check = found["transformers"]
    assert check.status == status
    assert text in check.value
    assert found["peft"].hint == "pip install peft"


HOPPER = ("NVIDIA X", (9, 0))
VOLTA = ("NVIDIA V", (7, 0))


@pytest.fixture
def built(tmp_path):
    """带有编译好的 CUDA 库的假 _native；参数是加载失败的原因。"""
    (tmp_path / "_C_cuda.so").touch()

    def _built(reason=None, **extra):
        return make_native(
            __file__=str(tmp_path / "_native.py"),
            cuda_loaded=lambda: reason is None,
            cuda_load_error=lambda: reason,
            **extra,
        )

    return _built


def test_cuda_ready(fake, built):
    found = fake(torch=make_torch(cuda="13.0", devices=[HOPPER]), native=built())
    assert (found["CUDA"].status, found["CUDA"].value) == ("ok", "CUDA 13.0，NVIDIA X（sm_90）")
    library = found["CUDA 内核"]
    assert (library.status, library.value) == ("ok", "已加载 _C_cuda.so")


def test_torch_without_cuda(fake, built):
    library = fake()["CUDA 内核"]
    assert library.status == "ok" and "没有编译" in library.value
    library = fake(native=built("装着的 torch 不带 CUDA。"))["CUDA 内核"]
    assert library.status == "warn" and "已编译；装着的 torch 不带 CUDA" in library.value
    assert "安装带 CUDA 的 torch" in library.hint


@pytest.mark.parametrize(
    ("driver", "visible", "value", "hint"),
    [
        ((0, 0), None, "没有找到 NVIDIA 驱动", "安装驱动"),
        ((12, 4), None, "驱动太旧：最高支持 CUDA 12.4", "CUDA 12 编译的 torch"),
        ((13, 0), None, "驱动正常（支持 CUDA 13.0），但看不见 GPU", "--gpus all"),
        ((13, 1), "", "看不见 GPU", "CUDA_VISIBLE_DEVICES=''"),
    ],
)
def test_cuda_without_gpu(fake, monkeypatch, driver, visible, value, hint):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(checks, "driver_version", lambda: driver)
    check = fake(torch=make_torch(cuda="13.0"))["CUDA"]
    assert check.status == "warn"
    assert check.value.startswith("torch 带 CUDA 13.0，") and value in check.value
    assert hint in check.hint


def test_cuda_warnings_of_torch_are_not_shown(fake, recwarn, monkeypatch):
    monkeypatch.setattr(checks, "driver_version", lambda: (12, 4))
    torch = make_torch(cuda="13.0")

    def noisy():
        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    torch.cuda.is_available = noisy
    assert "驱动太旧" in fake(torch=torch)["CUDA"].value
    assert not recwarn.list


def test_gpu_too_old(fake, built):
    torch = make_torch(cuda="12.6", devices=[HOPPER, VOLTA])
    check = fake(torch=torch, native=built())["CUDA"]
    assert check.status == "warn"
    assert check.value == "CUDA 12.6，NVIDIA X（sm_90）；NVIDIA V（sm_70）"
    assert "sm_80（Ampere）" in check.hint and "NVIDIA V（sm_70）" in check.hint
    assert "NVIDIA X" not in check.hint


def test_gpu_cannot_be_initialised(fake):
    torch = make_torch(cuda="13.0", devices=[HOPPER])

    def broken(index):
        raise RuntimeError(f"GPU {index} is busy")

    torch.cuda.get_device_name = broken
    check = fake(torch=torch)["CUDA"]
    assert check.status == "warn" and "GPU 0 is busy" in check.value


def test_cuda_library_not_built(fake):
    torch = make_torch(cuda="13.0", devices=[HOPPER])
    check = fake(torch=torch, native=make_native(cuda_load_error=lambda: "没有找到"))["CUDA 内核"]
    assert check.status == "warn" and "没有编译；没有找到" in check.value
    assert "nvcc" in check.hint and "DEEPSEEK_OPT_CUDA=1" in check.hint


@pytest.mark.parametrize(
    ("reason", "cpu_error", "hint"),
    [
        ("undefined symbol: aoti_torch_x", None, "太旧：需要 torch ≥ 2.10"),
        ("version `GLIBC_2.38' not found", None, "请在这台机器上重新编译"),
        ("_C_cuda.so 是用 CUDA 13.0 编译的，而驱动最高支持 CUDA 12.4", None, "请升级驱动"),
        ("没有找到本地库", "没有找到本地库", "请先解决上面的本地库"),
    ],
)
def test_cuda_library_does_not_load(fake, built, reason, cpu_error, hint):
    torch = make_torch(cuda="13.0", devices=[HOPPER])
    native = built(reason, load_error=lambda: cpu_error)
    check = fake(torch=torch, native=native)["CUDA 内核"]
    assert check.status == "warn" and f"已编译；{reason}" in check.value
    assert hint in check.hint


def test_model(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "_MODEL", tmp_path)
    assert checks._model_check().status == "warn"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"0" * 2**20)
    assert "1.0 MiB" in checks._model_check().value


def test_import_failures_become_text():
    assert "ModuleNotFoundError" in checks._import("deepseek_opt.no_such_module")
    assert checks._version("no-such-package-at-all") is None


def test_model_option_lists_what_the_experts_cost(fake, capsys, tmp_path):
    fake()
    folder = checks._MODEL
    assert cli.run(["doctor", "--model", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "原权重：5.6 MiB，3 层" in out and "int8：2.9 MiB；保留原权重" in out
    assert "int4（64 个一组），默认：1.6 MiB" in out
    assert "fp8：2.9 MiB" in out and "fp8（128 个一组）：2.9 MiB" in out
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert cli.run(["doctor", "--model", str(tmp_path)]) == 0
    assert "没有认得的 MoE 专家" in capsys.readouterr().out
    assert cli.run(["doctor", "--model", str(tmp_path / "没有")]) != 0
    assert "有 config.json 的模型目录" in capsys.readouterr().err
