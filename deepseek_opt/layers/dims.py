"""MLA 层的维度：由 MLAConfig 与宽度定出，没有给出的按 DeepSeek 的比例推出。"""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_opt.config import MLAConfig
from deepseek_opt.errors import InputError

# DeepSeek-V2/V3 的比例：每头 nope : rope : v = 2 : 1 : 2，潜在维度是 nope 的 4 倍。
_LATENT_PER_NOPE = 4
_DEFAULT_HEAD_DIM = 64


@dataclass(frozen=True)
class MLADims:
    """MLA 层的维度。q_lora_rank 为 None 表示查询不压缩（q_proj）。"""

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        """每头查询（键）的维度 dn + dr。"""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def q_out(self) -> int:
        """查询投影的输出宽度。"""
        return self.num_heads * self.qk_head_dim

    @property
    def kv_out(self) -> int:
        """kv_b_proj 的输出宽度。"""
        return self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)

    @property
    def latent_width(self) -> int:
        """每个词元缓存的元素数 r + dr。"""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def standard_width(self) -> int:
        """同样头数的标准注意力每个词元缓存的元素数 H (dn + dr + dv)。"""
        return self.q_out + self.num_heads * self.v_head_dim


def resolve_dims(config: MLAConfig, hidden_size: int, num_heads: int | None = None) -> MLADims:
    """补全维度。

    头数：config 的，其次 num_heads，其次每 64 宽一头。每头维度 d = hidden_size / 头数；
    qk_nope_head_dim、v_head_dim 默认 d，qk_rope_head_dim 默认 d / 2（取偶），kv_lora_rank 默认由
    kv_compression_ratio 推出，没有时为 4 * qk_nope_head_dim（不超过 hidden_size）。

    抛出 :class:`InputError`（config 的类型、hidden_size 不对）、:class:`ConfigError`（维度矛盾）。

    示例
    ----
    >>> from deepseek_opt import MLAConfig
    >>> resolve_dims(MLAConfig(kv_compression_ratio=8.0), 512, 8).kv_lora_rank
    128
    """
    if not isinstance(config, MLAConfig):
        raise InputError.expected("config", " MLAConfig", config)
    if not isinstance(hidden_size, int) or hidden_size < 1:
        raise InputError.expected("hidden_size", "正整数", hidden_size)
    heads = config.num_attention_heads or num_heads or max(1, hidden_size // _DEFAULT_HEAD_DIM)
    head_dim = max(1, hidden_size // heads)
    nope = config.qk_nope_head_dim or head_dim
    rope = config.qk_rope_head_dim
    known = {
        "num_attention_heads": heads,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": head_dim // 4 * 2 if rope is None else rope,
        "v_head_dim": config.v_head_dim or head_dim,
    }
    rank = config.model_copy(update=known).latent_dim
    if rank is None:
        rank = min(_LATENT_PER_NOPE * nope, hidden_size)
    return MLADims(
        num_heads=heads,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=known["qk_rope_head_dim"],
        v_head_dim=known["v_head_dim"],
    )
