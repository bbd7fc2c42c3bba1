"""替换一个 MLA 注意力实例的 forward：投影与归一化、旋转、缓存、spans、潜变量核、输出投影。

补丁只放在实例上（``module.forward``）；参数、类、模块全局都不动。任何不支持的情形
交给原 forward 计算，并在报告里计数、说明原因。
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt import ops
from deepseek_opt.cache import LatentCache
from deepseek_opt.cache_layer import LatentLayer
from deepseek_opt.errors import InputError, UnsupportedError
from deepseek_opt.integrations import bridge
from deepseek_opt.integrations.patch import Patch
from deepseek_opt.integrations.projections import (
    effective_weight,
    has_hooks,
    is_plain,
    is_rms_norm,
    norm,
    norm_eps,
    project,
)
from deepseek_opt.integrations.runtime import Runtime
from deepseek_opt.integrations.specs import AttentionSpec
from deepseek_opt.ops._run import is_tracing_grad

# 行数至多这么多时整层用一个算子：实测到 256 行都更快（小模型约一成，V2-Lite 的维度百分之一二），再多则持平。
FUSED_ROWS = 256
# 长输入按这么多查询（各行之和）分块：矩阵乘在此长度已到峰值，再长只增加内存。
QUERY_TOKENS = 2048
# 这一层要用的算子：所在的设备上缺一个（求导时连同反向），就由原实现计算。
OPS = (
    "rms_norm",
    "rope",
    "rope_",
    "mla_cache_write",
    "mla_decode",
    "mla_prefill",
    "mla_layer_decode",
)
FORWARD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class AttentionPatch(Patch):
    """一个 MLA 注意力实例的新 forward。"""

    kind = "mla"

    def __init__(self, module: nn.Module, spec: AttentionSpec, runtime: Runtime, name: str):
        super().__init__(module, runtime, name)
        self.spec = spec
        self.owns_masks = False  # 所在的基础模型是否用了配置替身（掩码是 2 维）
        self.rank = getattr(module, spec.kv_lora_rank)
        self.nope_dim = getattr(module, spec.qk_nope_head_dim)
        self.rope_dim = getattr(module, spec.qk_rope_head_dim)
        self.value_dim = getattr(module, spec.v_head_dim)
        self.rope = _rope_kind(module, spec)
        self.known_norms = frozenset(
            key for key in _norm_names(spec) if is_rms_norm(getattr(module, key, None))
        )
        self.decode_limit = ops.decode_limit(self.rank, self.nope_dim, self.value_dim)
        self.fusable = self.rope is not None and _is_standard(spec, self.known_norms)
        self._parameters: tuple[str, ...] | None = None

    # ---- 入口 ----

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs.update(zip(self._positional(), args, strict=False))
        self.runtime.refresh()
        weight, reason = effective_weight(self.module._modules[self.spec.kv_b_proj])
        reason = reason or self._refusal(hidden_states, kwargs)
        if reason is not None:
            return self._fallback(reason, hidden_states, kwargs)
        out, reason = self._decode_fused(hidden_states, kwargs, weight)
        if out is None and reason is None:
            out, reason = self._compute(hidden_states, kwargs, weight)
        if reason is not None:
            return self._fallback(reason, hidden_states, kwargs)
        return (out, None) if self.spec.returns_tuple else out

    def _compute(
        self, hidden_states: Tensor, kwargs: dict[str, Any], weight: Tensor
    ) -> tuple[Tensor | None, str | None]:
        """逐个算子计算；(输出, 改由原实现计算的原因)。"""
        chunk = self._chunk(hidden_states)
        if chunk:
            q, (latent, rope) = None, self._keys(hidden_states, kwargs)
        else:
            q, latent, rope = self._project(hidden_states, kwargs)
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        plan, *keys = self._store(latent, rope, cache, mask)
        if plan.reason is not None:
            return None, plan.reason
        if chunk:
            return self._in_chunks(hidden_states, kwargs, plan, (*keys, weight), chunk), None
        return self._output(hidden_states, q, plan, plan.spans, (*keys, weight)), None

    def _chunk(self, hidden: Tensor) -> int:
        """查询分块时每行每块的词元数；0 为不分块。

        不求导的长输入分块：查询、注意力输出只存在一块，峰值不随输入长度按比例增长。
        各块一样长，免得零头走到解码核（只差舍入，但会与不分块时不同）。
        """
        batch, steps = hidden.shape[:2]
        if torch.is_grad_enabled() or batch * steps < 2 * QUERY_TOKENS:
            return 0
        pieces = -(-steps * batch // QUERY_TOKENS)
        return -(-steps // pieces)

    def _in_chunks(
        self, hidden: Tensor, kwargs: dict[str, Any], plan: Any, keys: tuple, chunk: int
    ) -> Tensor:
        steps, out = hidden.shape[1], None
        for start in range(0, steps, chunk):
            stop = min(start + chunk, steps)
            part = hidden[:, start:stop]
            spans = ops.slice_spans(plan.spans, steps, start, stop)
            q = self._query(part, kwargs, slice(start, stop))
            part = self._output(part, q, plan, spans, keys)
            if out is None:
                out = part.new_empty(*hidden.shape[:2], part.shape[-1])
            out[:, start:stop] = part
        return out

    def _output(self, hidden: Tensor, q: Tensor, plan: Any, spans: Tensor, keys: tuple) -> Tensor:
        """注意力、输出门与输出投影；keys 为 (latent, rope, scale, kv_b 权重)。"""
        softmax_scale = float(getattr(self.module, self.spec.scaling))
        out = ops.mla_attention(q, *keys, spans, plan.kv_mask, softmax_scale, self.value_dim)
        if self.spec.gate is not None:
            out = out * self._gate(hidden, out.dtype)
        return project(self.module._modules[self.spec.o_proj], out.flatten(2))

    def _positional(self) -> tuple[str, ...]:
        """原 forward 在 hidden_states 之后的位置参数名。"""
        if self._parameters is None:
            self._parameters = tuple(self.__signature__.parameters)[1:]
        return self._parameters

    def _refusal(self, hidden: Tensor, kwargs: dict[str, Any]) -> str | None:
        """这次调用不能由潜变量核计算的原因；可以则为 None。"""
        module = self.module
        state = module.__dict__
        reason = ops.missing(hidden, *OPS)
        if reason is not None:
            return reason
        if hidden.dtype not in FORWARD_DTYPES:
            return f"数据类型 {hidden.dtype} 不受支持"
        if state["training"] and state.get("attention_dropout"):
            return f"训练时 attention_dropout={module.attention_dropout}，融合核不做 dropout"
        if kwargs.get("output_attentions") or bridge.wants_attentions():
            return "output_attentions=True 需要完整的注意力权重"
        if _bidirectional(module, kwargs):
            return "双向注意力（is_causal=False）"
        return None

    def _fallback(self, reason: str, hidden: Tensor, kwargs: dict[str, Any]) -> Any:
        """交给原 forward；掩码先换成原实现要的形式。"""
        self.runtime.count(self.name, reason)
        mask = kwargs.get("attention_mask")
        light = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)
        if self.owns_masks and light and not _bidirectional(self.module, kwargs):
            index = getattr(self.module, self.spec.layer_idx)
            kwargs = bridge.original_mask(self.module, hidden, kwargs, index)
        return self.call_original(hidden, **kwargs)

    # ---- 投影 ----

    def _fused_projections(
        self, hidden: Tensor, kwargs: dict[str, Any], kv_b: Tensor
    ) -> tuple | None:
        """mla_layer_decode 的投影参数；条件不符则为 None。"""
        batch, steps = hidden.shape[:2]
        if batch * steps > FUSED_ROWS or steps > self.decode_limit or torch.is_grad_enabled():
            return None
        projections = self.steady_projections(kv_b)
        if projections is None:
            return None
        cos, sin = self._angles(kwargs)
        if steps > 1 and cos.shape[0] != batch:
            return None
        return (*projections, cos, sin, self.rope == "interleaved")

    def steady_projections(self, kv_b: Tensor) -> tuple | None:
        """同上，旋转以外、与输入无关的部分。"""
        if not self.fusable or torch.is_autocast_enabled(kv_b.device.type):
            return None
        modules, spec = self.module._modules, self.spec
        down, joint, out = (modules.get(n) for n in (spec.q_a_proj, spec.kv_a_proj, spec.o_proj))
        last = modules[spec.q_proj if down is None else spec.q_b_proj]
        norms = [modules[spec.kv_a_layernorm]]
        plain = is_plain(joint) and is_plain(last) and is_plain(out)
        if down is not None:
            plain = plain and is_plain(down) and spec.q_a_layernorm in self.known_norms
            norms.append(modules[spec.q_a_layernorm])
        if not plain or any(has_hooks(m) for m in norms):
            return None
        queries = (None, None, None, 0.0)
        if down is not None:
            queries = (*_weights(down), _weights(norms[1])[0], norm_eps(norms[1]))
        keys = (*_weights(joint), _weights(norms[0])[0], norm_eps(norms[0]))
        return (*queries, *_weights(last), *keys, kv_b, *_weights(out))

    def _decode_fused(
        self, hidden: Tensor, kwargs: dict[str, Any], kv_b: Tensor
    ) -> tuple[Tensor | None, str | None]:
        """解码（行数少、不求导）时整层由一个算子计算：(输出, 改由原实现计算的原因)；用不了则都为 None。"""
        cache = kwargs.get("past_key_values")
        projections = None if cache is None else self._fused_projections(hidden, kwargs, kv_b)
        if projections is None:
            return None, None
        layer = self.open_layer(cache, hidden)
        if layer is None:
            return None, None
        spans = kv_mask = None
        if kwargs.get("attention_mask") is not None:
            plan = self._cached_plan(layer, kwargs["attention_mask"], *hidden.shape[:2])
            if plan.reason is not None:
                return None, plan.reason
            spans, kv_mask = plan.spans, plan.kv_mask
        heads = kv_b.shape[0] // (self.nope_dim + self.value_dim)
        return self.decode_layer(hidden, projections, layer, heads, spans, kv_mask), None

    def open_layer(self, cache: Any, hidden: Tensor) -> LatentLayer | None:
        """cache 里这一层的潜变量存储，保证放得下 hidden [B, T, ...]；不是潜变量的为 None。"""
        index = getattr(self.module, self.spec.layer_idx)
        layer = bridge.resolve_layer(cache, index, self.runtime, False)
        if layer is not None and not layer.has_room(hidden, self.rank, self.rope_dim):
            sizes = (self.rank, self.rope_dim)  # 张量只用来给出形状与类型
            layer.prepare(*(hidden.new_empty(*hidden.shape[:2], n) for n in sizes))
        return layer

    def decode_layer(
        self,
        hidden: Tensor,
        projections: tuple,
        layer: LatentLayer,
        heads: int,
        spans: Tensor | None = None,
        kv_mask: Tensor | None = None,
    ) -> Tensor:
        """整层一个算子：写进 layer，返回注意力层的输出；projections 含旋转。"""
        cache = (layer.latent, layer.rope, layer.scale, layer.offsets, spans, kv_mask)
        scaling = float(getattr(self.module, self.spec.scaling))
        paired = self.spec.rope_complex
        mark = layer.mark()
        try:
            out = ops.mla_layer_decode(hidden, *projections, *cache, scaling, heads, paired)
        except BaseException:
            layer.unwind(mark)  # 算子在设备上前移位置，失败在那之后时主机还不知道
            raise
        layer.advance(hidden.shape[1])
        return out

    def _project(self, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, dn + dr]（已旋转）、latent [B, T, r]（已归一化）、rope [B, T, dr]（已旋转）。"""
        return (self._query(hidden, kwargs), *self._keys(hidden, kwargs))

    def _keys(self, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        module, spec = self.module, self.spec
        joint = project(module._modules[spec.kv_a_proj], hidden)
        latent, rope = joint.split((self.rank, self.rope_dim), -1)
        latent = self._norm(spec.kv_a_layernorm, latent)
        if spec.kv_scale is not None:
            latent = latent * getattr(module, spec.kv_scale)
        if spec.k_rope_layernorm is not None:
            rope = self._norm(spec.k_rope_layernorm, rope)
        if self.rope is not None:
            cos, sin = self._angles(kwargs)
            rope = self._turn(rope.unsqueeze(2), cos, sin).squeeze(2)
        return latent, rope

    def _query(self, hidden: Tensor, kwargs: dict[str, Any], steps: slice = slice(None)) -> Tensor:
        """steps 是 hidden 在整个输入里的位置（分块时）。"""
        module, spec = self.module, self.spec
        q, own = self._queries(hidden)
        q = q.view(*hidden.shape[:2], -1, self.nope_dim + self.rope_dim)
        if spec.q_scale is not None:
            q, own = q * getattr(module, spec.q_scale), True
        if self.rope is not None:
            cos, sin = (t[:, steps] for t in self._angles(kwargs))
            if own and not torch.is_grad_enabled():
                # 不求导时原地旋转，省一份 q
                pairs = (self.rope == "interleaved", spec.rope_complex)
                ops.rope_(q[..., self.nope_dim :], cos, sin, *pairs)
            else:
                turned = self._turn(q[..., self.nope_dim :], cos, sin).to(q.dtype)
                q = torch.cat((q[..., : self.nope_dim], turned), -1)
        if spec.q_position_scale is not None:
            q = q * self._position_scale(kwargs["position_ids"][:, steps]).to(q.dtype)
        return q

    def _queries(self, hidden: Tensor) -> tuple[Tensor, bool]:
        """(查询, 是否是可以原地改写的新张量)。"""
        module, spec = self.module, self.spec
        down = module._modules.get(spec.q_a_proj)
        if down is None:
            last = module._modules[spec.q_proj]
        else:
            hidden = self._norm(spec.q_a_layernorm, project(down, hidden))
            if spec.q_latent_scale is not None:
                hidden = hidden * getattr(module, spec.q_latent_scale)
            last = module._modules[spec.q_b_proj]
        return project(last, hidden), type(last) is nn.Linear

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return norm(self.module._modules[name], x, name in self.known_norms)

    def _angles(self, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return self.runtime.ropes.halves(kwargs["position_embeddings"], self.rope_dim // 2)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return ops.rope(x, cos, sin, self.rope == "interleaved", keep_pairs=self.spec.rope_complex)

    def _position_scale(self, position_ids: Tensor) -> Tensor:
        """llama4 式的长文温度，[1 或 B, T, 1, 1]。"""
        rope = self.module.config.rope_parameters
        beta, length = (
            rope.get("llama_4_scaling_beta"),
            rope.get("original_max_position_embeddings"),
        )
        scale = 1 + beta * torch.log(1 + torch.floor(position_ids / length))
        return scale[:, :, None, None]

    def _gate(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """每头的输出门 [B, T, H, 1]。"""
        gate = project(getattr(self.module, self.spec.gate), hidden)
        gate = gate.float().sigmoid() if self.spec.gate_fp32 else gate.sigmoid()
        return gate.to(dtype).unsqueeze(-1)

    # ---- 缓存与注意力 ----

    def _store(
        self, latent: Tensor, rope: Tensor, cache: Any, mask: Any
    ) -> tuple[Any, Tensor, Tensor, Tensor | None]:
        """换算掩码、写缓存；返回 (plan, latent, rope, scale)，有 plan.reason 时缓存未动。"""
        batch, steps = latent.shape[:2]
        if cache is None:
            plan = self.runtime.masks.plan(mask, batch, steps, steps, steps, latent.device)
            return plan, latent, rope, None
        index = getattr(self.module, self.spec.layer_idx)
        tracked = is_tracing_grad(latent, rope)
        layer = bridge.resolve_layer(cache, index, self.runtime, tracked)
        if layer is None or (tracked and not isinstance(cache, LatentCache)):
            return self._through_update(cache, index, latent, rope, mask)
        return self._through_layer(layer, latent, rope, mask, tracked)

    def _through_layer(
        self, layer: LatentLayer, latent: Tensor, rope: Tensor, mask: Any, tracked: bool
    ) -> tuple[Any, Tensor, Tensor, Tensor | None]:
        """写入原地增长的缓冲区，直接在缓冲区上计算。"""
        batch, steps = latent.shape[:2]
        past = layer.length
        total = past + steps
        if tracked:  # LatentCache 是常量存储：旧词元不带梯度，新词元带
            plan = self.runtime.masks.plan(mask, batch, steps, total, total, latent.device)
            if past:
                old = layer.dequantized().to(latent.dtype), layer.rope[:, :past].to(rope.dtype)
                joined = torch.cat((old[0], latent), 1), torch.cat((old[1], rope), 1)
            else:
                joined = latent, rope
            if plan.reason is None:
                layer.append(latent, rope)
            return plan, *joined, None
        layer.prepare(latent, rope)
        plan = self._cached_plan(layer, mask, batch, steps)
        if plan.reason is None:
            layer.write(latent, rope)
        return plan, layer.latent, layer.rope, layer.scale

    def _cached_plan(self, layer: LatentLayer, mask: Any, batch: int, steps: int) -> Any:
        """新词元写入缓冲区之后的可见范围。"""
        if not layer.ragged:
            total, device = layer.length + steps, layer.latent.device
            return self.runtime.masks.plan(mask, batch, steps, total, layer.capacity, device)
        if mask is not None:
            raise InputError("缓存各行长度不同（用过 crop_rows），不能再与 attention_mask 同用")
        return self.runtime.masks.ragged_plan(layer, steps)

    def _through_update(
        self, cache: Any, index: int, latent: Tensor, rope: Tensor, mask: Any
    ) -> tuple[Any, Tensor, Tensor, None]:
        """StaticCache 等：走它自己的 update，再读它返回的张量。"""
        batch, steps = latent.shape[:2]
        layers = getattr(cache, "layers", ())
        layer = layers[index] if index < len(layers) else None
        if getattr(layer, "is_sliding", False):
            raise UnsupportedError(f"{self.name}：滑动窗口缓存不能用于 MLA 全注意力层")
        total = _known(cache.get_seq_length(index)) + steps
        fixed = getattr(layer, "max_cache_len", None)
        slots = fixed if isinstance(fixed, int) else total
        if isinstance(total, int) and total > slots:
            raise InputError(f"{self.name}：缓存上限 {slots} 个词元，需要 {total} 个")
        plan = self.runtime.masks.plan(mask, batch, steps, total, slots, latent.device)
        if plan.reason is None:
            keys, values = cache.update(latent.unsqueeze(1), rope.unsqueeze(1), index)
            latent, rope = keys[:, 0], values[:, 0]
        return plan, latent, rope, None


def _known(length: int | Tensor) -> int | Tensor:
    """缓存的长度；StaticCache 的是张量，在设备上的不读回来（那要等设备，每层一次）。"""
    return length if isinstance(length, Tensor) and not length.is_cpu else int(length)


def _weights(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """(weight, bias)；没有 bias 为 None。"""
    parameters = module.__dict__["_parameters"]
    return parameters["weight"], parameters.get("bias")


def _rope_kind(module: nn.Module, spec: AttentionSpec) -> str | None:
    """旋转约定：interleaved、half，或 None（不旋转）。"""
    if spec.rope == "none" or not getattr(module, spec.qk_rope_head_dim):
        return None
    if spec.rope == "config":
        return "interleaved" if module.config.rope_interleave else "half"
    return spec.rope


def _bidirectional(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    state = module.__dict__
    if kwargs.get("is_causal") is False or state.get("is_causal") is False:
        return True
    config = state.get("config")
    return config is not None and config.__dict__.get("is_causal") is False


def _is_standard(spec: AttentionSpec, known_norms: frozenset[str]) -> bool:
    """投影部分是否就是 DeepSeek-V3 的样子：没有额外的缩放、门与归一化。"""
    extras = (spec.q_scale, spec.kv_scale, spec.q_latent_scale, spec.q_position_scale, spec.gate)
    if spec.k_rope_layernorm or any(e is not None for e in extras):
        return False
    return spec.kv_a_layernorm in known_norms


def _norm_names(spec: AttentionSpec) -> tuple[str, ...]:
    names = (spec.q_a_layernorm, spec.kv_a_layernorm, spec.k_rope_layernorm)
    return tuple(name for name in names if name is not None)
