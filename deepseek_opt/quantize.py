"""专家权重的量化：int8（每输出通道一个尺度）、int4（沿输入每组一个尺度，可带零点）与 fp8（float8_e4m3fn，
每输出通道或沿输入每 128 个一个尺度）。

结果供 ``ops.moe_experts_quantized`` 使用，各张量可以直接放进 state_dict（缓冲区）。
权重 [E, N, K] 是 nn.Linear 的次序（gate 在前、up 在后），逐个专家处理，临时内存只有一个专家的几倍。
W[e, n, k] ≈ scale[e, n, 组] * (码[e, n, k] - 零点[e, n, 组])。
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_opt import buffers
from deepseek_opt.errors import InputError

GROUP_SIZES = (32, 64, 128)
FP8_GROUP_SIZE = 128  # fp8 分组时只有这一种，与 DeepSeek-V3 检查点的 128 x 128 一块一致
_FP8 = torch.float8_e4m3fn
_FP8_MOST = torch.finfo(_FP8).max
# 由配置量化 int4 而没有写明时。随包模型上各种组大小的准确率都与 bf16 相差不到 0.2 个百分点（见 docs/MoE.md），
# 取中间的一种：每个权重 4.5 位，没有零点要读。
DEFAULT_GROUP_SIZE, DEFAULT_SYMMETRIC = 64, True
# int4 的截断比例：舍去最大的几个权重，换来其余的更细；组内误差最小的胜出。
_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_HALF = 16  # 16 字节一段：低 4 位是前 16 个权重，高 4 位是后 16 个


class QuantizedExperts(NamedTuple):
    """一叠量化的专家权重。

    属性：
        packed: int8 或 float8_e4m3fn（fp8）[E, N, K]；int4 时 uint8 [E, N, K' / 2]，K' 是 K 补齐到组的倍数，
            每 32 个权重 16 字节，第 j 字节的低 4 位是第 j 个、高 4 位是第 j + 16 个。
        scale: fp32，不分组时 [E, N]；分组时 [E, N, 组数]。
        zero: uint8 [E, N, 组数]；对称（零点都是 8）与 int8、fp8 时为 None。
        bits: 8 或 4。
        group_size: int8 为 0；int4 为 32、64 或 128；fp8 为 0 或 128。
        shape: 原来的 (E, N, K)。
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    group_size: int
    shape: tuple[int, int, int]

    @property
    def floating(self) -> bool:
        """码是 float8_e4m3fn（fp8），而不是整数。"""
        return self.packed.dtype == _FP8

    @property
    def nbytes(self) -> int:
        """码、尺度与零点一共多少字节。"""
        tensors = (self.packed, self.scale, self.zero)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def quantize_experts(  # pylint: disable=too-many-arguments
    weight: Tensor,
    bits: int = 8,
    group_size: int | None = None,
    symmetric: bool = True,
    floating: bool = False,
    *,
    order: Tensor | None = None,
    name: str = "weight",
) -> QuantizedExperts:
    """量化 [E, N, K] 的权重。

    参数：
        weight: 浮点张量 [E, N, K]，必须有限；转置存放的传它的视图即可。
        bits: 8 或 4。
        group_size: int4 的组大小 32、64、128，默认 128；int8 不分组，只能是 None 或 0；fp8 是 None、0（每输出
            通道一个尺度）或 128。
        symmetric: False 时带零点（只用于 int4）：范围偏在一侧的权重误差更小。
        floating: True 时是 fp8：8 位的码是 float8_e4m3fn 的数（3 位尾数），小的权重相对误差也小。
        order: 结果的第 n 行取原来的第 order[n] 行，例如把交错的 gate、up 分开；默认不变。
        name: 报错时怎样称呼这个权重。

    抛出 InputError：参数不合要求，或权重有 NaN、无穷。

    示例::

        packed = quantize_experts(experts.gate_up_proj.data, bits=4, group_size=64)
        dequantize(packed)   # 与原来相差约一成（int8 约千分之几，fp8 约百分之三）
    """
    group = _check(weight, bits, group_size, symmetric, floating)
    count, rows, columns = weight.shape
    groups = -(-columns // group) if group else 1
    shapes = packed_shapes((count, rows, columns), bits, group, symmetric, floating)
    tensors = {
        part: buffers.large_empty(size, dtype, weight.device)
        for part, (dtype, size) in shapes.items()
    }
    packed, scale, zero = tensors["packed"], tensors["scale"], tensors.get("zero")
    for e in range(count):
        wide = weight[e].detach() if order is None else weight[e].detach()[order]
        wide = wide.float()
        require_finite(wide, f"{name}[{e}]")
        if bits == 8:
            packed[e], scale[e] = _fp8(wide, groups, group) if floating else _int8(wide)
            continue
        codes, scale[e], zeros = _int4(wide, groups, group, symmetric)
        packed[e] = _pack(codes)
        if zero is not None:
            zero[e] = zeros
    return QuantizedExperts(packed, scale, zero, bits, group, (count, rows, columns))


def require_finite(wide: Tensor, name: str) -> None:
    """fp32 的权重有 NaN、无穷时抛出 InputError；name 为报错时的称呼。

    示例::

        require_finite(weight.float(), "down_proj")
    """
    if not wide.isfinite().all():
        raise InputError.expected(name, "有限的数", "含有 NaN 或无穷（或超出 float32）")


def packed_shapes(
    shape: tuple[int, int, int],
    bits: int,
    group_size: int,
    symmetric: bool,
    floating: bool = False,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """[E, N, K] 量化之后各张量的 (类型, 形状)：packed、scale，带零点时还有 zero。

    示例::

        packed_shapes((64, 2816, 2048), 4, 64, True)["packed"]   # (torch.uint8, (64, 2816, 1024))
    """
    count, rows, columns = shape
    groups = -(-columns // group_size) if group_size else 0
    scales = (count, rows, groups) if group_size else (count, rows)
    if bits == 8:
        codes = (_FP8 if floating else torch.int8, shape)
    else:
        codes = (torch.uint8, (count, rows, groups * group_size // 2))
    found = {"packed": codes, "scale": (torch.float32, scales)}
    if not symmetric:
        found["zero"] = (torch.uint8, (count, rows, groups))
    return found


def dequantize(experts: QuantizedExperts, dtype: torch.dtype = torch.float32) -> Tensor:
    """还原成 [E, N, K]。

    示例::

        weight = dequantize(quantize_experts(weight, bits=4), torch.bfloat16)
    """
    packed, scale, zero, bits, group, shape = experts
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    for e in range(shape[0]):
        if bits == 8:
            each = torch.arange(shape[2], device=packed.device) // group if group else None
            out[e] = packed[e].float() * (scale[e, :, None] if each is None else scale[e][:, each])
            continue
        codes = _unpack(packed[e]).unflatten(-1, (-1, group)).float()
        shift = 8.0 if zero is None else zero[e, :, :, None].float()
        out[e] = ((codes - shift) * scale[e, :, :, None]).flatten(-2)[:, : shape[2]]
    return out


def _check(
    weight: Tensor, bits: int, group_size: int | None, symmetric: bool, floating: bool
) -> int:
    """返回组大小（不分组为 0）。"""
    if not isinstance(weight, Tensor) or weight.dim() != 3 or not weight.is_floating_point():
        raise InputError.expected("weight", "三维浮点张量 [E, N, K]", weight)
    if bits not in (4, 8):
        raise InputError.expected("bits", " 8 或 4", bits)
    if floating:
        return _check_fp8(bits, group_size, symmetric)
    if bits == 8:
        if group_size not in (None, 0):
            raise InputError.expected("group_size", " None 或 0（int8 不分组）", group_size)
        if not symmetric:
            raise InputError.expected("symmetric", " True（int8 没有零点）", symmetric)
        return 0
    if group_size not in (None, *GROUP_SIZES):
        raise InputError.expected("group_size", " 32、64 或 128", group_size)
    return group_size or GROUP_SIZES[-1]


def _check_fp8(bits: int, group_size: int | None, symmetric: bool) -> int:
    if bits != 8:
        raise InputError.expected("bits", " 8（fp8）", bits)
    if group_size not in (None, 0, FP8_GROUP_SIZE):
        raise InputError.expected("group_size", f" None、0 或 {FP8_GROUP_SIZE}（fp8）", group_size)
    if not symmetric:
        raise InputError.expected("symmetric", " True（fp8 没有零点）", symmetric)
    return group_size or 0


def _nonzero(scale: Tensor) -> Tensor:
    """全 0（或小到尺度下溢）的组取 1：码都是零点。"""
    return torch.where(scale.abs() < torch.finfo(torch.float32).tiny, 1.0, scale)


def _int8(wide: Tensor) -> tuple[Tensor, Tensor]:
    if wide.shape[-1] == 0:
        return wide.to(torch.int8), wide.new_ones(wide.shape[0])
    scale = _nonzero(wide.abs().amax(-1) / 127)
    return (wide / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def _fp8(wide: Tensor, groups: int, group: int) -> tuple[Tensor, Tensor]:
    """（码 [N, K]，尺度 [N] 或 [N, 组数]）：每组最大的一个落在 448。"""
    rows, columns = wide.shape
    if columns == 0:
        return wide.to(_FP8), wide.new_ones((rows, groups) if group else (rows,))
    each = group or columns
    grouped = wide.new_zeros(rows, groups * each)
    grouped[:, :columns] = wide
    grouped = grouped.view(rows, groups, each)
    scale = _nonzero(grouped.abs().amax(-1) / _FP8_MOST)
    codes = (grouped / scale[..., None]).clamp(-_FP8_MOST, _FP8_MOST).to(_FP8)
    return codes.flatten(-2)[:, :columns], scale if group else scale[:, 0]


def _int4(wide: Tensor, groups: int, group: int, symmetric: bool):
    """（码 [N, 组数, 组]，尺度 [N, 组数]，零点 [N, 组数]）。"""
    rows, columns = wide.shape
    grouped = wide.new_zeros(rows, groups * group)
    grouped[:, :columns] = wide
    grouped = grouped.view(rows, groups, group)
    best = None
    for ratio in _RATIOS:
        found = _round(grouped, ratio, symmetric)
        if best is None:
            best = found
            continue
        better = found[3] < best[3]
        best = tuple(
            torch.where(better[..., None] if new.dim() == 3 else better, new, old)
            for new, old in zip(found, best, strict=True)
        )
    return best[:3]


def _round(grouped: Tensor, ratio: float, symmetric: bool):
    """按截断比例取整：（码，尺度，零点，平方误差）。"""
    if grouped.shape[-2] == 0:
        empty = grouped.new_zeros(grouped.shape[:-1])
        return grouped.to(torch.uint8), empty, empty.to(torch.uint8), empty
    low, high = grouped.amin(-1) * ratio, grouped.amax(-1) * ratio
    if symmetric:
        # 码为 -8..7：绝对值最大的一侧落在 -8，尺度因此可为负，16 个码都用上。
        scale = _nonzero(torch.where(high.abs() > low.abs(), -high, -low) / 8)
        zero = torch.full_like(scale, 8)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _nonzero(high / 15 - low / 15)
        zero = (-low / scale).round().clamp(0, 15)
    codes = (grouped / scale[..., None] + zero[..., None]).round().clamp(0, 15)
    error = ((codes - zero[..., None]) * scale[..., None] - grouped).square().sum(-1)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8), error


def _pack(codes: Tensor) -> Tensor:
    pairs = codes.flatten(-2).unflatten(-1, (-1, 2, _HALF))
    return (pairs[..., 0, :] | (pairs[..., 1, :] << 4)).flatten(-2)


def _unpack(packed: Tensor) -> Tensor:
    bytes_ = packed.unflatten(-1, (-1, _HALF))
    return torch.stack((bytes_ & 15, bytes_ >> 4), -2).flatten(-3)
