"""scripts/gpu.sh：一步失败不影响其余各步，最后有总结（python 与 compute-sanitizer 换成替身）。"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu.sh"
STEPS = ["编译", "测试", "compute-sanitizer memcheck", "compute-sanitizer racecheck", "基准"]


@pytest.fixture
def script(tmp_path):
    """script(失败的词, 环境变量…) -> (退出码, 输出, 各次调用)；命令里含有失败的词就失败。"""
    log = tmp_path / "calls"
    body = '#!/bin/bash\necho "${0##*/} $*" >>%s\n[ "$1" = - ] || ! [[ "$*" =~ $FAIL ]]\n' % log
    for name in ("python", "compute-sanitizer"):
        path = tmp_path / name
        path.write_text(body, encoding="utf-8")
        path.chmod(0o755)

    def run(fail: str, **extra: str) -> tuple[int, str, list[str]]:
        path = f"{tmp_path}:{os.environ['PATH']}"
        settings = {"PATH": path, "PYTHON": str(tmp_path / "python"), "FAIL": fail, **extra}
        command = [str(SCRIPT), "out.json"]
        done = subprocess.run(
            command, env={**os.environ, **settings}, capture_output=True, text=True, check=False
        )
        calls = log.read_text(encoding="utf-8").splitlines()
        return done.returncode, done.stdout, calls[1:]  # 第一次是查看设备

    return run


def test_all_steps_pass(script):
    code, out, calls = script("^$")
    assert code == 0 and len(calls) == 5
    summary = out.split("总结")[1]
    assert all(f"{name}：通过" in summary for name in STEPS)
    assert "--kernel-name kns=dso" in calls[3] and "--kernel-name" not in calls[2]
    assert "--output out.json --budget-s 240" in calls[4]


@pytest.mark.parametrize("fail, index", [("-m gpu", 1), ("racecheck", 3), ("benchmarks", 4)])
def test_a_failure_does_not_hide_the_rest(script, fail, index):
    code, out, calls = script(fail)
    summary = out.split("总结")[1]
    assert code == 1 and len(calls) == 5
    for step, name in enumerate(STEPS):
        assert f"{name}：{'失败' if step == index else '通过'}" in summary


def test_several_workers(script):
    _, _, calls = script("^$", GPU_WORKERS="8")
    assert "-n 8 -m gpu tests" in calls[1]


def test_a_failed_build_ends_the_run(script):
    code, out, calls = script("build_native")
    assert code == 1 and len(calls) == 1 and "编译：失败" in out.split("总结")[1]


def test_the_time_limit_is_shared(script):
    """总时限用完：没有运行的也写在总结里，退出码非零。"""
    code, out, calls = script("^$", GPU_SECONDS="0")
    assert code == 1 and not calls and "编译：没有运行" in out
    code, out, calls = script("^$", GPU_SECONDS="20")
    assert code == 1 and "基准：没有运行" in out and "测试：通过" in out
