"""稠密算子：linear、门控 FFN、RMS 归一化。"""

from __future__ import annotations

from torch import Tensor

from deepseek_opt.ops._run import run


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ (+ bias)，等价于 ``F.linear``，权重按 nn.Linear 的布局原地读取。

    Args:
        x: [..., K]。
        weight: [N, K]，可与 x 的 dtype 不同。
        bias: [N]，dtype 与 weight 相同，或 None。

    Returns:
        [..., N]，dtype 随 x。可求导。

    Raises:
        ValueError: 形状或 dtype 不符。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> ops.linear(torch.ones(2, 3), torch.ones(4, 3)).shape
        torch.Size([2, 4])
    """
    return run("linear", x, weight, bias)


def swiglu_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """融合的门控前馈层：down(silu(gate x) * up x)，中间量只有一份。

    Args:
        x: [..., K]。
        gate, up: [I, K]；down: [N, I]。三者 dtype 相同，无偏置。

    Returns:
        [..., N]，dtype 随 x。可求导，反向重算中间量，不保存它们。

    Raises:
        ValueError: 形状或 dtype 不符。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> w = torch.ones(8, 4)
        >>> ops.swiglu_mlp(torch.ones(2, 4), w, w, w.T.contiguous()).shape
        torch.Size([2, 4])
    """
    return run("swiglu_mlp", x, gate, up, down)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS 归一化：fp32 内归一化，舍入到 x 的 dtype 后乘 weight（与 transformers 一致）。

    Args:
        x: [..., d]；weight: [d]；eps: 加在均方上的小数。

    Returns:
        与 x 同形同 dtype。可求导。

    Raises:
        ValueError: 形状或 dtype 不符。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> ops.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6).shape
        torch.Size([2, 4])
    """
    return run("rms_norm", x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """加残差再做 RMS 归一化，一趟完成。

    Args:
        x, residual: [..., d]，同形同 dtype；weight: [d]。

    Returns:
        (归一化结果, x + residual)，均与 x 同形同 dtype。可求导。

    Raises:
        ValueError: 形状或 dtype 不符。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> y, total = ops.add_rms_norm(torch.ones(2, 4), torch.ones(2, 4), torch.ones(4), 1e-6)
        >>> total[0, 0].item()
        2.0
    """
    return run("add_rms_norm", x, residual, weight, eps)
