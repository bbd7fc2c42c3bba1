"""MoE 的算子：路由、稀疏专家。

形状记号：T 词元数，K 输入宽，N 输出宽，E 专家数，I 专家的中间宽，k 每个词元的专家数。
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deepseek_opt.ops._run import is_tracing_grad, run

CLIPPED = ("clipped", "clipped_silu")  # 必须有门，要给 limit
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", *CLIPPED)
SCORES = ("sigmoid", "softmax", "sqrtsoftplus")


def moe_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    shared: Sequence[Tensor] = (),
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    *,
    transposed: bool = False,
    interleaved: bool = False,
    gated: bool = True,
    recompute: bool = False,
) -> Tensor:
    """稀疏专家：y[t] = Σ_j weights[t, j] · down_e(a(gate_e x[t]) * up_e x[t])，e = indices[t, j]。

    权重按 transformers 的布局原地读取。词元按专家排序；每个输出按专家的次序以 fp32 累加，与线程数无关。
    求导时只留下 gate、up 的输出（2 · T · k · I 个元素），其余重算（做法见 SonicMoE，arXiv 2512.14080）。

    Args:
        x: [T, K]。
        indices: [T, k] int64；等于或大于 E 的是哨兵，不计算，它们的梯度为 0。
        weights: [T, k] 混合权重，浮点。
        gate_up: [E, 2I, K]，前 I 行 gate、后 I 行 up；interleaved 时 gate、up 逐行交替；transposed 时
            [E, K, 2I]，上述的行换成列；gated 为 False 时没有门，宽 I。
        gate_up_bias: [E, 2I] 或 None，次序同 gate_up。
        down: [E, N, I]，transposed 时 [E, I, N]；down_bias: [E, N] 或 None。
        shared: 共享专家，空或 (gate [S, K], up [S, K], down [N, S])，或再加逐词元的系数 [T]；激活与
            专家相同，它的输出加进 y。
        activation: ``silu``、``gelu``、``gelu_tanh``、``relu``、``relu2``（relu 的平方）、``clipped``
            （gpt-oss：g = min(gate, limit)，u = clamp(up, ±limit)，g · sigmoid(alpha · g) · (u + 1)）、
            ``clipped_silu``（DeepSeek-V4：同样截断，silu(g) · u）。
        alpha, limit: alpha 只用于 clipped，limit 只用于 clipped、clipped_silu。
        recompute: True 时连 gate、up 也在反向里重算：什么都不多留，反向多做前向的三分之二。

    Returns:
        [T, N]，dtype 随 x。对 x、weights、各权重与偏置、shared 可求导。

    Raises:
        ValueError: 形状、dtype 不符，负的下标，不认识的 activation。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> x, index, weight = torch.randn(5, 8), torch.tensor([[0, 2]] * 5), torch.rand(5, 2)
        >>> gate_up, down = torch.randn(3, 2 * 6, 8), torch.randn(3, 8, 6)
        >>> ops.moe_experts(x, index, weight, gate_up, None, down, None).shape
        torch.Size([5, 8])
    """
    weight = (gate_up, gate_up_bias, down, down_bias, list(shared))
    act = (activation, alpha, limit, transposed, interleaved, gated)
    save = not recompute and is_tracing_grad(x, weights, gate_up, gate_up_bias, down, *shared)
    return run("moe_experts", x, indices, weights, *weight, *act, save)[0]


def moe_experts_list(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate: Sequence[Tensor],
    up: Sequence[Tensor],
    down: Sequence[Tensor],
    gate_bias: Sequence[Tensor] = (),
    up_bias: Sequence[Tensor] = (),
    down_bias: Sequence[Tensor] = (),
    shared: Sequence[Tensor] = (),
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    *,
    gated: bool = True,
    recompute: bool = False,
) -> Tensor:
    """同 :func:`moe_experts`，但每个专家的权重是单独的张量（例如各自的 nn.Linear），原地读取，不叠成一个。

    各专家的中间宽可以不同。梯度直接写进各张量自己的梯度；没有分到词元的专家得 0（不是 None）。

    Args:
        x, indices, weights, shared, activation, alpha, limit, recompute: 见 :func:`moe_experts`；
            E 是 gate 的个数。
        gate: E 个 [Iₑ, K]；up 为空而 gated 为 True 时是 E 个 [2Iₑ, K]，前一半是 gate，后一半是 up。
        up: E 个 [Iₑ, K]，或空。
        down: E 个 [N, Iₑ]。
        gate_bias, up_bias, down_bias: E 个偏置（形状随各自的权重），或空。
        gated: False 时没有门：down(a(gate x))，up 应为空。

    Returns:
        [T, N]，dtype 随 x。对 x、weights、各权重与偏置、shared 可求导。

    Raises:
        ValueError: 个数、形状、dtype 不符，没有专家，负的下标，不认识的 activation。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> x, index, weight = torch.randn(5, 8), torch.tensor([[0, 2]] * 5), torch.rand(5, 2)
        >>> gate, up = ([torch.randn(6, 8) for _ in range(3)] for _ in range(2))
        >>> down = [torch.randn(8, 6) for _ in range(3)]
        >>> ops.moe_experts_list(x, index, weight, gate, up, down).shape
        torch.Size([5, 8])
    """
    lists = (gate, up, down, gate_bias, up_bias, down_bias, shared)
    act = (activation, alpha, limit, gated)
    flat = (t for group in lists for t in group)
    save = not recompute and is_tracing_grad(x, weights, *flat)
    return run("moe_experts_list", x, indices, weights, *map(list, lists), *act, save)[0]


def moe_route(
    x: Tensor,
    weight: Tensor | None = None,
    logit_bias: Tensor | None = None,
    choice_bias: Tensor | None = None,
    *,
    top_k: int,
    score: str = "sigmoid",
    normalize: bool = True,
    softmax_after: bool = False,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "top2",
    scaling: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """路由：每个词元打分、选 top_k 个专家、给出混合权重，并数出各专家的词元数。

    logits = x · weightᵀ + logit_bias，以 fp32 累加，不舍入到半精度；s = score(logits)。按 s + choice_bias
    选择（分组时先选得分最高的 topk_group 组），权重取不加 choice_bias 的 s，再归一化、乘 scaling。各模型：

    - DeepSeek-V3、GLM-4：``score="sigmoid"``，choice_bias，n_group、topk_group，``group_score="top2"``；
    - DeepSeek-V2：``score="softmax", normalize=False, group_score="max"``；
    - Mixtral、Qwen-MoE：``score="softmax"``，normalize 随 norm_topk_prob；
    - gpt-oss：``score="softmax", softmax_after=True, normalize=False``，logit_bias；
    - DeepSeek-V4：``score="sqrtsoftplus"``，choice_bias。

    Args:
        x: [T, K]；weight 为 None 时就是 logits [T, E]。
        weight: [E, K] 或 None；logit_bias: [E] 或 None。
        choice_bias: [E] 或 None，只影响选择，没有梯度。
        top_k: 每个词元的专家数 k。
        score: ``sigmoid``、``softmax``、``sqrtsoftplus``（softplus 的平方根）。
        normalize: 所选权重除以（其和 + eps）。
        softmax_after: 按 logits 选，再只对所选的做 softmax；此时 score 应为 ``softmax``。
        n_group: 组数，整除 E；topk_group: 每个词元可选的组数。组是相邻的 E / n_group 个专家。
        group_score: 组得分，``top2``（最高两项之和，组内只有一个时就是它）或 ``max``。
        scaling: 权重最后乘的系数。

    Returns:
        (logits [T, E] fp32，weights [T, k] fp32，indices [T, k] int64，counts [E] int64)。indices 按得分
        从高到低，得分相同时下标小的在前；NaN 视为最大（同 torch.topk），它的权重是 NaN。logits、weights 对
        x、weight、logit_bias 可求导。结果与线程数无关；autocast 里也不降精度。

    Raises:
        ValueError: 形状、dtype 不符；top_k 不在 1 到（可选的）专家数之间；n_group 不整除专家数；topk_group
            大于 n_group；不认识的 score、group_score。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> logits = torch.tensor([[0.0, 2.0, 1.0, -1.0], [3.0, 0.0, 0.0, 0.0]])
        >>> _, weights, indices, counts = ops.moe_route(logits, top_k=2, score="softmax")
        >>> indices
        tensor([[1, 2],
                [0, 1]])
        >>> counts
        tensor([1, 2, 1, 0])
        >>> weights.shape
        torch.Size([2, 2])
    """
    groups = (n_group, topk_group, group_score)
    rule = (top_k, score, normalize, softmax_after, *groups, scaling, eps)
    return run("moe_route", x, weight, logit_bias, choice_bias, *rule)
