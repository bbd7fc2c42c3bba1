"""机器与版本：没有它们，读数没有意义。"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deepseek_opt import __version__

_SMI = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
)


def has_triton(device: str) -> bool:
    """有没有 Triton 的对照；不导入它。"""
    return device == "cuda" and importlib.util.find_spec("triton") is not None


def environment(device: str) -> dict[str, Any]:
    """日期、设备、驱动、时钟与各库的版本。"""
    versions = {name: _version(name) for name in ("torch", "triton", "transformers")}
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "deepseek_opt": __version__,
        **versions,
    }
    return {**found, **_cuda()} if device == "cuda" else found


@contextmanager
def setting(name: str, value: str | None) -> Iterator[None]:
    """在其中把环境变量 name 设成 value，出来时还原；value 为 None 时不动。"""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if value is not None:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "没有安装"


def _cuda() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "clock_mhz": _clock_mhz(),
        "smi": smi(),
    }


def _clock_mhz() -> int | None:
    """此刻的 SM 时钟；torch 要有 pynvml 才读得到。"""
    try:
        return torch.cuda.clock_rate()
    except (ImportError, RuntimeError):
        return None


def smi() -> dict[str, str]:
    """nvidia-smi 此刻的驱动、时钟、功率；没有这个命令时为空。"""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(_SMI, values, strict=False))
