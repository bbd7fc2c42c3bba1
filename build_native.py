"""csrc/ 与 cuda/ 的编译：按文件名前缀给标志，按依赖文件增量重编，目标文件并行编译。

setup.py 与 Makefile 都用它。没有静态库：各指令集的目标文件直接一起链接，次序无关。
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import build_cuda_report as report

C_FLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno"]
CXX_FLAGS = ["-std=c++20", "-O2"]
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic"]
COMMON = ["-g1", "-fPIC", "-fvisibility=hidden"]
# 稳定 ABI：一个库对 torch >= 2.10、Python >= 3.11 都能用。
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030B0000"]

AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2_FLAGS]
AVX512VNNI_FLAGS = ["-mavx512vnni", *AVX512_FLAGS]
AVX512BF16_FLAGS = ["-mavx512bf16", *AVX512VNNI_FLAGS]
# 由低到高，后一级包含前一级（csrc/isa/select.c 按同样的次序逐级覆盖）。
ISA_FLAGS = {
    "avx2": AVX2_FLAGS,
    "avx512": AVX512_FLAGS,
    "avx512vnni": AVX512VNNI_FLAGS,
    "avx512bf16": AVX512BF16_FLAGS,
}

SM90A = "-gencode=arch=compute_90a,code=sm_90a"
# sm_90 的机器码与 sm_90a 的逐字节相同（没有 wgmma 的核），所以不另编一份；PTX：更新的卡由驱动即时编译。
CUDA_ARCH = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[compute_90,sm_90]",
]
# 文件名后缀 → 架构：TMA、wgmma 只有 sm_90a 有，这样的核单独成文件。
CUDA_ARCH_OF_SUFFIX = {"_sm90": [SM90A]}

STRICT, CLEAN = "-Werror", "没有警告"  # CLEAN 记在编译命令之后


class BuildError(RuntimeError):
    """编译环境不够或编译失败；消息是给人看的中文。"""


def _flag(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def _env_args(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def find_compiler(variable: str, names: tuple[str, ...]) -> list[str]:
    """编译器命令：先看环境变量，再看 Python 自己用的，最后按常用名字找。"""
    for command in (os.environ.get(variable), sysconfig.get_config_var(variable), *names):
        words = shlex.split(command or "")
        if words and shutil.which(words[0]):
            # Python 记录的 CC 可能带 -pthread 之类的标志，只有用户自己给的才照用。
            return words if command == os.environ.get(variable) else words[:1]
    raise BuildError(
        f"找不到编译器（试过 {'、'.join(names)}）：请安装 gcc >= 10 或 clang，或设置 {variable}。"
    )


def find_nvcc() -> str | None:
    """nvcc 的路径：先看 CUDA_HOME，再看 PATH。"""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidate = Path(home, "bin", "nvcc") if home else None
    if candidate and candidate.is_file():
        return str(candidate)
    return shutil.which("nvcc")


def wants_cuda(root: Path) -> bool:
    """要不要编译 CUDA 部分（DEEPSEEK_OPT_CUDA=1 却没有 nvcc 时报错，不静默跳过）。"""
    choice = os.environ.get("DEEPSEEK_OPT_CUDA", "")
    if choice == "0" or not list(root.glob("cuda/*.cu")):
        return False
    if find_nvcc():
        return True
    if choice == "1":
        raise BuildError("DEEPSEEK_OPT_CUDA=1，但找不到 nvcc：请安装 CUDA 工具包或设置 CUDA_HOME。")
    print("没有找到 nvcc：只编译 CPU 部分。")
    return False


def cuda_arch(source: Path) -> list[str]:
    """一个 .cu 文件的 -gencode 标志。"""
    for suffix, flags in CUDA_ARCH_OF_SUFFIX.items():
        if source.stem.endswith(suffix):
            return flags
    return CUDA_ARCH


@dataclass
class Unit:
    """一个要编译的源文件。"""

    source: Path
    command: list[str]  # 编译器与标志，不含 -c、-o 与源文件
    name: str  # 目标文件名（在 build 目录里唯一）

    @property
    def is_cuda(self) -> bool:
        """由 ptxas 编译、有用量记录的。"""
        return self.source.suffix == ".cu"


class Builder:
    """一种配置（编译器、标志、覆盖率与否）的增量构建，产物在 build/native-<配置>/。"""

    def __init__(self, root: Path):
        if os.name == "nt":
            raise BuildError("目前只支持 Linux 与 macOS 上的 gcc、clang；Windows 请用 WSL。")
        self.root = root
        self.cc = find_compiler("CC", ("gcc", "cc", "clang"))
        self.cxx = find_compiler("CXX", ("g++", "c++", "clang++"))
        self.coverage = _flag("DEEPSEEK_OPT_COVERAGE")
        werror = _flag("DEEPSEEK_OPT_WERROR")
        kind = "coverage" if self.coverage else "release"
        self.out = root / "build" / f"native-{kind}-{platform.machine()}"
        self.out.mkdir(parents=True, exist_ok=True)
        self.extra = [STRICT] if werror else []
        if self.coverage:
            # 覆盖率要看得出每一行，又要在 2 核机器上跑得完整套测试。
            self.extra += ["--coverage", "-O1", "-fprofile-update=atomic"]

    # ---- 源文件与标志 ----

    def isas(self) -> list[str]:
        """这次要编译的指令集（scalar 总在内）；高一级包含低一级，编译器不认的从那一级起去掉。"""
        wanted = os.environ.get("DEEPSEEK_OPT_BUILD_ISAS", "").replace("_", "")
        names = [n.strip() for n in wanted.split(",") if n.strip()] or ["scalar", *ISA_FLAGS]
        unknown = sorted(set(names) - {"scalar", *ISA_FLAGS})
        if unknown:
            raise BuildError(f"DEEPSEEK_OPT_BUILD_ISAS 里有不认识的指令集：{'、'.join(unknown)}。")
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return ["scalar"]
        found = ["scalar"]
        for isa, flags in ISA_FLAGS.items():
            if isa not in names:
                break
            if not self._accepts(flags):
                print(f"编译器不支持 {' '.join(flags)}：{isa} 及以上不编译。")
                break
            found.append(isa)
        return found

    @staticmethod
    def _isa_of(path: Path) -> str:
        # 取最长的前缀：avx512bf16*.c 不能落进 avx512*。
        matches = [isa for isa in ISA_FLAGS if path.name.startswith(isa)]
        return matches[-1] if matches and path.parent.name == "isa" else "scalar"

    def _accepts(self, flags: list[str]) -> bool:
        return self._try_compile([*self.cc, *flags], "#include <immintrin.h>\nint x;\n", ".c")

    @staticmethod
    def _try_compile(command: list[str], text: str, suffix: str) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe" + suffix)
            source.write_text(text, encoding="utf-8")
            done = subprocess.run(
                [*command, "-c", str(source), "-o", str(source) + ".o"],
                capture_output=True,
                check=False,
            )
            return done.returncode == 0

    def c_units(self) -> list[Unit]:
        """csrc/*.c 与 csrc/isa/*.c，各带自己的标志。"""
        isas = self.isas()
        defines = [f"-DDSO_HAVE_{isa.upper()}=1" for isa in isas if isa != "scalar"]
        base = [*self.cc, *C_FLAGS, *COMMON, *WARNINGS, f"-I{self.root / 'csrc'}", *self.extra]
        units = []
        for path in sorted([*self.root.glob("csrc/*.c"), *self.root.glob("csrc/isa/*.c")]):
            isa = self._isa_of(path)
            if path.name == "module.c" or isa not in isas:
                continue
            # 基础文件（select.c 等）要知道编译进来了哪些指令集。
            flags = defines if isa == "scalar" else ISA_FLAGS[isa]
            name = "_".join(path.relative_to(self.root).with_suffix("").parts)
            units.append(Unit(path, [*base, *flags, *_env_args("CFLAGS")], name))
        return units

    def _module_unit(self) -> list[Unit]:
        """PyInit。没有 Python.h（没装 python3-dev）也能构建：加载器并不依赖它。"""
        include = sysconfig.get_path("include")
        source = self.root / "csrc" / "module.c"
        command = [*self.cc, *C_FLAGS, *COMMON, *WARNINGS, f"-isystem{include}", *STABLE_ABI[1:]]
        if not self._try_compile(command, "#include <Python.h>\n", ".c"):
            print("没有找到 Python.h：不编译 csrc/module.c（不影响使用）。")
            return []
        return [Unit(source, [*command, *self.extra], "csrc_module")]

    def _torch_dir(self) -> Path:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise BuildError(
                "构建需要先装好 torch >= 2.10，并且关掉构建隔离："
                "pip install torch，然后 pip install . --no-build-isolation。"
            )
        return Path(spec.origin).parent

    def _torch_include(self) -> Path:
        include = self._torch_dir() / "include"
        if not (include / "torch/csrc/stable/library.h").is_file():
            raise BuildError("装着的 torch 没有稳定 ABI 的头文件：需要 torch >= 2.10。")
        return include

    def _cxx_command(self) -> list[str]:
        include = self._torch_include()
        command = [*self.cxx, *CXX_FLAGS, *COMMON, *WARNINGS, *STABLE_ABI]
        if not self._try_compile([*self.cxx, "-std=c++20"], "#include <concepts>\n", ".cpp"):
            raise BuildError(
                f"{' '.join(self.cxx)} 不支持 C++20：需要 g++ >= 10 或 clang++ >= 11。"
            )
        return [*command, f"-I{self.root / 'csrc'}", f"-isystem{include}"]

    # ---- 编译与链接 ----

    def build_cpu(self) -> Path:
        """编译并链接 _C.abi3.so，返回它在 build/ 里的路径。"""
        units = [*self.c_units(), *self._module_unit()]
        command = [*self._cxx_command(), *self.extra, *_env_args("CXXFLAGS")]
        for path in sorted(self.root.glob("csrc/binding*.cpp")):
            units.append(Unit(path, command, f"csrc_{path.stem}"))
        coverage = ["--coverage"] if self.coverage else []
        linker = [*self.cxx, *coverage, "-shared", *_env_args("LDFLAGS")]
        objects = self._compile_all(units)
        return self._link(self.out / "_C.abi3.so", objects, self._torch_libs(), linker)

    def build_cuda(self) -> Path:
        """编译并链接 _C_cuda.so。只用 torch 的稳定 ABI，所以对着纯 CPU 的 torch 也能链接。"""
        nvcc = find_nvcc()
        if nvcc is None:
            raise BuildError("找不到 nvcc。")
        # 全程经 nvcc：它自己知道头文件与运行库在哪里。
        host = [
            f"-ccbin={self.cxx[0]}",
            f"-I{self.root / 'csrc'}",
            f"-I{self.root / 'cuda'}",  # <ptx.cuh> 等：主机模拟用同名的替换
            f"-Xcompiler={','.join(COMMON)}",
        ]
        device = [nvcc, *host, "-std=c++17", "-O3", "-Werror=all-warnings", "-Xptxas=-v"]
        sources = sorted(self.root.glob("cuda/*.cu"))
        kernels = [Unit(p, [*device, *cuda_arch(p)], f"cuda_{p.stem}") for p in sources]
        include = self._torch_include()
        binding = [
            nvcc,
            *host,
            "-std=c++20",
            "-O2",
            "-DUSE_CUDA",
            *STABLE_ABI,
            f"-isystem={include}",
        ]
        sources = sorted(self.root.glob("cuda/binding*.cpp"))
        bindings = [Unit(path, binding, f"cuda_{path.stem}") for path in sources]
        objects = self._compile_all([*kernels, *bindings])
        self._check_resources(kernels, report.nvcc_release(nvcc))
        # 静态的 CUDA 运行库：不与 torch 自带的版本相争。
        linker = [nvcc, f"-ccbin={self.cxx[0]}", "-shared", "-cudart=static"]
        # 取当前流的函数在 libtorch_cuda.so 里，纯 CPU 的 torch 没有它：经 libtorch.so 依赖它（带 CUDA 的
        # torch 的 libtorch.so 依赖 libtorch_cuda.so），没有直接用到也要留下这个依赖。
        linker.append("-Xlinker=--no-as-needed")
        return self._link(self.out / "_C_cuda.so", objects, self._torch_libs(), linker)

    def _check_resources(self, kernels: list[Unit], release: str) -> None:
        """汇总各核的用量；有没登记的溢出时报错（别的版本的 nvcc 只提示）。"""
        usages, found = [], []
        for unit in kernels:
            functions, missing = report.load(self._resources(unit))
            usages += functions
            found += [
                f"{unit.source.relative_to(self.root)}：没有从 ptxas 的输出里读到 {arch} 的用量。"
                for arch in missing
            ]
        table = self.root / "build" / "cuda_resources.txt"
        report.write_summary(usages, release, self.out / "cuda_resources.json", table)
        spills = report.read_list(self.root / report.SPILL_LIST)
        found += report.problems(usages, spills)
        if not found:
            return
        text = "\n  ".join(["CUDA 核的用量没有通过检查：", *found])
        if spills.applies_to(release):
            raise BuildError(
                f"{text}\n请减少寄存器用量；确有理由的写进 {report.SPILL_LIST}。"
                f"各核的用量见 {table.relative_to(self.root)}。"
            )
        print(
            f"{text}\n名单是用 nvcc {'、'.join(spills.releases)} 核对的，这里只提示。", flush=True
        )

    def _torch_libs(self) -> list[str]:
        if sys.platform == "darwin":
            return ["-undefined", "dynamic_lookup"]
        return [f"-L{self._torch_dir() / 'lib'}", "-ltorch_cpu", "-ltorch"]

    def _compile_all(self, units: list[Unit]) -> list[Path]:
        jobs = int(os.environ.get("MAX_JOBS") or min(8, os.cpu_count() or 1))
        stale = [unit for unit in units if not self._fresh(unit)]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(self._compile, stale))
        return [self.out / f"{unit.name}.o" for unit in units]

    def _paths(self, unit: Unit) -> tuple[Path, Path, Path]:
        base = self.out / unit.name
        return Path(f"{base}.o"), Path(f"{base}.d"), Path(f"{base}.cmd")

    def _resources(self, unit: Unit) -> Path:
        """CUDA 核的用量，与目标文件一起更新。"""
        return self.out / f"{unit.name}.resources.json"

    def _fresh(self, unit: Unit) -> bool:
        """目标文件比源文件、所有头文件都新，且编译命令没变；警告当错误时，上次还要没有警告。"""
        obj, deps, cmd = self._paths(unit)
        extra = [self._resources(unit)] if unit.is_cuda else []
        if not all(path.is_file() for path in (obj, deps, cmd, *extra)):
            return False
        key, last = self._key(unit), cmd.read_text(encoding="utf-8")
        if last != f"{key}\n{CLEAN}" and (last != key or STRICT in unit.command):
            return False
        built = obj.stat().st_mtime_ns
        rule = deps.read_text(encoding="utf-8").replace("\\\n", " ")
        names = shlex.split(rule.partition(": ")[2])  # gcc 写“x.o: ”，nvcc 写“x.o : ”
        paths = [Path(name) for name in names]
        return all(p.is_file() and p.stat().st_mtime_ns < built for p in [unit.source, *paths])

    @staticmethod
    def _key(unit: Unit) -> str:
        """STRICT 不改变生成的代码：make lint 与 make build 用同一份目标文件。"""
        return "\n".join([*(word for word in unit.command if word != STRICT), str(unit.source)])

    def _compile(self, unit: Unit) -> None:
        obj, deps, cmd = self._paths(unit)
        obj.unlink(missing_ok=True)
        obj.with_suffix(".gcda").unlink(missing_ok=True)  # 旧计数与新目标文件对不上
        print(f"编译 {unit.source.relative_to(self.root)}", flush=True)
        depend = ["-MMD", "-MF", str(deps)]
        output = self._run([*unit.command, *depend, "-c", str(unit.source), "-o", str(obj)])
        if unit.is_cuda:
            output = self._record(unit, output)
        if output:
            print(output, file=sys.stderr, flush=True)
        cmd.write_text(self._key(unit) + ("" if output else f"\n{CLEAN}"), encoding="utf-8")

    def _record(self, unit: Unit, output: str) -> str:
        """记下各核的用量，返回其余要给人看的输出。"""
        usages, rest = report.parse(output, str(unit.source.relative_to(self.root)))
        expected = report.architectures(unit.command)
        has_kernels = usages or "__global__" in unit.source.read_text(encoding="utf-8")
        missing = report.unread(usages, expected) if has_kernels else []
        report.save(self._resources(unit), report.demangle(usages), missing)
        return rest

    def _link(self, target: Path, objects: list[Path], libs: list[str], linker: list[str]) -> Path:
        command = [*linker, *map(str, objects), *libs, "-o", str(target)]
        key = target.with_suffix(".link")
        same = key.is_file() and key.read_text(encoding="utf-8") == "\n".join(command)
        newest = max(path.stat().st_mtime_ns for path in objects)
        if not (same and target.is_file() and target.stat().st_mtime_ns > newest):
            print(f"链接 {target.name}", flush=True)
            warnings = self._run(command)
            if warnings:
                print(warnings, file=sys.stderr, flush=True)
            key.write_text("\n".join(command), encoding="utf-8")
        return target

    def _run(self, command: list[str]) -> str:
        """运行编译器，返回它的警告等输出；失败时连同输出一起报告。"""
        # 在仓库根目录里运行：报错里的路径才是相对的、可点的。
        done = subprocess.run(command, cwd=self.root, capture_output=True, text=True, check=False)
        if done.returncode:
            print(report.parse(done.stderr, "")[1], file=sys.stderr, flush=True)
            raise BuildError(f"编译失败（退出码 {done.returncode}）：{shlex.join(command)}")
        return done.stderr


def main() -> None:
    """命令行：编译（增量），默认再放进 deepseek_opt/ 供可编辑安装使用。"""
    parser = argparse.ArgumentParser(description="编译 deepseek_opt 的本地库")
    parser.add_argument("--no-install", action="store_true", help="只编译到 build/，不复制")
    parser.add_argument("--only", choices=("cpu", "cuda"), help="只编译一半（默认两半都编译）")
    args = parser.parse_args()
    root = Path(__file__).resolve().parent
    builder = Builder(root)
    built = [builder.build_cpu()] if args.only != "cuda" else []
    if args.only != "cpu" and wants_cuda(root):
        built.append(builder.build_cuda())
    for path in built:
        if not args.no_install:
            install(path, root / "deepseek_opt" / path.name)
        print(f"本地库：{path.relative_to(root)}")


def install(source: Path, target: Path) -> None:
    """换上新库：先写旁边再改名，正在使用旧库的进程不受影响。"""
    if target.is_file() and target.stat().st_mtime_ns == source.stat().st_mtime_ns:
        return
    beside = target.with_suffix(".new")
    shutil.copy2(source, beside)
    beside.replace(target)


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        sys.exit(str(error))
