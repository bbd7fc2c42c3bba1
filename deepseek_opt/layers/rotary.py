"""旋转位置编码的角度表：默认、线性缩放与 YaRN（公式同 DeepSeek-V3 与 transformers）。"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt.errors import ConfigError

_YARN_KEYS = {
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "truncate",
}
_KNOWN_KEYS = {"default": set(), "linear": {"factor"}, "yarn": _YARN_KEYS}


class RotaryEmbedding(nn.Module):
    """由位置算出 cos、sin。

    参数
    ----
    dim : 旋转维度 dr（正偶数）。
    theta : 频率底数。
    scaling : None，或含 ``rope_type``（``default``、``linear``、``yarn``）及其参数的字典，键名同
        transformers 的 ``rope_parameters``。

    抛出 :class:`~deepseek_opt.errors.ConfigError`：dim 不是正偶数、类型或键未知、缺少必需的键。

    示例
    ----
    >>> import torch
    >>> cos, sin = RotaryEmbedding(8, theta=10000.0)(torch.arange(4)[None])
    >>> cos.shape, cos.dtype
    (torch.Size([1, 4, 4]), torch.float32)
    """

    inv_freq: Tensor

    def __init__(self, dim: int, theta: float = 10000.0, scaling: Mapping[str, Any] | None = None):
        super().__init__()
        if dim <= 0 or dim % 2:
            raise ConfigError(f"旋转维度 qk_rope_head_dim 应为正偶数，得到 {dim}")
        if theta <= 0:
            raise ConfigError(f"rope_theta 应为正数，得到 {theta}")
        self.dim = dim
        self.theta = float(theta)
        self.scaling = checked_scaling(scaling)
        self.attention_factor = _attention_factor(self.scaling)
        self.register_buffer("inv_freq", self._frequencies(None), persistent=False)

    def _frequencies(self, device: torch.device | None) -> Tensor:
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim
        plain = 1.0 / (self.theta**exponent)
        kind = self.scaling["rope_type"]
        if kind == "default":
            return plain
        slow = plain / self.scaling["factor"]
        if kind == "linear":
            return slow
        low, high = _yarn_range(self.scaling, self.dim, self.theta)
        ramp = torch.arange(self.dim // 2, dtype=torch.float32, device=device)
        keep = 1 - ((ramp - low) / (high - low)).clamp(0, 1)
        return slow * (1 - keep) + plain * keep

    def _apply(self, fn, recurse=True):
        """移动设备时跟着移动，但 ``.to(bfloat16)`` 不能降低频率的精度：按新设备重算。"""
        super()._apply(fn, recurse)
        self.inv_freq = self._frequencies(self.inv_freq.device)
        return self

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [Bc, T]（整数）-> cos、sin，各 [Bc, T, dim / 2]，fp32。"""
        angle = position_ids.unsqueeze(-1).to(torch.float32) * self.inv_freq
        return angle.cos() * self.attention_factor, angle.sin() * self.attention_factor


def checked_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """检查并规范化缩放参数：返回含 ``rope_type`` 的新字典。"""
    given = dict(scaling or {})
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("rope_theta", None)
    given = {key: value for key, value in given.items() if value is not None}
    if kind not in _KNOWN_KEYS:
        raise ConfigError(f"rope_type 应为 {'、'.join(_KNOWN_KEYS)} 之一，得到 {kind!r}")
    unknown = sorted(set(given) - _KNOWN_KEYS[kind])
    if unknown:
        raise ConfigError(f"rope_scaling（{kind}）不认识的键：{'、'.join(unknown)}")
    needed = {"linear": ["factor"], "yarn": ["factor", "original_max_position_embeddings"]}
    missing = [key for key in needed.get(kind, []) if key not in given]
    if missing:
        raise ConfigError(f"rope_scaling（{kind}）缺少 {'、'.join(missing)}")
    if given.get("factor", 1.0) < 1.0:
        raise ConfigError(f"rope_scaling.factor 应不小于 1，得到 {given['factor']}")
    return {"rope_type": kind, **given}


def softmax_scale(qk_head_dim: int, scaling: Mapping[str, Any] | None) -> float:
    """softmax 的缩放：吸收前的维度 (dn + dr) 的 -1/2 次方，YaRN 时再乘 mscale 的平方。"""
    scale = qk_head_dim**-0.5
    given = checked_scaling(scaling)
    if given.get("mscale_all_dim"):
        scale *= _mscale(given["factor"], given["mscale_all_dim"]) ** 2
    return scale


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _attention_factor(scaling: Mapping[str, Any]) -> float:
    """乘在 cos、sin 上的系数（只有 YaRN 不为 1）。"""
    if scaling["rope_type"] != "yarn":
        return 1.0
    if "attention_factor" in scaling:
        return float(scaling["attention_factor"])
    factor, top, bottom = scaling["factor"], scaling.get("mscale"), scaling.get("mscale_all_dim")
    if top and bottom:
        return _mscale(factor, top) / _mscale(factor, bottom)
    return _mscale(factor)


def _yarn_range(scaling: Mapping[str, Any], dim: int, theta: float) -> tuple[float, float]:
    """YaRN 中从保持原频率过渡到插值的维度区间。"""
    length = scaling["original_max_position_embeddings"]

    def correction(rotations: float) -> float:
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = correction(scaling.get("beta_fast", 32))
    high = correction(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return (low, high + 0.001) if low == high else (low, high)
