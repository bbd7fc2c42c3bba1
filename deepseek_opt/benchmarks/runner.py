"""运行一个套件，得到表格与 JSON。"""

from __future__ import annotations

import datetime
import io
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from deepseek_opt.benchmarks import timing
from deepseek_opt.benchmarks.cases import Case, Env, Row, Suite, find_suite
from deepseek_opt.benchmarks.probe import ProbeError
from deepseek_opt.benchmarks.shapes import REFERENCE, Shape
from deepseek_opt.errors import InputError, UnsupportedError

SCHEMA = 1
_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
)
_SMALL = 10

Progress = Callable[[int, int, str], None]
Finished = Callable[["SuiteResult"], None]


@dataclass(frozen=True)
class SuiteResult:
    """一次运行：套件、环境、屋顶线、各行读数。"""

    suite: str
    title: str
    document: dict[str, Any]
    rows: tuple[Row, ...]

    @property
    def failed(self) -> list[Row]:
        """有要求而没有达到的各行。"""
        return [row for row in self.rows if row.met is False]

    def render(self, width: int | None = None) -> str:
        """终端用的文本表格。"""
        from rich.console import Console

        stream = io.StringIO()
        console = Console(file=stream, width=width or 150, highlight=False)
        print_result(self, console)
        return stream.getvalue()

    def write_json(self, path: Path) -> None:
        """写 JSON（UTF-8），目录不存在时建立。"""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.document, ensure_ascii=False, indent=2)
        path.write_text(text + "\n", encoding="utf-8")


def run_suite(
    name: str,
    *,
    shape: Shape = REFERENCE,
    quick: bool = False,
    threads: int | None = None,
    isa: str | None = None,
    only: Sequence[str] = (),
    progress: Progress | None = None,
    finished: Finished | None = None,
) -> SuiteResult:
    """运行套件 name。

    参数
    ----
    quick : 计时两轮、内存减为四分之一长度，几分钟内看个大概。
    threads : 线程数，默认 torch 现在的。isa : 本库限用的指令集，默认自动。
    only : 只跑键名含有其中任一片段的各项；空为全部。
    progress : 每项开始前调用 progress(序号, 总数, 标题)。
    finished : 每项完成后以到此为止的结果调用，用来边跑边显示、边存盘。

    抛出 InputError（没有这个套件、形状不适用、指令集不可用、only 什么也没选中）、UnsupportedError（缺
    transformers）。
    """
    suite = find_suite(name)
    if shape.suite not in (None, name):
        raise InputError(f"形状 {shape.name} 只用于套件 {shape.suite}，不能用于 {name}")
    _require_transformers()
    env = Env(shape, quick, threads or torch.get_num_threads(), isa)
    cases = [c for c in suite.build(env) if not only or any(part in c.key for part in only)]
    if not cases:
        raise InputError(f"--only {'、'.join(only)} 没有选中任何一项")
    rows: list[Row] = []
    with timing.settings(env.threads, isa):
        for index, case in enumerate(cases):
            if progress is not None:
                progress(index, len(cases), case.title)
            rows += _run_case(case, env)
            result = _result(suite, env, rows)
            if finished is not None:
                finished(result)
    return result


def _result(suite: Suite, env: Env, rows: list[Row]) -> SuiteResult:
    return SuiteResult(suite.name, suite.title, _document(suite, env, rows), tuple(rows))


def _run_case(case: Case, env: Env) -> list[Row]:
    try:
        return case.run(env)
    except ProbeError as error:
        return [Row(case.key, case.title, "saving", "", "", None, None, 0.0, note=str(error))]


def _require_transformers() -> None:
    try:
        import transformers  # noqa: F401  # pylint: disable=unused-import
    except ImportError as error:
        raise UnsupportedError(
            "基准要与 transformers 比较：请运行 pip install 'transformers>=5.17'"
        ) from error


def _document(suite: Suite, env: Env, rows: list[Row]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "suite": suite.name,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "shape": suite.model or env.shape.name,
        "quick": env.quick,
        "threads": env.threads,
        "machine": machine(),
        "versions": versions(),
        "roofline": [asdict(env.rooflines[key]) for key in sorted(env.rooflines)],
        "rows": [row.to_dict() for row in rows],
    }


def machine() -> dict[str, Any]:
    """机器的类别（不含主机名与路径）：CPU 型号、核数、内存、指令集。"""
    from deepseek_opt import _native

    info = _cpuinfo()
    flags = set(info.get("flags", "").split())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": info.get("model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(pages / 2**30, 1),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "isa": _native.isa(),
        "system": platform.system(),
    }


def _cpuinfo() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def versions() -> dict[str, str]:
    """python、torch、transformers、deepseek_opt 的版本。"""
    from deepseek_opt import __version__

    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["transformers"] = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        pass
    return {**found, "deepseek_opt": __version__}


# ---- 表格 ----


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "—"
    digits = 2 if value < _SMALL else 1
    return f"{value:,.{digits}f} {unit}".rstrip()


def _ratio(row: Row, value: float | None) -> str:
    if value is None:
        return "—"
    if row.kind == "saving":
        return f"省 {value:.1%}"
    if row.kind == "accuracy":
        return f"{value:+.2f} 个百分点"
    return f"{value:.2f}x" if value < _SMALL else f"{value:.1f}x"


def row_line(row: Row) -> str:
    """一行读数，边跑边显示用。"""
    ours, peer = _number(row.ours, row.unit), _number(row.peer, row.unit)
    roofline = "" if row.roofline is None else f"，占屋顶线 {row.roofline:.0%}"
    return f"{row.title}：{ours}，{row.peer_name} {peer}，{_ratio(row, row.ratio)}{roofline}"


def _verdict(row: Row) -> str:
    from rich.markup import escape

    mark = {None: "", True: "[green]✓[/]", False: "[bold red]✗[/]"}[row.met]
    return f"{mark} {escape(row.note)}".strip()


def print_result(result: SuiteResult, console: Any) -> None:
    """用 rich 打印。"""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"基准 {result.title}（形状 {result.document['shape']}）")
    table.add_column("工作", overflow="fold")
    table.add_column("对照", overflow="fold")
    for name in ("对照读数", "本库", "倍数 / 节省", "要求", "占屋顶线"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in result.rows:
        table.add_row(
            escape(row.title),
            escape(row.peer_name),
            _number(row.peer, row.unit),
            _number(row.ours, row.unit),
            _ratio(row, row.ratio),
            "" if row.target is None else "≥ " + _ratio(row, row.target),
            "—" if row.roofline is None else f"{row.roofline:.0%}",
            _verdict(row),
        )
    console.print(table)
    for line in summary_lines(result):
        console.print(line)


def summary_lines(result: SuiteResult) -> list[str]:
    """表格下面的说明：机器、版本、屋顶线、达标数。"""
    doc = result.document
    hardware, found = doc["machine"], doc["versions"]
    lines = [
        f"机器：{hardware['cpu']}，{hardware['cores']} 核，{hardware['memory_gib']} GiB；"
        f"线程 {doc['threads']}，指令集 {hardware['isa']}",
        "版本：" + "，".join(f"{name} {version}" for name, version in found.items()),
    ]
    for roof in doc["roofline"]:
        peaks = "，".join(f"{name} {value:,.0f}" for name, value in roof["gflops"].items())
        lines.append(
            f"屋顶线（{roof['threads']} 个线程，本次实测）：读带宽 {roof['read_gbps']:.1f} GB/s，"
            f"矩阵乘法峰值 GFLOP/s：{peaks}"
        )
    judged = [row for row in result.rows if row.met is not None]
    if judged:
        lines.append(f"达到要求：{len(judged) - len(result.failed)} / {len(judged)}")
    return lines
