"""MLA 层的公共部分：参数、投影、旋转与注意力调用；参数名同 DeepSeek。"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt import ops
from deepseek_opt.config import MLAConfig
from deepseek_opt.errors import InputError, UnsupportedError
from deepseek_opt.integrations.projections import effective_weight, project
from deepseek_opt.layers.dims import resolve_dims
from deepseek_opt.layers.rotary import RotaryEmbedding, softmax_scale

SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LatentProjections(nn.Module):
    """MLA 的参数与各步计算；:class:`MLAAttention` 与 :class:`LatentMultiheadAttention` 的基类。

    参数
    ----
    config : :class:`~deepseek_opt.MLAConfig`；没有给出的维度按 :func:`resolve_dims` 推出，
        rope_interleaved 默认 True（成对交错，DeepSeek 的约定）。
    hidden_size : 查询一侧（也是输出）的宽度。
    kv_hidden_size : 键值一侧的宽度，默认与 hidden_size 相同（交叉注意力可以不同）。
    bias : q_a_proj、kv_a_proj_with_mqa、o_proj 是否带偏置（同 transformers 的 attention_bias）。
    rope : 是否旋转；False 时 dr 维不旋转，成为各头共享的一段键。
    rope_theta、rope_scaling : 见 :class:`RotaryEmbedding`。
    eps : 两个 RMSNorm 的 epsilon。
    """

    def __init__(
        self,
        config: MLAConfig,
        hidden_size: int,
        *,
        kv_hidden_size: int | None = None,
        num_heads: int | None = None,
        bias: bool = False,
        rope: bool = True,
        rope_theta: float = 10000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        eps: float = 1e-6,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        dims = resolve_dims(config, hidden_size, num_heads)
        self.config = config
        self.dims = dims
        self.hidden_size = hidden_size
        self.kv_hidden_size = hidden_size if kv_hidden_size is None else kv_hidden_size
        self._built_from = config.snapshot()
        self._revision = config.revision
        self.rope_interleaved = config.rope_interleaved is not False
        self.softmax_scale = softmax_scale(dims.qk_head_dim, rope_scaling)
        with_rope = rope and dims.qk_rope_head_dim > 0
        self.rotary_emb = (
            RotaryEmbedding(dims.qk_rope_head_dim, rope_theta, rope_scaling) if with_rope else None
        )
        self._make_parameters(bias, eps, {"dtype": dtype, "device": device})
        if device is not None and self.rotary_emb is not None:
            self.rotary_emb.to(device)
        self.reset_parameters()

    def _make_parameters(self, bias: bool, eps: float, where: dict[str, Any]) -> None:
        d = self.dims
        if d.q_lora_rank is None:
            self.q_proj = nn.Linear(self.hidden_size, d.q_out, bias=False, **where)
        else:
            self.q_a_proj = nn.Linear(self.hidden_size, d.q_lora_rank, bias=bias, **where)
            self.q_a_layernorm = nn.RMSNorm(d.q_lora_rank, eps=eps, **where)
            self.q_b_proj = nn.Linear(d.q_lora_rank, d.q_out, bias=False, **where)
        kv_a_out = d.kv_lora_rank + d.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(self.kv_hidden_size, kv_a_out, bias=bias, **where)
        self.kv_a_layernorm = nn.RMSNorm(d.kv_lora_rank, eps=eps, **where)
        self.kv_b_proj = nn.Linear(d.kv_lora_rank, d.kv_out, bias=False, **where)
        self.o_proj = nn.Linear(d.num_heads * d.v_head_dim, self.hidden_size, bias=bias, **where)

    def reset_parameters(self) -> None:
        """重新初始化：权重 Xavier 均匀分布（同 nn.MultiheadAttention），偏置 0，RMSNorm 权重 1。"""
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)

    def extra_repr(self) -> str:
        """打印层的维度。"""
        d = self.dims
        return (
            f"num_heads={d.num_heads}, q_lora_rank={d.q_lora_rank}, kv_lora_rank={d.kv_lora_rank}, "
            f"qk_nope_head_dim={d.qk_nope_head_dim}, qk_rope_head_dim={d.qk_rope_head_dim}, "
            f"v_head_dim={d.v_head_dim}, rope={self.rotary_emb is not None}"
        )

    # ---- 各步计算 ----

    def _rotation(self, position_ids: Tensor) -> tuple[Tensor, Tensor] | None:
        return None if self.rotary_emb is None else self.rotary_emb(position_ids)

    def _rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """x [B, T, H, dr]。"""
        if rotation is None:
            return x
        return ops.rope(x, rotation[0], rotation[1], self.rope_interleaved)

    def _queries(self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """hidden [B, T, D] -> q [B, T, H, dn + dr]，最后 dr 维已旋转。"""
        d = self.dims
        if d.q_lora_rank is None:
            flat = project(self.q_proj, hidden)
        else:
            norm = self.q_a_layernorm
            down = ops.rms_norm(project(self.q_a_proj, hidden), norm.weight, norm.eps)
            flat = project(self.q_b_proj, down)
        q = flat.view(*hidden.shape[:2], d.num_heads, d.qk_head_dim)
        if rotation is None:
            return q
        plain, turning = q.split((d.qk_nope_head_dim, d.qk_rope_head_dim), -1)
        rotated = self._rotate(turning, rotation)
        if torch.is_grad_enabled():
            return torch.cat((plain, rotated), -1)
        turning.copy_(rotated)  # 不求导时原地写回，省下一份 q
        return q

    def _latents(self, hidden: Tensor, rotation: tuple[Tensor, Tensor] | None):
        """hidden [B, S, Dkv] -> latent [B, S, r]（归一化之后）、rope [B, S, dr]（旋转之后）。"""
        d = self.dims
        joint = project(self.kv_a_proj_with_mqa, hidden)
        latent, rope = joint.split((d.kv_lora_rank, d.qk_rope_head_dim), -1)
        latent = ops.rms_norm(latent, self.kv_a_layernorm.weight, self.kv_a_layernorm.eps)
        return latent, self._rotate(rope.unsqueeze(2), rotation).squeeze(2)

    def _attend(self, q, latent, rope, scale, spans, kv_mask, causal: bool) -> Tensor:
        """注意力与输出投影：[B, T, H, dn + dr] -> [B, T, D]。"""
        weight, reason = effective_weight(self.kv_b_proj)
        if weight is None:
            raise UnsupportedError(f"潜变量核要直接读 kv_b_proj 的权重：{reason}")
        weight = weight.to(q.dtype)
        out = ops.mla_attention(
            q,
            latent,
            rope,
            scale,
            weight,
            spans,
            kv_mask,
            self.softmax_scale,
            self.dims.v_head_dim,
            causal,
        )
        return project(self.o_proj, out.flatten(2))

    # ---- 检查 ----

    def _check_config(self) -> None:
        """config 是活的：调用前发现决定形状的字段被改动，就说明原因，而不是默默用旧的。"""
        if torch.compiler.is_compiling():  # 编译时已按当时的配置定形
            return
        if self.config.revision != self._revision:
            self.config.require_live(self._built_from)
            self._revision = self.config.revision

    def _check_hidden(self, hidden: Tensor, name: str, width: int) -> None:
        if not isinstance(hidden, Tensor) or hidden.dim() != 3:
            got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise InputError(f"{name} 应为 [B, T, {width}] 的张量，得到 {got}")
        if hidden.shape[-1] != width:
            raise InputError(f"{name} 的最后一维应为 {width}，得到 {tuple(hidden.shape)}")
        weight = self.o_proj.weight
        if hidden.device != weight.device:
            raise InputError(
                f"{name} 在 {hidden.device}，而本层参数在 {weight.device}；请放到同一设备"
            )
        autocast = torch.is_autocast_enabled(hidden.device.type)
        if hidden.dtype not in SUPPORTED_DTYPES or (hidden.dtype != weight.dtype and not autocast):
            raise InputError(
                f"{name} 的 dtype 应与本层参数一致（{weight.dtype}，支持 float32、bfloat16、float16），"
                f"得到 {hidden.dtype}；混合精度请用 torch.autocast"
            )


def checked_mask(mask: Tensor, shape: tuple[int, int], name: str, device: torch.device) -> Tensor:
    """检查二维填充掩码的形状、设备、类型。"""
    if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(f"{name} 的形状应为 {shape}（B, 已缓存 + 新词元），得到 {got}")
    if mask.device != device:
        raise InputError(f"{name} 在 {mask.device}，而输入在 {device}；请放到同一设备")
    return mask
