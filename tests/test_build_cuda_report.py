"""CUDA 核用量的记录与把关：读 ptxas 的输出、名单、汇总，以及真的编译一个会溢出的核。"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "setup.py").is_file():
    pytest.skip("不在源码仓库里", allow_module_level=True)
sys.path.insert(0, str(ROOT))
import build_cuda_report as report  # noqa: E402  # pylint: disable=wrong-import-position
import build_native  # noqa: E402  # pylint: disable=wrong-import-position

# nvcc 13.0 的原样输出（两种架构各取一部分）：栈帧与溢出的模板核，没有内联的函数，普通的核，一句提醒。
PTXAS = """\
x.cu(3): warning #550-D: variable "u" was set but never used
ptxas info    : 377 bytes gmem, 48 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN3dso45_GLOBAL__N__feddaeae_8_spill_cu_ee323913_87465stackENS0_1PE' for 'sm_80'
ptxas info    : Function properties for _ZN3dso45_GLOBAL__N__feddaeae_8_spill_cu_ee323913_87465stackENS0_1PE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 27 registers, used 1 barriers, 132 bytes smem, 376 bytes cmem[0]
ptxas info    : Compile time = 2.639 ms
ptxas info    : Function properties for _ZN43_INTERNAL_feddaeae_8_spill_cu_ee323913_87463dso45_GLOBAL__N__feddaeae_8_spill_cu_ee323913_87466helperEfPKf
    32 bytes stack frame, 28 bytes spill stores, 28 bytes spill loads
ptxas info    : Compiling entry function '_Z5heavyILi64EfEvPKT0_PS0_' for 'sm_80'
ptxas info    : Function properties for _Z5heavyILi64EfEvPKT0_PS0_
    512 bytes stack frame, 716 bytes spill stores, 888 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 512 bytes cumulative stack size, 368 bytes cmem[0]
ptxas info    : Compile time = 19.418 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5heavyILi64EfEvPKT0_PS0_' for 'sm_90a'
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in function '_Z5heavyILi64EfEvPKT0_PS0_'
ptxas info    : Function properties for _Z5heavyILi64EfEvPKT0_PS0_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers
"""  # noqa: E501


def usage(name="k<8>", arch="sm_80", **values) -> report.Usage:
    return report.Usage("cuda/x.cu", name, arch, **{"registers": 32, **values})


def only(texts: list[str]) -> str:
    assert len(texts) == 1, texts
    return texts[0]


def spill_list(tmp_path, text) -> report.SpillList:
    path = tmp_path / "spills.txt"
    path.write_text(text, encoding="utf-8")
    return report.read_list(path)


# ---- 读 ptxas ----


def test_parse_real_output():
    found, rest = report.parse(PTXAS, "cuda/spill.cu")
    assert len(found) == 4
    first, helper, heavy, hopper = (found[i] for i in range(4))
    assert (first.registers, first.static_shared, first.barriers) == (27, 132, 1)
    assert (first.arch, first.kernel, first.local_bytes) == ("sm_80", True, 0)
    assert (helper.kernel, helper.registers, helper.arch) == (False, None, "sm_80")
    assert (helper.stack, helper.spill_stores) == (32, 28)
    assert (heavy.stack, heavy.spill_stores, heavy.spill_loads) == (512, 716, 888)
    assert heavy.local_bytes == 888
    assert (hopper.arch, hopper.local_bytes, hopper.registers) == ("sm_90a", 0, 32)
    # 认得的行不给人看，警告与别的提醒照样给人看。
    assert rest.splitlines() == [PTXAS.splitlines()[0], PTXAS.splitlines()[16]]


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="没有 c++filt")
def test_demangled_names():
    found = report.demangle(report.parse(PTXAS, "cuda/spill.cu")[0])
    names = [usage.name for usage in found]
    assert names == ["dso::stack", "dso::helper", "heavy<64, float>", "heavy<64, float>"]


def test_names_stay_as_they_are_without_a_tool(monkeypatch, tmp_path):
    found = [usage("_Z1kv")]
    assert report.demangle([]) == []
    broken = tmp_path / "c++filt"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.demangle(found) == found
    broken.unlink()
    assert report.demangle(found) == found


def test_architectures_and_what_was_not_read():
    flags = ["nvcc", "-O3", *build_native.CUDA_ARCH]
    assert report.architectures(flags) == ["sm_80", "sm_90"]
    found = [usage(arch="sm_80"), usage(arch="sm_90", registers=None)]
    assert report.unread(found, ["sm_80", "sm_90a", "sm_90"]) == ["sm_90a", "sm_90"]
    assert report.unread([usage(), usage("j", registers=None)], ["sm_80"]) == ["sm_80"]


def test_hopper_files_are_compiled_for_hopper_only():
    hopper = build_native.cuda_arch(Path("cuda/mla_decode_sm90.cu"))
    assert report.architectures(hopper) == ["sm_90a"]
    assert "compute_90," not in "".join(hopper)  # 没有 PTX：sm_90a 的指令不能换到别的架构
    assert build_native.cuda_arch(Path("cuda/mla_decode.cu")) == build_native.CUDA_ARCH


def test_record_round_trip(tmp_path):
    found, _ = report.parse(PTXAS, "cuda/spill.cu")
    report.save(tmp_path / "x.json", found, ["sm_90"])
    assert report.load(tmp_path / "x.json") == (found, ["sm_90"])


def test_summary(tmp_path):
    rows = [usage("b", spill_loads=8), usage("a", "sm_90a", stack=64), usage("a", "sm_80")]
    helper = usage("帮手", kernel=False, registers=None)
    report.write_summary([*rows, helper], "13.0", tmp_path / "r.json", tmp_path / "r.txt")
    document = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert document["nvcc"] == "13.0"
    order = [(row["name"], row["arch"]) for row in document["functions"]]
    assert order == [("a", "sm_80"), ("a", "sm_90a"), ("b", "sm_80"), ("帮手", "sm_80")]
    lines = (tmp_path / "r.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "nvcc 13.0" and lines[1].startswith("架构    寄存器  共享内存")
    assert lines[2].split() == ["sm_80", "32", "0", "0", "0", "0", "0", "cuda/x.cu", "a"]
    assert lines[4].split()[6] == "8"
    assert "-" in lines[5] and lines[5].endswith("帮手（没有内联的函数）")


# ---- 名单与把关 ----


def test_nothing_spills():
    assert not report.problems([usage()], report.SpillList())


def test_spill_is_a_problem():
    text = only(report.problems([usage(stack=16, spill_stores=12)], report.SpillList()))
    assert text.startswith("cuda/x.cu：核 k<8> 在 sm_80 上溢出寄存器：栈帧 16 字节")
    assert "溢出写 12 字节、读 0 字节。" in text


def test_serialized_wgmma_is_a_problem():
    """ptxas 只当作提示的一行：编译失败；说了函数名就记在那个核上。"""
    found, _ = report.parse(PTXAS, "cuda/x_sm90.cu")
    slow = [one for one in found if one.loss]
    assert [(one.arch, one.kernel, one.registers) for one in slow] == [("sm_90a", True, 32)]
    assert "C7510" in only(report.problems(slow, report.SpillList()))
    nameless = "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored"
    found, rest = report.parse(nameless, "cuda/x_sm90.cu")
    assert rest == nameless
    assert "setmaxnreg" in only(report.problems(found, report.SpillList()))


def test_stack_frame_alone_is_a_problem():
    helper = usage("f", kernel=False, registers=None, stack=64)
    text = only(report.problems([helper], report.SpillList()))
    assert "函数 f 在 sm_80 上用了栈帧" in text and "64 字节" in text


def test_listed_spill_passes(tmp_path):
    text = "# 说明\n\nk<*> | sm_8? | 16 | 循环外各一次\nnvcc 13.0\n"
    spills = spill_list(tmp_path, text)
    assert not report.problems([usage(spill_loads=16), usage(arch="sm_90")], spills)
    more = only(report.problems([usage(spill_loads=17)], spills))
    assert "cuda/spills.txt 只允许 16 字节" in more
    both = report.problems([usage(arch="sm_90a", stack=4)], spills)
    assert len(both) == 2 and "sm_90a" in both[0] and "第 3 行" in both[1]


@pytest.mark.parametrize("name, covered", [("k<a[2]>", True), ("k<a2>", False)])
def test_brackets_in_names_are_plain(tmp_path, name, covered):
    spills = spill_list(tmp_path, "k<a[2]> | * | 8 | 理由")
    assert bool(report.problems([usage(name, stack=8)], spills)) != covered


def test_stale_entry_is_a_problem(tmp_path):
    spills = spill_list(tmp_path, "k<8> | * | 64 | 以前溢出\n")
    text = only(report.problems([usage()], spills))
    assert text.startswith("cuda/spills.txt 第 1 行（k<8> | *）") and "过时" in text


@pytest.mark.parametrize(
    "line",
    ["k | sm_80 | 8", "k | sm_80 | 八 | 理由", "k | sm_80 | -8 | 理由", "k | * | 8 |", "nvcc"],
)
def test_bad_line_is_a_problem(tmp_path, line):
    text = only(report.problems([], spill_list(tmp_path, f"\n{line}\n")))
    assert "第 2 行应当是“核名 | 架构 | 至多几字节 | 理由”" in text and text.endswith(line)


def test_other_nvcc_releases_are_only_told(tmp_path):
    spills = spill_list(tmp_path, "nvcc 13.0\nnvcc 13.1\n")
    assert spills.applies_to("13.1") and not spills.applies_to("12.8")
    assert report.read_list(tmp_path / "没有").applies_to("12.8")


def test_the_list_in_the_tree_can_be_read():
    spills = report.read_list(ROOT / report.SPILL_LIST)
    assert not spills.problems and spills.releases


# ---- 整个构建 ----

SPILLING = """
template <int N> __global__ void __launch_bounds__(1024, 2) heavy(const float *in, float *out) {
  float a[N];
#pragma unroll
  for (int i = 0; i < N; i++) a[i] = in[i * 1024 + threadIdx.x];
#pragma unroll
  for (int i = 0; i < N; i++) a[i] = a[i] * a[(i * 7 + 3) % N] + a[(i * 5 + 1) % N];
#pragma unroll
  for (int i = 0; i < N; i++) out[i * 1024 + threadIdx.x] = a[i];
}
extern "C" void run(const float *in, float *out) { heavy<64><<<1, 1024>>>(in, out); }
"""


@pytest.fixture
def cuda_tree(tmp_path, monkeypatch):
    """只有一个 .cu 的仓库，只给 sm_90a 编译（快）。"""
    if build_native.find_nvcc() is None:
        pytest.skip("没有 nvcc")
    monkeypatch.delenv("DEEPSEEK_OPT_COVERAGE", raising=False)
    monkeypatch.delenv("DEEPSEEK_OPT_WERROR", raising=False)
    (tmp_path / "cuda").mkdir()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "cuda" / "heavy_sm90.cu").write_text(SPILLING, encoding="utf-8")
    return tmp_path


def test_build_stops_at_a_spill_until_it_is_listed(cuda_tree, capfd):
    builder = build_native.Builder(cuda_tree)
    with pytest.raises(build_native.BuildError, match="heavy.*在 sm_90a 上溢出寄存器"):
        builder.build_cuda()
    out, err = capfd.readouterr()
    assert "编译 cuda/heavy_sm90.cu" in out and "ptxas info" not in out + err
    # 不重新编译也记得。
    with pytest.raises(build_native.BuildError, match="请减少寄存器用量"):
        build_native.Builder(cuda_tree).build_cuda()
    assert "编译" not in capfd.readouterr().out
    listed = cuda_tree / "cuda" / "spills.txt"
    listed.write_text("*heavy* | sm_90a | 4096 | 测试用\n", encoding="utf-8")
    assert build_native.Builder(cuda_tree).build_cuda().is_file()
    assert "编译" not in capfd.readouterr().out
    assert "heavy" in (cuda_tree / "build" / "cuda_resources.txt").read_text(encoding="utf-8")
    document = json.loads((builder.out / "cuda_resources.json").read_text(encoding="utf-8"))
    (kernel,) = document["functions"]
    assert kernel["arch"] == "sm_90a" and kernel["registers"] <= 32 and kernel["spill_stores"] > 0
    listed.write_text("nvcc 1.0\nother | * | 8 | 过时\n", encoding="utf-8")
    build_native.Builder(cuda_tree).build_cuda()
    out = capfd.readouterr().out
    assert "在 sm_90a 上溢出寄存器" in out and "过时" in out and "nvcc 1.0" in out


def test_build_stops_when_nothing_could_be_read(cuda_tree, monkeypatch):
    monkeypatch.setattr(report, "parse", lambda text, source: ([], ""))
    with pytest.raises(build_native.BuildError, match="没有从 ptxas 的输出里读到 sm_90a 的用量"):
        build_native.Builder(cuda_tree).build_cuda()


def test_lost_record_recompiles(cuda_tree):
    builder = build_native.Builder(cuda_tree)
    unit = build_native.Unit(
        cuda_tree / "cuda" / "heavy_sm90.cu", [build_native.find_nvcc(), build_native.SM90A], "x"
    )
    builder._compile_all([unit])
    assert builder._fresh(unit)
    builder._resources(unit).unlink()
    assert not builder._fresh(unit)
    builder._compile_all([unit])
    later = (builder.out / "x.o").stat().st_mtime + 5
    os.utime(unit.source, (later, later))
    assert not builder._fresh(unit)


def test_compile_error_shows_only_the_error(cuda_tree, capfd):
    source = cuda_tree / "cuda" / "heavy_sm90.cu"
    source.write_text(SPILLING + "__global__ void k(int *p) { int unused; p[0] = 1; }\n")
    with pytest.raises(build_native.BuildError, match="编译失败.*heavy_sm90.cu"):
        build_native.Builder(cuda_tree).build_cuda()
    err = capfd.readouterr().err
    assert "unused" in err and "ptxas info" not in err
