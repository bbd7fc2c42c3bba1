"""GPU 上的基准：各算子、显存、整个模型解码一步，对照与屋顶线都在同一次运行里量。

    python benchmarks/gpu.py --output benchmarks/results/gpu.json
    python benchmarks/gpu.py --only mla_decode,mla_prefill --match h128

先核对结果（fp64 参考，只算几行几头），不对的记为失败，不计时，退出码为 1；没有的算子、放不下的、超出
``--budget-s`` 的记为跳过。每得一行就写一次 JSON，中途被打断也留下已有的。
``--device cpu --quick`` 只用来检查脚本本身能跑，数字没有意义。
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# pylint: disable=wrong-import-position
from benchmarks.gpu_cases import (  # noqa: E402
    compiled,
    decode_step,
    dense,
    generate,
    generation,
    length,
    memory,
    mla_decode,
    mla_heads,
    mla_prefill,
    moe,
    moe_train,
    mtp_ops,
    sparse_dense,
)
from benchmarks.gpu_cases.environment import environment, smi  # noqa: E402
from benchmarks.gpu_cases.row import FAILED, OK, SKIPPED, Row  # noqa: E402
from benchmarks.gpu_cases.runner import Env, run_case  # noqa: E402
from benchmarks.gpu_cases.timer import Timer  # noqa: E402
from deepseek_opt import _native  # noqa: E402

# 依次运行；编译的对照最慢，放在最后。
GROUPS: dict[str, ModuleType] = {
    "mla_decode": mla_decode,
    "mla_prefill": mla_prefill,
    "moe": moe,
    "moe_train": moe_train,
    "decode_step": decode_step,
    "generate": generate,
    "sparse_dense": sparse_dense,
    "memory": memory,
    "length": length,
    "dense": dense,
    "mla_heads": mla_heads,
    "mtp_ops": mtp_ops,
    "generation": generation,
    "compiled": compiled,
}
BUDGET_SECONDS = 240.0


class Report:
    """读数：逐行打印，逐行写进 JSON。"""

    def __init__(self, path: Path, header: dict[str, Any], rows: list[Row]):
        self.path, self.header, self.rows = path, header, rows
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        """一行读数；quick 的数字没有意义，不与要求比。"""
        if self.header["quick"]:
            row.met = None
        self.rows.append(row)
        print(row.line(), flush=True)
        self.write(complete=False)

    def write(self, complete: bool) -> None:
        """写 JSON；complete 为 False 表示还没有跑完。"""
        rows = [row.to_dict() for row in self.rows]
        result = {**self.header, "complete": complete, "rows": rows}
        text = json.dumps(result, ensure_ascii=False, indent=1)
        self.path.write_text(text + "\n", encoding="utf-8")

    def summary(self) -> str:
        """一段总结：各种结果的个数，没有达到的、跳过的、失败的名字。"""
        count = Counter(row.status for row in self.rows)
        judged = [row for row in self.rows if row.met is not None]
        lines = [
            f"共 {len(self.rows)} 行：{count[OK]} 行有读数，{count[SKIPPED]} 行跳过，{count[FAILED]} 行失败；"
            f"{len(judged)} 项要求达到 {sum(row.met for row in judged)} 项"
        ]
        for title, rows in (
            ("未达到", [row for row in judged if not row.met]),
            ("跳过", [row for row in self.rows if row.status == SKIPPED]),
            ("失败", [row for row in self.rows if row.status == FAILED]),
        ):
            if rows:
                lines.append(f"{title}：" + "、".join(row.key for row in rows))
        return "\n".join(lines)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """命令行参数。"""
    parser = argparse.ArgumentParser(description="GPU 上的基准")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="很小的形状，只检查能不能跑")
    parser.add_argument("--match", default="", help="只跑名字含有其中之一的项，逗号分隔")
    parser.add_argument("--only", help=f"只跑这几组，逗号分隔：{'、'.join(GROUPS)}")
    parser.add_argument(
        "--budget-s", type=float, default=BUDGET_SECONDS, help="过了这么多秒，余下的项不再运行"
    )
    args = parser.parse_args(arguments)
    args.groups = args.only.split(",") if args.only else list(GROUPS)
    unknown = [name for name in args.groups if name not in GROUPS]
    if unknown:
        parser.error(f"--only：应为 {'、'.join(GROUPS)}，实际有 {'、'.join(unknown)}")
    return args


def make_env(args: argparse.Namespace) -> Env:
    """量屋顶线，定下截止时刻。"""
    deadline = time.monotonic() + args.budget_s
    timer = Timer(args.device, args.quick)
    peak = timer.bf16_tflops()  # 先量它：让时钟升上来
    return Env(args.device, args.quick, timer, timer.copy_gbps(), peak, deadline)


def main(arguments: list[str] | None = None) -> int:
    """运行全部基准，打印表格，写 JSON；返回退出码。"""
    args = parse_args(arguments)
    if args.device == "cuda" and not _native.cuda_loaded():
        print(f"CUDA 算子库不可用：{_native.cuda_load_error()}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    env = make_env(args)
    roofline = {"copy_gbps": round(env.copy_gbps, 1), "bf16_tflops": round(env.bf16_tflops, 2)}
    header = {**environment(args.device), "quick": args.quick, "roofline": roofline}
    print(json.dumps(header, ensure_ascii=False), flush=True)
    report = Report(args.output, header, env.rows)
    for name in args.groups:
        for case in GROUPS[name].cases(env):
            if any(part in case.key for part in args.match.split(",")):
                run_case(env, case, report.add)
    if args.device == "cuda":
        header["smi_after"] = smi()
    report.write(complete=True)
    print(report.summary())
    print(f"已写入 {args.output}")
    return 1 if any(row.status == FAILED for row in env.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
