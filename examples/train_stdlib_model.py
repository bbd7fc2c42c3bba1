"""在标准库源码上训练随包小模型，并导出成 HF 格式。

    python examples/train_stdlib_model.py --minutes 95 --state 训练目录 --out 导出目录

学习率与上下文长度按墙上时间安排：到 ``--minutes`` 时恰好降完，中途被暂停也照样按时结束。
每隔几分钟保存一次，重新执行同一命令即从断点继续；``--export-only`` 只把最近的断点导出。
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from stdlib_model.architecture import MAX_LENGTH, build_model
from stdlib_model.data import Batches
from stdlib_model.export import export
from stdlib_model.fast_forward import FastForward, update_router_bias
from stdlib_model.optimizer import HybridOptimizer
from stdlib_model.tokenizer import encode_files, save_tokenizer, train_tokenizer
from tokenizers import Tokenizer

from deepseek_opt import corpus

#: (到哪个进度为止, 行数, 长度)：先小批短窗多走几步，最后用长窗适应长上下文。
PHASES = ((0.15, 8, 512), (0.50, 16, 512), (0.78, 8, 1024), (0.90, 4, 2048), (1.0, 2, 4096))
#: 学习率在这个进度之后线性降到零。
DECAY_FROM = 0.45
#: 从这个进度起，一部分窗口的位置编号里留空隙；再早会拖慢最初的学习。
GAPS_FROM = 0.2
WARMUP_STEPS = 40
BIAS_RATE = 5e-3
SAVE_SECONDS = 240
EVAL_SECONDS = 300


@dataclass
class Progress:
    """训练到哪里了；随断点保存，也写进模型卡。"""

    steps: int = 0
    tokens: int = 0
    started: float = 0.0
    deadline: float = 0.0
    busy_seconds: float = 0.0
    train_tokens: int = 0
    resumed: int = 0

    def fraction(self) -> float:
        """墙上时间的进度，0 到 1。"""
        return min((time.time() - self.started) / (self.deadline - self.started), 1.0)


def learning_rate_scale(fraction: float, steps: int) -> float:
    """预热、恒定、线性降到零。"""
    decay = 1.0 if fraction < DECAY_FROM else (1.0 - fraction) / (1.0 - DECAY_FROM)
    return max(decay, 0.0) * min((steps + 1) / WARMUP_STEPS, 1.0)


def prepare_data(state: Path) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """分词器与两条 token 流（训练、留出），缓存在状态目录。"""
    tokenizer_file = state / "tokenizer.json"
    if not tokenizer_file.exists():
        texts = [corpus.read_text(path) for path in corpus.training_files()]
        held_out = [corpus.read_text(path) for path in corpus.held_out_files()]
        tokenizer = train_tokenizer(texts)
        np.save(state / "train.npy", encode_files(tokenizer, texts))
        np.save(state / "held_out.npy", encode_files(tokenizer, held_out))
        tokenizer.save(str(tokenizer_file))
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    return tokenizer, np.load(state / "train.npy"), np.load(state / "held_out.npy")


@torch.no_grad()
def quick_loss(fast: FastForward, stream: np.ndarray, windows: int = 24, length: int = 1024):
    """留出流上等距若干窗口的平均损失与准确率（训练中途看趋势用）。"""
    starts = np.linspace(0, len(stream) - length - 2, windows).astype(int)
    loss, hits = 0.0, 0.0
    for start in starts:
        window = torch.from_numpy(stream[start : start + length + 1].astype(np.int64))
        hidden, _ = fast(window[None, :-1], torch.arange(length)[None])
        logits = hidden.float() @ fast.model.lm_head.weight.float().t()
        loss += float(torch.nn.functional.cross_entropy(logits, window[1:]))
        hits += float((logits.argmax(-1) == window[1:]).float().mean())
    return loss / windows, hits / windows


class Trainer:
    """训练循环的状态：模型、优化器、数据与进度。"""

    def __init__(self, state: Path, minutes: float):
        self.state = state
        self.tokenizer, stream, self.held_out = prepare_data(state)
        self.model = build_model()
        self.optimizer = HybridOptimizer(self.model, muon_lr=0.02, embed_lr=0.01, other_lr=0.003)
        self.fast = FastForward(self.model)
        self.compiled = torch.compile(self.fast.forward, dynamic=False)
        self.progress = Progress()
        if (state / "checkpoint.pt").exists():
            self._resume()
        else:
            now = time.time()
            self.progress.started, self.progress.deadline = now, now + 60 * minutes
        self.progress.train_tokens = len(stream)
        self.batches = Batches(stream, seed=self.progress.resumed)

    def run(self) -> None:
        """训练到截止时间。"""
        saved = evaluated = time.time()
        average = None
        while (fraction := self.progress.fraction()) < 1.0:
            begin = time.time()
            loss, ratios = self._step(fraction)
            average = loss if average is None else 0.98 * average + 0.02 * loss
            self.progress.busy_seconds += time.time() - begin
            if self.progress.steps % 50 == 0 or self.progress.steps in (1, 10, 20, 30):
                self._log(fraction, average, ratios, time.time() - begin)
            if time.time() - saved > SAVE_SECONDS:
                self.save()
                saved = time.time()
            if time.time() - evaluated > EVAL_SECONDS:
                held_loss, accuracy = quick_loss(self.fast, self.held_out)
                print(f"    留出损失 {held_loss:.4f}  准确率 {accuracy:.2%}", flush=True)
                evaluated = time.time()
        self.save()

    def _step(self, fraction: float) -> tuple[float, list[float]]:
        rows, length = next((r, t) for until, r, t in PHASES if fraction < until)
        tokens, target, positions = self.batches.next(rows, length, gaps=fraction > GAPS_FROM)
        hidden, chosen = self.compiled(tokens, positions)
        loss = self.fast.loss(hidden, target)
        loss.backward()
        value = float(loss.detach())
        if not np.isfinite(value):
            raise FloatingPointError(f"第 {self.progress.steps} 步的损失不是有限值：{value}")
        scale = learning_rate_scale(fraction, self.progress.steps)
        ratios = update_router_bias(self.model, chosen, BIAS_RATE * min(1.0, 2 * scale))
        self.optimizer.step(scale)
        self.progress.steps += 1
        self.progress.tokens += tokens.numel()
        return value, ratios

    def _log(self, fraction: float, average: float, ratios: list[float], seconds: float) -> None:
        print(
            f"{time.strftime('%H:%M:%S')} 步 {self.progress.steps} 进度 {fraction:.1%} "
            f"token {self.progress.tokens / 1e6:.2f}M 损失 {average:.4f} "
            f"最忙专家/平均 {max(ratios):.2f} 本步 {seconds:.2f} s",
            flush=True,
        )

    def save(self) -> None:
        """写断点；先写临时文件再改名，被打断也不会留下半个文件。"""
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "progress": asdict(self.progress),
            },
            self.state / "checkpoint.tmp",
        )
        os.replace(self.state / "checkpoint.tmp", self.state / "checkpoint.pt")

    def _resume(self) -> None:
        saved = torch.load(self.state / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.progress = Progress(**saved["progress"])
        self.progress.resumed += 1


def export_checkpoint(state: Path, out: Path, limit: int | None) -> None:
    """把最近的断点转 bf16，连同分词器与模型卡写成 HF 目录。"""
    tokenizer, _, _ = prepare_data(state)
    saved = torch.load(state / "checkpoint.pt", weights_only=True)
    model = build_model()
    model.load_state_dict(saved["model"])
    out.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, out, MAX_LENGTH)
    figures = export(model, out, saved["progress"], limit)
    print(json.dumps(figures, ensure_ascii=False, indent=1))


def main() -> None:
    """命令行入口。"""
    parser = argparse.ArgumentParser(description="在标准库源码上训练随包小模型")
    parser.add_argument("--minutes", type=float, default=95.0, help="墙上训练时间（分钟）")
    parser.add_argument("--state", type=Path, required=True, help="断点与分词缓存的目录")
    parser.add_argument("--out", type=Path, required=True, help="导出的 HF 目录")
    parser.add_argument("--export-only", action="store_true", help="只导出最近的断点")
    parser.add_argument("--eval-tokens", type=int, help="评测的 token 数上限（省略即全部）")
    args = parser.parse_args()
    torch.set_num_threads(2)
    args.state.mkdir(parents=True, exist_ok=True)
    if not args.export_only:
        Trainer(args.state, args.minutes).run()
    export_checkpoint(args.state, args.out, args.eval_tokens)


if __name__ == "__main__":
    main()
