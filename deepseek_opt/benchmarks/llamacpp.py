"""与 llama.cpp 并排：``moe`` 套件里整个模型的解码与预填充，另与 llama-bench 比。

llama.cpp 不随本库，也不下载；自己编译好，并有同样形状（V2-Lite-3L，bf16）的 GGUF 时，用两个环境变量告诉这里：

    DEEPSEEK_OPT_LLAMA_BENCH   llama-bench 的路径
    DEEPSEEK_OPT_LLAMA_GGUF    模型文件
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from deepseek_opt.benchmarks import timing
from deepseek_opt.benchmarks.cases import Case, Env, Row, Work
from deepseek_opt.errors import InputError

_STEPS = 16  # 一次解码的词元数，两边相同
_ROUNDS = 3
_VARIABLES = ("DEEPSEEK_OPT_LLAMA_BENCH", "DEEPSEEK_OPT_LLAMA_GGUF")


@dataclass(frozen=True)
class LlamaCase(Case):
    """一项工作与 llama-bench 交替运行；tokens 为一次计时的词元数。"""

    key: str
    title: str
    build: Callable[[Env], Work]
    options: tuple[str, ...]
    tokens: int
    calls: int = 1

    def run(self, env: Env) -> list[Row]:
        """各跑几轮，取最快的一轮。"""
        command = _command(env, self.options)
        with torch.inference_mode():
            work = self.build(env)
            work.ours()
            with timing.fresh_read(env.roofline(), env.quick) as found:
                pairs = [
                    (_llama_ms(command), _ours_ms(work.ours, self.calls))
                    for _ in range(1 if env.quick else _ROUNDS)
                ]
        peers, mine = zip(*pairs, strict=True)
        floor = found[0].floor_seconds(work.flops, work.read_bytes, work.dtype) * 1e3
        peer, ours = min(peers), min(mine)
        details = {
            "threads": env.threads,
            "read_gbps": found[0].read_gbps,
            "peer_median_ms": statistics.median(peers),
            "ours_median_ms": statistics.median(mine),
            "tokens_per_second": self.tokens / self.calls / ours * 1e3,
            "peer_tokens_per_second": self.tokens / self.calls / peer * 1e3,
        }
        reading = (self.key, self.title, "speed", "ms", "llama.cpp", peer, ours, 1.0, floor / ours)
        return [Row(*reading, details=details)]


def cases(
    env: Env, decode: Callable[..., Work], prefill: Callable[..., Work], dtype: torch.dtype
) -> list[Case]:
    """两个环境变量都给出时，解码与预填充各两项；都没给出时为空。

    抛出 InputError：只给出一个，或指的文件不存在。
    """
    given = [os.environ.get(name) for name in _VARIABLES]
    if not any(given):
        return []
    for name, path in zip(_VARIABLES, given, strict=True):
        if not path or not Path(path).is_file():
            raise InputError.expected(name, "已有的文件（两个环境变量要一起给出）", path)
    shape, found = env.shape, []
    for tokens in shape.model_prefill:
        found.append(
            LlamaCase(
                f"llamacpp.prefill.{tokens}",
                f"整个模型 预填充 {tokens} bf16",
                partial(prefill, tokens=tokens, dtype=dtype),
                ("-p", str(tokens), "-n", "0"),
                tokens,
            )
        )
    for context in (shape.batch_context, shape.long_context):
        found.append(
            LlamaCase(
                f"llamacpp.decode.1x{context}",
                f"整个模型 解码 1 行 已缓存 {context} bf16",
                partial(decode, rows=1, context=context, dtype=dtype),
                ("-p", "0", "-n", str(_STEPS), "-d", str(context), "-fa", "1"),
                _STEPS,
                _STEPS,
            )
        )
    return found


def _command(env: Env, options: tuple[str, ...]) -> list[str]:
    program, model = (os.environ[name] for name in _VARIABLES)
    return [program, "-m", model, "-t", str(env.threads), "-r", "1", "-o", "json", *options]


def _llama_ms(command: list[str]) -> float:
    """每次（预填充）或每步（解码）的毫秒数。"""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"llama-bench 退出码 {done.returncode}：{done.stderr.strip()[-300:]}")
    row = json.loads(done.stdout)[0]
    return min(row["samples_ns"]) / max(1, row["n_gen"]) / 1e6


def _ours_ms(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls * 1e3
