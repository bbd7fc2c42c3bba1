"""MLAAttention：自建 Transformer 用的多头潜变量注意力层。"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepseek_opt import ops
from deepseek_opt.cache import LatentCache
from deepseek_opt.cache_layer import QUANTIZED, LatentLayer, cache_dtype, token_bytes
from deepseek_opt.config import MLAConfig
from deepseek_opt.errors import InputError, MemoryBudgetError, UnsupportedError
from deepseek_opt.layers.projections import LatentProjections, checked_mask
from deepseek_opt.memo import TensorMemo
from deepseek_opt.ops.spans import row_spans
from deepseek_opt.row_lengths import NEVER, Mark, to_device


@dataclass(frozen=True)
class _Past:
    """已缓存的词元数：longest 为各行最大值；rows [B] 只在各行不同、或不在 CPU 上时给出，与缓存同设备。

    不在 CPU 上时位置与可见范围由 rows 在设备上算：不往设备送东西，也能录进 CUDA graph。
    mark 是缓存的这一层，写入之后失败时退回到那里。
    """

    longest: int
    rows: Tensor | None = None
    mark: Mark = NEVER


class MLAAttention(LatentProjections):
    """多头潜变量注意力（MLA）：缓存里只有潜变量，不展开成 K、V。

    预填充与训练在核内逐块展开，解码用吸收形式；两者共用一份潜变量缓存。

    参数
    ----
    config : :class:`~deepseek_opt.MLAConfig`。没有给出的维度由 hidden_size 推出。改动它的
        prefill_chunk_size、cache_dtype（对还空着、没有指定类型的缓存）、max_cache_length、
        memory_budget_bytes，下一次调用生效；改动维度则下一次调用报错并说明原因。
    hidden_size : 输入与输出的宽度 D。
    layer_idx : 本层在缓存中的序号；多层模型必须从 0 起各不相同，否则各层会写进同一层缓存
        （``LatentCache.for_model(model)`` 会检查）。
    causal : 是否因果（只看自己与之前的词元）。
    bias、rope、rope_theta、rope_scaling、eps、dtype、device :
        见 :class:`~deepseek_opt.layers.projections.LatentProjections`。

    参数名与 DeepSeek 相同（q_a_proj、q_a_layernorm、q_b_proj 或 q_proj、kv_a_proj_with_mqa、
    kv_a_layernorm、kv_b_proj、o_proj），可以直接装入 DeepSeek 检查点里的一层。注意力内没有
    dropout；全部参数都参与计算，DDP 不需要 find_unused_parameters。

    示例
    ----
    transformers 的习惯：``attention_mask`` 为 1 的位置可见，缓存逐步增长。

    >>> import torch
    >>> from deepseek_opt import LatentCache, MLAAttention, MLAConfig
    >>> config = MLAConfig(num_attention_heads=4, kv_lora_rank=32, qk_nope_head_dim=16,
    ...                    qk_rope_head_dim=8, v_head_dim=16)
    >>> attention = MLAAttention(config, hidden_size=64).eval()
    >>> x = torch.randn(2, 5, 64)
    >>> mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])      # 左填充
    >>> attention(x, attention_mask=mask).shape
    torch.Size([2, 5, 64])

    nn.MultiheadAttention 的习惯：``key_padding_mask`` 为 True 的位置被忽略，batch_first。

    >>> attention(x, key_padding_mask=mask == 0).shape
    torch.Size([2, 5, 64])

    打包序列：长度 3 与 2 的两条序列首尾相接，位置各自从 0 开始，互不可见。

    >>> attention(x[:1], cu_seqlens=torch.tensor([0, 3, 5])).shape
    torch.Size([1, 5, 64])
    """

    def __init__(
        self,
        config: MLAConfig,
        hidden_size: int,
        *,
        layer_idx: int = 0,
        causal: bool = True,
        **options,
    ):
        super().__init__(config, hidden_size, **options)
        self.layer_idx = layer_idx
        self.causal = causal

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LatentCache | None = None,
        need_weights: bool = False,
    ) -> Tensor:
        """计算注意力。

        参数
        ----
        hidden : [B, T, D]，dtype 与参数一致（或在 autocast 内）。
        attention_mask : [B, S]，非零为可见；S = 已缓存的词元数 + T。
        key_padding_mask : [B, S]，True 为忽略；与 attention_mask 只能给一个。
        cu_seqlens : [n + 1] 整数，打包序列的累计长度，从 0 到 T；要求 B = 1，不能与掩码、缓存同用。
        position_ids : [B, T] 或 [1, T] 整数；默认从已缓存的词元数（打包时从每条序列开头）起递增。
        cache : :class:`~deepseek_opt.LatentCache`；新词元的潜变量写入其中。
        need_weights : 只接受 False：注意力权重从不成形，无法返回。

        返回 [B, T, D]。什么都看不见的查询（例如填充位置）在输出投影之前为 0。

        抛出 :class:`~deepseek_opt.errors.InputError`（形状、dtype、设备、组合不对，超出缓存）、
        :class:`~deepseek_opt.errors.UnsupportedError`（need_weights）、
        :class:`~deepseek_opt.errors.ConfigError`（建层之后改动了维度）；抛出时缓存不变。
        """
        self._check_call(hidden, need_weights, cu_seqlens, cache, attention_mask, key_padding_mask)
        packed = None if cu_seqlens is None else _packed_spans(cu_seqlens, hidden)
        batch, steps = hidden.shape[:2]
        past = _Past(0) if cache is None else self._past(cache, hidden)
        total = past.longest + steps
        kv_mask = self._kv_mask(attention_mask, key_padding_mask, (batch, total), hidden)
        rotation = self._rotation(self._positions(position_ids, cu_seqlens, past, hidden))
        latent, rope = self._latents(hidden, rotation)
        if packed is not None:
            q = self._queries(hidden, rotation)
            return self._attend(q, latent, rope, None, packed, None, self.causal)
        if cache is None:
            return self._in_chunks(hidden, rotation, (latent, rope, None), kv_mask, past)
        try:
            keys = self._store(cache, latent, rope, past)
            unused = keys[0].shape[1] - total  # 缓存的容量大于已用的槽位
            if kv_mask is not None and unused > 0:
                kv_mask = nn.functional.pad(kv_mask, (0, unused))
            return self._in_chunks(hidden, rotation, keys, kv_mask, past)
        except BaseException:
            cache.layer(self.layer_idx).unwind(past.mark)
            raise

    def _store(self, cache: LatentCache, latent: Tensor, rope: Tensor, past: _Past) -> tuple:
        """写入缓存；返回注意力要读的 (latent, rope, scale)。"""
        layer = cache.layer(self.layer_idx)
        if not (torch.is_grad_enabled() and latent.requires_grad):
            layer.append(latent, rope)
            return layer.latent, layer.rope, layer.scale
        # 缓存不记录梯度：要求导时，新词元用带梯度的原值，旧词元取自缓存。
        if layer.ragged:
            raise InputError("各行长度不同的缓存不能在求导时使用；请放进 torch.no_grad()")
        layer.append(latent, rope)
        old = slice(0, past.longest)
        kept = layer.dequantized()[:, old].to(latent.dtype), layer.rope[:, old].to(rope.dtype)
        return torch.cat((kept[0], latent), 1), torch.cat((kept[1], rope), 1), None

    def _in_chunks(self, hidden, rotation, keys, kv_mask, past: _Past) -> Tensor:
        """按 config.prefill_chunk_size 分段算查询（不求导时），使 q 与输出的峰值与长度无关。"""
        batch, steps = hidden.shape[:2]
        slots = keys[0].shape[1]
        chunk = self.config.prefill_chunk_size or steps
        if torch.is_grad_enabled() or chunk >= steps:
            chunk = steps
        out = None
        for start in range(0, steps, chunk):
            stop = min(start + chunk, steps)
            piece = None if rotation is None else tuple(t[:, start:stop] for t in rotation)
            seen = stop if self.causal else steps
            spans = self._spans((batch, stop - start, slots), seen, past, hidden.device)
            q = self._queries(hidden[:, start:stop], piece)
            part = self._attend(q, *keys, spans, kv_mask, self.causal)
            if chunk >= steps:
                return part
            out = part.new_empty(batch, steps, self.hidden_size) if out is None else out
            out[:, start:stop] = part
        return hidden.new_empty(hidden.shape) if out is None else out

    def _spans(
        self, shape: tuple[int, int, int], seen: int, past: _Past, device: torch.device
    ) -> Tensor:
        """shape 为 (行数, 查询数, 槽位数)；每行看得见 seen 个新词元与已缓存的。"""
        if device.type != "cpu":
            cached = past.longest if past.rows is None else past.rows
            return row_spans(*shape, cached + seen, device)
        batch, steps, slots = shape
        ends = None if past.rows is None else past.rows + seen
        total = past.longest + seen
        return ops.make_spans(batch, steps, total, end=ends, slots=slots, causal=self.causal)

    def latent_geometry(self) -> tuple[int, int, int, Tensor]:
        """(layer_idx, r, dr, 给出 dtype 与设备的权重)：``LatentCache.for_model`` 据此建缓存。"""
        d = self.dims
        return self.layer_idx, d.kv_lora_rank, d.qk_rope_head_dim, self.kv_a_layernorm.weight

    # ---- 检查与准备 ----

    def _check_call(self, hidden, need_weights, cu_seqlens, cache, *masks) -> None:
        if need_weights:
            raise UnsupportedError("need_weights=True：MLA 的核从不生成注意力权重矩阵，无法返回")
        self._check_config()
        self._check_hidden(hidden, "hidden", self.hidden_size)
        if all(mask is not None for mask in masks):
            raise InputError("attention_mask 与 key_padding_mask 含义相反，只能给其中一个")
        if cu_seqlens is None:
            return
        if cache is not None or any(mask is not None for mask in masks):
            raise InputError("cu_seqlens 不能与 cache、attention_mask、key_padding_mask 同用")
        whole = not (cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool)
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or not whole:
            raise InputError(
                f"cu_seqlens 应为一维整数张量 [n + 1]，得到 {tuple(cu_seqlens.shape)}、{cu_seqlens.dtype}"
            )
        if hidden.shape[0] != 1:
            raise InputError(f"打包序列要求 B = 1，得到 B = {hidden.shape[0]}")

    def _past(self, cache: LatentCache, hidden: Tensor) -> _Past:
        """已缓存的长度；缓存与本层不合、或超出 config 的上限，则说明原因。"""
        if not isinstance(cache, LatentCache):
            raise InputError.expected("cache", " LatentCache", cache)
        if not self.causal:
            raise InputError("causal=False 的层不能使用缓存：旧词元本应看到新词元")
        layer = cache.layer(self.layer_idx)
        if layer.latent is None and layer.store_dtype is None:
            layer.store_dtype = cache_dtype(self.config.cache_dtype)
        self._check_limits(len(cache), layer, hidden)
        held = layer.latent is not None
        moving = held and (layer.ragged or not hidden.is_cpu)  # 写入时 offsets 原地前移
        return _Past(layer.length, layer.offsets.clone() if moving else None, layer.mark())

    def _check_limits(self, layers: int, layer: LatentLayer, hidden: Tensor) -> None:
        """config 的 max_cache_length 与 memory_budget_bytes（各层平分）；都在写入之前。"""
        batch, steps = hidden.shape[:2]
        length, limit = layer.length + steps, self.config.max_cache_length
        if limit is not None and length > limit:
            raise InputError(f"缓存将有每行 {length} 个词元，超出配置的 max_cache_length={limit}")
        budget = self.config.memory_budget_bytes
        if budget is None:
            return
        store = layer.store_dtype or hidden.dtype
        rope_store = torch.bfloat16 if store in QUANTIZED else store
        d = self.dims
        size = token_bytes(d.kv_lora_rank, d.qk_rope_head_dim, store, rope_store) * batch * layers
        if length * size > budget:
            raise MemoryBudgetError(
                f"{batch} 行、每行 {length} 个词元的缓存（{layers} 层）要 {length * size} 字节，"
                f"超出预算 memory_budget_bytes={budget}；在此预算内每行最多 {budget // size} 个词元",
                required_bytes=length * size,
                budget_bytes=budget,
                max_length=budget // size,
            )

    @staticmethod
    def _kv_mask(attention_mask, key_padding_mask, shape, hidden) -> Tensor | None:
        if attention_mask is not None:
            mask = checked_mask(attention_mask, shape, "attention_mask", hidden.device)
            return mask != 0
        if key_padding_mask is None:
            return None
        mask = checked_mask(key_padding_mask, shape, "key_padding_mask", hidden.device)
        if mask.dtype != torch.bool:
            raise InputError(f"key_padding_mask 应为 bool（True 为忽略），得到 {mask.dtype}")
        return ~mask

    @staticmethod
    def _positions(position_ids, cu_seqlens, past: _Past, hidden: Tensor) -> Tensor:
        batch, steps = hidden.shape[:2]
        if position_ids is not None:
            shape = tuple(position_ids.shape)
            if shape not in ((batch, steps), (1, steps)) or position_ids.is_floating_point():
                raise InputError(
                    f"position_ids 应为 [{batch}, {steps}] 或 [1, {steps}] 的整数，"
                    f"得到 {shape}、{position_ids.dtype}"
                )
            if position_ids.device != hidden.device:
                raise InputError(
                    f"position_ids 在 {position_ids.device}，而 hidden 在 {hidden.device}"
                )
            return position_ids
        index = torch.arange(steps, device=hidden.device)
        if past.rows is not None:
            return past.rows.unsqueeze(1) + index
        index = index + past.longest
        if cu_seqlens is not None:
            starts = cu_seqlens.to(hidden.device, torch.int64)
            index = index - starts[torch.searchsorted(starts, index, right=True) - 1]
        return index.unsqueeze(0)


_packed = TensorMemo()


def _packed_spans(cu_seqlens: Tensor, hidden: Tensor) -> Tensor:
    """打包序列的 spans，与 hidden 同设备；各层收到同一个 cu_seqlens，只核对、换算一次。"""
    steps, device = hidden.shape[1], hidden.device
    if torch.compiler.is_compiling():  # 编译时看不到数值
        return ops.spans_from_cu_seqlens(cu_seqlens).to(device)

    def make() -> Tensor:
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != steps or ends != sorted(ends):
            raise InputError(f"cu_seqlens 应从 0 递增到 T = {steps}，得到 {ends}")
        spans = ops.spans_from_cu_seqlens(torch.tensor(ends))
        return to_device(spans, device)

    return _packed.get(cu_seqlens, (steps, device), make)
