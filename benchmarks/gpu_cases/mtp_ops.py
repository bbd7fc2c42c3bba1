"""MTP 与采样的算子：草稿的输出头、核对、采样前的处理、抽样；受限于带宽，没有要求，对照是 torch 与 transformers 的写法。"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_cases.check import Pairs
from benchmarks.gpu_cases.runner import Case, Env, Row, Work, measure
from deepseek_opt import ops

BF16 = torch.bfloat16
# (行数, 词表, 隐藏宽, 候选数或 0)
HEADS = [(8, 129280, 7168, 0), (8, 32000, 2048, 0), (1, 32000, 2048, 0), (8, 129280, 7168, 8192)]
# (行数, 位置数, 词表)
VOCABS = [(8, 5, 129280), (1, 5, 129280), (8, 5, 32000), (64, 5, 32000)]
TOP_K, TOP_P, TEMPERATURE = 50, 0.9, 0.8


def cases(env: Env) -> list[Case]:
    """全部项；quick 时只用很小的形状。"""
    heads, vocabs = ([(2, 64, 16, 8)], [(2, 2, 96)]) if env.quick else (HEADS, VOCABS)
    found = [_case(draft_head, shape) for shape in heads]
    for shape in vocabs:
        found += [_case(build, shape) for build in (verify_greedy, filter_both, filter_top_p, draw)]
    return found


def _case(build, shape: tuple[int, ...]) -> Case:
    key = f"mtp.{build.__name__}.{'x'.join(map(str, shape))}"

    def run(env: Env) -> Iterator[Row]:
        yield measure(env, build(env, key, *shape))

    return Case(key, run)


def draft_head(env: Env, key: str, rows: int, vocab: int, width: int, kept: int) -> Work:
    """argmax (W x)，不写出分数；kept 为只在这么多候选里选。"""
    ids = None
    if kept:
        ids = torch.randperm(vocab, device=env.device)[:kept].sort().values

    def peer(x: Tensor, weight: Tensor) -> Tensor:
        if ids is None:
            return torch.nn.functional.linear(x, weight).argmax(-1)
        return ids[torch.nn.functional.linear(x, weight[ids]).argmax(-1)]

    def pairs(args: tuple, token: Tensor) -> Pairs:
        x, weight = args
        own = (x.float() * weight[token].float()).sum(-1)
        scores = x.float() @ (weight if ids is None else weight[ids]).float().T
        return [("选中的分数", own, scores.amax(-1))]

    return Work(
        key,
        BF16,
        lambda: (env.randn(rows, width), env.randn(vocab, width)),
        lambda x, weight: ops.mtp_draft_head(x, weight, None, ids),
        {"F.linear 再 argmax": peer},
        pairs,
        bytes=(kept or vocab) * width * 2,
        flops=2 * rows * (kept or vocab) * width,
        graph=True,
    )


def verify_greedy(env: Env, key: str, rows: int, positions: int, vocab: int) -> Work:
    """全部接受的草稿：每个位置都要看。"""

    def make() -> tuple[Tensor, Tensor]:
        logits = env.randn(rows, positions, vocab)
        return logits, logits[:, :-1].argmax(-1)

    def peer(logits: Tensor, drafts: Tensor) -> tuple[Tensor, Tensor]:
        best = logits.argmax(-1)
        accepted = (best[:, :-1] == drafts).cumprod(1).sum(1)
        return accepted, best.gather(1, accepted[:, None])[:, 0]

    def pairs(args: tuple, out: tuple[Tensor, Tensor]) -> Pairs:
        want = peer(*args)
        return [
            (name, a.float(), b) for name, a, b in zip(("接受数", "其后的"), out, want, strict=True)
        ]

    return Work(
        key,
        BF16,
        make,
        ops.mtp_verify_greedy,
        {"argmax、cumprod、gather": peer},
        pairs,
        bytes=rows * positions * vocab * 2,
        graph=True,
    )


def _sorted_filter(logits: Tensor, top_k: int) -> Tensor:
    """transformers 的处理器：topk，再排序。"""
    scores = logits.float() / TEMPERATURE
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[..., -1:], -torch.inf)
    values, order = scores.sort(descending=False)
    dropped = values.softmax(-1).cumsum(-1) <= 1 - TOP_P
    dropped[..., -1:] = False
    return scores.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf).softmax(-1)


def _filter(top_k: int, env: Env, key: str, rows: int, positions: int, vocab: int) -> Work:
    def pairs(args: tuple, out: Tensor) -> Pairs:
        return [("概率", out, _sorted_filter(*args, top_k))]

    options = {"temperature": TEMPERATURE, "top_k": top_k, "top_p": TOP_P}
    return Work(
        key,
        torch.float32,
        lambda: (_peaked(env, rows, positions, vocab),),
        lambda logits: ops.sample_filter(logits, **options),
        {"transformers 的写法": partial(_sorted_filter, top_k=top_k)},
        pairs,
        bytes=rows * positions * vocab * 8,
        graph=True,
    )


def _peaked(env: Env, *shape: int) -> Tensor:
    """像语言模型的：少数分数明显大。fp32：半精度里相同的多，去掉哪几个没有规定，比不了。"""
    logits = 2 * torch.randn(*shape, device=env.device)
    return logits + 6 * torch.rand(*shape, device=env.device).pow(40)


def filter_both(env: Env, key: str, rows: int, positions: int, vocab: int) -> Work:
    """温度、top-k、top-p。"""
    return _filter(min(TOP_K, vocab - 1), env, key, rows, positions, vocab)


def filter_top_p(env: Env, key: str, rows: int, positions: int, vocab: int) -> Work:
    """温度、top-p：没有 top-k 先减少候选。"""
    return _filter(0, env, key, rows, positions, vocab)


def _search(probs: Tensor, uniform: Tensor) -> Tensor:
    sums = probs.cumsum(-1)
    return torch.searchsorted(sums, (uniform * sums[:, -1])[:, None])[:, 0]


def draw(env: Env, key: str, rows: int, positions: int, vocab: int) -> Work:
    """按概率抽样；一个位置一行。"""

    def make() -> tuple[Tensor, Tensor]:
        count = rows * positions
        return env.randn(count, vocab).float().softmax(-1), torch.rand(count, device=env.device)

    def pairs(args: tuple, token: Tensor) -> Pairs:
        probs, uniform = args
        sums = probs.double().cumsum(-1)
        above = sums.gather(1, token[:, None])[:, 0].float()
        reached = torch.maximum(above, uniform * sums[:, -1].float())
        return [("累计概率", above, reached)]

    return Work(
        key,
        torch.float32,
        make,
        ops.sample_tokens,
        {"cumsum 再 searchsorted": _search},
        pairs,
        bytes=rows * positions * vocab * 4,
        graph=True,
    )
