"""MLA（多头潜在注意力）的配置。"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from deepseek_opt.config.base import ConfigBase, Conflict
from deepseek_opt.config.fields import ByteSize, Count, CountOrZero, PositiveFloat, Tokens

# 给出的压缩比率与由维度算出的比率允许相差 1%：手写的比率总要四舍五入。
_RATIO_TOLERANCE = 0.01
# 由比率推导潜在维度时取 8 的倍数：16 位数据一次读 16 字节。
_RANK_MULTIPLE = 8
_DIMS = ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")

CacheDtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "float8_e4m3fn"]


class MLAConfig(ConfigBase):
    """MLA 的配置；所有字段都可省略，省略即“与模型一致”。

    描述模型结构的字段（头数、各维度）对已有模型是核对值，不一致即报错；
    对 ``MLAAttention`` 是构造值。缓存和分块字段可以在运行中的模型上修改，下一次调用生效。

    示例::

        MLAConfig()                                             # 一切与模型一致
        MLAConfig(cache_dtype="int8", memory_budget_bytes="2GB")
        MLAConfig(num_attention_heads=16, kv_lora_rank=512, qk_rope_head_dim=64,
                  qk_nope_head_dim=128, v_head_dim=128).compression_ratio   # 8.89
    """

    live_fields: ClassVar[frozenset[str]] = frozenset(
        {
            "cache_dtype",
            "max_cache_length",
            "memory_budget_bytes",
            "prefill_chunk_size",
            "cuda_graphs",
        }
    )
    frozen_reason: ClassVar[str] = "它由模型权重的形状决定；要换结构请构造新的 MLAAttention"

    num_attention_heads: Count | None = Field(None, description="注意力头数")
    kv_lora_rank: Count | None = Field(None, description="潜在维度：每个 token 缓存的潜在向量长度")
    q_lora_rank: Count | None = Field(None, description="查询的低秩维度")
    kv_compression_ratio: PositiveFloat | None = Field(
        None, description="KV 压缩比率：标准注意力每 token 的 KV 元素数 / 潜在缓存每 token 的元素数"
    )
    qk_rope_head_dim: CountOrZero | None = Field(
        None, description="每头带旋转位置的维度，偶数，可为 0"
    )
    qk_nope_head_dim: Count | None = Field(None, description="每头不带旋转位置的维度")
    v_head_dim: Count | None = Field(None, description="每头的值维度")
    rope_interleaved: bool | None = Field(
        None, description="旋转位置的配对方式：true 为相邻两维一对，false 为前后两半一对"
    )
    cache_dtype: CacheDtype = Field(
        "auto", description="潜在缓存的数据类型；int8、float8_e4m3fn 每 token 一个缩放系数"
    )
    max_cache_length: Tokens | None = Field(None, description="缓存上限，每行 token 数")
    memory_budget_bytes: ByteSize | None = Field(None, description="缓存与工作区的内存预算，字节")
    prefill_chunk_size: Tokens | None = Field(None, description="预填充分块大小，token 数")
    cuda_graphs: bool | None = Field(
        None, description="CUDA 上生成时是否把解码的一步录成 CUDA graph；缺省能录就录"
    )

    @property
    def compression_ratio(self) -> float | None:
        """KV 压缩比率：给出的值，或由维度算出的 ``H·(dn+dr+dv)/(r+dr)``；维度不全时为 None。"""
        if self.kv_compression_ratio is not None:
            return self.kv_compression_ratio
        return _ratio(self.__dict__)

    @property
    def latent_dim(self) -> int | None:
        """潜在维度：给出的 ``kv_lora_rank``，或由压缩比率推导（取 8 的倍数）；信息不足时为 None。"""
        if self.kv_lora_rank is not None:
            return self.kv_lora_rank
        raw = _raw_rank(self.__dict__)
        if raw is None:
            return None
        if raw < _RANK_MULTIPLE:
            return max(1, round(raw))
        return _RANK_MULTIPLE * round(raw / _RANK_MULTIPLE)

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterable[Conflict]:
        rope = values.get("qk_rope_head_dim")
        if rope is not None and rope % 2:
            yield Conflict(("qk_rope_head_dim",), "应为偶数：旋转位置按两维一对转动", rope)
        yield from _ratio_conflicts(values)

    def check_against(self, actual: Mapping[str, Any], where: str = "") -> None:
        """与模型核对；给出的压缩比率与模型维度算出的比率相差超过 1% 也算不符。"""
        actual = dict(actual)
        derived = _ratio(actual)
        given = self.kv_compression_ratio
        if derived is not None and given is not None:
            actual["kv_compression_ratio"] = given if _close(given, derived) else round(derived, 4)
        super().check_against(actual, where)


def _standard_width(values: Mapping[str, Any]) -> int | None:
    """标准注意力每个 token 要缓存的元素数 H·(dn+dr+dv)。"""
    heads, nope, rope, value = (values.get(name) for name in _DIMS)
    if None in (heads, nope, rope, value):
        return None
    return heads * (nope + rope + value)


def _ratio(values: Mapping[str, Any]) -> float | None:
    width, rank = _standard_width(values), values.get("kv_lora_rank")
    if width is None or rank is None:
        return None
    return width / (rank + values["qk_rope_head_dim"])


def _raw_rank(values: Mapping[str, Any]) -> float | None:
    width, ratio = _standard_width(values), values.get("kv_compression_ratio")
    if width is None or ratio is None:
        return None
    return width / ratio - values["qk_rope_head_dim"]


def _close(given: float, derived: float) -> bool:
    return abs(given - derived) <= _RATIO_TOLERANCE * derived


def _ratio_conflicts(values: Mapping[str, Any]) -> Iterable[Conflict]:
    given, rank = values.get("kv_compression_ratio"), values.get("kv_lora_rank")
    if given is None:
        return
    fields = ("kv_compression_ratio", "kv_lora_rank", *_DIMS)
    if rank is not None:
        derived = _ratio(values)
        if derived is not None and not _close(given, derived):
            message = (
                f"与 kv_lora_rank = {rank} 矛盾：由各维度算出的压缩比率是 {derived:.4g}；"
                "两者只需给出一个"
            )
            yield Conflict(fields, message, given)
        return
    raw = _raw_rank(values)
    if raw is not None and raw < 1:
        limit = _standard_width(values) / (values["qk_rope_head_dim"] + 1)
        message = f"压缩比率过大：在这些维度下潜在维度会小于 1，最大为 {limit:.4g}"
        yield Conflict(fields, message, given)
