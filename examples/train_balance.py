"""负载均衡的几种做法在一次真实训练上的差别：同一个小模型、同样的数据与种子，只换均衡的做法。

语料是正在运行的 Python 的标准库源码（逐字节，留出的模块不参与训练），不下载任何东西。模型是 MLA 注意力加
16 选 2 的 MoE，4 层。记下各层的最大/平均负载、熵、训练与留出损失，写成 JSON，画成图。用法::

    python examples/train_balance.py --json balance.json --figure balance.png   # 每种做法约 3 分钟
    python examples/train_balance.py --steps 20 --strategies none bias_update   # 快速看一遍

图的后缀为 .svg 时文字由浏览器渲染，总是中文；.png 时本机没有中文字体就用英文。只画已有的读数：``--from-json``。
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepseek_opt as dso
from deepseek_opt import corpus
from deepseek_opt.benchmarks.runner import machine
from deepseek_opt.demo.chart import chinese_font

WIDTH, HEADS, LAYERS, LENGTH, BATCH, VOCABULARY = 128, 4, 4, 256, 8, 256
EXPERTS, TOP_K, INNER = 16, 2, 64
RATE, WARMUP, SEED = 2e-3, 50, 0
EVAL_WINDOWS, FINAL_WINDOWS = 32, 256
#: 名字 -> (中文, 英文, 颜色, MOEConfig 的均衡字段)。两种辅助损失用同样的权重，才看得出写法的差别。
STRATEGIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "none": ("不均衡", "none", "#6b7280", {}),
    "bias_update": (
        "偏置更新",
        "bias update",
        "#047857",
        {"balance_strategy": "bias_update", "bias_update_rate": 1e-3},
    ),
    "sequence_aux_loss": (
        "逐序列辅助损失",
        "sequence aux loss",
        "#f59e0b",
        {"balance_strategy": "sequence_aux_loss", "aux_loss_weight": 1e-2},
    ),
    "global_aux_loss": (
        "全局辅助损失",
        "global aux loss",
        "#1d4ed8",
        {"balance_strategy": "global_aux_loss", "aux_loss_weight": 1e-2},
    ),
}


class Block(nn.Module):
    """归一化、MLA、归一化、MoE。"""

    def __init__(self, balance: dict[str, Any], index: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        mla = dso.MLAConfig(num_attention_heads=HEADS, kv_lora_rank=32)
        self.attention = dso.MLAAttention(mla, WIDTH, layer_idx=index)
        moe = dso.MOEConfig(num_experts=EXPERTS, num_experts_per_tok=TOP_K, **balance)
        self.moe = dso.MoEFeedForward(moe, WIDTH, INNER)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.moe(self.norm2(x))


class Model(nn.Module):
    """自回归的字节模型。"""

    def __init__(self, balance: dict[str, Any]):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block(balance, i) for i in range(LAYERS)])
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Loads:
    """一段训练里各层的负载：每次读取给出上次以来的增量。"""

    def __init__(self, model: Model):
        self.counters = [block.moe.load_counter for block in model.blocks]
        self.seen: list[Tensor] = []
        self.skip()

    def skip(self) -> None:
        """到此为止的不算（例如评估时的前向）。"""
        self.seen = [counter.snapshot() for counter in self.counters]

    def read(self) -> dict[str, list[float]]:
        """各层的最大/平均、归一化的熵。"""
        now = [counter.snapshot() for counter in self.counters]
        shares = [(a - b).double() / (a - b).sum() for a, b in zip(now, self.seen, strict=True)]
        self.seen = now
        entropy = [float(-torch.xlogy(p, p).sum() / torch.tensor(EXPERTS).log()) for p in shares]
        return {
            "max_over_mean": [round(float(p.max()) * EXPERTS, 4) for p in shares],
            "entropy": [round(value, 4) for value in entropy],
        }


def read_bytes(files: list[Path]) -> Tensor:
    """各文件的 UTF-8 字节连在一起。"""
    text = "\n".join(corpus.read_text(path) for path in files)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def loss_of(model: Model, ids: Tensor) -> Tensor:
    """预测下一个字节。"""
    ids = ids.long()
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@torch.inference_mode()
def held_out_loss(model: Model, text: Tensor, count: int) -> float:
    """留出文本上均匀取的 count 段的平均损失（奈特每字节）。"""
    starts = torch.linspace(0, text.numel() - LENGTH - 1, count).long()[:, None]
    windows = text[starts + torch.arange(LENGTH + 1)]
    model.eval()
    total = sum(float(loss_of(model, part)) * len(part) for part in windows.split(BATCH))
    model.train()
    return total / count


def rate_at(step: int, steps: int) -> float:
    """线性预热，余弦降到十分之一。"""
    progress = torch.tensor(step / steps * torch.pi).cos().item()
    return RATE * min(1.0, (step + 1) / WARMUP) * (0.55 + 0.45 * progress)


def train(name: str, train_text: Tensor, held_out: Tensor, steps: int, every: int) -> dict:
    """训练一种做法，返回它的读数。"""
    torch.manual_seed(SEED)
    model = Model(STRATEGIES[name][3])
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.1)
    picks = torch.Generator().manual_seed(SEED)  # 各种做法看到同样的数据
    loads, history, losses, busy = Loads(model), [], [], 0.0
    for step in range(steps):
        start = time.process_time()
        begins = torch.randint(0, train_text.numel() - LENGTH - 1, (BATCH, 1), generator=picks)
        loss = loss_of(model, train_text[begins + torch.arange(LENGTH + 1)])
        (loss + dso.aux_loss(model)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        if name == "bias_update":
            dso.update_expert_bias(model)
        busy += time.process_time() - start
        losses.append(float(loss.detach()))
        if (step + 1) % every == 0:
            entry = {"step": step + 1, "tokens": (step + 1) * BATCH * LENGTH}
            entry |= {"seconds": round(busy, 2), "train_loss": sum(losses) / len(losses)}
            entry |= loads.read()
            entry["held_out_loss"] = held_out_loss(model, held_out, EVAL_WINDOWS)
            loads.skip()
            losses.clear()
            history.append(entry)
            print(
                f"  第 {step + 1} 步，训练 {entry['train_loss']:.3f}，"
                f"留出 {entry['held_out_loss']:.3f}，最大/平均 {entry['max_over_mean']}，"
                f"{busy:.0f} 秒",
                flush=True,
            )
    final = {"held_out_loss": held_out_loss(model, held_out, FINAL_WINDOWS)}
    final |= {f"held_out_{key}": value for key, value in loads.read().items()}
    return {"history": history, "final": final, "seconds": busy, "tokens": steps * BATCH * LENGTH}


def draw(document: dict, path: Path) -> None:
    """三幅：最大/平均负载与熵（线是各层的平均，色带是各层的范围）、留出损失。"""
    import matplotlib
    from matplotlib.figure import Figure

    vector = path.suffix == ".svg"
    font = chinese_font()
    chinese = vector or font is not None
    family = [font or "sans-serif"]
    titles = (
        ("max_over_mean", "最大/平均负载（1 为均衡）", "max / mean load (1 = balanced)"),
        ("entropy", "负载的熵（1 为均衡）", "load entropy (1 = balanced)"),
        ("held_out_loss", "留出损失（奈特每字节）", "held-out loss (nats per byte)"),
    )
    settings = {"font.family": family, "svg.fonttype": "none", "svg.hashsalt": "balance"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # SVG 里的字由浏览器画，不缺
        figure = Figure(figsize=(13.5, 4.4), dpi=110, layout="constrained")
        axes = figure.subplots(1, len(titles))
        for axis, (key, title, english) in zip(axes, titles, strict=True):
            for name, run in document["runs"].items():
                _curve(axis, run["history"], key, name, chinese)
            axis.set(title=title if chinese else english)
            axis.set_xlabel("训练步" if chinese else "training step")
            axis.grid(alpha=0.3)
        axes[0].set_yscale("log", base=2)
        axes[0].set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
        wide = {"columnspacing": 5.0}  # 中文比量得的宽
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, **wide
        )
        figure.savefig(path, metadata={"Date": None} if vector else None)


def _curve(axis: Any, history: list[dict], key: str, name: str, chinese: bool) -> None:
    """一种做法的一条线；各层的值画平均，并填出各层的范围。"""
    label, english, color, _ = STRATEGIES[name]
    steps = [entry["step"] for entry in history]
    values = torch.tensor([entry[key] for entry in history])
    if values.dim() == 2:
        axis.fill_between(steps, values.amin(1), values.amax(1), color=color, alpha=0.12, lw=0)
        values = values.mean(1)
    axis.plot(steps, values, color=color, lw=1.8, label=label if chinese else english)


def run(arguments: argparse.Namespace) -> dict:
    """训练各种做法，返回要写进 JSON 的全部内容。"""
    torch.set_num_threads(1)
    text = read_bytes(corpus.training_files()[:: arguments.stride])
    held_out = read_bytes(corpus.held_out_files())
    print(f"语料：{text.numel():,} 字节，留出 {held_out.numel():,} 字节")
    document = {
        "kind": "balance",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "model": {"width": WIDTH, "layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K}
        | {"inner": INNER, "length": LENGTH, "batch": BATCH, "steps": arguments.steps},
        "corpus": {"train_bytes": text.numel(), "held_out_bytes": held_out.numel()},
        "seed": SEED,
        "threads": 1,
        "runs": {},
    }
    for name in arguments.strategies:
        print(STRATEGIES[name][0])
        found = train(name, text, held_out, arguments.steps, arguments.every)
        document["runs"][name] = {"balance": STRATEGIES[name][3], **found}
        save(document, arguments.json)  # 每完成一种写一次，中断了也有
    return document


def save(document: dict, path: Path | None) -> None:
    """写成 JSON；path 为 None 时不写。"""
    if path is not None:
        body = json.dumps(document, ensure_ascii=False, indent=1)
        path.write_text(body + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> dict:
    """命令行；返回读数。"""
    parser = argparse.ArgumentParser(description="几种负载均衡的做法在真实训练上的差别")
    parser.add_argument("--steps", type=int, default=1000, help="每种做法训练的步数")
    parser.add_argument("--every", type=int, default=25, help="每多少步记一次")
    parser.add_argument("--stride", type=int, default=1, help="每几个训练文件取一个")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--json", type=Path, help="读数写到这里")
    parser.add_argument("--figure", type=Path, help="图写到这里（.png 或 .svg，需要 matplotlib）")
    parser.add_argument("--from-json", type=Path, help="不训练，用这份读数画图")
    chosen = parser.parse_args(arguments)
    if chosen.from_json is None:
        document = run(chosen)
    else:
        document = json.loads(chosen.from_json.read_text(encoding="utf-8"))
    if chosen.figure is not None:
        draw(document, chosen.figure)
    return document


if __name__ == "__main__":
    main()
