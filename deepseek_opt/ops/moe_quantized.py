"""量化专家的算子；形状记号同 ``ops.moe_experts``。"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deepseek_opt.ops._run import run


def moe_experts_quantized(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    gate_up_zero: Tensor | None,
    down: Tensor,
    down_scale: Tensor,
    down_zero: Tensor | None,
    shared: Sequence[Tensor] = (),
    group_size: int = 0,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    *,
    gated: bool = True,
    shared_scale: Sequence[Tensor] = (),
    shared_zero: Sequence[Tensor] = (),
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """int8、int4、fp8 的稀疏专家：与 ``moe_experts`` 相同，权重在读入时反量化，以 fp32 累加；只做推理。

    权重由 ``deepseek_opt.quantize.quantize_experts`` 得到。词元少时受读权重的带宽限制，读的字节只有
    bf16 的一半（int8、fp8）、约四分之一（int4）。一个专家多于 16 行时，权重逐段解成 x 的计算格式再做矩阵乘。

    Args:
        x: [T, K]；indices: [T, k] int64；weights: [T, k]。
        gate_up: int8 [E, 2I, K]，前 I 行 gate、后 I 行 up；或 int4 打包的 uint8 [E, 2I, K' / 2]，
            K' 是 K 补齐到 group_size 的倍数；或 float8_e4m3fn [E, 2I, K]。gated 为 False 时宽 I。
            格式由它的类型分辨。
        gate_up_scale: fp32，int8 时 [E, 2I]，int4 时 [E, 2I, 组数]；fp8 时 [E, 2I]，或（group_size 为 128）
            [E, 2I, 组数]。按 128 x 128 一块给出的尺度（DeepSeek-V3 的检查点）在行上重复即可。
        gate_up_zero: uint8 [E, 2I, 组数]；None 是对称的（零点 8），int8、fp8 只能是 None。
        down, down_scale, down_zero: 同上，[E, N, I]。
        shared: 共享专家，同 ``moe_experts``；给了 shared_scale 时 gate、up、down 是量化的，形状同上，
            没有 E 这一维。int8 的共享专家可与 int4、fp8 的专家同用，int4、fp8 的与专家同一个 group_size。
        group_size: int8 为 0；int4 为 32、64 或 128；fp8 为 0 或 128。
        activation, alpha, limit: 同 ``moe_experts``。
        shared_scale: 共享专家没有量化时为空；否则 gate、up、down 三个的尺度。
        shared_zero: 同样三个零点；空是对称的。
        gate_up_bias、down_bias: 路由专家的偏置 [E, 2I]（gate 在前）、[E, N]，任一种浮点类型，两个相同；
            没有为 None。共享专家没有偏置。

    Returns:
        [T, N]，dtype 随 x。不可求导：反向时报错。

    Raises:
        ValueError: 形状、dtype、group_size 不符，负的下标，不认识的 activation。

    Example:
        >>> import torch
        >>> from deepseek_opt import ops
        >>> from deepseek_opt.quantize import quantize_experts
        >>> x, index, weight = torch.randn(5, 64), torch.tensor([[0, 2]] * 5), torch.rand(5, 2)
        >>> up = quantize_experts(torch.randn(3, 2 * 48, 64), bits=4, group_size=32)
        >>> down = quantize_experts(torch.randn(3, 64, 48), bits=4, group_size=32)
        >>> ops.moe_experts_quantized(
        ...     x, index, weight, *up[:3], *down[:3], group_size=up.group_size
        ... ).shape
        torch.Size([5, 64])
    """
    first, last = (gate_up, gate_up_scale, gate_up_zero), (down, down_scale, down_zero)
    options = (group_size, activation, alpha, limit, gated, list(shared_scale), list(shared_zero))
    stacked = (*first, *last, list(shared), *options, gate_up_bias, down_bias)
    return run("moe_experts_quantized", x, indices, weights, *stacked)
