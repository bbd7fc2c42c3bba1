"""把训练好的模型导出成 HF 目录：权重转 bf16，用原版 transformers 评测，写中文模型卡。"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from deepseek_opt import corpus

from .card import write_card

# 评测窗口：每个留出文件从头切成互不重叠的段，段内逐 token 预测。
EVAL_LENGTH = 2048
# 长上下文读数：最长的留出文件里，各段位置的损失。
_BUCKETS = (0, 1024, 2048, 4096, 8192, 16384)


@dataclass
class Score:
    """留出文本上的读数；loss 的单位是 nat / token。"""

    tokens: int = 0
    loss: float = 0.0
    hits: int = 0
    data_bytes: int = 0

    @property
    def mean_loss(self) -> float:
        """每 token 的平均损失。"""
        return self.loss / self.tokens

    @property
    def accuracy(self) -> float:
        """下一 token 的准确率。"""
        return self.hits / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """每字节源码的比特数。"""
        return self.loss / 0.6931471805599453 / self.data_bytes


def _window_logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids[None], use_cache=False).logits[0].float()


@torch.no_grad()
def score_held_out(model: nn.Module, tokenizer, limit: int | None = None) -> Score:
    """在全部留出文件上评测；给出 ``limit`` 时评够这么多 token 就停。

    每个文件以文档分隔符开头，切成 ``EVAL_LENGTH`` 的段，段间不带上下文。
    """
    score = Score()
    for path in corpus.held_out_files():
        text = corpus.read_text(path)
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text, verbose=False)["input_ids"]])
        for begin in range(0, ids.numel() - 1, EVAL_LENGTH):
            window = ids[begin : begin + EVAL_LENGTH + 1]
            logits = _window_logits(model, window[:-1])
            score.loss += float(F.cross_entropy(logits, window[1:], reduction="sum"))
            score.hits += int((logits.argmax(-1) == window[1:]).sum())
            score.tokens += window.numel() - 1
        score.data_bytes += len(text.encode())
        if limit is not None and score.tokens >= limit:
            break
    return score


@torch.no_grad()
def loss_by_position(model: nn.Module, tokenizer) -> dict[str, float]:
    """一段 16384 token 的留出文本里，各段位置的平均损失：看长上下文是否走样。"""
    texts = [corpus.read_text(path) for path in corpus.held_out_files()]
    longest = max(texts, key=len)
    ids = torch.tensor(tokenizer(longest, verbose=False)["input_ids"][: _BUCKETS[-1] + 1])
    # 分块喂入，缓存续接：与长输入的真实用法相同，也不需要 16384 x 16384 的注意力矩阵。
    losses, cache = [], None
    for begin in range(0, ids.numel() - 1, 1024):
        window = ids[begin : begin + 1025]
        out = model(window[None, :-1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        losses.append(F.cross_entropy(out.logits[0].float(), window[1:], reduction="none"))
    loss = torch.cat(losses)
    pairs = zip(_BUCKETS[:-1], _BUCKETS[1:], strict=True)
    return {
        f"{begin}-{end}": round(float(loss[begin:end].mean()), 4)
        for begin, end in pairs
        if begin < loss.numel()
    }


@torch.no_grad()
def continuation(model: nn.Module, tokenizer, prompt: str, new_tokens: int = 96) -> str:
    """贪心续写。"""
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=new_tokens,
        do_sample=False,
    )
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# 模型卡里展示的续写：(留出文件, 提示截止处)。一段先写文档串，一段直接写代码。
_SAMPLES = (
    ("textwrap.py", "def fill(self, text):"),
    ("json/decoder.py", "def raw_decode("),
)


def sample_prompts() -> list[tuple[str, str]]:
    """各展示样例的 (来源, 提示)；提示取截止处之前至多 6000 个字符。"""
    prompts = []
    for name, mark in _SAMPLES:
        text = corpus.read_text(corpus.stdlib_root() / name)
        end = text.index(mark) + len(mark)
        prompts.append((name, text[max(0, end - 6000) : end]))
    return prompts


def _evaluate(out: Path, limit: int | None) -> dict:
    """重新载入导出的目录，在 fp32 与 bf16 下评测，fp32 下另测长上下文并续写一段。"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    models = {
        name: AutoModelForCausalLM.from_pretrained(out, dtype=getattr(torch, name)).eval()
        for name in ("float32", "bfloat16")
    }
    scores = {}
    for name, model in models.items():
        score = score_held_out(model, tokenizer, limit)
        scores[name] = {
            "tokens": score.tokens,
            "loss": round(score.mean_loss, 4),
            "accuracy": round(score.accuracy, 4),
            "bits_per_byte": round(score.bits_per_byte, 4),
        }
    samples = [
        {
            "source": source,
            "prompt": prompt,
            "text": continuation(models["float32"], tokenizer, prompt),
        }
        for source, prompt in sample_prompts()
    ]
    return {
        "scores": scores,
        "by_position": loss_by_position(models["float32"], tokenizer),
        "samples": samples,
    }


def export(model: nn.Module, out: Path, progress: dict, limit: int | None = None) -> dict:
    """写出权重与配置，重新载入后评测，写模型卡；返回全部读数。

    参数:
        model: fp32 主权重的 DeepseekV3ForCausalLM。
        out: 目标目录，分词器已经写在里面。
        progress: 训练进度（步数、token 数、用时）。
        limit: 评测的 token 数上限；None 表示全部留出文件。
    """
    # 只转参数：路由的修正偏置是缓冲区，留在 fp32，transformers 载入时也这样保持。
    for param in model.parameters():
        param.data = param.data.to(torch.bfloat16)
    model.config.dtype = "bfloat16"
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    training, held_out = corpus.training_files(), corpus.held_out_files()
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "file_bytes": (out / "model.safetensors").stat().st_size,
        "python": platform.python_version(),
        "training_files": len(training),
        "training_bytes": sum(path.stat().st_size for path in training),
        "held_out_files": len(held_out),
        "progress": progress,
        **_evaluate(out, limit),
    }
    write_card(out / "README.md", figures, model.config)
    return figures
