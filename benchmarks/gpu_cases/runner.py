"""运行各项：时间预算、没有的算子与放不下的项记为跳过，结果不对与出错记为失败，都不影响其余各项。"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu_cases.check import PEER_SLACK, Pairs, WrongResult, finite, largest_error
from benchmarks.gpu_cases.row import FAILED, SKIPPED, Peer, Row, Target
from benchmarks.gpu_cases.timer import Clocked, Timer, first_line


@dataclass
class Env:
    """这次运行：设备、计时、屋顶线、截止时刻（time.monotonic），以及已有的读数。"""

    device: str
    quick: bool
    timer: Timer
    copy_gbps: float
    bf16_tflops: float
    deadline: float
    rows: list[Row] = field(default_factory=list)

    def remaining(self) -> float:
        """还剩几秒。"""
        return self.deadline - time.monotonic()

    def find(self, key: str) -> Row | None:
        """已有的一行读数。"""
        return next((row for row in self.rows if row.key == key), None)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """设备上的标准正态。"""
        return torch.randn(*shape, device=self.device, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """一项：run(env) 逐行给出读数；中途出错时，已给出的仍然留下。"""

    key: str
    run: Callable[[Env], Iterator[Row]]


@dataclass
class Work:
    """一项计时工作。

    make : 造一份输入；ours、peers 的参数就是它。
    pairs : (输入, 输出) -> 要与参考比较的各对；输入可能已被原地改写。
    bytes、flops : 至少要读写的字节与要做的运算。
    checked : 核对时用的输入，由计时用的输入得到（例如只留一部分的梯度）。
    grad : 建图（训练）。graph : 试着录成 CUDA 图。
    """

    key: str
    dtype: torch.dtype
    make: Callable[[], tuple]
    ours: Callable[..., Any]
    peers: dict[str, Callable[..., Any]]
    pairs: Callable[[tuple, Any], Pairs]
    bytes: float = 0
    flops: float = 0
    checked: Callable[[tuple], tuple] = lambda args: args
    grad: bool = False
    graph: bool = False
    details: dict[str, Any] = field(default_factory=dict)


def run_case(env: Env, case: Case, emit: Callable[[Row], None]) -> None:
    """跑一项，每得一行就 emit。"""
    if env.remaining() <= 0:
        emit(Row(case.key, SKIPPED, "时间预算用完了"))
        return
    try:
        for row in case.run(env):
            emit(row)
    except (NotImplementedError, ImportError) as error:
        # 没有这个算子（UnsupportedError 也是 NotImplementedError），或没有装 transformers。
        emit(Row(case.key, SKIPPED, first_line(error)))
    except WrongResult as error:
        emit(Row(case.key, FAILED, str(error)))
    except Exception as error:  # pylint: disable=broad-exception-caught
        # 无人看着的运行：一项的错误不能让其余各项没有读数。
        status, why = (SKIPPED, "显存不够：") if out_of_memory(error) else (FAILED, "")
        emit(Row(case.key, status, why + first_line(error)))
    finally:
        free(env.device)


def out_of_memory(error: BaseException) -> bool:
    """是不是放不下：torch 的、本库的 MemoryBudgetError，或核里转述的。"""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "out of memory" in str(error).lower()


def free(device: str) -> None:
    """归还空闲的显存。"""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure(env: Env, work: Work) -> Row:
    """先核对，再与各对照交替计时。抛出 WrongResult：我们的结果不对。"""
    inputs = [work.make() for _ in range(env.timer.copies(int(work.bytes)))]
    row = Row(work.key, dtype=str(work.dtype).removeprefix("torch."), details=dict(work.details))
    with nullcontext() if work.grad else torch.no_grad():
        row.error = _checked(work, work.ours, inputs[0], 1.0)
        ours = env.timer.prepare(work.ours, inputs, work.graph)
        sides, timed = [ours], []
        for index, (name, call) in enumerate(work.peers.items()):
            peer = Peer(name)
            row.peers.append(peer)
            side = _peer_side(env, work, peer, call, inputs, inputs[(index + 1) % len(inputs)])
            if side is not None:
                sides.append(side)
                timed.append(peer)
        if ours.mode == "graph":  # 逐次调用的另记一份
            sides.append(env.timer.prepare(work.ours, inputs))
        readings = env.timer.in_turn(sides)
    if ours.mode == "graph":
        row.details["eager_us"] = readings.pop()
    if ours.note:
        row.details["note"] = ours.note
    fill(env, row, readings[0], ours.mode, work.bytes, work.flops)
    for peer, us in zip(timed, readings[1:], strict=True):
        peer.us, peer.speedup = us, us / readings[0]
    return row


def fill(  # pylint: disable=too-many-arguments
    env: Env, row: Row, us: float, mode: str, size: float, flops: float
) -> None:
    """填上时间、速率与占屋顶线的比例：读写 size 字节，做 flops 次运算。"""
    row.us, row.mode = us, mode
    row.gbps = size / us / 1e3 if size else None
    row.tflops = flops / us / 1e6 if flops else None
    row.roofline = max(size / env.copy_gbps / 1e3, flops / env.bf16_tflops / 1e6) / us


def _checked(work: Work, call: Callable[..., Any], args: tuple, slack: float) -> float:
    args = work.checked(args)
    out = call(*args)
    for tensor in out if isinstance(out, tuple) else (out,):
        if isinstance(tensor, torch.Tensor):
            finite(tensor)
    return largest_error(work.pairs(args, out), slack)


def _peer_side(
    env: Env, work: Work, peer: Peer, call: Callable, inputs: Sequence[tuple], args: tuple
) -> Clocked | None:
    """核对并准备一个对照；不能用则记下原因，返回 None。"""
    try:
        peer.error = _checked(work, call, args, PEER_SLACK)
        side = env.timer.prepare(call, inputs, work.graph)
    except WrongResult as error:
        peer.note = str(error)
        return None
    except Exception as error:  # pylint: disable=broad-exception-caught
        # 对照来自别处（后端、Triton 编译器）：用不了就记下。
        peer.note = first_line(error)
        return None
    peer.mode, peer.note = side.mode, side.note
    return side


def ratio_row(
    key: str, value: float, unit: str, target: Target | None, details: dict[str, Any]
) -> Row:
    """不计时的一行：一个比值与它的要求。"""
    return Row(key, details=details).judge(value, unit, target)
