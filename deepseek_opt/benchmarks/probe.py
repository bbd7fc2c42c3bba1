"""在独立子进程里实测一种实现的预填充：内存峰值、时间、缓存大小，随后的解码时间。

每种实现一个子进程（:class:`Probe`），互不共用堆，峰值互不影响；进程留着，按长度逐次提问，因此几种
实现可以交替测量，也只启动一次。峰值是预填充期间常驻内存的增量（缓存 + 激活，不含权重），量法见
:mod:`~deepseek_opt.benchmarks.process_memory`。

内存取最后一遍：oneDNN 等库按矩阵形状缓存生成的代码，MoE 每个专家的行数各不相同，同一输入的第一遍会
多占几十 MiB（每种实现都一样）；第二遍输入相同、形状都见过，量到的才是缓存与激活。``repeats=1`` 时
读数含有这部分。

子进程由 ``python -m deepseek_opt.benchmarks.probe '{JSON}'`` 启动，一行一问一答。
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepseek_opt.errors import DeepSeekOptError, InputError

#: 实现的键名与中文名；顺序即表格里的顺序。
IMPLEMENTATIONS = {
    "standard_eager": "标准多头注意力（eager）",
    "standard_sdpa": "标准多头注意力（SDPA）",
    "transformers_eager": "transformers MLA（eager）",
    "transformers_sdpa": "transformers MLA（SDPA）",
    "optimized": "本库",
}
SUBJECTS = ("folder", "model", "layer")
_WARMUP = 16
# 让 oneDNN 记得住一遍里的全部形状，第二遍才不再生成代码。
_CACHE_SETTINGS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192"}


class ProbeError(DeepSeekOptError):
    """子进程没有给出读数。"""


@dataclass(frozen=True)
class ProbeSpec:
    """子进程测什么。

    subject : ``folder``（source 为 HF 模型目录）、``model`` 或 ``layer``（source 为形状名）。
    implementation : :data:`IMPLEMENTATIONS` 之一。
    dtype : ``float32``、``bfloat16`` 或 ``float16``。
    preset : 本库用的预设。
    """

    subject: str
    source: str
    implementation: str
    dtype: str
    threads: int
    isa: str | None = None
    preset: str = "fast_decode"


@dataclass(frozen=True)
class ProbeReading:
    """一个长度的读数；时间为秒，内存为字节。decode_s 为每个新词元的中位数，没有解码时为 None。"""

    batch: int
    length: int
    prefill_s: float
    peak_bytes: int
    cache_bytes: int
    decode_s: float | None
    method: str


class Probe:
    """子进程的句柄；用作上下文管理器，离开时结束子进程。

    示例::

        spec = ProbeSpec("layer", "V2-Lite-3L", "optimized", "bfloat16", threads=2)
        with Probe(spec) as probe:
            print(probe.measure(1, 8192).peak_bytes)
    """

    def __init__(self, spec: ProbeSpec):
        self.spec = spec
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        # 句柄留到 close()：子进程要跨多次提问。
        self._process = subprocess.Popen(  # pylint: disable=consider-using-with
            [sys.executable, "-m", "deepseek_opt.benchmarks.probe", json.dumps(asdict(spec))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            env=_CACHE_SETTINGS | dict(os.environ),
        )
        self._ready = False

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_ready(self) -> None:
        """等模型装好；抛出 ProbeError：子进程没有起来。"""
        if not self._ready:
            self._receive()
            self._ready = True

    def measure(
        self, batch: int, length: int, *, decode: int = 0, repeats: int = 1
    ) -> ProbeReading:
        """预填充 batch 行、每行 length 个词元，再解码 decode 步。

        repeats 遍，内存取最后一遍，时间取最短。
        """
        self.wait_ready()
        request = {"batch": batch, "length": length, "decode": decode, "repeats": repeats}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # 子进程已退出：下面读不到回答，报出它的错误
        return ProbeReading(**self._receive())

    def _receive(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            tail = self._errors.read().strip().splitlines()[-1:] or ["没有输出"]
            code = self._process.returncode
            raise ProbeError(
                f"测量 {IMPLEMENTATIONS[self.spec.implementation]} 的子进程退出了"
                f"（退出码 {code}{'，多半是内存不够' if code == -9 else ''}）：{tail[0]}"
            )
        return json.loads(line)

    def close(self) -> None:
        """结束子进程。"""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            try:
                stream.close()
            except OSError:
                pass


# ---- 子进程 ----


@dataclass
class Subject:
    """被测物：prepare 造一次输入与空缓存；prefill、decode 各跑一次。"""

    prepare: Callable[[int, int], Any]
    prefill: Callable[[Any], Any]
    decode: Callable[[Any], Any]


def make_subject(spec: ProbeSpec) -> Subject:
    """按 spec 装好被测物（权重常驻，不计入峰值）。"""
    if spec.implementation not in IMPLEMENTATIONS or spec.subject not in SUBJECTS:
        raise InputError(f"不认识的测量：{spec.subject}、{spec.implementation}")
    if spec.subject == "layer":
        return _layer_subject(spec)
    return _model_subject(spec)


def _attention_kind(spec: ProbeSpec) -> str:
    return "eager" if spec.implementation.endswith("eager") else "sdpa"


def _optimize(module: Any, spec: ProbeSpec) -> None:
    from deepseek_opt import OptimizationProfile, optimize

    optimize(module, OptimizationProfile.preset(spec.preset))


def _model_subject(spec: ProbeSpec) -> Subject:
    import torch
    from transformers import DynamicCache

    model = _load_model(spec, getattr(torch, spec.dtype))
    if spec.implementation.startswith("standard"):
        from deepseek_opt.benchmarks.standard import use_standard_attention

        use_standard_attention(model, _attention_kind(spec))
    elif spec.implementation == "optimized":
        _optimize(model, spec)
    vocabulary = model.config.vocab_size
    tokens = _held_out_ids(spec) if spec.subject == "folder" else None

    def prepare(batch: int, length: int) -> dict[str, Any]:
        if tokens is None:
            generator = torch.Generator().manual_seed(length)  # 每一遍的输入相同
            ids = torch.randint(0, vocabulary, (batch, length), generator=generator)
        else:
            stream = tokens.repeat(-(-batch * length // tokens.numel()))
            ids = stream[: batch * length].view(batch, length).clone()
        return {"ids": ids, "cache": DynamicCache(config=model.config)}

    def forward(state: dict[str, Any]) -> Any:
        out = model(state["ids"], past_key_values=state["cache"], logits_to_keep=1)
        state["ids"] = out.logits[:, -1:].argmax(-1)
        return state["cache"]

    return Subject(prepare, forward, forward)


def _load_model(spec: ProbeSpec, dtype: Any) -> Any:
    kind = _attention_kind(spec)
    if spec.subject == "model":
        from deepseek_opt.benchmarks import shapes

        return shapes.build_model(shapes.SHAPES[spec.source], dtype, kind)
    from deepseek_opt.demo.data import load_model

    return load_model(Path(spec.source), dtype, kind)


def _held_out_ids(spec: ProbeSpec) -> Any:
    import torch
    from transformers import AutoTokenizer

    from deepseek_opt.demo.data import held_out_stream

    tokenizer = AutoTokenizer.from_pretrained(spec.source, local_files_only=True)
    return torch.tensor(held_out_stream(tokenizer, 20000))


def _layer_subject(spec: ProbeSpec) -> Subject:
    import torch
    from transformers import DynamicCache

    from deepseek_opt.benchmarks import shapes, standard

    shape, dtype = shapes.SHAPES[spec.source], getattr(torch, spec.dtype)
    kind = _attention_kind(spec)
    if spec.implementation.startswith("standard"):
        config = shapes.make_config(shape, kind)
        layer = standard.StandardAttention(config, 0, kind).to(dtype)
    else:
        layer = shapes.build_attention(shape, dtype, kind)
    if spec.implementation == "optimized":
        _optimize(layer, spec)
    width = shape.config["hidden_size"]

    def prepare(batch: int, length: int) -> dict[str, Any]:
        # 逐步计算要显式的因果掩码；它是整个模型共用的一份，不算在一层的用量里。
        mask = standard.causal_mask(length, length, dtype) if kind == "eager" else None
        return {
            "hidden": torch.randn(batch, length, width).to(dtype),
            "rope": shapes.rope_tables(shape, batch, 0, length, dtype),
            "step": torch.randn(batch, 1, width).to(dtype),
            "step_rope": shapes.rope_tables(shape, batch, length, 1, dtype),
            "mask": mask,
            "cache": DynamicCache(config=shapes.make_config(shape)),
        }

    def prefill(state: dict[str, Any]) -> Any:
        state["out"] = layer(
            state["hidden"], state["rope"], state["mask"], past_key_values=state["cache"]
        )[0]
        return state["cache"]

    def decode(state: dict[str, Any]) -> Any:
        return layer(state["step"], state["step_rope"], None, past_key_values=state["cache"])[0]

    return Subject(prepare, prefill, decode)


def cache_bytes(cache: Any) -> int:
    """缓存已分配的字节数（含本库为后续词元预留的容量）。"""
    total = 0
    for layer in cache.layers:
        own = getattr(layer, "nbytes", None)
        if own is None:
            stored = (getattr(layer, "keys", None), getattr(layer, "values", None))
            own = sum(t.numel() * t.element_size() for t in stored if t is not None)
        total += own
    return total


def measure(subject: Subject, batch: int, length: int, decode: int, repeats: int) -> ProbeReading:
    """量一个长度：同样的输入 repeats 遍，内存取最后一遍，时间取最短，再解码 decode 步。"""
    from deepseek_opt.benchmarks.process_memory import measure_peak

    best, peak = float("inf"), None
    state: dict[str, Any] = {}
    for _ in range(repeats):
        state = subject.prepare(batch, length)

        def run(state: dict[str, Any] = state) -> float:
            start = time.perf_counter()
            subject.prefill(state)
            return time.perf_counter() - start

        peak = measure_peak(run)
        best = min(best, peak.result)
    size = cache_bytes(state["cache"])
    times = [_seconds(lambda: subject.decode(state)) for _ in range(decode)]
    middle = sorted(times)[len(times) // 2] if times else None
    return ProbeReading(batch, length, best, peak.peak_bytes, size, middle, peak.method)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def serve(spec: ProbeSpec, requests: Any, answers: Any) -> None:
    """装好被测物，先答一行 ready，然后逐行答问，直到输入结束。"""
    import torch

    from deepseek_opt import _native

    torch.set_num_threads(spec.threads)
    torch.manual_seed(0)
    if spec.isa is not None:
        _native.set_isa(spec.isa)
    with torch.inference_mode():
        subject = make_subject(spec)
        measure(subject, 1, _WARMUP, 1, 1)  # 线程池、各库的暂存不算在读数里
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in requests:
            reading = measure(subject, **json.loads(line))
            print(json.dumps(asdict(reading)), file=answers, flush=True)


if __name__ == "__main__":
    serve(ProbeSpec(**json.loads(sys.argv[1])), sys.stdin, sys.stdout)
