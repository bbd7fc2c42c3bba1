"""用 MTP 生成：8 行、至多 4 个草稿，模型就在这里的标准库源码上训练一分钟，与自己逐个词元、transformers 比。

模型是 DeepSeek-V3 的结构（MLA，稠密的 FFN），一个共用的 MTP 层、递归训练到 4 个深度。续写的是留出的源码。对照：
本库优化过、逐个词元的 generate；本库同一个循环、同样的 CUDA graph 但从不起草（MTP 本身带来多少）；transformers。
计时之前先以 fp32 核对：各行的词元与逐个词元生成的相同。
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_cases.check import WrongResult
from benchmarks.gpu_cases.models import DTYPE
from benchmarks.gpu_cases.row import Peer, Row, Target
from benchmarks.gpu_cases.runner import Case, Env, free, ratio_row
from benchmarks.gpu_cases.timer import Clocked
from deepseek_opt import DenseConfig, MLAConfig, MTPConfig, OptimizationProfile, optimize
from deepseek_opt.corpus import read_text, training_files
from deepseek_opt.demo import data
from deepseek_opt.generation.adaptive import DraftLength
from deepseek_opt.generation.plan import keep_length
from deepseek_opt.metrics import stop_metrics

ROWS, DRAFTS, DEPTH = 8, 4, 4
TRAIN_SECONDS = 60.0
LESS_TIME = Target(0.25, "省下的时间的比例")
MORE_TOKENS = Target(1.30, "倍于逐个词元的词元数每秒")
_SAME = 0.75  # fp32 里相同的词元至少这么多：偶有两个分数几乎相等，不同的矩阵乘选了另一个，那一行从此不同
_PEAK_LR, _WARMUP = 1e-3, 0.05


@dataclass(frozen=True)
class Scale:
    """规模：模型、训练的一批、生成的长度、至多用多少源码（字节；分词也占时间）。"""

    hidden: int
    layers: int
    batch: int
    length: int
    prompt: int
    new: int
    text: int
    steps: int | None = None  # 训练的步数；None 为按时间


FULL = Scale(768, 12, 32, 512, 128, 256, 24 << 20)
QUICK = Scale(64, 2, 2, 32, 8, 12, 1 << 16, 2)


def cases(_: Env) -> list[Case]:
    """一项，几行读数。"""
    return [Case("generation.b8", run)]


def run(env: Env) -> Iterator[Row]:
    """训练、核对、计时。"""
    scale = QUICK if env.quick else FULL
    tokenizer = data.load_tokenizer(data.MODEL_FOLDER)
    model = _build(env, scale, len(tokenizer))
    trained = _train(env, scale, model, tokenizer)
    ids = _prompts(env, scale, tokenizer)
    same = _check(scale, model, ids)
    free(env.device)
    model = model.to(DTYPE)
    plain, fast, still = (_optimized(model, on) for on in (False, True, True))
    keep_length(fast.mtp, DraftLength(DRAFTS))
    keep_length(still.mtp, _Never())
    found: dict[str, Tensor] = {}
    sides = {
        "ours": fast,
        "本库逐个词元": plain,
        "本库同一循环，不起草": still,
        "transformers 逐个词元": model,
    }
    clocked = []
    for name, side in sides.items():
        call = _generating(side, ids, scale.new, found, name)
        for _ in range(1 if env.quick else 3):  # 选定起草几个，录好 CUDA graph
            call()
        clocked.append(Clocked(call, 1))
    fast.mtp.draft_statistics.reset()
    readings = dict(zip(sides, env.timer.in_turn(clocked), strict=True))
    ours = readings.pop("ours")
    drafts = fast.mtp.draft_statistics
    details = {
        **trained,
        "same_tokens_fp32": same,
        "acceptance_per_depth": [round(a, 4) for a in drafts.acceptance],
        "tokens_per_step": drafts.tokens_per_step,
        "tokens_per_second": ROWS * scale.new / ours * 1e6,
        "rows": ROWS,
        "prompt": scale.prompt,
        "new": scale.new,
    }
    row = Row("generation.b8.time", dtype="bfloat16", us=ours, details=details)
    for name, us in readings.items():
        share = float((found[name] == found["ours"]).float().mean())
        row.peers.append(Peer(name, us, us / ours, note=f"相同的词元 {share:.1%}"))
    yield row.judge(1 - ours / readings["本库逐个词元"], LESS_TIME.unit, LESS_TIME)
    for key, name in (
        ("throughput", "本库逐个词元"),
        ("same_loop", "本库同一循环，不起草"),
        ("transformers", "transformers 逐个词元"),
    ):
        pair = {"ours_us": ours, "peer_us": readings[name], "peer": name}
        yield ratio_row(
            f"generation.b8.{key}", readings[name] / ours, MORE_TOKENS.unit, MORE_TOKENS, pair
        )


class _Never(DraftLength):
    """从不起草：同一个循环的对照。"""

    def __init__(self) -> None:
        super().__init__(DRAFTS)

    def choose(self, *_: Any) -> int:  # pylint: disable=arguments-differ
        return 0


# ---- 模型与训练 ----


def _build(env: Env, scale: Scale, vocabulary: int) -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from deepseek_opt import attach_mtp

    width = scale.hidden
    config = DeepseekV3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        moe_intermediate_size=width,
        num_hidden_layers=scale.layers,
        first_k_dense_replace=scale.layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        q_lora_rank=width // 2,
        kv_lora_rank=256 if width > 64 else 32,
        qk_rope_head_dim=32,
        qk_nope_head_dim=64,
        v_head_dim=64,
        max_position_embeddings=2048,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(env.device):
        model = DeepseekV3ForCausalLM(config)
    model.generation_config.eos_token_id = None  # 各行都生成满
    model.generation_config.pad_token_id = 1
    attach_mtp(model, config=MTPConfig(depth=DEPTH, shared_layers=True), fresh=True)
    return model


def _stream(tokenizer: Any, most: int) -> Tensor:
    """训练用的源码首尾相接的词元。"""
    texts, size = [], 0
    for path in training_files():
        texts.append(read_text(path))
        size += len(texts[-1])
        if size > most:
            break
    ids = [one for part in tokenizer(texts)["input_ids"] for one in part]
    return torch.tensor(ids)


def _train(env: Env, scale: Scale, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """训练到时间用完（预算的一半，至多 TRAIN_SECONDS 秒）；返回用时、词元数、最后的损失。"""
    from deepseek_opt import MTPTraining

    stream = _stream(tokenizer, scale.text)
    began, seconds = time.monotonic(), min(TRAIN_SECONDS, env.remaining() / 2)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1
    )
    generator = torch.Generator().manual_seed(0)
    losses: list[Tensor] = []
    model.train()
    with MTPTraining(model) as training:
        while True:
            step, spent = len(losses), time.monotonic() - began
            share = step / scale.steps if scale.steps else spent / seconds
            if share >= 1:
                break
            _set_rate(optimizer, share)
            starts = torch.randint(
                len(stream) - scale.length, (scale.batch,), generator=generator
            ).tolist()
            ids = torch.stack([stream[i : i + scale.length] for i in starts]).to(env.device)
            with torch.autocast(env.device, DTYPE):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            training.step += 1
            losses.append(loss.detach())
            if step % 10 == 9 and env.device == "cuda":
                torch.cuda.synchronize()  # 主机不要跑在时间前面太远
    model.eval().requires_grad_(False)
    last = torch.stack(losses[-20:]).mean().item()
    if not math.isfinite(last):
        raise WrongResult(f"训练的损失不是有限数：{last}")
    return {
        "train_s": time.monotonic() - began,
        "train_tokens": len(losses) * scale.batch * scale.length,
        "train_loss": last,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _set_rate(optimizer: Any, share: float) -> None:
    """按走过的时间：先线性升，再余弦降到十分之一。"""
    rate = min(1.0, share / _WARMUP) * (0.55 + 0.45 * math.cos(math.pi * share))
    for group in optimizer.param_groups:
        group["lr"] = _PEAK_LR * rate


# ---- 生成 ----


def _prompts(env: Env, scale: Scale, tokenizer: Any) -> Tensor:
    """[ROWS, prompt]：留出的源码里均匀取的段。"""
    stream = torch.tensor(data.held_out_stream(tokenizer, 100_000))
    starts = torch.linspace(0, len(stream) - scale.prompt - 1, ROWS + 2)[1:-1].long()
    return torch.stack([stream[i : i + scale.prompt] for i in starts.tolist()]).to(env.device)


def _optimized(model: nn.Module, mtp: bool) -> nn.Module:
    fast = copy.deepcopy(model)
    config = MTPConfig(draft_length=DRAFTS) if mtp else None
    optimize(fast, OptimizationProfile(mla=MLAConfig(), dense=DenseConfig(), mtp=config))
    stop_metrics(fast)
    return fast


def _generate(model: nn.Module, ids: Tensor, new: int) -> Tensor:
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
    )
    return out[:, ids.shape[1] :]


def _generating(
    model: nn.Module, ids: Tensor, new: int, found: dict[str, Tensor], name: str
) -> Callable[[], None]:
    def call() -> None:
        found[name] = _generate(model, ids, new)

    return call


def _check(scale: Scale, model: nn.Module, ids: Tensor) -> float:
    """fp32 里用 MTP 生成的与原模型逐个词元的相同的比例；抛出 WrongResult：太少。"""
    new = min(scale.new, 64)
    fast = _optimized(model, True)
    out = _generate(fast, ids, new)
    if not fast.mtp.draft_statistics.steps:
        raise WrongResult("没有用 MTP 生成，由 transformers 自己的代码生成了")
    same = float((out == _generate(model, ids, new)).float().mean())
    if same < _SAME:
        raise WrongResult(f"fp32 里只有 {same:.1%} 的词元与逐个词元生成的相同")
    return same
