"""给随包的小模型训练 MTP 层：主模型冻结，在它自己生成的文本上递归地学四个深度。

    python examples/train_stdlib_mtp.py --minutes 62 --state 训练目录 --out 导出目录

先用优化过的主模型由训练语料的片段续写（四分之三贪心，四分之一采样），存在 ``--state``；训练时每批四分之三是这些
续写，四分之一是语料原文，每个位置的标签都是主模型自己的 argmax：接受率看的是与主模型一致。MTP 层由主模型的最后
一层开始，隐藏层矩阵用 Muon，其余用 AdamW。每几分钟存一次，重新执行即续训；最后写出带 MTP 层的检查点，
主模型的张量逐位不变，并在留出的源码上给出接受率。
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from stdlib_model.optimizer import HybridOptimizer
from torch import Tensor, nn

import deepseek_opt as dso
from deepseek_opt import corpus
from deepseek_opt.benchmarks import mtp_models
from deepseek_opt.demo import data

DEPTH, PROMPT, NEW, BATCH = 4, 64, 192, 8
WARMUP_STEPS, DECAY_FROM, SAVE_SECONDS = 40, 0.4, 240
MUON_LR, OTHER_LR = 0.02, 2e-3
PROFILE = {"mla": dso.MLAConfig(), "moe": dso.MOEConfig(), "dense": dso.DenseConfig()}


def base_model(folder: Path = data.MODEL_FOLDER) -> nn.Module:
    """fp32 的主模型。"""
    return mtp_models.endless(data.load_model(folder, torch.float32))


def corpus_tokens(state: Path, stride: int) -> Tensor:
    """训练语料（每 stride 个文件取一个）的词元流。"""
    file = state / "corpus.pt"
    if not file.exists():
        tokenizer = data.load_tokenizer(data.MODEL_FOLDER)
        ids: list[int] = []
        for path in corpus.training_files()[::stride]:
            ids += [0, *tokenizer(corpus.read_text(path))["input_ids"]]
        torch.save(torch.tensor(ids), file)
    return torch.load(file)


def own_text(state: Path, stream: Tensor, rows: int) -> Tensor:
    """主模型自己的续写 [约 rows, PROMPT + NEW]。"""
    file = state / "own.pt"
    if not file.exists():
        model, found = base_model(), []
        dso.optimize(model, dso.OptimizationProfile(**PROFILE))
        generator = torch.Generator().manual_seed(5)
        while len(found) * 64 < rows:
            starts = torch.randint(len(stream) - PROMPT, (64,), generator=generator)
            prompt = torch.stack([stream[i : i + PROMPT] for i in starts.tolist()])
            options = {"do_sample": len(found) % 4 == 0, "max_new_tokens": NEW}
            if options["do_sample"]:
                options |= {"temperature": 0.8, "top_k": 50}
            mask = torch.ones_like(prompt)
            found.append(model.generate(prompt, attention_mask=mask, **options))
        torch.save(torch.cat(found), file)
    return torch.load(file)


def start(model: nn.Module) -> dso.TokenPredictor:
    """装上 MTP 层，从主模型的最后一层开始；只训练它。"""
    config = dso.MTPConfig(depth=DEPTH, shared_layers=True, loss_weight=1.0, depth_decay=0.85)
    predictor = dso.attach_mtp(model, config=config, fresh=True)
    layer, width = predictor.layers[0], model.config.hidden_size
    with torch.no_grad():
        layer.block.load_state_dict(model.model.layers[-1].state_dict())
        layer.eh_proj.weight.copy_(torch.cat((0.3 * torch.eye(width), torch.eye(width)), 1))
        layer.shared_head.norm.weight.copy_(model.model.norm.weight)
    model.requires_grad_(False)
    predictor.requires_grad_(True)
    return predictor


def batch(own: Tensor, stream: Tensor, generator: torch.Generator) -> Tensor:
    """四分之三是主模型的续写，四分之一是语料。"""
    mine = own[torch.randint(len(own), (BATCH * 3 // 4,), generator=generator)]
    length = own.shape[1]
    starts = torch.randint(len(stream) - length, (BATCH - len(mine),), generator=generator)
    return torch.cat((mine, torch.stack([stream[i : i + length] for i in starts.tolist()])))


def loss(model: nn.Module, ids: Tensor) -> dso.MTPLoss:
    """标签是主模型自己的 argmax。"""
    with torch.no_grad():
        hidden = model.model(ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
        labels = torch.full_like(ids, -100)
        labels[:, 1:] = logits[:, :-1].argmax(-1)
    return dso.mtp_loss(model.mtp, ids, hidden, labels, logits=logits)


class Run:
    """一次（可以续的）训练：进度按墙上时间算，续训时接着上次的分钟数。"""

    def __init__(self, options: argparse.Namespace, model: nn.Module):
        self.options, self.model = options, model
        self.optimizer = HybridOptimizer(model.mtp, MUON_LR, 1e-3, OTHER_LR)
        self.file = options.state / "checkpoint.pt"
        self.steps = self.tokens = 0
        self.minutes = 0.0
        if self.file.exists():
            kept = torch.load(self.file)
            self.steps, self.tokens, self.minutes = kept["progress"]
            model.mtp.load_state_dict(kept["mtp"])
            self.optimizer.load_state_dict(kept["optimizer"])
        self.began = time.monotonic() - self.minutes * 60

    def fraction(self) -> float:
        """进度，0 到 1。"""
        self.minutes = (time.monotonic() - self.began) / 60
        return min(self.minutes / self.options.minutes, 1.0)

    def save(self) -> None:
        """存断点。"""
        progress = (self.steps, self.tokens, self.minutes)
        kept = {"mtp": self.model.mtp.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**kept, "progress": progress}, self.file)

    def train(self, own: Tensor, stream: Tensor) -> None:
        """训练到 --minutes。"""
        generator = torch.Generator().manual_seed(1 + self.steps)
        shown = saved = time.monotonic()
        while (done := self.fraction()) < 1:
            ids = batch(own, stream, generator)
            loss(self.model, ids).loss.backward()
            decay = 1.0 if done < DECAY_FROM else (1 - done) / (1 - DECAY_FROM)
            self.optimizer.step(decay * min((self.steps + 1) / WARMUP_STEPS, 1.0))
            self.steps, self.tokens = self.steps + 1, self.tokens + ids.numel()
            if time.monotonic() - shown > self.options.log_seconds:
                shown, found = time.monotonic(), self.model.mtp.statistics
                rates = " / ".join(f"{rate:.1%}" for rate in found.acceptance)
                print(
                    f"{self.minutes:.1f} 分钟，{self.tokens} 词元：各深度一致 {rates}", flush=True
                )
                found.reset()
            if time.monotonic() - saved > SAVE_SECONDS:
                saved = time.monotonic()
                self.save()
        self.save()


def held_out_acceptance(folder: Path, rows: int = 32, new: int = 128) -> dict[str, Any]:
    """留出的源码上贪心续写，每步起草四个：前 k 个都被接受的比例。"""
    config = dso.MTPConfig(draft_length=DEPTH, fixed_draft_length=True)
    model = mtp_models.optimized(base_model(folder), config)
    mtp_models.run(model, mtp_models.prompts(rows), new)
    found = model.mtp.draft_statistics
    return {
        "acceptance": [round(rate, 4) for rate in found.acceptance],
        "tokens_per_step": round(found.tokens_per_step, 3),
    }


def export(model: nn.Module, folder: Path) -> None:
    """写出检查点：主模型的文件原样，MTP 层（bf16）在 mtp.safetensors，配置只改 MTP 的层数。"""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for file in data.MODEL_FOLDER.iterdir():
        shutil.copy(file, folder)
    names = model.mtp.checkpoint_names()
    found = model.mtp.state_dict()
    tensors = {names[key]: value.to(torch.bfloat16).contiguous() for key, value in found.items()}
    tensors = model.mtp.adapter.to_checkpoint(tensors)
    save_file(tensors, folder / "mtp.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["num_nextn_predict_layers"] = len(model.mtp.layers)
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """命令行；返回留出的接受率。"""
    parser = argparse.ArgumentParser(description="给随包的小模型训练 MTP 层")
    parser.add_argument("--minutes", type=float, default=62)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=4700, help="主模型自己续写几行")
    parser.add_argument("--stride", type=int, default=2, help="每几个训练文件取一个")
    parser.add_argument("--log-seconds", type=float, default=60)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    options.state.mkdir(parents=True, exist_ok=True)
    stream = corpus_tokens(options.state, options.stride)
    own = own_text(options.state, stream, options.rows)
    model = base_model()
    start(model)
    dso.optimize(model, dso.OptimizationProfile(**PROFILE))
    run = Run(options, model)
    run.train(own, stream)
    dso.restore(model)
    export(model, options.out)
    found = held_out_acceptance(options.out)
    print(f"{run.minutes:.0f} 分钟，{run.tokens} 词元：留出的接受率 {found}")
    return found


if __name__ == "__main__":
    main()
