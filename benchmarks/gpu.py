"""CUDA 算子的基准：每个算子的字节每秒，对照同一次运行里读到的拷贝带宽与 torch 自己的算子。

    python benchmarks/gpu.py --output benchmarks/results/gpu.json

计时：输入轮换多份，总量大过 L2，读到的是显存而不是缓存；每项取多轮的中位数。
``--device cpu --quick`` 只用来检查脚本本身能跑，数字没有意义。
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deepseek_opt import _native, ops  # noqa: E402  # pylint: disable=wrong-import-position

EPS = 1e-6
ROTATE_BYTES = 512 << 20  # 轮换的输入总量：任何现有 GPU 的 L2 都装不下
ROUNDS, CALLS = 7, 20


@dataclass
class Reading:
    """一项读数；时间单位微秒，带宽单位 GB/s。"""

    op: str
    shape: str
    dtype: str
    us: float
    gbps: float
    roofline: float  # 占拷贝带宽的比例
    torch_us: float
    speedup: float  # torch 的时间 / 我们的时间


@dataclass
class Case:
    """一项基准：make() 造一份输入；ours、theirs 各跑一次；bytes 为最少的读写量。"""

    op: str
    shape: str
    dtype: torch.dtype
    bytes: int
    make: Callable[[], tuple]
    ours: Callable
    theirs: Callable


class Timer:
    """GPU 用事件计时，CPU 用时钟。"""

    def __init__(self, device: str, quick: bool):
        self.cuda = device == "cuda"
        self.rounds, self.calls = (1, 1) if quick else (ROUNDS, CALLS)
        self.rotate = (1 << 20) if quick else ROTATE_BYTES

    def _run(self, call: Callable, inputs: list[tuple]) -> None:
        for index in range(self.calls):
            call(*inputs[index % len(inputs)])

    def _clock_us(self, call: Callable, inputs: list[tuple]) -> float:
        start = time.perf_counter()
        self._run(call, inputs)
        return (time.perf_counter() - start) * 1e6 / self.calls

    def _event_us(self, call: Callable, inputs: list[tuple]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._run(call, inputs)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3 / self.calls

    def us(self, call: Callable, inputs: list[tuple]) -> float:
        """一次调用的微秒数（各轮中位数）。"""
        for args in inputs[:3]:
            call(*args)
        once = self._event_us if self.cuda else self._clock_us
        return statistics.median(once(call, inputs) for _ in range(self.rounds))

    def copies(self, size: int) -> int:
        """输入要几份。"""
        return max(1, min(self.calls, -(-self.rotate // max(size, 1))))


def copy_bandwidth(device: str, timer: Timer, quick: bool) -> float:
    """拷贝带宽（读加写）GB/s：这次运行的屋顶线。"""
    size = (1 << 20) if quick else (1 << 30)
    pair = [tuple(torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))]
    return 2 * size / timer.us(lambda to, source: to.copy_(source), pair) / 1e3


def eager_norm(x, weight):
    """transformers 的 RMSNorm 逐步写法。"""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def norm_cases(device: str, shapes: list[tuple[int, int]]) -> list[Case]:
    """RMS 归一化：前向、加残差、反向。torch 一侧用它的融合算子 F.rms_norm。"""
    cases = []
    for rows, dim in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            one = rows * dim * dtype.itemsize

            def make(rows=rows, dim=dim, dtype=dtype):
                x = torch.randn(rows, dim, device=device).to(dtype)
                return x, torch.ones(dim, device=device, dtype=dtype), torch.randn_like(x)

            def torch_backward(x, w, g):
                leaves = x.detach().requires_grad_(), w.detach().requires_grad_()
                y = F.rms_norm(leaves[0], (x.shape[-1],), leaves[1], EPS)
                return torch.autograd.grad(y, leaves, g)

            def torch_add(x, w, g):
                total = x + g
                return F.rms_norm(total, (x.shape[-1],), w, EPS), total

            shape = f"{rows}x{dim}"
            backward = torch.ops.deepseek_opt.rms_norm_backward
            cases += [
                Case(
                    *("rms_norm", shape, dtype, 2 * one, make),
                    lambda x, w, g: ops.rms_norm(x, w, EPS),
                    lambda x, w, g: F.rms_norm(x, (x.shape[-1],), w, EPS),
                ),
                Case(
                    *("rms_norm_vs_eager", shape, dtype, 2 * one, make),
                    lambda x, w, g: ops.rms_norm(x, w, EPS),
                    lambda x, w, g: eager_norm(x, w),
                ),
                Case(
                    *("add_rms_norm", shape, dtype, 4 * one, make),
                    lambda x, w, g: ops.add_rms_norm(x, g, w, EPS),
                    torch_add,
                ),
                # torch 一侧含前向：autograd 没有单独的反向入口。
                Case(
                    *("rms_norm_backward_vs_forward_backward", shape, dtype, 3 * one, make),
                    lambda x, w, g, run=backward: run(g, x, w, EPS),
                    torch_backward,
                ),
            ]
    return cases


def rope_cases(device: str, shapes: list[tuple[int, int, int, int]]) -> list[Case]:
    """旋转位置编码：torch 一侧是 transformers 的逐步写法。"""

    def eager(x, cos, sin):
        b, t, h, d = x.shape
        x = x.view(b, t, h, d // 2, 2).transpose(4, 3).reshape(b, t, h, d)
        full_cos = torch.cat((cos, cos), -1)[:, :, None].to(x.dtype)
        full_sin = torch.cat((sin, sin), -1)[:, :, None].to(x.dtype)
        half = torch.cat((-x[..., d // 2 :], x[..., : d // 2]), -1)
        return x * full_cos + half * full_sin

    cases = []
    for b, t, h, d in shapes:
        for dtype in (torch.bfloat16, torch.float32):

            def make(b=b, t=t, h=h, d=d, dtype=dtype):
                angle = torch.randn(1, t, d // 2, device=device)
                return torch.randn(b, t, h, d, device=device).to(dtype), angle.cos(), angle.sin()

            size = 2 * b * t * h * d * dtype.itemsize + t * d * 4
            ours = lambda x, c, s: ops.rope(x, c, s, True)  # noqa: E731  # pylint: disable=C3001
            cases.append(Case("rope", f"{b}x{t}x{h}x{d}", dtype, size, make, ours, eager))
    return cases


def cache_cases(device: str, shapes: list[tuple[int, int]]) -> list[Case]:
    """缓存写入：B 行各写 T 个新词元（r = 512，dr = 64）；torch 一侧是切片赋值。"""
    rank, dr, capacity = 512, 64, 8192
    cases = []
    for b, t in shapes:
        for target in (torch.bfloat16, torch.int8):

            def make(b=b, t=t, target=target):
                cache = torch.zeros(b, capacity, rank, device=device, dtype=target)
                keys = torch.zeros(b, capacity, dr, device=device, dtype=torch.bfloat16)
                quantized = target == torch.int8
                scale = torch.zeros(b, capacity, device=device) if quantized else None
                latent = torch.randn(b, t, rank, device=device).bfloat16()
                rope = torch.randn(b, t, dr, device=device).bfloat16()
                start = torch.zeros(b, dtype=torch.int64, device=device)
                return cache, keys, scale, latent, rope, start

            def eager(cache, keys, scale, latent, rope, _start, t=t):
                keys[:, :t] = rope
                if scale is None:
                    cache[:, :t] = latent
                    return
                wide = latent.float()
                step = wide.abs().amax(-1) / 127
                scale[:, :t] = step
                cache[:, :t] = (wide / step[..., None]).round().to(torch.int8)

            size = b * t * (rank * (2 + target.itemsize) + dr * 4)
            ours = torch.ops.deepseek_opt.mla_cache_write
            cases.append(Case("mla_cache_write", f"{b}x{t}", target, size, make, ours, eager))
    return cases


def all_cases(device: str, quick: bool) -> list[Case]:
    """全部基准；quick 只用很小的形状。"""
    if quick:
        return [
            *norm_cases(device, [(4, 64)]),
            *rope_cases(device, [(1, 4, 2, 64)]),
            *cache_cases(device, [(1, 4)]),
        ]
    return [
        *norm_cases(device, [(1, 2048), (64, 7168), (4096, 2048), (16384, 7168), (65536, 512)]),
        *rope_cases(
            device, [(1, 1, 16, 64), (8, 1, 128, 64), (4, 4096, 16, 64), (1, 8192, 128, 64)]
        ),
        *cache_cases(device, [(1, 1), (64, 1), (1, 4096), (8, 4096)]),
    ]


def measure(case: Case, timer: Timer, roofline: float) -> Reading:
    """跑一项，先核对结果再计时。"""
    inputs = [case.make() for _ in range(timer.copies(case.bytes))]
    with torch.no_grad():
        us = timer.us(case.ours, inputs)
    # 反向的 torch 一侧要建图，因此这里不能关梯度。
    torch_us = timer.us(case.theirs, inputs)
    gbps = case.bytes / us / 1e3
    dtype = str(case.dtype).removeprefix("torch.")
    shown = (round(us, 2), round(gbps, 1), round(gbps / roofline, 3), round(torch_us, 2))
    return Reading(case.op, case.shape, dtype, *shown, speedup=round(torch_us / us, 2))


def environment(device: str) -> dict[str, object]:
    """机器与版本：没有它们，读数没有意义。"""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {
        "device": name or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "library": _native.cuda_loaded() if device == "cuda" else _native.loaded(),
    }


def parse_args() -> argparse.Namespace:
    """命令行参数。"""
    parser = argparse.ArgumentParser(description="CUDA 算子的基准")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="很小的形状，只检查能不能跑")
    return parser.parse_args()


def main() -> None:
    """运行全部基准，打印表格，写 JSON。"""
    args = parse_args()
    if args.device == "cuda" and not _native.cuda_loaded():
        sys.exit(f"CUDA 算子库不可用：{_native.cuda_load_error()}")
    timer = Timer(args.device, args.quick)
    roofline = copy_bandwidth(args.device, timer, args.quick)
    print(f"拷贝带宽 {roofline:.0f} GB/s（本次运行的屋顶线）")
    readings = []
    for case in all_cases(args.device, args.quick):
        reading = measure(case, timer, roofline)
        readings.append(reading)
        print(
            f"{reading.op:38} {reading.shape:>16} {reading.dtype:>8} {reading.us:10.2f} us "
            f"{reading.gbps:8.1f} GB/s  屋顶线 {reading.roofline:6.1%}  "
            f"torch 的 {reading.speedup:.2f} 倍",
            flush=True,
        )
    result = {
        **environment(args.device),
        "copy_gbps": round(roofline, 1),
        "readings": [asdict(reading) for reading in readings],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(
        json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
    print(f"已写入 {args.output}")


if __name__ == "__main__":
    main()
