"""自己的 Transformer 用上 MLA：两个可以直接运行的例子。

1. 替换：PyTorch 自带的 nn.TransformerEncoder，把其中的 nn.MultiheadAttention 换成 MLA
   （全新的权重），在标准库的源码上学填空：遮住 15% 的字符，猜出来。
2. 自建：用 MLAAttention 搭一个自回归字符模型，在同样的源码上训练，再用 LatentCache 逐字续写；
   最后核对“带缓存逐字”与“整段一次”的结果一致。

语料是正在运行的 Python 的标准库源码，不下载任何东西。用法::

    python examples/own_transformer.py              # 默认步数，约一两分钟
    python examples/own_transformer.py --steps 20   # 快速看一遍
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_opt import LatentCache, MLAAttention, MLAConfig, estimate_memory, metrics
from deepseek_opt.layers import replace_mha

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 128, 4, 2, 128, 16
TRAIN = ("argparse", "ast", "difflib", "doctest", "inspect", "pdb", "tarfile", "typing", "zipfile")
HELD_OUT = "textwrap"
MASK = 0  # 源码里没有 NUL 字符，用它表示被遮住的位置


def load(name: str) -> Tensor:
    """标准库一个模块的源码 -> 字节序列（0 到 127，其他字符记作 127）。"""
    text = (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_bytes()
    return torch.tensor(list(text), dtype=torch.long).clamp(max=127)


def windows(corpus: Tensor, length: int, count: int) -> Tensor:
    """随机取 count 段，[count, length]。"""
    starts = torch.randint(0, corpus.numel() - length, (count, 1))
    return corpus[starts + torch.arange(length)]


class FillInTheBlank(nn.Module):
    """nn.TransformerEncoder 做的填空模型；MLA 自带旋转位置编码，不另加位置向量。"""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(128, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS)
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids)))


class Block(nn.Module):
    """归一化、MLA、归一化、FFN。"""

    def __init__(self, config: MLAConfig, index: int):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = MLAAttention(config, WIDTH, layer_idx=index)
        self.ffn = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, cache: LatentCache | None) -> Tensor:
        x = x + self.attention(self.norm1(x), cache=cache)
        return x + self.ffn(self.norm2(x))


class Writer(nn.Module):
    """自回归字符模型；传入 cache 时只需送新字符。"""

    def __init__(self, config: MLAConfig):
        super().__init__()
        self.embed = nn.Embedding(128, WIDTH)
        self.blocks = nn.ModuleList([Block(config, i) for i in range(LAYERS)])
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 128)

    def forward(self, ids: Tensor, cache: LatentCache | None = None) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, cache)
        return self.head(self.norm(x))


def train(model: nn.Module, loss_of, steps: int) -> list[float]:
    """训练 steps 步，打印进度，返回每步的损失。"""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
    losses, start = [], time.perf_counter()
    for step in range(1, steps + 1):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % max(1, steps // 5) == 0:
            print(f"  第 {step} 步，损失 {losses[-1]:.3f}，{time.perf_counter() - start:.0f} 秒")
    return losses


def fill_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """遮住 15% 的字符，只在被遮住的位置算损失。"""
    hidden = torch.rand(ids.shape) < 0.15
    logits = model(ids.masked_fill(hidden, MASK))
    return F.cross_entropy(logits[hidden], ids[hidden])


def write_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """预测下一个字符。"""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@torch.inference_mode()
def continue_text(model: Writer, prompt: Tensor, count: int) -> Tensor:
    """带缓存逐字续写（每步取概率最大的字符）：提示 [1, T] -> 新字符 [count]。"""
    cache, written = LatentCache.for_model(model), []
    logits = model(prompt, cache)
    for _ in range(count):
        written.append(logits[:, -1].argmax(-1, keepdim=True))
        logits = model(written[-1], cache)
    return torch.cat(written, 1)[0]


def replaced_encoder(corpus: Tensor, held_out: Tensor, steps: int) -> list[float]:
    """例一：替换 nn.TransformerEncoder 里的注意力，再训练。"""
    print("例一：把 nn.TransformerEncoder 的 nn.MultiheadAttention 换成 MLA")
    model = FillInTheBlank()
    print(replace_mha(model, MLAConfig(kv_lora_rank=32)))
    losses = train(model, lambda m: fill_loss(m, windows(corpus, LENGTH, BATCH)), steps)
    with torch.no_grad():
        loss = fill_loss(model.eval(), windows(held_out, LENGTH, 32))
    print(
        f"  没见过的 {HELD_OUT}.py 上的填空损失 {loss:.3f}（瞎猜为 {torch.tensor(128.0).log():.3f}）"
    )
    return losses


def own_model(corpus: Tensor, held_out: Tensor, steps: int) -> list[float]:
    """例二：自建自回归模型，训练、估算内存、续写、核对缓存。"""
    print("例二：用 MLAAttention 自建自回归模型")
    model = Writer(MLAConfig(num_attention_heads=HEADS, kv_lora_rank=32))
    losses = train(model, lambda m: write_loss(m, windows(corpus, LENGTH + 1, BATCH)), steps)
    model.eval()
    with torch.no_grad():
        loss = write_loss(model, windows(held_out, LENGTH + 1, 32))
    print(f"  没见过的 {HELD_OUT}.py 上每个字符的损失 {loss:.3f}")
    print(estimate_memory(model, batch=1, length=8192))

    metrics(model)  # 从现在开始收集
    prompt = held_out[None, :LENGTH]
    written = continue_text(model, prompt, 80)
    print("  续写：" + repr(bytes(written.tolist()).decode("latin1")))
    print(metrics(model))
    with torch.no_grad():
        whole = model(torch.cat((prompt, written[None]), 1))[0, LENGTH - 1 : -1].argmax(-1)
    same = int((whole == written).sum())
    print(f"  带缓存逐字与整段一次算出的字符：{same} / {written.numel()} 相同")
    return losses


def main(arguments: list[str] | None = None) -> tuple[list[float], list[float]]:
    """运行两个例子，返回各自的损失曲线。"""
    parser = argparse.ArgumentParser(description="自己的 Transformer 用上 MLA")
    parser.add_argument("--steps", type=int, default=300, help="每个例子训练的步数")
    steps = parser.parse_args(arguments).steps
    torch.manual_seed(0)
    corpus, held_out = torch.cat([load(name) for name in TRAIN]), load(HELD_OUT)
    print(f"语料：标准库的 {len(TRAIN)} 个模块，{corpus.numel():,} 个字符")
    return replaced_encoder(corpus, held_out, steps), own_model(corpus, held_out, steps)


if __name__ == "__main__":
    main()
