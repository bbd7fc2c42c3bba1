"""对照用的标准多头注意力：同样的隐藏维与头数，每头都缓存自己的 K、V。

接口与 transformers 的注意力层相同，因此能直接换进 DeepSeek 结构的模型里，其余部分一模一样，
差别只来自注意力。eager 是 transformers 逐步计算的写法（得分、fp32 softmax、乘 V）；sdpa 是
``F.scaled_dot_product_attention``。权重随机（只比内存与速度）。
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_opt.errors import InputError

_STD = 0.02


class StandardAttention(nn.Module):
    """标准多头注意力：hidden [B, T, D] -> ([B, T, D], None)，每头 D / H 维。

    参数
    ----
    config : 含 hidden_size、num_attention_heads 的 transformers 配置。
    layer_idx : 缓存里的层号。
    implementation : ``"eager"`` 或 ``"sdpa"``。

    旋转编码用在每头的前几维（维数随给出的 cos、sin），其余维不旋转。不支持填充：sdpa 忽略
    attention_mask，按因果计算；eager 用给出的 4 维相加式掩码，没有时自己做因果掩码。

    示例::

        layer = StandardAttention(config, 0, "sdpa")
        out, _ = layer(hidden, (cos, sin), None, past_key_values=DynamicCache())
    """

    def __init__(self, config: Any, layer_idx: int, implementation: str):
        super().__init__()
        if implementation not in ("eager", "sdpa"):
            raise InputError.expected("implementation", "eager 或 sdpa", implementation)
        width = config.hidden_size
        self.layer_idx = layer_idx
        self.implementation = implementation
        self.heads = config.num_attention_heads
        self.head_dim = width // self.heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, self.heads * self.head_dim, bias=False) for _ in range(4)
        )
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=_STD)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """因果注意力；past_key_values 为 transformers 的 DynamicCache（可为 None）。"""
        q, k, v = (
            project(hidden_states).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, position_embeddings), _rotate(k, position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if self.implementation == "sdpa":
            out = _sdpa(q, k, v)
        else:
            out = self._eager(q, k, v, attention_mask)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def _eager(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = torch.matmul(q, k.transpose(2, 3)) * self.head_dim**-0.5
        if mask is None and q.shape[2] > 1:
            mask = causal_mask(q.shape[2], k.shape[2], q.dtype, q.device)
        if mask is not None:
            scores = scores + mask
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(weights, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.shape[2] in (1, k.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)
    mask = causal_mask(q.shape[2], k.shape[2], q.dtype, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def causal_mask(
    queries: int, keys: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """相加式因果掩码 [1, 1, T, S]，右下对齐。"""
    mask = torch.full((queries, keys), torch.finfo(dtype).min, dtype=dtype, device=device)
    return mask.triu_(keys - queries + 1)[None, None]


def _rotate(x: Tensor, embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """旋转 x [B, H, T, d] 的前几维（cos、sin 为 [B, T, d']，前后两半的排列）。"""
    cos, sin = (part.unsqueeze(1) for part in embeddings)
    dims = cos.shape[-1]
    turned, rest = x[..., :dims], x[..., dims:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned.to(x.dtype), rest), -1)


def use_standard_attention(model: nn.Module, implementation: str) -> nn.Module:
    """把 DeepSeek 结构的 transformers 模型的每层 MLA 换成 :class:`StandardAttention`（就地）。"""
    like = next(model.parameters())
    model.set_attn_implementation(implementation)  # 决定模型生成哪种掩码
    for index, layer in enumerate(model.model.layers):
        layer.self_attn = StandardAttention(model.config, index, implementation).to(like)
    return model
