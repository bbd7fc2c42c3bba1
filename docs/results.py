"""把 benchmarks/results/*.json 的读数写进文档里有标记的区块；数字从不手写。

    python docs/results.py            改写 README.md、docs/性能与内存.md、docs/MoE.md 与 docs/MTP.md
    python docs/results.py --check    只检查区块是否与读数一致，不一致时退出码为 1

README 只列有要求的各项，性能页列全部，MoE 页只列量化的精度。同一套件、同一形状
有多份读数时用最新的一份（先取完整的，再取 quick）。
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NOTICE = "<!-- 由 docs/results.py 从 benchmarks/results/*.json 生成，不要手改 -->"
NONE_YET = "尚无读数：运行 `deepseek-opt bench mla --json benchmarks/results/mla.json` 得到。"
# 文档 -> 是否列出全部读数，或只列哪个套件自己的表
TARGETS: dict[Path, bool | str] = {
    ROOT / "README.md": False,
    ROOT / "docs" / "性能与内存.md": True,
    ROOT / "docs" / "MoE.md": "quant",
}
BALANCE_BEGIN, BALANCE_END = "<!-- balance:begin -->", "<!-- balance:end -->"
RETROFIT_BEGIN, RETROFIT_END = "<!-- retrofit:begin -->", "<!-- retrofit:end -->"
GPU_BEGIN, GPU_END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
# 新的在前
GPU_FILES = tuple(RESULTS / f"gpu-{name}.json" for name in ("h200", "h100", "h200-second"))
GPU_HEAD_BEGIN, GPU_HEAD_END = "<!-- gpu-headlines:begin -->", "<!-- gpu-headlines:end -->"
# README 里列的
_STEP = "解码一步，V2-Lite 结构的 3 层，已缓存 4096，bf16，"
GPU_HEADLINES = {
    "decode_step.b1.bandwidth": f"{_STEP}1 行",
    "decode_step.b8.bandwidth": f"{_STEP}8 行",
    "decode_step.b64.bandwidth": f"{_STEP}64 行",
    "mla_decode.h128.b128.s8192": "mla_decode，128 个头，128 行，已缓存 8192",
    "mla_decode.h16.b128.s8192": "mla_decode，16 个头，128 行，已缓存 8192",
    "mla_prefill.h16.s8192.forward": "mla_prefill，16 个头，8192 个词元",
    "moe.decode.bf16.t64": "128 个专家选 8，64 个词元，bf16",
    "moe.decode.int8.t64": "128 个专家选 8，64 个词元，int8",
    "moe.forward.t32768": "128 个专家选 8，32768 个词元，bf16",
    "moe.train.t32768": "同上，前向加反向",
    "moe13b.b1": "130 亿参数的 MoE（每词元 13 亿）解码一步，1 行",
    "moe13b.b8": "同上，8 行",
}
_BALANCE = ("max_over_mean", "entropy")
_BALANCE_NAMES = {
    "none": "不均衡",
    "bias_update": "偏置更新",
    "sequence_aux_loss": "逐序列辅助损失",
    "global_aux_loss": "全局辅助损失",
}
_SMALL = 10

Document = dict[str, Any]


def load(folder: Path = RESULTS) -> list[Document]:
    """每个基准套件、每种形状的最新读数；别的 JSON（例如 GPU 脚本的）不在这里。"""
    newest: dict[tuple[str, str], Document] = {}
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or "suite" not in document or "rows" not in document:
            continue
        key = (document["suite"], document["shape"])
        if key not in newest or _age(document) > _age(newest[key]):
            newest[key] = document
    return [newest[key] for key in sorted(newest)]


def _age(document: Document) -> tuple[bool, str]:
    return not document["quick"], document["date"]


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "—"
    digits = 2 if abs(value) < _SMALL else 1
    return f"{value:,.{digits}f} {unit}".rstrip()


def _ratio(row: Document, value: float | None) -> str:
    if value is None:
        return "—"
    if row["kind"] == "saving":
        return f"省 {value:.1%}"
    if row["kind"] == "accuracy":
        return f"{value:+.2f} 个百分点"
    return f"{value:.2f}x" if value < _SMALL else f"{value:.1f}x"


def _target(row: Document) -> str:
    if row["target"] is None:
        return ""
    mark = {True: "达到", False: "**未达到**", None: "未判定"}[row["met"]]
    return f"≥ {_ratio(row, row['target'])}，{mark}"


def _row(row: Document) -> list[str]:
    roofline = "—" if row["roofline"] is None else f"{row['roofline']:.0%}"
    title = row["title"] + (f"（{row['note']}）" if row["note"] else "")
    peer = f"{row['peer_name']}：{_number(row['peer'], row['unit'])}" if row["peer_name"] else "—"
    ours, ratio = _number(row["ours"], row["unit"]), _ratio(row, row["ratio"])
    return [title, peer, ours, ratio, _target(row), roofline]


def _is_headline(row: Document) -> bool:
    """首页列的：有要求的，不含按行数与草稿数展开的大表。"""
    return row["target"] is not None and ".table." not in row["key"]


def table(document: Document, everything: bool) -> str:
    """一个套件的 Markdown：机器、版本、屋顶线、表格。"""
    machine, versions = document["machine"], document["versions"]
    lines = [
        f"套件 `{document['suite']}`，形状 {document['shape']}，{document['date'][:10]}；"
        f"{machine['cpu']}，{machine['cores']} 核，{machine['memory_gib']} GiB，"
        f"指令集 {machine['isa']}，{document['threads']} 线程；"
        + "，".join(f"{name} {version}" for name, version in versions.items())
        + ("。**quick 模式，轮数少，仅供参考**" if document["quick"] else "")
        + "。",
        "",
    ]
    for roof in document["roofline"]:
        peaks = "，".join(f"{name} {value:,.0f}" for name, value in roof["gflops"].items())
        lines.append(
            f"- 同一次运行的硬件上限（{roof['threads']} 线程）：读带宽 {roof['read_gbps']:.1f} GB/s；"
            f"矩阵乘法 GFLOP/s：{peaks}。"
        )
    rows = [row for row in document["rows"] if everything or _is_headline(row)]
    heads = ["工作", "对照", "本库", "倍数 / 节省", "要求", "占硬件上限"]
    lines += ["", "| " + " | ".join(heads) + " |", "|---|---|---|---|---|---|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in _row(r)) + " |" for r in rows]
    judged = [row for row in document["rows"] if row["met"] is not None]
    met = sum(row["met"] for row in judged)
    return "\n".join([*lines, "", f"有要求的各项达到 {met} / {len(judged)}。"])


def quantization_table(document: Document) -> str:
    """套件 quant 的表：大小、准确率、损失。"""
    first = document["rows"][0]["details"]
    heads = ["专家", "每个权重的位数", "全部专家", "准确率", "与 bf16 原模型相差", "交叉熵的增加"]
    lines = [
        f"随包模型，留出的标准库源码 {first['tokens']} 个词元（{document['date'][:10]}）：",
        "",
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
    ]
    for row in document["rows"]:
        more = row["details"]
        cells = [
            row["title"],
            f"{more['bits_per_weight']:.2f}",
            f"{more['expert_mib']:.2f} MiB",
            f"{row['ours']:.2f} %",
            _ratio(row, row["ratio"]),
            f"{more['loss'] - more['peer_loss']:+.4f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def block(documents: list[Document], everything: bool | str) -> str:
    """标记之间的全部内容；everything 是套件名时只列它自己的表。"""
    if everything == "quant":
        body = "\n".join(quantization_table(d) for d in documents if d["suite"] == everything)
    else:
        body = "\n\n".join(table(d, everything) for d in documents)
    return f"{BEGIN}\n{NOTICE}\n\n{body or NONE_YET}\n\n{END}"


def between(begin: str, end: str) -> re.Pattern:
    """从 begin 到 end 的一个区块。"""
    return re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)


def updated(text: str, documents: list[Document], everything: bool | str) -> str:
    """换掉区块后的全文；没有恰好一个区块时抛出 ValueError。"""
    if len(between(BEGIN, END).findall(text)) != 1:
        raise ValueError(f"应恰好有一个 {BEGIN} … {END} 区块")
    return replaced(text, BEGIN, END, partial(block, documents, everything))


def balance(path: Path = RESULTS / "balance.json") -> str:
    """各种负载均衡的做法的对照表。"""
    document = json.loads(path.read_text(encoding="utf-8"))
    model, runs = document["model"], document["runs"]
    lines = [
        f"{document['date']}；{document['machine']['cpu']}，{document['threads']} 线程；"
        f"每种 {model['steps']} 步 × {model['batch']} × {model['length']} 字节；种子 {document['seed']}。"
        "负载取最后四分之一的训练，为各层的平均（最差的层）；秒是 CPU 时间。",
        "",
        "| 做法 | 最大/平均负载 | 熵 | 留出文本上的最大/平均 | 留出损失（奈特每字节） | 词元 | 秒 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        late = run["history"][-max(1, len(run["history"]) // 4) :]
        load, entropy = ([_layers(entry[key]) for entry in late] for key in _BALANCE)
        final, held = run["final"], _layers(run["final"]["held_out_max_over_mean"])
        average = [sum(values) / len(values) for values in zip(*load, strict=True)]
        cells = [
            _BALANCE_NAMES[name],
            f"{average[0]:.2f}（{average[1]:.2f}）",
            f"{sum(mean for mean, _ in entropy) / len(entropy):.3f}",
            f"{held[0]:.2f}（{held[1]:.2f}）",
            f"{final['held_out_loss']:.4f}",
            f"{run['tokens']:,}",
            f"{run['seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([BALANCE_BEGIN, NOTICE, "", *lines, "", BALANCE_END])


def _layers(values: list[float]) -> tuple[float, float]:
    """(各层的平均, 最大)。"""
    return sum(values) / len(values), max(values)


def retrofit(path: Path = RESULTS / "mtp-retrofit.json") -> str:
    """训练若干分钟之后的接受率与速度。"""
    document = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        f"{document['date']}；{document['machine']['cpu']}，训练 {document['threads']} 线程；"
        f"{document['rows']} 行各 {document['new']} 个词元，{document['dtype']}。",
        "",
        "| 训练 | 词元 | 前 1 / 2 / 3 / 4 个都被接受 | 每步词元 | 1 行对逐个词元的速度 |",
        "|---|---|---|---|---|",
    ]
    for run in document["runs"]:
        rates = " / ".join(f"{rate:.1%}" for rate in run["acceptance"])
        lines.append(
            f"| {run['minutes']:.0f} 分钟 | {run['tokens'] / 1e6:.2f} M | {rates} "
            f"| {run['tokens_per_step']:.2f} | {run['speedup_one_row']:.2f}x |"
        )
    return "\n".join([RETROFIT_BEGIN, NOTICE, "", *lines, "", RETROFIT_END])


def gpu(paths: Sequence[Path] = GPU_FILES) -> str:
    """GPU 上的各项，一张卡一个表；后面的表只列前面没有的项。"""
    lines, seen = [], set()
    for path in paths:
        document = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in document["rows"] if row["key"] not in seen]
        seen |= {row["key"] for row in rows}
        lines += [*gpu_table(document, rows), ""]
    return "\n".join([GPU_BEGIN, NOTICE, "", *lines, GPU_END])


def gpu_headlines(paths: Sequence[Path] = GPU_FILES) -> str:
    """README 里的几项：时间、占屋顶线、对各对照的倍数；每项取最新的读数。"""
    found: dict[str, tuple[str, dict]] = {}
    for path in paths:
        document = json.loads(path.read_text(encoding="utf-8"))
        card = f"{document['device'].split()[1]}，{document['date'][:10]}"
        for row in document["rows"]:
            found.setdefault(row["key"], (card, row))
    lines = ["| 工作 | 微秒 | 占屋顶线 | 快几倍 | 卡、日期 |", "|---|---|---|---|---|"]
    for key, label in GPU_HEADLINES.items():
        card, row = found[key]
        share = "—" if row.get("roofline") is None else f"{row['roofline']:.0%}"
        lines.append(f"| {label} | {row['us']:,.0f} | {share} | {_peers(row)} | {card} |")
    return "\n".join([GPU_HEAD_BEGIN, NOTICE, "", *lines, "", GPU_HEAD_END])


def _peers(row: dict) -> str:
    """各对照与倍数。"""
    return (
        "、".join(
            f"{p['name']} {p['speedup']:.2f}x" for p in row.get("peers", []) if p.get("speedup")
        )
        or "—"
    )


def gpu_table(document: dict, rows: list[dict]) -> list[str]:
    """一张卡的：读数、占屋顶线、要求、对各对照的倍数。"""
    roofline = document["roofline"]
    lines = [
        f"{document['date'][:10]}；{document['device']}，驱动 {document['smi']['driver_version']}，"
        f"torch {document['torch']}，CUDA {document['cuda']}，triton {document['triton']}，"
        f"transformers {document['transformers']}；拷贝 {roofline['copy_gbps']:,.0f} GB/s，"
        f"bf16 矩阵乘 {roofline['bf16_tflops']:.0f} TFLOP/s。",
        "",
        "| 项 | 微秒 | 读数 | 占屋顶线 | 要求 | 达到 | 对照（倍数） |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        value, target, share = (row.get(key) for key in ("value", "target", "roofline"))
        reading = f"{_number(value, row['unit'])}" if value is not None else "—"
        cells = [
            row["key"],
            "—" if row.get("us") is None else f"{row['us']:,.0f}",
            reading,
            "—" if share is None else f"{share:.0%}",
            "—" if target is None else f"≥ {target:g}",
            {True: "是", False: "**否**", None: "—"}[row.get("met")],
            _peers(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def replaced(text: str, begin: str, end: str, make: Callable[[], str]) -> str:
    """换掉 begin … end 的区块后的全文；没有区块的不变。"""
    return between(begin, end).sub(lambda _: make(), text)


def others(text: str) -> str:
    """换掉均衡、retrofit 与 GPU 的区块。"""
    text = replaced(text, BALANCE_BEGIN, BALANCE_END, balance)
    text = replaced(text, GPU_BEGIN, GPU_END, gpu)
    text = replaced(text, GPU_HEAD_BEGIN, GPU_HEAD_END, gpu_headlines)
    return replaced(text, RETROFIT_BEGIN, RETROFIT_END, retrofit)


def main(arguments: list[str] | None = None) -> int:
    """命令行。"""
    parser = argparse.ArgumentParser(description="用基准读数更新文档")
    parser.add_argument("--check", action="store_true", help="只检查，不改文件")
    check = parser.parse_args(arguments).check
    documents, stale = load(), []
    pages = {
        path: partial(updated, documents=documents, everything=x) for path, x in TARGETS.items()
    }
    pages[ROOT / "docs" / "MTP.md"] = str  # 没有基准的表，只有下面的
    for path, change in pages.items():
        text = path.read_text(encoding="utf-8")
        wanted = others(change(text))
        if wanted == text:
            continue
        stale.append(path.name)
        if not check:
            path.write_text(wanted, encoding="utf-8")
    verb = "需要更新" if check else "已更新"
    print(f"{verb}：{'、'.join(stale)}" if stale else "文档与读数一致。")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
