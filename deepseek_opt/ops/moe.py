"""MoE 的算子：稀疏专家。

形状记号：T 词元数，K 输入宽，N 输出宽，E 专家数，I 专家的中间宽，k 每个词元的专家数。
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deepseek_opt.ops._run import run

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "clipped")


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
) -> Tensor:
    """稀疏专家：y[t] = Σ_j weights[t, j] · down_e(a(gate_e x[t]) * up_e x[t])，e = indices[t, j]。

    权重按 transformers 的布局原地读取。词元按专家排序；每个输出按专家的次序以 fp32 累加，与线程数无关。
    反向不保存中间量（做法见 SonicMoE，arXiv 2512.14080）。

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
            （gpt-oss：g = min(gate, limit)，u = clamp(up, ±limit)，g · sigmoid(alpha · g) · (u + 1)）。
        alpha, limit: 只用于 clipped。

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
    return run("moe_experts", x, indices, weights, *weight, *act)
