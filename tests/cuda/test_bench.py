"""benchmarks/gpu.py 能跑完并写出 JSON（在 CPU 上用极小的形状，不看数字）。"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_bench_writes_json(tmp_path):
    output = tmp_path / "results" / "gpu.json"
    script = str(ROOT / "benchmarks" / "gpu.py")
    command = [sys.executable, script, "--device", "cpu", "--quick", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"已写入 {output}" in done.stdout
    result = json.loads(output.read_text(encoding="utf-8"))
    assert result["copy_gbps"] > 0 and result["torch"]
    names = {reading["op"] for reading in result["readings"]}
    assert {"rms_norm", "add_rms_norm", "rope", "mla_cache_write"} <= names
    assert all(reading["us"] > 0 for reading in result["readings"])
