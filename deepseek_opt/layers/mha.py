"""用 MLA 替换 nn.MultiheadAttention：同样的调用方式，全新的权重。"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt import ops
from deepseek_opt.config import MLAConfig
from deepseek_opt.errors import InputError, UnsupportedError
from deepseek_opt.layers.masks import attention_kind, hidden_positions
from deepseek_opt.layers.projections import LatentProjections, checked_mask
from deepseek_opt.memo import TensorMemo
from deepseek_opt.ops.spans import row_spans

_visible = TensorMemo()


class LatentMultiheadAttention(LatentProjections):
    """与 :class:`torch.nn.MultiheadAttention` 调用方式相同的 MLA 层。

    参数
    ----
    config : :class:`~deepseek_opt.MLAConfig`。
    embed_dim : 查询与输出的宽度。
    num_heads : config 没有给出头数时使用。
    kdim : 键值一侧的宽度，默认 embed_dim；MLA 的键和值出自同一潜变量，所以 vdim 必须等于它。
    batch_first : True 时为 (N, L, E)，否则为 (L, N, E)。
    rope : 是否旋转位置编码；自注意力默认 True，交叉注意力应为 False。

    其余参数见 :class:`~deepseek_opt.layers.projections.LatentProjections`。

    与 nn.MultiheadAttention 的不同：need_weights 默认 False，传 True 会被拒绝（权重矩阵从不成形）；
    没有 dropout；被全部遮挡的查询得 0（而不是 NaN）；attn_mask 只认因果与全零。

    示例
    ----
    >>> import torch
    >>> from deepseek_opt import MLAConfig
    >>> from deepseek_opt.layers import LatentMultiheadAttention
    >>> attention = LatentMultiheadAttention(MLAConfig(), 64, num_heads=4, batch_first=True)
    >>> x = torch.randn(2, 5, 64)
    >>> ignored = torch.zeros(2, 5, dtype=torch.bool)
    >>> out, weights = attention(x, x, x, key_padding_mask=ignored)
    >>> out.shape, weights
    (torch.Size([2, 5, 64]), None)
    """

    def __init__(
        self,
        config: MLAConfig,
        embed_dim: int,
        *,
        num_heads: int | None = None,
        kdim: int | None = None,
        batch_first: bool = False,
        **options: Any,
    ):
        super().__init__(config, embed_dim, kv_hidden_size=kdim, num_heads=num_heads, **options)
        self.batch_first = batch_first

    # nn.TransformerEncoderLayer 与 nn.TransformerEncoder 在 eval 模式下会直接读取下面这些属性，决定
    # 是否绕过本层走融合路径。_qkv_same_embed_dim = False 使它们走普通路径；其余属性给出真实的参数，
    # 使它们的检查不会碰到 None。
    _qkv_same_embed_dim = False

    @property
    def embed_dim(self) -> int:
        """查询与输出的宽度。"""
        return self.hidden_size

    @property
    def num_heads(self) -> int:
        """注意力头数。"""
        return self.dims.num_heads

    @property
    def in_proj_weight(self) -> Tensor:
        """供 nn.TransformerEncoder 检查之用：键值一侧的投影权重。"""
        return self.kv_a_proj_with_mqa.weight

    @property
    def in_proj_bias(self) -> Tensor:
        """供 nn.TransformerEncoder 检查之用。"""
        return self.kv_a_layernorm.weight

    @property
    def out_proj(self) -> nn.Module:
        """输出投影，同 o_proj。"""
        return self.o_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """与 nn.MultiheadAttention.forward 相同；返回 (输出, None)。

        参数
        ----
        query : (L, N, E)、batch_first 时 (N, L, E)，不分批时 (L, E)。
        key、value : 形状同上，长度为 S；必须是同一个张量。
        key_padding_mask : (N, S)，True（或 -inf）为忽略；不分批时 (S)。
        need_weights : 只接受 False。average_attn_weights : 没有权重可平均，忽略。
        attn_mask : 因果或全零，见 :func:`attention_kind`。
        is_causal : attn_mask 为 None 时也可以单独使用。

        抛出 :class:`~deepseek_opt.errors.InputError`、
        :class:`~deepseek_opt.errors.UnsupportedError`。
        """
        del average_attn_weights
        if need_weights:
            raise UnsupportedError("need_weights=True：MLA 的核从不生成注意力权重矩阵，无法返回")
        if value is not key:
            raise UnsupportedError("value 必须与 key 是同一个张量：MLA 的键和值出自同一潜变量")
        if query.is_nested or key.is_nested:
            return self._nested(query, key, key_padding_mask, attn_mask, is_causal), None
        single = query.dim() == 2
        same = query is key
        query = self._batched(query)
        key = query if same else self._batched(key)
        if single and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        self._check_inputs(query, key)
        kind = attention_kind(attn_mask, is_causal, query.shape[1], key.shape[1])
        visible = self._visible(key_padding_mask, key)
        out = self._attention(query, key, visible, kind == "causal")
        if single:
            return out.squeeze(0), None
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _batched(self, x: Tensor) -> Tensor:
        """统一成 [B, 长度, 宽度]。"""
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first or x.dim() != 3 else x.transpose(0, 1)

    def _check_inputs(self, query: Tensor, key: Tensor) -> None:
        self._check_config()
        self._check_hidden(query, "query", self.hidden_size)
        self._check_hidden(key, "key", self.kv_hidden_size)
        if query.shape[0] != key.shape[0]:
            raise InputError(f"query 与 key 的批大小不同：{query.shape[0]} 与 {key.shape[0]}")

    @staticmethod
    def _visible(key_padding_mask: Tensor | None, key: Tensor) -> Tensor | None:
        if key_padding_mask is None:
            return None
        shape = (key.shape[0], key.shape[1])
        mask = checked_mask(key_padding_mask, shape, "key_padding_mask", key.device)
        if torch.compiler.is_compiling():
            return ~hidden_positions(mask, "key_padding_mask")
        # 各层收到同一个掩码；浮点的要核对内容，在设备上要读回来，只做一次
        return _visible.get(mask, None, lambda: ~hidden_positions(mask, "key_padding_mask"))

    def _attention(
        self, query: Tensor, key: Tensor, visible: Tensor | None, causal: bool
    ) -> Tensor:
        """[B, L, E]、[B, S, Ek] -> [B, L, E]。"""
        batch, q_len = query.shape[:2]
        kv_len = key.shape[1]
        keys_at = torch.arange(kv_len, device=key.device).unsqueeze(0)
        offset = kv_len - q_len if causal else 0  # 因果时右下对齐，查询的位置随之平移
        queries_at = torch.arange(offset, offset + q_len, device=query.device).unsqueeze(0)
        latent, rope = self._latents(key, self._rotation(keys_at))
        q = self._queries(query, self._rotation(queries_at))
        if query.is_cpu:
            spans = ops.make_spans(batch, q_len, kv_len, causal=causal)
        else:
            spans = row_spans(batch, q_len, kv_len, kv_len, query.device)
        return self._attend(q, latent, rope, None, spans, visible, causal)

    def _nested(self, query, key, key_padding_mask, attn_mask, is_causal) -> Tensor:
        """嵌套张量（nn.TransformerEncoder 在 eval 模式下去掉填充时产生）：补齐后计算，再变回去。"""
        if query is not key or key_padding_mask is not None or attn_mask is not None:
            raise UnsupportedError("嵌套张量只支持自注意力，且不能同时给掩码")
        lengths = torch.tensor([part.shape[0] for part in query.unbind()], device=query.device)
        padded = query.to_padded_tensor(0.0)
        self._check_inputs(padded, padded)
        slots = torch.arange(padded.shape[1], device=query.device)
        visible = slots < lengths[:, None]
        out = self._attention(padded, padded, visible, is_causal)
        rows = [row[:length] for row, length in zip(out, lengths.tolist(), strict=True)]
        return torch.nested.as_nested_tensor(rows)
