"""与 llama-bench 并排：命令、换算与报错；用一个只会输出 JSON 的假程序，没有对时间的断言。"""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("transformers")
# pylint: disable=wrong-import-position

from deepseek_opt.benchmarks import llamacpp, runner  # noqa: E402
from deepseek_opt.benchmarks.shapes import TINY  # noqa: E402
from deepseek_opt.errors import InputError  # noqa: E402

_PROGRAM, _MODEL = llamacpp._VARIABLES
_FAKE = """#!{python}
import json, sys
args = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(args) + chr(10))
count = int(args[args.index("-n") + 1])
if {broken}:
    sys.exit("model not found")
print(json.dumps([{{"samples_ns": [8_000_000], "n_gen": count}}]))
"""


pytestmark = pytest.mark.usefixtures("small_buffers")


def _install(tmp_path, monkeypatch, broken=False):
    program, model, log = (tmp_path / name for name in ("llama-bench", "m.gguf", "log"))
    program.write_text(_FAKE.format(python=sys.executable, log=str(log), broken=broken))
    program.chmod(0o755)
    model.write_bytes(b"")
    monkeypatch.setenv(_PROGRAM, str(program))
    monkeypatch.setenv(_MODEL, str(model))
    return log


def test_rows_and_commands(tmp_path, monkeypatch):
    log = _install(tmp_path, monkeypatch)
    result = runner.run_suite("moe", shape=TINY, quick=True, only=["llamacpp"])
    assert [row.key for row in result.rows] == [
        "llamacpp.prefill.16",
        "llamacpp.decode.1x24",
        "llamacpp.decode.1x48",
    ]
    assert [row.peer for row in result.rows] == [8.0, 0.5, 0.5]  # 解码是每步的
    assert all(row.ours > 0 and row.target == 1.0 for row in result.rows)
    assert result.rows[0].details["peer_tokens_per_second"] == pytest.approx(16 / 8e-3)
    assert result.rows[1].details["peer_tokens_per_second"] == pytest.approx(1 / 0.5e-3)
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert ["-p", "16", "-n", "0"] == calls[0][-4:]
    assert ["-p", "0", "-n", "16", "-d", "24", "-fa", "1"] == calls[1][-8:]


def test_not_asked_for(monkeypatch):
    monkeypatch.delenv(_PROGRAM, raising=False)
    monkeypatch.delenv(_MODEL, raising=False)
    result = runner.run_suite("moe", shape=TINY, quick=True, only=["router.1"])
    assert not any(row.key.startswith("llamacpp") for row in result.rows)


def test_half_given_or_missing(tmp_path, monkeypatch):
    _install(tmp_path, monkeypatch)
    monkeypatch.setenv(_MODEL, str(tmp_path / "没有.gguf"))
    with pytest.raises(InputError, match=f"{_MODEL}.*没有.gguf"):
        runner.run_suite("moe", shape=TINY, quick=True, only=["llamacpp"])
    monkeypatch.delenv(_PROGRAM)
    with pytest.raises(InputError, match=_PROGRAM):
        runner.run_suite("moe", shape=TINY, quick=True, only=["llamacpp"])


def test_failure_is_reported(tmp_path, monkeypatch):
    _install(tmp_path, monkeypatch, broken=True)
    with pytest.raises(InputError, match="llama-bench 退出码 1：model not found"):
        runner.run_suite("moe", shape=TINY, quick=True, only=["llamacpp"])
