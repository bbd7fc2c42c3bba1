"""doctor 的各项检查；任何一项都不会因为缺少依赖而抛错。"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from deepseek_opt.driver import driver_version

MINIMUM_PYTHON = (3, 11)
MINIMUM_TORCH = (2, 10)
MINIMUM_TRANSFORMERS = (5, 17)
NEWEST_TESTED_TRANSFORMERS = (5, 23)
MINIMUM_CAPABILITY = (8, 0)  # build_native.py 的 CUDA_ARCH 里最低的

# 指令集由慢到快，以及 /proc/cpuinfo 里对应的标志。
_ISA_FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512vnni": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    "avx512bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"},
}
_ISA_NAMES = {
    "scalar": "标量",
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512vnni": "AVX-512-VNNI",
    "avx512bf16": "AVX-512-BF16",
}
_COMPILERS = {
    "avx2": "GCC ≥ 5 或 Clang ≥ 4",
    "avx512": "GCC ≥ 6 或 Clang ≥ 4",
    "avx512vnni": "GCC ≥ 8 或 Clang ≥ 6",
    "avx512bf16": "GCC ≥ 10 或 Clang ≥ 9",
}
_REBUILD = "在仓库根目录运行 pip install . --no-build-isolation"
_BUILD_CUDA = (
    "需要 CUDA 工具包（nvcc 在 PATH 里，或设置 CUDA_HOME）；"
    "在仓库根目录运行 DEEPSEEK_OPT_CUDA=1 pip install . --no-build-isolation"
)
_MODEL = Path(__file__).resolve().parent.parent / "assets" / "stdlib_model"


@dataclass(frozen=True)
class Check:
    """一项检查的结果。

    属性：
        group: 分组名。
        name: 项目名。
        status: ``ok`` 正常；``warn`` 可用但有缺憾；``bad`` 不能使用。
        value: 情况。
        hint: 建议；没有时为空串。
    """

    group: str
    name: str
    status: str
    value: str
    hint: str = ""

    def as_dict(self) -> dict[str, str]:
        """供 --json 输出。"""
        return asdict(self)


def collect() -> list[Check]:
    """全部检查，按显示顺序。"""
    torch = _import("torch")
    native = _import("deepseek_opt._native") if isinstance(torch, ModuleType) else torch
    return [
        *_environment(torch),
        *_native_checks(native),
        *_cuda_checks(torch, native),
        *_optional_checks(),
        _model_check(),
    ]


def _import(name: str) -> ModuleType | str:
    """模块，或导入失败的原因。"""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, int]:
    found = re.findall(r"\d+", version)
    major, minor = [*found, "0", "0"][:2]
    return int(major), int(minor)


def _dot(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


# ---- 环境 ----


def _environment(torch: ModuleType | str) -> list[Check]:
    group = "环境"
    python = platform.python_version()
    python_ok = _numbers(python) >= MINIMUM_PYTHON
    checks = [
        Check(
            group,
            "Python",
            "ok" if python_ok else "bad",
            f"{python}（{platform.system()} {platform.machine()}）",
            "" if python_ok else f"需要 Python ≥ {_dot(MINIMUM_PYTHON)}",
        )
    ]
    if isinstance(torch, str):
        hint = "请安装 torch ≥ 2.10（见 PyTorch 官网的安装说明）"
        return [*checks, Check(group, "torch", "bad", f"导入不了（{torch}）", hint)]
    version = torch.__version__
    torch_ok = _numbers(version) >= MINIMUM_TORCH
    hint = "" if torch_ok else f"需要 torch ≥ {_dot(MINIMUM_TORCH)}，请升级"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        *checks,
        Check(group, "torch", "ok" if torch_ok else "bad", version, hint),
        _thread_check(torch.get_num_threads(), cores or 1),
    ]


def _thread_check(threads: int, cores: int) -> Check:
    hint = ""
    if threads > cores:
        hint = f"线程比可用的核多，会变慢；请设置 OMP_NUM_THREADS={cores} 或 torch.set_num_threads"
    value = f"{threads} 个线程，{cores} 个可用的逻辑核"
    return Check("环境", "线程", "warn" if hint else "ok", value, hint)


# ---- 本地内核 ----


def _native_checks(native: ModuleType | str) -> list[Check]:
    group = "CPU 内核"
    reason = native if isinstance(native, str) else native.load_error()
    if reason is not None:
        return [
            Check(group, "本地库", "bad", f"没有加载：{reason}", _rebuild_hint(reason)),
            Check(group, "本机指令集", "ok", _isa_list(_machine_isas())),
        ]
    try:
        info = native.build_info()
    except (AttributeError, RuntimeError) as error:
        value = f"本地库与这份 Python 代码不是同一个版本（{error}）"
        return [Check(group, "本地库", "bad", value, f"请重新编译：{_REBUILD}")]
    compiled = [_canonical(name) for name in info["compiled_isas"]]
    available = [_canonical(name) for name in info["available_isas"]]
    return [
        Check(group, "本地库", "ok", f"已加载 {Path(str(info['library'])).name}"),
        _current_isa(_canonical(info["isa"]), available),
        _compiled_check(compiled, available),
    ]


def _rebuild_hint(reason: str) -> str:
    return "" if "pip install" in reason else f"需要 gcc ≥ 10 或 clang；{_REBUILD}"


def _canonical(isa: str) -> str:
    """avx512_bf16 与 avx512bf16 是同一个：内核用前者，构建脚本用后者。"""
    return isa.replace("_", "")


def _isa_list(names: list[str]) -> str:
    return "、".join(_ISA_NAMES.get(name, name) for name in names)


def _machine_isas() -> list[str]:
    """CPU 支持的指令集（由慢到快），按 /proc/cpuinfo；读不到时只有标量。"""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ["scalar"]
    match = re.search(r"^flags\s*:\s*(.*)$", text, re.MULTILINE)
    flags = set(match[1].split()) if match else set()
    return ["scalar", *(name for name, needed in _ISA_FLAGS.items() if needed <= flags)]


def _current_isa(current: str, available: list[str]) -> Check:
    best = available[-1] if available else current
    forced = os.environ.get("DEEPSEEK_OPT_ISA")
    value = _ISA_NAMES.get(current, current)
    if forced:
        value += f"（由环境变量 DEEPSEEK_OPT_ISA={forced} 指定）"
    if current == best:
        return Check("CPU 内核", "使用的指令集", "ok", value)
    hint = f"这台机器可用更快的 {_ISA_NAMES.get(best, best)}"
    if forced:
        hint += "：请取消环境变量 DEEPSEEK_OPT_ISA"
    return Check("CPU 内核", "使用的指令集", "warn", value, hint)


def _compiled_check(compiled: list[str], available: list[str]) -> Check:
    value = f"编译进来 {_isa_list(compiled)}；这台机器可用 {_isa_list(available)}"
    missing = [name for name in _machine_isas() if name not in compiled]
    if not missing:
        return Check("CPU 内核", "指令集", "ok", value)
    best = missing[-1]
    hint = (
        f"CPU 支持 {_ISA_NAMES[best]}，但没有编译进来：请用 {_COMPILERS[best]} 重新编译，{_REBUILD}"
    )
    if os.environ.get("DEEPSEEK_OPT_BUILD_ISAS"):
        hint += "，并取消环境变量 DEEPSEEK_OPT_BUILD_ISAS"
    return Check("CPU 内核", "指令集", "warn", value, hint)


# ---- GPU ----


def _cuda_checks(torch: ModuleType | str, native: ModuleType | str) -> list[Check]:
    if isinstance(torch, str):
        return []
    return [_cuda_check(torch), _cuda_library(torch, native)]


def _cuda_check(torch: Any) -> Check:
    group, name = "GPU", "CUDA"
    if torch.version.cuda is None:
        return Check(group, name, "ok", "torch 不带 CUDA，只用 CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 用英文警告驱动的问题，下面说得更清楚
        available = torch.cuda.is_available()
    if not available:
        reason, hint = _no_gpu(torch)
        return Check(group, name, "warn", f"torch 带 CUDA {torch.version.cuda}，{reason}", hint)
    try:
        return _device_check(torch)
    except RuntimeError as error:
        value = f"torch 带 CUDA {torch.version.cuda}，但 GPU 初始化失败（{error}）"
        return Check(group, name, "warn", value, "请用 nvidia-smi 看 GPU 是否正常、有没有被独占")


def _device_check(torch: Any) -> Check:
    devices = range(torch.cuda.device_count())
    names = [_device_name(torch, i) for i in devices]
    value = f"CUDA {torch.version.cuda}，{'；'.join(names)}"
    old = [i for i in devices if torch.cuda.get_device_capability(i) < MINIMUM_CAPABILITY]
    if not old:
        return Check("GPU", "CUDA", "ok", value)
    needed = "".join(map(str, MINIMUM_CAPABILITY))
    hint = f"CUDA 内核需要 sm_{needed}（Ampere）及更新的 GPU，用不了 {'、'.join(names[i] for i in old)}"
    return Check("GPU", "CUDA", "warn", value, hint)


def _no_gpu(torch: Any) -> tuple[str, str]:
    """torch 带 CUDA 却用不了 GPU：原因与建议。"""
    driver = driver_version()
    if driver == (0, 0):
        return (
            "但没有找到 NVIDIA 驱动",
            "如果有 NVIDIA GPU，请安装驱动（装好后 nvidia-smi 能列出它）",
        )
    needed = _numbers(torch.version.cuda)
    if driver[0] < needed[0]:  # 同一个大版本之内，旧驱动也能用
        reason = f"但驱动太旧：最高支持 CUDA {_dot(driver)}"
        return reason, f"请升级驱动，或安装 CUDA {driver[0]} 编译的 torch"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        hint = (
            f"环境变量 CUDA_VISIBLE_DEVICES={visible!r} 限定了看得见的 GPU；要用 GPU 请改正或取消它"
        )
    else:
        hint = "nvidia-smi 应当能列出 GPU；容器里要把 GPU 传进来（docker 用 --gpus all）"
    return f"驱动正常（支持 CUDA {_dot(driver)}），但看不见 GPU", hint


def _device_name(torch: Any, index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)}（sm_{major}{minor}）"


def _cuda_library(torch: Any, native: ModuleType | str) -> Check:
    group, name = "GPU", "CUDA 内核"
    if isinstance(native, str):
        return Check(group, name, "warn", "没有加载：本地库不可用")
    built = (Path(native.__file__).parent / native.CUDA_LIBRARY).is_file()
    state = f"{native.CUDA_LIBRARY} {'已编译' if built else '没有编译'}"
    if torch.version.cuda is None:
        # 编译了 CUDA 库，多半是想用 GPU：装着的却是只有 CPU 的 torch。
        hint = "要用 GPU，请安装带 CUDA 的 torch（见 PyTorch 官网），不用重新编译" if built else ""
        status = "warn" if built else "ok"
        return Check(group, name, status, f"{state}；{native.cuda_load_error()}", hint)
    if native.cuda_loaded():
        return Check(group, name, "ok", f"已加载 {native.CUDA_LIBRARY}")
    reason = native.cuda_load_error()
    hint = _load_hint(native, reason) if built else _BUILD_CUDA
    return Check(group, name, "warn", f"{state}；{reason}", hint)


def _load_hint(native: ModuleType, reason: str) -> str:
    """编译好的 CUDA 库加载不了时怎么办。"""
    if native.load_error() is not None:
        return "请先解决上面的本地库"
    if "驱动" in reason:
        return "请升级驱动；torch 自己能用不等于本库能用，两者用的 CUDA 版本可以不同"
    if "undefined symbol" in reason:
        wanted = f"torch ≥ {_dot(MINIMUM_TORCH)}"
        return f"装着的 torch 里没有这个符号，多半太旧：需要 {wanted}，请升级；或者{_REBUILD}"
    return f"请在这台机器上重新编译：{_REBUILD}"


# ---- 可选组件与模型 ----


def _optional_checks() -> list[Check]:
    return [
        _transformers_check(_version("transformers")),
        _optional("peft", "LoRA 等微调"),
        _optional("matplotlib", "演示的图片与笔记本里的图"),
        _optional("tomli-w", "写 TOML 配置（读不需要）"),
    ]


def _transformers_check(version: str | None) -> Check:
    group, name = "可选组件", "transformers"
    minimum, newest = _dot(MINIMUM_TRANSFORMERS), _dot(NEWEST_TESTED_TRANSFORMERS)
    if version is None:
        hint = f"pip install 'transformers>={minimum}'；没有它，MLAAttention 等自己的层照常可用"
        return Check(group, name, "warn", "没有安装", hint)
    if _numbers(version) < MINIMUM_TRANSFORMERS:
        hint = f"支持 {minimum} 及更新的版本（更早的版本缓存的是展开的 K、V）；请升级"
        return Check(group, name, "warn", f"{version}，过旧，不支持", hint)
    if _numbers(version) > NEWEST_TESTED_TRANSFORMERS:
        value = f"{version}（测试过 {minimum} 到 {newest}；可先用 deepseek-opt verify 核对）"
        return Check(group, name, "ok", value)
    return Check(group, name, "ok", f"{version}（支持 {minimum} 及更新的版本）")


def _optional(package: str, purpose: str) -> Check:
    version = _version(package)
    if version is None:
        hint = f"pip install {package}"
        return Check("可选组件", package, "warn", f"没有安装（用于{purpose}）", hint)
    return Check("可选组件", package, "ok", f"{version}（用于{purpose}）")


def _model_check() -> Check:
    files = [_MODEL / "config.json", *_MODEL.glob("*.safetensors")]
    if len(files) < 2 or not files[0].is_file():
        hint = "请从完整的仓库或安装包重新安装；只影响 deepseek-opt demo"
        return Check("随附模型", "stdlib_model", "warn", "没有找到", hint)
    size = sum(path.stat().st_size for path in files) / 2**20
    return Check("随附模型", "stdlib_model", "ok", f"{_MODEL}（{size:.1f} MiB）")
