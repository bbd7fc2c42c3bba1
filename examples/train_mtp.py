"""训练 MTP 的两种写法，语料是正在运行的 Python 的标准库源码，不下载任何东西。

- ``trainer``：给随包的小模型加上 MTP，主模型冻结，用 transformers 的 Trainer 训练，存盘、读回。
- ``own``：自己的 nn.Module（字节模型），与主模型一起训练，普通的循环。

两种都在留出的源码上给出各深度的接受率（MTP 的贪心预测与主模型相同的比例）。用法::

    python examples/train_mtp.py trainer --steps 2000 --depth 4 --out build/stdlib_mtp
    python examples/train_mtp.py own --steps 500
    python examples/train_mtp.py trainer own --steps 5 --stride 100      # 快速看一遍
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepseek_opt as dso
from deepseek_opt import corpus

LENGTH, BATCH, EVAL_ROWS = 128, 8, 16
WIDTH, HEADS, BYTES = 64, 4, 256


def windows(stream: Tensor, length: int) -> Tensor:
    """[词元数] -> [段数, length]，首尾相接。"""
    return stream[: stream.numel() // length * length].view(-1, length)


def texts(stride: int) -> tuple[str, str]:
    """(训练, 留出) 的源码。"""
    parts = (corpus.training_files()[::stride], corpus.held_out_files()[::4])
    train, held_out = ("\n".join(corpus.read_text(path) for path in files) for files in parts)
    return train, held_out


def show(title: str, found: dso.MTPLoss) -> list[float]:
    """打印并返回各深度的接受率。"""
    rates = [round(float(rate), 4) for rate in found.acceptance]
    print(f"{title}：留出的接受率 " + " / ".join(f"{rate:.1%}" for rate in rates))
    return rates


# ---- transformers 的模型与 Trainer ----


@torch.no_grad()
def evaluate_hf(model: nn.Module, ids: Tensor) -> dso.MTPLoss:
    """transformers 模型在 ids 上的 MTP 损失与接受率。"""
    model.eval()
    hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
    return dso.mtp_loss(model.mtp, ids, hidden, logits=model.lm_head(hidden))


def with_trainer(options: argparse.Namespace) -> list[list[float]]:
    """主模型冻结，只训练 MTP；返回训练前后的接受率。"""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    folder = Path(dso.__file__).parent / "assets" / "stdlib_model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, held_out = (
        windows(torch.tensor(tokenizer(text, verbose=False)["input_ids"]), LENGTH)
        for text in texts(options.stride)
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    config = dso.MTPConfig(depth=options.depth, loss_weight=1.0, depth_decay=0.8)
    predictor = dso.attach_mtp(model, config=config, fresh=True)
    model.requires_grad_(False)
    predictor.requires_grad_(True)

    seen = [show("训练之前", evaluate_hf(model, held_out[:EVAL_ROWS]))]
    out = Path(options.out or tempfile.mkdtemp())
    arguments = TrainingArguments(
        str(out / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-3,
        warmup_steps=min(50, options.steps // 5),
        lr_scheduler_type="cosine",
        logging_steps=max(options.steps // 10, 1),
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
    )
    data = [{"input_ids": row, "labels": row} for row in train]
    Trainer(model, arguments, train_dataset=data, callbacks=[dso.MTPCallback()]).train()
    seen.append(show("训练之后", evaluate_hf(model.cpu(), held_out[:EVAL_ROWS])))

    model.save_pretrained(out)  # MTP 层写成 model.layers.4.*，排在主模型的 4 层之后
    again = AutoModelForCausalLM.from_pretrained(out, dtype="float32")
    dso.attach_mtp(again, out, dso.MTPConfig(depth=options.depth))
    seen.append(show("存盘读回", evaluate_hf(again, held_out[:EVAL_ROWS])))
    return seen


# ---- 自己的模型与普通循环 ----


class Block(nn.Module):
    """归一化、因果注意力、归一化、前馈；documents 给出时只看同一文档。"""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        split = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (t.view(split).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        if documents is not None:
            mask = mask & (documents[:, :, None] == documents[:, None, :])[:, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ByteModel(nn.Module):
    """自回归的字节模型；hidden() 是最后的归一化之前的隐藏状态。"""

    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Embedding(BYTES, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, BYTES)

    def hidden(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, H]。"""
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(ids)))


class ByteAdapter(dso.MTPAdapter):
    """告诉 MTP：这个模型的嵌入要加上位置，一层怎样建、怎样运行。"""

    def make_layer(self) -> nn.Module:
        return Block()

    def run_layer(self, layer: nn.Module, x: Tensor, inputs) -> Tensor:
        return layer(x, inputs.documents)

    def embed(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        return self.model.embed(tokens) + self.model.place(position_ids)


def with_own_loop(options: argparse.Namespace) -> list[list[float]]:
    """与主模型一起训练；返回训练前后的接受率。"""
    train, held_out = (
        windows(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long(), LENGTH)
        for text in texts(options.stride)
    )
    model = ByteModel()
    adapter = ByteAdapter(
        model,
        embedding=model.embed,
        head=model.head,
        hidden_size=WIDTH,
        final_norm=model.norm,
        hidden_normed=False,
    )
    config = dso.MTPConfig(
        depth=options.depth,
        loss_weight=0.3,
        final_loss_weight=0.1,
        loss_weight_steps=max(options.steps * 2 // 3, 1),
    )
    predictor = dso.attach_mtp(model, config=config, fresh=True, adapter=adapter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # 包括 model.mtp

    def losses(ids: Tensor, step: int = 0) -> tuple[Tensor, dso.MTPLoss]:
        hidden = model.hidden(ids)
        logits = model.head(model.norm(hidden))
        main = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return main, dso.mtp_loss(predictor, ids, hidden, logits=logits, step=step)

    with torch.no_grad():
        seen = [show("训练之前", losses(held_out[:EVAL_ROWS])[1])]
    for step in range(options.steps):
        main, extra = losses(train[torch.randint(len(train), (BATCH,))], step)
        (main + extra.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(options.steps // 5, 1) == 0:
            found = dso.metrics(model)
            print(
                f"第 {step + 1} 步：主损失 {float(main.detach()):.3f}，MTP {found.mtp_loss_per_depth}"
            )
            predictor.statistics.reset()
    with torch.no_grad():
        seen.append(show("训练之后", losses(held_out[:EVAL_ROWS])[1]))
    return seen


WAYS = {"trainer": with_trainer, "own": with_own_loop}


def main(arguments: list[str] | None = None) -> dict[str, list[list[float]]]:
    """命令行；返回各种写法的接受率。"""
    parser = argparse.ArgumentParser(description="训练 MTP 的两种写法")
    parser.add_argument("ways", nargs="+", choices=WAYS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--depth", type=int, default=2, help="预测深度，共用一个物理层")
    parser.add_argument("--stride", type=int, default=10, help="每几个训练文件取一个")
    parser.add_argument("--out", help="trainer：存到哪个文件夹")
    parser.add_argument("--threads", type=int, help="线程数，缺省由 torch 决定")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return {way: WAYS[way](options) for way in options.ways}


if __name__ == "__main__":
    main()
