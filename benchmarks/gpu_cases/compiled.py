"""解码一步的另一个对照：transformers 经 ``torch.compile(mode="reduce-overhead")``，缓存是 StaticCache。

编译可能很久，甚至不成功，所以在子进程里跑，限时；到时候已经给出的批量照样算数。放在最后：不占别的项的时间。
子进程由 ``python -m benchmarks.gpu_cases.compiled '{JSON}'`` 启动，每个批量输出一行 JSON。
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases.decode_step import BATCHES, CONTEXT
from benchmarks.gpu_cases.row import SKIPPED, Row
from benchmarks.gpu_cases.runner import Case, Env, free, ratio_row
from benchmarks.gpu_cases.timer import Timer, first_line
from deepseek_opt.benchmarks import shapes

SECONDS = 100.0  # 三个批量合计：启动约 15 秒，首次编译约一分钟
ROOM = 256  # StaticCache 在 CONTEXT 之外的余量：计时要走一百多步
_ROOT = Path(__file__).resolve().parents[2]
_DTYPE = torch.bfloat16


def cases(_: Env) -> list[Case]:
    """一项，每个批量一行。"""
    return [Case("decode_step.compiled", run)]


def run(env: Env) -> Iterator[Row]:
    """限时跑子进程，与已有的解码读数比。"""
    free(env.device)
    seconds = min(SECONDS, env.remaining())
    found, why = measured(env, seconds)
    for rows in BATCHES:
        key = f"decode_step.b{rows}.compiled"
        reading = found.get(rows, {"error": why})
        ours = env.find(f"decode_step.b{rows}.bandwidth")
        if "us" not in reading:
            yield Row(key, SKIPPED, reading["error"], details=reading)
        elif ours is None or ours.us is None:
            yield Row(key, SKIPPED, "本库没有这个批量的读数", details=reading)
        else:
            details = {**reading, "ours_us": ours.us, "ours_mode": ours.mode}
            unit = "倍于编译后的 transformers"
            yield ratio_row(key, reading["us"] / ours.us, unit, None, details)


def measured(env: Env, seconds: float) -> tuple[dict[int, dict[str, Any]], str]:
    """({批量: 读数}，其余批量没有读数的原因)。"""
    request = {"device": env.device, "quick": env.quick, "batches": BATCHES}
    command = [sys.executable, "-m", "benchmarks.gpu_cases.compiled", json.dumps(request)]
    options: dict[str, Any] = {"cwd": _ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        done = subprocess.run(command, timeout=seconds, check=False, **options)
        output, why = done.stdout, f"子进程退出码 {done.returncode}：{_last_line(done.stderr)}"
    except subprocess.TimeoutExpired as error:
        output, why = error.stdout or b"", f"{seconds:.0f} 秒内没有编译完"
    lines = [json.loads(line) for line in output.decode().splitlines() if line.startswith("{")]
    return {line.pop("rows"): line for line in lines}, why


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "没有输出"


# ---- 子进程 ----


def serve(device: str, quick: bool, batches: list[int]) -> None:
    """逐个批量编译、计时，各输出一行。"""
    shape, context = (shapes.TINY, 32) if quick else (shapes.REFERENCE, CONTEXT)
    model = shapes.build_model(shape, _DTYPE, "sdpa", device)
    # CPU 上只检查脚本：不经编译器后端，省去几十秒。
    options = {"backend": "eager"} if quick else {"mode": "reduce-overhead"}
    timer = Timer(device, quick)
    for rows in batches:
        torch.compiler.reset()
        try:
            with torch.no_grad():  # 录图时要原地改写缓存，推理张量不行
                reading = _measure(model, shape, rows, context, timer, options)
        except Exception as error:  # pylint: disable=broad-exception-caught
            reading = {"error": first_line(error)}  # 编译器的错误各式各样
        print(json.dumps({"rows": rows, **reading}), flush=True)


def _measure(
    model: Any, shape: shapes.Shape, rows: int, context: int, timer: Timer, options: dict[str, str]
) -> dict[str, float]:
    from transformers import StaticCache

    layers = shape.config["num_hidden_layers"]
    filled = shapes.make_cache(shape, rows, context, layers, _DTYPE, timer.device)
    cache = StaticCache(config=model.config, max_cache_len=context + ROOM)
    for index, layer in enumerate(filled.layers):
        cache.update(layer.keys, layer.values, index)
    ids = torch.zeros(rows, 1, dtype=torch.int64, device=timer.device)
    compiled = torch.compile(model.forward, **options)
    start = time.perf_counter()
    for _ in range(3):  # 编译，再录图
        compiled(ids, past_key_values=cache)
    seconds = time.perf_counter() - start
    us = timer.us(lambda: compiled(ids, past_key_values=cache), [()])
    return {"us": us, "compile_s": seconds}


if __name__ == "__main__":
    serve(**json.loads(sys.argv[1]))
