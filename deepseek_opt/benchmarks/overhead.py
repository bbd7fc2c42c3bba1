"""每次算子调用的固定开销：张量小到计算可以忽略时，一次调用多少微秒。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from deepseek_opt import ops
from deepseek_opt.benchmarks.cases import Case, Env, Row
from deepseek_opt.benchmarks.timing import call_microseconds

_CALLS = 2000


@dataclass(frozen=True)
class OverheadCase(Case):
    """rms_norm、linear、mla_decode 的小张量，记录梯度与 inference_mode 两种情形。"""

    key: str
    title: str

    def run(self, env: Env) -> list[Row]:
        calls = _CALLS // 20 if env.quick else _CALLS
        rows = []
        for name, (ours, peer) in _calls().items():
            for mode, label in (
                (torch.enable_grad, "记录梯度"),
                (torch.inference_mode, "推理模式"),
            ):
                with mode():
                    mine = call_microseconds(ours, calls)
                    theirs = None if peer is None else call_microseconds(peer, calls)
                suffix = "grad" if mode is torch.enable_grad else "inference"
                rows.append(
                    Row(
                        f"{self.key}.{name}.{suffix}",
                        f"每次调用 {name}（{label}）",
                        "info",
                        "us",
                        "torch 的同类运算" if peer is not None else "",
                        theirs,
                        mine,
                    )
                )
        return rows


def _calls() -> dict[str, tuple[Callable[[], Any], Callable[[], Any] | None]]:
    """名字 -> (本库, torch)；权重记录梯度，像训练时那样。"""
    x, weight = torch.ones(1, 16), torch.ones(16, requires_grad=True)
    matrix = torch.ones(16, 16, requires_grad=True)
    q, latent, rope = torch.ones(1, 1, 1, 12), torch.ones(1, 4, 16), torch.ones(1, 4, 4)
    kv_b, spans = torch.ones(16, 16), ops.make_spans(1, 1, 4)
    return {
        "rms_norm": (
            lambda: ops.rms_norm(x, weight, 1e-6),
            lambda: F.rms_norm(x, (16,), weight, 1e-6),
        ),
        "linear": (lambda: ops.linear(x, matrix), lambda: F.linear(x, matrix)),
        "mla_decode": (
            lambda: ops.mla_decode(q, latent, rope, None, kv_b, spans, None, 0.3, 8),
            None,
        ),
    }
