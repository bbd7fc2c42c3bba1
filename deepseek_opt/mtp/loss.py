"""MTP 的训练损失：逐深度递归，按打包的序列、填充与标签取舍。"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_opt.config import MTPConfig
from deepseek_opt.errors import InputError
from deepseek_opt.mtp.documents import document_runs
from deepseek_opt.mtp.predictor import Prediction, TokenPredictor

DEFAULT_WEIGHT = 0.3  # DeepSeek-V3 训练前期的 λ


@dataclass(frozen=True)
class MTPLoss:
    """:func:`mtp_loss` 的结果。

    示例::

        found = mtp_loss(predictor, tokens, hidden, logits=logits)
        (main_loss + found.loss).backward()
        print(found.losses, found.acceptance)

    属性：
        loss: 加权之和，可求导。
        losses: 各深度每词元的损失（没有词元时为 0），可求导。
        weights: 各深度的权重。
        acceptance: 各深度的贪心预测与主模型对同一位置的相同的比例；没有给出 logits 时为 None。
        tokens: 各深度参与的词元数。
    """

    loss: Tensor
    losses: tuple[Tensor, ...]
    weights: tuple[float, ...]
    acceptance: tuple[Tensor, ...] | None
    tokens: tuple[Tensor, ...]


def loss_weights(config: MTPConfig, depth: int, step: int = 0) -> tuple[float, ...]:
    """第 step 步各深度的权重。

    给出 ``loss_weights`` 时就是它；否则为 λ · β^(k-1) / Σⱼ β^(j-1)：β = 1 时各深度平分 λ（DeepSeek-V3），
    λ 在 ``loss_weight_steps`` 步之前为 ``loss_weight``（缺省 0.3），之后为 ``final_loss_weight``。

    示例
    ----
    >>> from deepseek_opt import MTPConfig
    >>> config = MTPConfig(loss_weight=0.3, final_loss_weight=0.1, loss_weight_steps=9)
    >>> loss_weights(config, 1, step=9)
    (0.1,)
    >>> [round(w, 3) for w in loss_weights(MTPConfig(loss_weight=0.7, depth_decay=0.5), 3)]
    [0.4, 0.2, 0.1]
    """
    if config.loss_weights is not None:
        if len(config.loss_weights) != depth:
            raise InputError.expected(
                "loss_weights", f"{depth} 项（等于预测深度）", config.loss_weights
            )
        return tuple(config.loss_weights)
    scale = DEFAULT_WEIGHT if config.loss_weight is None else config.loss_weight
    if config.loss_weight_steps is not None and step >= config.loss_weight_steps:
        scale = config.final_loss_weight
    decay = 1.0 if config.depth_decay is None else config.depth_decay
    shares = [decay**k for k in range(depth)]
    return tuple(scale * share / sum(shares) for share in shares)


def mtp_loss(
    predictor: TokenPredictor,
    tokens: Tensor,
    hidden: Tensor,
    labels: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    position_ids: Tensor | None = None,
    document_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    step: int = 0,
    ignore_index: int = -100,
    num_items: Tensor | float | None = None,
) -> MTPLoss:
    """MTP 的训练损失 Σₖ wₖ Lₖ（DeepSeek-V3 式 24、25），深度 k 由 h^{k-1}ᵢ 与 t_{i+k} 预测 t_{i+k+1}。

    参数
    ----
    predictor : :class:`~deepseek_opt.TokenPredictor`。
    tokens : [B, T]。
    hidden : [B, T, H]，主模型对 tokens 的隐藏状态（归一化前后由 adapter 约定）。
    labels : [B, T]，没有移位，与 transformers 的约定相同：labels[i] 是 t_i，ignore_index 不算；None 时为 tokens。
    logits : [B, T, V]，主模型的输出，只用来算接受率。
    position_ids, document_ids : 打包的序列，见 ``document_ids`` 变化处或 position_ids 不再增加处；
        跨文档的预测不算，注意力也不跨文档。
    attention_mask : [B, T]，0 为填充，不算。
    step : 第几步，用于 λ 的切换，见 :func:`loss_weights`。
    num_items : 归一化用的词元数（梯度累积时为整批的）；None 时每个深度除以自己的有效词元数。

    返回 :class:`MTPLoss`，同时累计到 ``predictor.statistics``（``metrics(model)`` 里的 mtp_...）。

    示例
    ----
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from deepseek_opt import MTPConfig, attach_mtp, mtp_loss
    >>> sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64)
    >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
    >>> predictor = attach_mtp(model, config=MTPConfig(depth=2), fresh=True)
    >>> tokens = torch.randint(64, (2, 8))
    >>> hidden = model.model(tokens).last_hidden_state
    >>> found = mtp_loss(predictor, tokens, hidden, logits=model.lm_head(hidden))
    >>> len(found.losses), [int(n) for n in found.tokens]
    (2, [12, 10])
    """
    labels = tokens if labels is None else labels
    _check(tokens, labels, logits)
    weights = loss_weights(predictor.config, predictor.depth, step)
    runs = document_runs(tokens, position_ids, document_ids, attention_mask)
    if position_ids is None:
        position_ids = torch.arange(tokens.shape[1], device=tokens.device)
    position_ids = position_ids.expand_as(tokens)
    if predictor.config.detach_hidden:
        hidden = hidden.detach()
    losses, counts, accepted = [], [], []
    for depth in range(1, predictor.depth + 1):
        if tokens.shape[1] - depth < 1:  # 比这个深度还短
            losses.append(hidden.sum() * 0.0)
            counts.append(tokens.new_zeros(()))
            accepted.append(tokens.new_zeros(()))
            continue
        made = predictor(
            tokens[:, depth:],
            hidden[:, :-1],
            depth=depth,
            position_ids=position_ids[:, depth:],
            document_ids=None if runs is None else runs[:, :-depth],
        )
        hidden = made.hidden
        total, count, same = _one(predictor, made, depth, labels, logits, runs, ignore_index)
        predictor.statistics.add(depth, total, count, same)
        losses.append(total / (count.clamp_min(1) if num_items is None else num_items))
        counts.append(count)
        accepted.append(same)
    loss = sum(w * one for w, one in zip(weights, losses, strict=True))
    rates = None
    if logits is not None:
        rates = tuple(a / n.clamp_min(1) for a, n in zip(accepted, counts, strict=True))
    return MTPLoss(loss, tuple(losses), weights, rates, tuple(counts))


def _one(
    predictor: TokenPredictor,
    made: Prediction,
    depth: int,
    labels: Tensor,
    logits: Tensor | None,
    runs: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """一个深度的（损失之和, 词元数, 与主模型相同的个数）。"""
    ahead = depth + 1
    target = labels[:, ahead:]
    valid = target != ignore_index
    if runs is not None:
        valid = valid & (runs[:, :-ahead] == runs[:, ahead:]) & (runs[:, ahead:] >= 0)
    chosen = predictor.logits(made.normed[:, :-1][valid], depth)
    wide = chosen if chosen.dtype == torch.float64 else chosen.float()
    total = F.cross_entropy(wide, target[valid], reduction="sum")
    same = None
    if logits is not None:
        main = logits[:, depth:-1].detach().argmax(-1)[valid]
        same = (chosen.detach().argmax(-1) == main).sum()
    return total, valid.sum(), same


def _check(tokens: Tensor, labels: Tensor, logits: Tensor | None) -> None:
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        raise InputError.expected("tokens", "整数张量 [B, T]", tokens)
    if not isinstance(labels, Tensor) or labels.shape != tokens.shape or labels.is_floating_point():
        raise InputError.expected("labels", f"形状 {list(tokens.shape)} 的整数张量", labels)
    if logits is not None and logits.shape[:-1] != tokens.shape:
        raise InputError.expected("logits", f"形状 {[*tokens.shape, 'V']} 的张量", logits)
