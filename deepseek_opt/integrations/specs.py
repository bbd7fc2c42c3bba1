"""架构描述：每种 MLA 注意力类怎样取投影、维度与旋转约定，全部是数据。

支持一个新模型通常只需在 :data:`SPECS` 里加一行；自己的模型用 :func:`register_spec` 登记::

    from deepseek_opt.integrations import AttentionSpec, register_spec

    register_spec(AttentionSpec(cls=MyAttention, rope="half", scaling="softmax_scale"))
    deepseek_opt.optimize(my_model, profile)

自己的类要满足：``forward(hidden_states, position_embeddings=(cos, sin), attention_mask=None,
past_key_values=None, **kwargs)`` 返回 ``(输出, None)``（``returns_tuple=False`` 时只返回输出），
因果注意力，子模块的含义与 DeepSeek-V3 相同（名字可以不同，由下面的字段给出）。
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from deepseek_opt.errors import InputError, UnsupportedError

MIN_TRANSFORMERS = "5.17"
_DSA = "DSA 稀疏注意力：索引器为每个查询各选一组键，不是“因果 + 填充”掩码，潜变量核尚不支持"


@dataclass(frozen=True)
class AttentionSpec:
    """一种 MLA 注意力类的描述；字符串字段都是该类实例上的属性名，None 为没有。

    属性：
        path: 类的完整路径 ``模块.类名``；自己的类改用 cls。
        cls: 类本身。
        q_proj: 不做低秩分解时的查询投影。
        q_a_proj、q_a_layernorm、q_b_proj: 低秩查询的三步；q_a_proj 为 None 时用 q_proj。
        kv_a_proj、kv_a_layernorm、kv_b_proj、o_proj: 其余投影与归一化。
        kv_lora_rank、qk_nope_head_dim、qk_rope_head_dim、v_head_dim: 维度。
        layer_idx: 缓存的层号。
        scaling: softmax 的缩放系数（含 YaRN 的 mscale²）。
        rope: ``"interleaved"``（输入相邻两维一对）、``"half"``（前后两半一对）、``"none"``，
            或 ``"config"``（由 ``module.config.rope_interleave`` 决定）。
        rope_complex: position_embeddings 是复数张量 freqs_cis，且旋转后保持交错排列。
        q_latent_scale: q_a_layernorm 之后、q_b_proj 之前乘的系数。
        q_scale、kv_scale: 查询、潜变量（归一化之后）乘的系数。
        k_rope_layernorm: 旋转之前作用于旋转键的归一化。
        q_position_scale: ``"llama4"`` 为查询乘 1 + beta·log(1 + floor(位置 / 原长度))。
        gate: 每头输出门的投影；gate_fp32 为门是否在 fp32 中算 sigmoid。
        returns_tuple: forward 是否返回 (输出, 注意力权重)。
        refuse: (属性名, 原因)：该属性存在且不为 None 时，这一层不替换。
    """

    path: str = ""
    cls: type | None = None
    q_proj: str | None = "q_proj"
    q_a_proj: str | None = "q_a_proj"
    q_a_layernorm: str | None = "q_a_layernorm"
    q_b_proj: str | None = "q_b_proj"
    kv_a_proj: str = "kv_a_proj_with_mqa"
    kv_a_layernorm: str = "kv_a_layernorm"
    kv_b_proj: str = "kv_b_proj"
    o_proj: str = "o_proj"
    kv_lora_rank: str = "kv_lora_rank"
    qk_nope_head_dim: str = "qk_nope_head_dim"
    qk_rope_head_dim: str = "qk_rope_head_dim"
    v_head_dim: str = "v_head_dim"
    layer_idx: str = "layer_idx"
    scaling: str = "scaling"
    rope: str = "config"
    rope_complex: bool = False
    q_latent_scale: str | None = None
    q_scale: str | None = None
    kv_scale: str | None = None
    k_rope_layernorm: str | None = None
    q_position_scale: str | None = None
    gate: str | None = None
    gate_fp32: bool = False
    returns_tuple: bool = True
    refuse: tuple[tuple[str, str], ...] = field(default=())

    @property
    def key(self) -> str:
        """登记用的名字。"""
        return self.path if self.cls is None else class_path(self.cls)


def class_path(cls: type) -> str:
    """类的完整路径。"""
    return f"{cls.__module__}.{cls.__qualname__}"


def _hf(model_type: str, name: str, **fields: Any) -> AttentionSpec:
    path = f"transformers.models.{model_type}.modeling_{model_type}.{name}"
    return AttentionSpec(path=path, **fields)


SPECS: dict[str, AttentionSpec] = {
    spec.key: spec
    for spec in (
        _hf("axk1", "AXK1Attention"),
        _hf(
            "bailing_hybrid",
            "BailingHybridAttention",
            rope="interleaved",
            gate="g_proj",
            gate_fp32=True,
        ),
        _hf("deepseek_v2", "DeepseekV2Attention", rope="interleaved", rope_complex=True),
        _hf("deepseek_v3", "DeepseekV3Attention"),
        _hf(
            "dots3_note",
            "Dots3NoteTextAttention",
            rope="interleaved",
            q_latent_scale="q_lora_scale",
            kv_scale="kv_lora_scale",
            k_rope_layernorm="k_rope_only_layernorm",
            gate="g_proj",
            refuse=(("indexer", _DSA), ("sliding_window", "滑动窗口注意力：只看最近的词元")),
        ),
        _hf("glm4_moe_lite", "Glm4MoeLiteAttention"),
        _hf("kimi_linear", "KimiLinearAttention", rope="none"),
        _hf(
            "longcat_flash",
            "LongcatFlashMLA",
            rope="interleaved",
            q_scale="mla_scale_q_lora",
            kv_scale="mla_scale_kv_lora",
        ),
        _hf("minicpm3", "MiniCPM3Attention", rope="half"),
        _hf("mistral4", "Mistral4Attention", q_position_scale="llama4"),
        _hf("youtu", "YoutuAttention"),
    )
}

# transformers 里有 kv_lora_rank、但不替换的类，及其原因。
SKIPPED: dict[str, str] = {
    f"transformers.models.{model_type}.modeling_{model_type}.{name}": reason
    for model_type, name, reason in (
        ("axk2", "AXK2Attention", _DSA),
        ("deepseek_v32", "DeepseekV32Attention", _DSA),
        ("glm5_next", "Glm5NextTextAttention", _DSA),
        ("glm_moe_dsa", "GlmMoeDsaAttention", _DSA),
        ("hy_v4", "HYV4Attention", _DSA + "；另有可学习的 softmax 汇点（sinks）"),
        ("mistral_large4", "MistralLarge4TextAttention", _DSA + "；另有跨层共享 KV"),
    )
}


def register_spec(spec: AttentionSpec) -> None:
    """登记一种注意力类；同名的旧登记被替换。"""
    if not isinstance(spec, AttentionSpec) or not spec.key:
        raise InputError.expected("spec", "给出 path 或 cls 的 AttentionSpec", spec)
    if spec.rope not in ("interleaved", "half", "none", "config"):
        raise InputError.expected("spec.rope", "interleaved、half、none 或 config", spec.rope)
    if spec.rope_complex and spec.rope != "interleaved":
        wanted = "interleaved（rope_complex=True 的输入成对）"
        raise InputError.expected("spec.rope", wanted, spec.rope)
    SPECS[spec.key] = spec


def find_spec(module: nn.Module) -> AttentionSpec | None:
    """module 的描述；子类只有在没有改写 forward 时才沿用父类的描述。"""
    for cls in type(module).__mro__:
        spec = SPECS.get(class_path(cls))
        if spec is not None:
            return spec if type(module).forward is cls.forward else None
    return None


def skip_reason(module: nn.Module) -> str | None:
    """有描述可查、但这一个实例不能替换的原因；可以替换则为 None。"""
    path = class_path(type(module))
    if path in SKIPPED:
        return SKIPPED[path]
    spec = find_spec(module)
    if spec is None:
        if any(class_path(cls) in SPECS for cls in type(module).__mro__):
            return f"{type(module).__name__} 改写了父类的 forward，行为未知"
        return f"{type(module).__name__} 像是 MLA，但没有登记；可用 register_spec 登记"
    for name, reason in spec.refuse:
        if getattr(module, name, None) is not None:
            return reason
    return None


def looks_like_mla(module: nn.Module) -> bool:
    """是否是 MLA 注意力（不论是否支持）：登记过，或带有 kv_lora_rank 与 kv_b_proj。"""
    if any(class_path(cls) in SPECS for cls in type(module).__mro__):
        return True
    if class_path(type(module)) in SKIPPED:
        return True
    return hasattr(module, "kv_lora_rank") and isinstance(
        getattr(module, "kv_b_proj", None), nn.Module
    )


def cache_geometry(model: nn.Module) -> dict[int, tuple[int, int, Tensor]]:
    """{层号: (r, dr, 一个给出 dtype 与设备的权重)}；没有受支持的层时抛出 UnsupportedError。"""
    found = {}
    for module in model.modules():
        own = getattr(module, "latent_geometry", None)
        if own is not None:  # 本库自己的 MLAAttention
            index, *shape = own()
            if index in found:
                raise InputError(f"有两层 MLAAttention 的 layer_idx 都是 {index}；每层应各不相同")
            found[index] = tuple(shape)
            continue
        spec = find_spec(module)
        if spec is None or skip_reason(module) is not None:
            continue
        rank = getattr(module, spec.kv_lora_rank)
        weight = next(getattr(module, spec.kv_a_layernorm).parameters())
        found[getattr(module, spec.layer_idx)] = (
            rank,
            getattr(module, spec.qk_rope_head_dim),
            weight,
        )
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} 里没有受支持的 MLA 注意力层，不能为它建 LatentCache"
        )
    if sorted(found) != list(range(len(found))):
        raise UnsupportedError(
            f"{type(model).__name__} 的 MLA 层是第 {sorted(found)} 层，其余层需要别的状态；"
            "请用 transformers 的 DynamicCache(config=model.config)，MLA 层会自动改用潜变量缓存"
        )
    return found
