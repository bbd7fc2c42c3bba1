"""transformers 因果语言模型与 MTP 的接口：稠密与 MoE 的各架构共用一份，凭接口认，凭小输入核对。"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt.errors import InputError, UnsupportedError
from deepseek_opt.integrations import bridge
from deepseek_opt.load import uncounted
from deepseek_opt.mtp.adapter import LayerInputs, MTPAdapter
from deepseek_opt.mtp.documents import places
from deepseek_opt.mtp.parts import altered, parts_of, same_parts
from deepseek_opt.mtp.steady import AngleTable, SteadyParts, close

_LAYERS = ("layers", "h")
_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
_PROBE = 5  # 核对用的词元数


def is_hf_model(model: nn.Module) -> bool:
    """是否是 transformers 的模型。"""
    if not bridge.loaded():
        return False
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


class HFAdapter(MTPAdapter):
    """transformers 的因果语言模型：Llama、Qwen、Mistral、Mixtral、DeepSeek、GLM-4-MoE、GPT-2 等。

    参数
    ----
    model : ``...ForCausalLM``。hidden_normed、chain_normed : 见 :class:`MTPAdapter`；缺省与 transformers
    自己的 MTP 相同。

    建立时用几个词元运行主模型一次，核对嵌入、最后一层与输出头就是这里所写的算法。抛出 UnsupportedError：
    接口或结果不符，说明哪一处。

    示例::

        adapter = HFAdapter(model, hidden_normed=False)      # 用最后的归一化之前的隐藏状态
        attach_mtp(model, folder, adapter=adapter)
    """

    def __init__(self, model: nn.Module, *, hidden_normed: bool = True, chain_normed: bool = True):
        bridge.check_version()
        empty = next((name for name, p in model.named_parameters() if p.is_meta), None)
        if empty is not None:
            raise InputError(f"参数 model：{empty} 还在 meta 设备上；请先读入主模型的权重")
        decoder = model.get_decoder()
        layers, norm = _first(decoder, _LAYERS), _first(decoder, _NORMS)
        head = model.get_output_embeddings()
        for part, found in (("各层（layers）", layers), ("最后的归一化", norm), ("输出头", head)):
            if found is None:
                raise UnsupportedError(f"不认得 {type(model).__name__}：没有找到{part}")
        self.decoder, self.layers = decoder, layers
        super().__init__(
            model,
            embedding=model.get_input_embeddings(),
            head=head,
            hidden_size=model.config.get_text_config().hidden_size,
            final_norm=norm,
            hidden_normed=hidden_normed,
            chain_normed=chain_normed,
            layer_path=next(name for name, m in model.named_modules() if m is layers),
            num_layers=len(layers),
        )
        self._parts = parts_of(model)
        self._angles = AngleTable(getattr(decoder, "rotary_emb", None))
        self._steady = SteadyParts()
        self._check()

    @property
    def config(self) -> Any:
        """主模型文本部分的配置（优化过的模型上是替身）。"""
        return self.decoder.config

    @property
    def template(self) -> nn.Module:
        """MTP 层照着它建：主模型的最后一层（DeepSeek-V3 里是 MoE 层）。"""
        return self.layers[-1]

    def make_layer(self) -> nn.Module:
        """与主模型最后一层同类、同设备、各参数同类型的一层。"""
        template = self.template
        config = copy.deepcopy(self.model.config.get_text_config())
        with torch.device(self.device), _default_dtype(self.dtype):
            layer = type(template)(config, self.num_layers - 1)
        wanted = {**dict(template.named_parameters()), **dict(template.named_buffers())}
        wanted = {name.replace(".base_layer.", "."): one for name, one in wanted.items()}  # LoRA
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            like = wanted[name]
            tensor.data = tensor.data.to(like.device, like.dtype)
        return layer

    def make_norm(self) -> nn.Module:
        """与主模型最后的归一化同类。"""
        norm = self.final_norm
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6))
        return type(norm)(self.hidden_size, eps=eps).to(self.device, self.dtype)

    def reset_layer(self, layer: nn.Module) -> None:
        """按主模型的 ``_init_weights`` 初始化。"""
        layer.apply(self.model._init_weights)

    def embed(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """词嵌入；GPT-2 一类加上学得的位置嵌入。"""
        found = self.embedding(tokens)
        learned = getattr(self.decoder, "wpe", None)
        return found if learned is None else found + learned(position_ids)

    def run_layer(self, layer: nn.Module, x: Tensor, inputs: LayerInputs) -> Tensor:
        """按主模型自己的掩码与旋转运行一层。"""
        if inputs.cache is not None and inputs.attention_mask is None:
            steady = self._steady.find(layer, *x.shape[:2])
            if steady is not None:
                # 第 index 层的条目从第 index + 1 个词元起，所以位置比缓存的长度多这么多
                count = inputs.cache.get_seq_length(inputs.index) + x.shape[1] + inputs.index + 1
                angles = self._angles.halves(inputs.position_ids, x.dtype, count)
                return steady(x, angles, inputs.cache)
        kwargs: dict[str, Any] = {}
        rotary = getattr(self.decoder, "rotary_emb", None)
        if rotary is not None:
            kwargs["position_embeddings"] = rotary(x, position_ids=inputs.position_ids)
        positions = inputs.position_ids
        if inputs.documents is not None:
            positions = places(inputs.documents)
        out = layer(
            x,
            attention_mask=self._mask(x, inputs),
            position_ids=positions,
            past_key_values=inputs.cache,
            use_cache=inputs.cache is not None,
            **kwargs,
        )
        return out[0] if isinstance(out, tuple) else out

    def blocks(self) -> list[nn.Module]:
        """各物理的 MTP 层里的解码层。"""
        return [layer.block for layer in self.model.mtp.layers]

    def make_cache(self) -> Any:
        """transformers 的 DynamicCache，每个物理层一层；各行长度可以不同。"""
        from deepseek_opt.integrations.hf_kv_cache import ragged_cache

        return ragged_cache(self.model.mtp.layers)

    @property
    def max_positions(self) -> int | None:
        """学得的位置嵌入的个数；旋转位置的模型为 None。"""
        learned = getattr(self.decoder, "wpe", None)
        return None if learned is None else learned.num_embeddings

    def make_model_cache(self) -> Any:
        """主模型的缓存，同上。"""
        from deepseek_opt.integrations.hf_kv_cache import ragged_cache

        return ragged_cache(self.layers)

    def run_model(self, tokens: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        """主模型（不含输出头）的前向；``hidden_normed=False`` 时取最后的归一化的输入。"""
        from deepseek_opt.integrations.hf_kv_cache import ragged_masks

        steady = self._steady.find(None, *tokens.shape)
        if steady is not None:
            count = cache.get_seq_length() + tokens.shape[1]
            angles = self._angles.halves(position_ids, self.dtype, count)
            return steady(tokens, angles, cache, self.hidden_normed)
        seen: dict[str, Any] = {}
        hook = None
        if not self.hidden_normed:
            hook = self.final_norm.register_forward_pre_hook(
                _input_saver(seen, "hidden"), with_kwargs=True
            )
        try:
            out = self.decoder(
                input_ids=tokens,
                attention_mask=ragged_masks(self.config, cache, tokens.shape[1], tokens.device),
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
        finally:
            if hook is not None:
                hook.remove()
        return out.last_hidden_state if self.hidden_normed else seen["hidden"]

    def default_source(self) -> Any:
        """主模型是从哪里读来的。"""
        return self.model.config.name_or_path or None

    def to_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """逐专家拆开等，与 save_pretrained 相同。"""
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(self.model, tensors)

    def from_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """逐专家合并等，与 from_pretrained 相同。"""
        from transformers import core_model_loading as loading

        conversions = [copy.deepcopy(item) for item in _conversions(self.model)]
        renamings = [c for c in conversions if isinstance(c, loading.WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, loading.WeightConverter)]
        by_pattern = {k: c for c in converters for k in c.source_patterns}
        plain: dict[str, Tensor] = {}
        merged: dict[str, Any] = {}
        for key in sorted(tensors, key=loading.dot_natural_key):
            renamed = loading.apply_renamings(key, renamings)
            name, pattern = loading.apply_converters(renamed, converters)
            if pattern is None:
                plain[renamed] = tensors[key]
                continue
            converter = merged.setdefault(name, copy.deepcopy(by_pattern[pattern]))
            converter.add_tensor(name, renamed, pattern, tensors[key])
        for name, converter in merged.items():
            found = converter.convert(name, model=self.model, config=self.model.config)
            plain |= {k: v[0] if isinstance(v, list) else v for k, v in found.items()}
        return plain

    # ---- 生成 ----

    def generating(self) -> AbstractContextManager[None]:
        """块内能直接调用算子的层不再经过各模块，见 integrations/steady.py。"""
        return self._steady.during(self)

    def capturable(self, rows: int, steps: int) -> bool:
        """主模型与 MTP 层是否都能直接调用算子。"""
        layers = (None, *self.blocks())
        return all(self._steady.find(layer, rows, steps) is not None for layer in layers)

    def is_current(self) -> bool:
        """主模型的各部分是不是还是建立时的那些。"""
        return same_parts(parts_of(self.model), self._parts)

    def altered(self) -> str | None:
        """录进 CUDA graph 会绕过的改动。"""
        return altered(self.model)

    def reserve_positions(self, count: int) -> Any:
        """角度的表。"""
        return self._angles.table(count, self.dtype, self.device)

    # ---- 掩码 ----

    def _mask(self, x: Tensor, inputs: LayerInputs) -> Any:
        documents = inputs.documents
        if inputs.cache is not None and inputs.attention_mask is None:
            from deepseek_opt.integrations.hf_kv_cache import layer_mask

            layer = inputs.cache.layers[inputs.index]
            return layer_mask(self.config, layer, x.shape[1], self._kind(), x.device)
        return self._mask_function()(
            config=self.config,
            inputs_embeds=x,
            attention_mask=inputs.attention_mask,
            past_key_values=inputs.cache,
            position_ids=None if documents is None else places(documents),
            layer_idx=None if inputs.cache is None else inputs.index,
        )

    def _kind(self) -> str:
        """最后一层（MTP 层照着它建）的注意力的种类。"""
        from deepseek_opt.integrations.hf_kv_cache import layer_kind

        return layer_kind(self.config, self.num_layers - 1)

    def _mask_function(self) -> Callable[..., Any]:
        from transformers import masking_utils

        kind = self._kind()
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(f"最后一层的注意力是 {kind}：MTP 层只支持全注意力与滑动窗口")
        name = (
            "create_causal_mask"
            if kind == "full_attention"
            else "create_sliding_window_causal_mask"
        )
        return getattr(masking_utils, name)

    # ---- 核对 ----

    @torch.no_grad()
    def _check(self) -> None:
        self._require_template()
        seen: dict[str, Any] = {}
        hooks = [
            self.layers[0].register_forward_pre_hook(
                _input_saver(seen, "embedded"), with_kwargs=True
            ),
            self.template.register_forward_pre_hook(_input_saver(seen, "input"), with_kwargs=True),
            self.template.register_forward_hook(_output_saver(seen)),
            self.captured.register_forward_pre_hook(_input_saver(seen, "hidden"), with_kwargs=True),
        ]
        tokens = torch.arange(_PROBE, device=self.device)[None] % self.embedding.weight.shape[0]
        try:
            with _evaluating(self.model), uncounted():
                # 不经过 __call__：性能指标挂在它的钩子上
                seen["logits"] = self.model.forward(input_ids=tokens, use_cache=False).logits
                pairs = self._pairs(tokens, seen)
        finally:
            for hook in hooks:
                hook.remove()
        wrong = [part for part, (got, wanted) in pairs.items() if not close(got, wanted)]
        if wrong:
            raise UnsupportedError(
                f"{type(self.model).__name__} 的{'、'.join(wrong)}与通常的写法不同，算出的结果对不上；"
                "请继承 MTPAdapter 写一个接口，用 attach_mtp(..., adapter=...) 给出"
            )

    def _require_template(self) -> None:
        """最后一层的注意力是 MTP 层能用的；不是则抛出 UnsupportedError。"""
        self._mask_function()

    def _pairs(self, tokens: Tensor, seen: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        """要核对的：哪一部分 -> (这里所写的, 模型算出的)；seen 是模型的一次前向里记下的。"""
        inputs = LayerInputs(torch.arange(_PROBE, device=self.device)[None])
        normed = seen["hidden"] if self.hidden_normed else self.final_norm(seen["hidden"])
        return {
            "词嵌入": (self.embed(tokens, inputs.position_ids), seen["embedded"]),
            "最后一层": (self.run_layer(self.template, seen["input"], inputs), seen["output"]),
            "输出头": (self.head(normed), seen["logits"]),
        }


def _conversions(model: nn.Module) -> list[Any]:
    """检查点 -> 内存的转换；不是 from_pretrained 得到的模型用它的类登记的。"""
    found = getattr(model, "_weight_conversions", None)
    if found is None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        found = get_model_conversion_mapping(model, add_legacy=False)
    return found or []


def _first(module: nn.Module, names: tuple[str, ...]) -> Any:
    return next(
        (found for name in names if (found := getattr(module, name, None)) is not None), None
    )


def _input_saver(seen: dict[str, Any], key: str) -> Callable[..., None]:
    owner = threading.get_ident()

    def save(_module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
        if threading.get_ident() == owner:  # 钩子挂在模块上，别的线程的前向也经过它
            seen.setdefault(key, args[0] if args else kwargs["hidden_states"])

    return save


def _output_saver(seen: dict[str, Any]) -> Callable[..., None]:
    def save(_module: nn.Module, _args: tuple, output: Any) -> None:
        seen.setdefault("output", output[0] if isinstance(output, tuple) else output)

    return save


@contextmanager
def _evaluating(model: nn.Module):
    """块内是 eval 模式；各模块之后各自还原。"""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
