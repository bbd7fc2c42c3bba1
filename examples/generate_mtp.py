"""用 MTP 生成的两种写法：随包的 transformers 模型，与自己的 nn.Module；不下载任何东西。

    python examples/generate_mtp.py hf own
    python examples/generate_mtp.py own --steps 300 --new 200     # 自己的字节模型先训练一会儿

``hf``：optimize 之后 ``model.generate`` 自己就用 MTP，一批各行接受的个数不同。
``own``：MTPAdapter 写明怎样带缓存地运行，之后用 ``deepseek_opt.generate``。
两种都与逐个词元生成的结果比较，一个词元也不差。
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepseek_opt as dso
from deepseek_opt import corpus

WIDTH, HEADS, BYTES, LENGTH = 64, 4, 256, 128


def report(title: str, rows: int, new: int, seconds: float, found: Any) -> None:
    """打印速度与接受率。"""
    rates = " / ".join(f"{rate:.0%}" for rate in found.spec_decode_acceptance_per_depth or ())
    print(
        f"{title}：{rows} 行各 {new} 个词元，{rows * new / seconds:.0f} 词元/秒；"
        f"每步 {found.spec_decode_tokens_per_step:.2f} 个，接受率 {rates}"
    )


# ---- transformers 的模型 ----


def with_transformers(options: argparse.Namespace) -> bool:
    """随包的模型（检查点里就有 MTP 层），续写留出的源码；返回是否与原来的相同。"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(dso.__file__).parent / "assets" / "stdlib_model"
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    texts = [corpus.read_text(path)[:400] for path in corpus.held_out_files()[:4]]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    arguments = {"max_new_tokens": options.new, "do_sample": False}

    plain = model.generate(**inputs, **arguments)
    profile = dso.OptimizationProfile(mla=dso.MLAConfig(), moe=dso.MOEConfig(), mtp=dso.MTPConfig())
    dso.optimize(model, profile, strict=True)
    start = time.perf_counter()
    fast = model.generate(**inputs, **arguments)
    seconds = time.perf_counter() - start
    report("随包的模型", len(texts), options.new, seconds, dso.metrics(model))
    return torch.equal(plain, fast)


# ---- 自己的模型 ----


class Block(nn.Module):
    """归一化、因果注意力、归一化、前馈；cache 给出时接在缓存之后。"""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor, cache: Any = None, index: int = 0) -> Tensor:
        split = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (t.view(split).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        if cache is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mask = cache.mask(index, x.shape[1])  # 各行长度不同
            k, v = cache.update(index, k, v)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ByteModel(nn.Module):
    """自回归的字节模型，正弦位置。"""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(BYTES, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, BYTES)

    def embedded(self, ids: Tensor, places: Tensor) -> Tensor:
        """嵌入加位置。"""
        rates = torch.exp(torch.arange(0, WIDTH, 2) * (-9.0 / WIDTH))
        angle = places[..., None] * rates
        return self.embed(ids) + torch.cat((angle.sin(), angle.cos()), -1)

    def hidden(self, ids: Tensor, places: Tensor | None = None, cache: Any = None) -> Tensor:
        """[B, T] -> [B, T, H]，最后的归一化之后的。"""
        places = torch.arange(ids.shape[1])[None] if places is None else places
        x = self.embedded(ids, places)
        for index, block in enumerate(self.blocks):
            x = block(x, cache, index)
        return self.norm(x)


class ByteAdapter(dso.MTPAdapter):
    """告诉 MTP：嵌入要加上位置，层怎样建、怎样带缓存地运行，主模型怎样带缓存地运行。"""

    def make_layer(self) -> nn.Module:
        return Block()

    def run_layer(self, layer: nn.Module, x: Tensor, inputs: Any) -> Tensor:
        return layer(x, inputs.cache, inputs.index)

    def embed(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        return self.model.embedded(tokens, position_ids)

    def make_cache(self) -> dso.KVCache:
        return dso.KVCache(num_layers=1)

    def run_model(self, tokens: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        return self.model.hidden(tokens, position_ids, cache)

    def make_model_cache(self) -> dso.KVCache:
        return dso.KVCache(num_layers=2)


def train(model: ByteModel, stream: Tensor, steps: int) -> None:
    """主模型与 MTP 一起训练一会儿，免得接受率是随机的。"""
    rows = stream[: stream.numel() // LENGTH * LENGTH].view(-1, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids = rows[torch.randint(len(rows), (8,))]
        hidden = model.hidden(ids)
        logits = model.head(hidden)
        main = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        (main + dso.mtp_loss(model.mtp, ids, hidden, logits=logits).loss).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def one_by_one(model: ByteModel, ids: Tensor, new: int) -> Tensor:
    """没有缓存的逐个词元贪心，作对照。"""
    for _ in range(new):
        ids = torch.cat((ids, model.head(model.hidden(ids)[:, -1:]).argmax(-1)), 1)
    return ids


def with_own_model(options: argparse.Namespace) -> bool:
    """自己的字节模型；返回是否与逐个词元的相同。"""
    text = "\n".join(corpus.read_text(path) for path in corpus.training_files()[::200])
    stream = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    model = ByteModel()
    adapter = ByteAdapter(model, embedding=model.embed, head=model.head, hidden_size=WIDTH)
    config = dso.MTPConfig(depth=3, shared_layers=True, loss_weight=0.5)
    dso.attach_mtp(model, config=config, fresh=True, adapter=adapter)
    train(model, stream, options.steps)
    model.eval()

    prompt = stream[: 4 * 32].view(4, 32)
    start = time.perf_counter()
    fast = dso.generate(model, prompt, max_new_tokens=options.new)
    report("自己的模型", 4, options.new, time.perf_counter() - start, dso.metrics(model))
    return torch.equal(fast, one_by_one(model, prompt, options.new))


WAYS = {"hf": with_transformers, "own": with_own_model}


def main(arguments: list[str] | None = None) -> dict[str, bool]:
    """命令行；各种写法的结果是否与逐个词元的相同。"""
    parser = argparse.ArgumentParser(description="用 MTP 生成的两种写法")
    parser.add_argument("ways", nargs="+", choices=WAYS)
    parser.add_argument("--new", type=int, default=64, help="每行生成几个词元")
    parser.add_argument("--steps", type=int, default=150, help="own：训练的步数")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    found = {way: WAYS[way](options) for way in options.ways}
    for way, same in found.items():
        print(f"{way}：{'与逐个词元生成的完全相同' if same else '与逐个词元生成的不同'}")
    return found


if __name__ == "__main__":
    main()
