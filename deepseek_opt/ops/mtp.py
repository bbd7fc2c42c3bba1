"""多 token 预测（MTP）的算子：核对草稿、MTP 模块的入口。

形状记号：R 行，D 每行至多的草稿数，V 词表大小，K 隐藏宽，N 输出宽。
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deepseek_opt.errors import InputError
from deepseek_opt.ops._run import run


def mtp_draft_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, vocabulary: Tensor | None = None
) -> Tensor:
    """草稿的输出头：argmax (W · hidden + b)，不写出 logits；可以只在词表的一部分里选。

    核对仍看整个词表，所以只在一部分里起草不影响结果，只是选不到别的词元；读的权重少，起草就快（FR-Spec，
    arXiv 2502.14856）。分数以 fp32 计算，不舍入成 hidden 的 dtype。

    Args:
        hidden: [R, K] 浮点，归一化之后的。
        weight: [V, K]，输出头的权重，原地读，可与 hidden 的 dtype 不同。bias: [V] 或 None。
        vocabulary: [N] int64，候选的词元，在 [0, V) 内；None 为全部。相邻的下标一次算完，排好序最快。

    Returns:
        [R] int64，各行分数最大的词元；相同时取靠前的候选。没有导数。

    Raises:
        ValueError: 形状、dtype 不符；vocabulary 为空或越界；分数里有 NaN（指出行）。

    CUDA 上不等设备，不看内容：分数里有 NaN、候选越界的行得 -1，读结果的地方用 :func:`check_drafts` 报错。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> x, weight = torch.tensor([[1.0, 0.0, 0.5]]), torch.eye(3)
        >>> ops.mtp_draft_head(x, weight)
        tensor([0])
        >>> ops.mtp_draft_head(x, weight, vocabulary=torch.tensor([1, 2]))
        tensor([2])
    """
    return run("mtp_draft_head", hidden, weight, bias, vocabulary)


def mtp_verify_greedy(
    logits: Tensor, drafts: Tensor, draft_len: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """贪心核对：每行从头起，草稿等于 argmax 就接受，给出接受的个数与其后的词元。

    结果与逐个词元的贪心解码相同。遇到第一个不符的就停，后面位置的 logits 不读。

    Args:
        logits: [R, D + 1, V]，第 i 个位置是看过前 i 个草稿之后的；浮点，前两维步长任意。
        drafts: [R, D] int64，在 [0, V) 内。
        draft_len: [R] int64，各行有效的草稿数（0 到 D），其余的不看；None 为都是 D。

    Returns:
        (accepted [R] int64，next [R] int64)：接受的个数；第一个不符处的 argmax，全部接受时是多出的那个
        位置的 argmax。最大值相同时取最小的下标（同 torch.argmax）。

    Raises:
        ValueError: 形状、dtype 不符；draft_len、drafts 越界；读到的 logits 里有 NaN（指出行与位置）。

    CUDA 上不等设备，不看内容：第 i 个位置有 NaN 的行得 next = -1 - i（accepted 没有意义），读结果的地方用
    :func:`check_verified` 报错；draft_len 截到 [0, D]，越界的草稿不接受。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> logits = torch.eye(4)[None, :3]  # 三个位置的 argmax 依次是 0、1、2
        >>> ops.mtp_verify_greedy(logits, torch.tensor([[0, 3]]))
        (tensor([1]), tensor([1]))
        >>> ops.mtp_verify_greedy(logits, torch.tensor([[0, 1]]))
        (tensor([2]), tensor([2]))
    """
    return run("mtp_verify_greedy", logits, drafts, draft_len)


def mtp_verify_sample(
    probs: Tensor,
    drafts: Tensor,
    uniform: Tensor,
    draft_len: Tensor | None = None,
    draft_probs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """采样核对：以概率 min(1, p / q) 接受草稿，结果的分布恰好是 p，与逐个词元采样相同。

    第 i 个草稿 x 在 uniform[r, i] < p(x) / q(x) 时接受；第一个不接受处的词元从 max(0, p − q) 抽，全部接受时从
    多出的那个位置的 p 抽（Leviathan 等，arXiv 2211.17192）。随机数由参数给出，结果因此与线程数无关。

    Args:
        probs: [R, D + 1, V] 目标的概率 p，已做过温度、top-k 等处理（见 :func:`sample_filter`）；浮点，不必
            恰好归一。
        drafts: [R, D] int64，在 [0, V) 内。
        uniform: [R, D + 1] float32 或 float64，[0, 1) 的均匀随机数：前 D 列决定接受与否，最后一列抽 next。
        draft_len: [R] int64，各行有效的草稿数；None 为都是 D。
        draft_probs: [R, D, V] 抽出草稿的分布 q，必须是真正用来抽的那个；None 表示 q 集中在草稿上，草稿是
            确定地选出的（例如 argmax）。不论草稿怎样来的，None 都无损，只是抽出来的草稿会少接受一些。

    Returns:
        (accepted [R] int64，next [R] int64)：接受的个数；其后的词元，它的概率不会是 0。

    Raises:
        ValueError: 形状、dtype 不符；draft_len、drafts、uniform 越界；读到的 probs 不是非负的有限数或全是 0；
            草稿的 draft_probs 不是正的有限数。都指出行与位置。

    CUDA 上不等设备，不看内容：第 i 个位置不对的行得 next = -1 - i，accepted 是 0（probs 不对）或 1（草稿越界，或
    它的 draft_probs 不对），读结果的地方用 :func:`check_verified` 报错；draft_len 截到 [0, D]。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> probs = torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]])
        >>> ops.mtp_verify_sample(probs, torch.tensor([[1]]), torch.tensor([[0.4, 0.9]]))
        (tensor([1]), tensor([2]))
        >>> ops.mtp_verify_sample(probs, torch.tensor([[1]]), torch.tensor([[0.6, 0.9]]))
        (tensor([0]), tensor([0]))
    """
    return run("mtp_verify_sample", probs, drafts, draft_len, draft_probs, uniform)


def check_drafts(tokens: Sequence[int]) -> None:
    """读回来的 :func:`mtp_draft_head` 的结果里有 -1 时报错。

    Raises:
        InputError: 指出行。

    Example:
        >>> from deepseek_opt import ops
        >>> ops.check_drafts([3, 5])
    """
    for row, token in enumerate(tokens):
        if token < 0:
            raise InputError(f"mtp_draft_head：第 {row} 行的分数含 NaN")


def check_verified(accepted: Sequence[int], following: Sequence[int]) -> None:
    """读回来的 ``mtp_verify_*`` 的结果（accepted、next）里有出错的行时报错。

    Raises:
        InputError: 指出行与位置。

    Example:
        >>> from deepseek_opt import ops
        >>> ops.check_verified([1, 0], [7, 9])
    """
    for row, (count, token) in enumerate(zip(accepted, following, strict=True)):
        if token >= 0:
            continue
        what = (
            "草稿不在词表里，或它的 draft_probs 不是正的有限数"
            if count
            else "logits（或 probs）含 NaN，或全是 0"
        )
        raise InputError(f"核对草稿：第 {row} 行第 {-1 - token} 个位置的{what}")


def mtp_input(
    embedding: Tensor,
    hidden: Tensor,
    embedding_norm: Tensor,
    hidden_norm: Tensor,
    weight: Tensor,
    eps: float,
) -> Tensor:
    """MTP 模块的入口：W · [RMSNorm(embedding); RMSNorm(hidden)]，两个归一化、拼接与投影一次算完。

    次序是 DeepSeek-V3 检查点的 ``eh_proj``：词嵌入在前。MiMo 等隐藏状态在前的，把两个输入与两个归一化对调即可。

    Args:
        embedding: [..., K] 下一个词元的嵌入；hidden: 同形同 dtype，上一层的隐藏状态。
        embedding_norm, hidden_norm: [K]，检查点的 ``enorm.weight``、``hnorm.weight``。
        weight: [N, 2K]，``eh_proj.weight``，可与 embedding 的 dtype 不同。
        eps: 加在均方上的小数。

    Returns:
        [..., N]，dtype 随 embedding。可求导，反向重算归一化。

    Raises:
        ValueError: 形状或 dtype 不符。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> x, norm = torch.ones(2, 4), torch.ones(4)
        >>> ops.mtp_input(x, x, norm, norm, torch.ones(3, 8), 1e-6).shape
        torch.Size([2, 3])
    """
    return run("mtp_input", embedding, hidden, embedding_norm, hidden_norm, weight, eps)
