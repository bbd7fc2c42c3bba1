"""采样的算子：由 logits 得到处理过的概率，按概率抽取。

形状记号：R 行，P 每行的位置数，V 词表大小，L 已有词元数。
"""

from __future__ import annotations

from torch import Tensor

from deepseek_opt.ops._run import run


def sample_filter(
    logits: Tensor,
    token_ids: Tensor | None = None,
    token_len: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """依次做重复惩罚、温度、top-k、top-p、min-p，再 softmax，得到采样用的概率；不排序。

    次序与取舍同 transformers 的 ``generate(do_sample=True)``：fp32 计算，top-k 边界上相同的分数全部保留，
    top-p 至少保留一个。top-p 边界上相同的分数保留几个也与 transformers 相同，保留的是下标大的（transformers
    用的 torch.sort 不稳定，保留哪几个没有规定）。

    Args:
        logits: [R, V] 或 [R, P, V]，浮点。
        token_ids: [R, L] int64，各行已有的词元（transformers 的 input_ids），重复惩罚用；不在 [0, V) 内的不算。
        token_len: [R]（logits 二维）或 [R, P] int64，各位置看 token_ids 的前几个；None 为全部。核对草稿时把
            草稿接在后面，第 i 个位置多看 i 个。
        temperature: 正数，1 为不变。
        top_k: 0 为不用。
        top_p: 0 到 1，1 为不用。
        min_p: 0 到 1，0 为不用。
        repetition_penalty: 正数，1 为不用；不为 1 时要给 token_ids。

    Returns:
        形状同 logits 的 fp32 概率，去掉的词元是 0。没有导数。

    Raises:
        ValueError: 形状、dtype、范围不符；logits 里有 NaN、+inf，或某个位置全是 -inf（指出行与位置）。

    CUDA 上不等设备，不看内容：logits 不对的位置，概率全是 NaN；token_len 截到 token_ids 的宽。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> ops.sample_filter(torch.tensor([[0.0, 1.0, 1.0, -5.0]]), top_k=2)
        tensor([[0.0000, 0.5000, 0.5000, 0.0000]])
    """
    flat = logits.dim() == 2
    if flat:
        logits = logits.unsqueeze(1)
        if token_len is not None and token_len.dim() == 1:
            token_len = token_len.unsqueeze(1)
    options = (temperature, top_k, top_p, min_p, repetition_penalty)
    probs = run("sample_filter", logits, token_ids, token_len, *options)
    return probs.squeeze(1) if flat else probs


def sample_tokens(probs: Tensor, uniform: Tensor) -> Tensor:
    """每行按概率抽一个词元：第一个累计概率超过 uniform · 总和的下标。

    随机数由参数给出（例如 ``torch.rand(R, generator=g)``），结果因此与线程数无关。概率为 0 的绝不会抽到。

    Args:
        probs: [R, V]，非负，不必归一；浮点。
        uniform: [R] float32 或 float64，在 [0, 1) 内。

    Returns:
        [R] int64。

    Raises:
        ValueError: 形状、dtype 不符；uniform 越界；某行有 NaN、inf 或全是 0（指出行）。

    CUDA 上不等设备，不看内容：全是 0 的行得 -1，有 NaN、inf 的行得 -2；越界的 uniform 取第一个或最后一个。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> ops.sample_tokens(torch.tensor([[0.25, 0.0, 0.75]] * 2), torch.tensor([0.2, 0.25]))
        tensor([0, 2])
    """
    return run("sample_tokens", probs, uniform)
