"""用 MTP 生成至少要读的字节与要做的运算，由实际走的步数算出。"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from deepseek_opt.benchmarks.timing import Roofline


def _weights(module: nn.Module) -> tuple[int, int]:
    """(每个词元都用的权重个数, 路由专家的权重个数)。"""
    experts = sum(p.numel() for name, p in module.named_parameters() if ".experts." in f".{name}")
    return sum(p.numel() for p in module.parameters()) - experts, experts


def floor_seconds(model: Any, ids: Tensor, drafts: Any, roofline: Roofline) -> float:
    """预填充、各步的核对与起草各取“读完权重”与“算完”里较久的，相加。"""
    rows, width = ids.shape
    steps = max(drafts.steps / rows, 1)
    length = drafts.num_draft_tokens / max(drafts.steps, 1)
    dtype = model.dtype
    head = model.lm_head.weight.numel()
    config = model.config

    def seconds(module: nn.Module, tokens: float, extra: int) -> float:
        dense, experts = _weights(module)
        share = config.num_experts_per_tok / config.n_routed_experts
        touched = experts * (1 - (1 - share) ** tokens)
        work = 2 * tokens * (dense + extra + experts * share)
        return roofline.floor_seconds(work, (dense + extra + touched) * dtype.itemsize, dtype)

    embedding = model.get_input_embeddings().weight.numel()
    total = seconds(model.model, rows * width, -embedding)
    total += steps * seconds(model.model, rows * (1 + length), head - embedding)
    total += steps * length * seconds(model.mtp, rows, head)
    return total
