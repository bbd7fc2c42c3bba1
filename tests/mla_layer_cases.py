"""MLAAttention 的测试共用：一个小层、输入、fp64 的直白实现。"""

from __future__ import annotations

import math

import torch

from deepseek_opt import MLAAttention, MLAConfig
from tests.tolerances import tol

HIDDEN = 32
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.8,
    "mscale_all_dim": 0.7,
}


def config(**changes) -> MLAConfig:
    base = {
        "num_attention_heads": 3,
        "q_lora_rank": 20,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
    }
    return MLAConfig(**{**base, **changes})


def layer(seed: int = 0, dtype=torch.float32, settings_=None, **options) -> MLAAttention:
    torch.manual_seed(seed)
    return MLAAttention(config(**(settings_ or {})), HIDDEN, dtype=dtype, **options)


def hidden(batch: int, steps: int, dtype=torch.float32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, steps, HIDDEN, generator=generator).to(dtype)


def expected(attention: MLAAttention, x: torch.Tensor, visible=None, positions=None):
    """fp64 的直白实现：展开 K、V，逐对旋转，softmax。visible [B, S]（True 可见）。"""
    d, w = attention.dims, {k: v.double() for k, v in attention.state_dict().items()}
    w.update({k: v.double() for k, v in attention.named_parameters()})
    x = x.double()
    batch, steps = x.shape[:2]
    if positions is None:
        positions = torch.arange(steps)[None]

    def norm(t, name):
        eps = getattr(attention, name).eps
        return t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + eps) * w[f"{name}.weight"]

    def project(t, name):
        y = t @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def rotate(t):  # [B, T, H, dr]
        if attention.rotary_emb is None:
            return t
        cos, sin = (v.double().unsqueeze(2) for v in attention.rotary_emb(positions))
        if attention.rope_interleaved:
            a, b = t[..., 0::2], t[..., 1::2]
        else:
            a, b = t.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    if d.q_lora_rank is None:
        q = project(x, "q_proj")
    else:
        q = project(norm(project(x, "q_a_proj"), "q_a_layernorm"), "q_b_proj")
    q = q.view(batch, steps, d.num_heads, d.qk_head_dim)
    split = (d.qk_nope_head_dim, d.qk_rope_head_dim)
    q = torch.cat((q.split(split, -1)[0], rotate(q.split(split, -1)[1])), -1)
    latent, rope = project(x, "kv_a_proj_with_mqa").split((d.kv_lora_rank, d.qk_rope_head_dim), -1)
    kv = project(norm(latent, "kv_a_layernorm"), "kv_b_proj")
    kv = kv.view(batch, steps, d.num_heads, -1)
    key, value = kv.split((d.qk_nope_head_dim, d.v_head_dim), -1)
    key = torch.cat((key, rotate(rope.unsqueeze(2)).expand(-1, -1, d.num_heads, -1)), -1)
    score = torch.einsum("bthd,bshd->bhts", q, key) * attention.softmax_scale
    allowed = torch.ones(steps, steps, dtype=torch.bool)
    allowed = (allowed.tril() if attention.causal else allowed)[None, None]
    if visible is not None:
        allowed = allowed & visible[:, None, None, :]
    weights = score.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)
    out = torch.einsum("bhts,bshd->bthd", weights, value)
    return project(out.flatten(2), "o_proj")


def assert_like(actual: torch.Tensor, wanted: torch.Tensor, dtype=None) -> None:
    dtype = dtype or actual.dtype
    torch.testing.assert_close(actual.double(), wanted.double(), **tol(dtype))
