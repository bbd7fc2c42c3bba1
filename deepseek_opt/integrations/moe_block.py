"""替换“门 → 专家 → 加共享专家”的整块：共享专家与路由专家由一次 ``ops.moe_experts`` 算完。

块的写法是数据（:data:`BLOCKS`）：加一种块通常只需加一行。
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt import ops
from deepseek_opt.eval_mode import evaluating
from deepseek_opt.integrations import experts
from deepseek_opt.integrations.dense import ffn_reason, instance_reason, probe_ffn
from deepseek_opt.integrations.expert_store import SharedTensors
from deepseek_opt.integrations.experts import ExpertsPatch
from deepseek_opt.integrations.patch import QuantizablePatch, patch_of
from deepseek_opt.integrations.projections import is_hooked, is_plain
from deepseek_opt.integrations.router import RouterPatch, route
from deepseek_opt.integrations.runtime import Runtime
from deepseek_opt.integrations.specs import class_path

_FFN = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class MoeBlockSpec:
    """一种 MoE 块；字符串都是块实例上的属性名，None 为没有。

    属性：
        path: 类的完整路径。
        gate: 路由器，返回 (logits, 权重 [T, k], 下标 [T, k])。
        experts、shared: 路由专家；共享的门控 FFN。
        shared_gate: 共享专家的逐词元系数 sigmoid(x · g)。
        flat_gate: 路由器的输入先展平成 [T, H]。
        gate_args: 路由器的其余参数。
        scale: 路由专家的输出乘的系数。
        post: 最后的归一化。
    """

    path: str
    gate: str = "gate"
    experts: str = "experts"
    shared: str = "shared_experts"
    shared_gate: str | None = None
    flat_gate: bool = False
    gate_args: tuple[str, ...] = ()
    scale: str | None = None
    post: str | None = None


def _hf(model_type: str, name: str, **fields: Any) -> MoeBlockSpec:
    return MoeBlockSpec(f"transformers.models.{model_type}.modeling_{model_type}.{name}", **fields)


# forward 与 DeepSeek-V3 逐句相同的类。
_DEEPSEEK = (
    ("axk2", "AXK2MoE"),
    ("bailing_hybrid", "BailingHybridMoE"),
    ("deepseek_ocr2", "DeepseekOcr2TextMoe"),
    ("deepseek_v2", "DeepseekV2Moe"),
    ("deepseek_v3", "DeepseekV3MoE"),
    ("deepseek_v32", "DeepseekV32MoE"),
    ("dots1", "Dots1MoE"),
    ("dots3_note", "Dots3NoteTextMoE"),
    ("exaone_moe", "ExaoneMoeSparseMoEBlock"),
    ("glm4_moe", "Glm4MoeMoE"),
    ("glm4_moe_lite", "Glm4MoeLiteMoE"),
    ("glm4v_moe", "Glm4vMoeTextMoE"),
    ("glm5_next", "Glm5NextTextMoE"),
    ("glm_moe_dsa", "GlmMoeDsaMoE"),
    ("hy_v4", "HYV4MoE"),
    ("kimi_linear", "KimiLinearMoE"),
    ("kolibri1", "Kolibri1SparseMoeBlock"),
    ("mistral4", "Mistral4MoE"),
    ("mistral_large4", "MistralLarge4TextMoE"),
    ("solar_open", "SolarOpenMoE"),
    ("unlimited_ocr", "UnlimitedOcrTextMoe"),
)
# forward 与 Qwen2-MoE 逐句相同的类：共享专家有逐词元的系数。
_QWEN = (
    ("qwen2_moe", "Qwen2MoeSparseMoeBlock"),
    ("qwen3_5_moe", "Qwen3_5MoeSparseMoeBlock"),
    ("qwen3_next", "Qwen3NextSparseMoeBlock"),
    ("qwen3_omni_moe", "Qwen3OmniMoeTalkerTextSparseMoeBlock"),
    ("qwen4_exp", "Qwen4ExpTextSparseMoeBlock"),
)
_GATED = {"shared": "shared_expert", "shared_gate": "shared_expert_gate", "flat_gate": True}
_SCALED = {"flat_gate": True, "scale": "routed_scaling_factor"}

BLOCKS: dict[str, MoeBlockSpec] = {
    spec.path: spec
    for spec in (
        *(_hf(*names) for names in _DEEPSEEK),
        *(_hf(*names, **_GATED) for names in _QWEN),
        _hf("afmoe", "AfmoeSparseMoeBlock", gate="router", gate_args=("expert_bias",)),
        _hf("axk1", "AXK1MoE", post="post_mlp_layernorm"),
        _hf("ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock", flat_gate=True),
        _hf("flint", "FlintSparseMoeBlock", shared="shared_expert", flat_gate=True),
        _hf("hunyuan_v1_moe", "HunYuanMoEV1Moe", shared="shared_mlp", flat_gate=True),
        _hf("hy_v3", "HYV3MoE", flat_gate=True, gate_args=("e_score_correction_bias",)),
        _hf("laguna", "LagunaSparseMoeBlock", **_SCALED),
    )
}


class MoeBlockPatch(QuantizablePatch):
    """一个 MoE 块的新 forward；专家的计数在它的 :class:`ExpertsPatch` 上，``store`` 是量化的共享专家。"""

    kind = "moe"

    def __init__(self, module: nn.Module, runtime: Runtime, name: str, spec: MoeBlockSpec):
        super().__init__(module, runtime, name)
        self.spec = spec

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.runtime.require_moe()
        reason = "有额外的参数" if args or kwargs else self._refusal(hidden_states)
        if reason is not None:
            self.give_way(reason)
            return self.call_original(hidden_states, *args, **kwargs)
        module, spec = self.module, self.spec
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        patch = patch_of(module._modules[spec.experts])
        weights, indices = self._routed(flat, hidden_states, patch)
        if spec.scale is not None:
            weights = weights * getattr(module, spec.scale)
        shared = self._shared(flat)
        out = patch.compute(flat, indices, weights, shared)
        out = out.view(hidden_states.shape)
        return out if spec.post is None else getattr(module, spec.post)(out)

    def _routed(self, flat: Tensor, hidden: Tensor, patch: ExpertsPatch) -> tuple[Tensor, Tensor]:
        """(权重, 下标)，各 [T, k]；顺带计数。"""
        module, spec, training = self.module, self.spec, patch.module.training
        gate = module._modules[spec.gate]
        mine = isinstance(patch_of(gate), RouterPatch) and not is_hooked(gate)
        if mine and ops.missing(flat, "moe_route") is None:
            _, weights, indices, counts = route(gate, flat)
            patch.load_counter.add(counts, training=training)
            return weights, indices
        extra = (getattr(module, name) for name in spec.gate_args)
        _, weights, indices = gate(flat if spec.flat_gate else hidden, *extra)
        weights, indices = (t.reshape(-1, t.shape[-1]) for t in (weights, indices))
        patch.load_counter.add_indices(indices, training=training)
        return weights, indices

    def shared_weights(self) -> list[Tensor]:
        """共享专家的三个原权重。"""
        parts = self.module._modules[self.spec.shared]._modules
        return [parts[name]._parameters["weight"] for name in _FFN]

    def _shared(self, flat: Tensor) -> SharedTensors:
        """共享专家，可再带逐词元的系数 [T]（不量化）。"""
        coefficient = []
        if self.spec.shared_gate is not None:
            logit = getattr(self.module, self.spec.shared_gate)(flat)
            coefficient.append(torch.sigmoid(logit).squeeze(-1))
        if self.store is not None:
            return self.store.shared_tensors(coefficient)
        return SharedTensors(self.shared_weights() + coefficient)

    def _refusal(self, hidden: Tensor) -> str | None:
        """这次调用不能一起算的原因：原 forward 里的专家部分仍由 ExpertsPatch 计算。"""
        inner = self.module._modules[self.spec.experts]
        patch = patch_of(inner)
        if not isinstance(patch, ExpertsPatch):
            return "专家的补丁已被取下"
        reason = "专家" + _BY_HOOKS if is_hooked(inner) else patch.refusal(hidden)
        reason = reason or _shared_reason(self.module, self.spec)
        if reason is None and self.store is not None:
            reason = self.store.refusal(self.module)
        return reason


def find_block(module: nn.Module) -> MoeBlockSpec | None:
    """module 的描述；子类只有在没有改写 forward 时才沿用父类的。"""
    for cls in type(module).__mro__:
        spec = BLOCKS.get(class_path(cls))
        if spec is not None:
            return spec if type(module).forward is cls.forward else None
    return None


def block_reason(module: nn.Module, spec: MoeBlockSpec, profile: Any) -> str | None:
    """这个块不能整块替换的原因；它的专家应已换上 ExpertsPatch。"""
    if getattr(module, spec.shared, None) is None:
        return "没有共享专家"
    layout = patch_of(getattr(module, spec.experts)).layout
    if layout.transposed or not layout.gated or layout.activation != "silu":
        return "路由专家的权重是转置存放的，或不是 SiLU 门控，不能与共享专家合在一起"
    reason = instance_reason(module) or _shared_reason(module, spec)
    if reason is not None:
        return reason
    if any(is_hooked(part) for part in module.modules()):
        return "块内有钩子"
    return probe_ffn(getattr(module, spec.shared)) or _probe(module, spec, profile)


def shared_paths(module: nn.Module, spec: MoeBlockSpec) -> tuple[str, ...]:
    """共享专家三个权重的路径；不是三个普通 nn.Linear 的门控 FFN 时为空。"""
    mlp = getattr(module, spec.shared, None)
    if not all(type(getattr(mlp, part, None)) is nn.Linear for part in _FFN):
        return ()
    return tuple(f"{spec.shared}.{part}.weight" for part in _FFN)


_BY_HOOKS = "上有钩子，合在一起算就不会触发它"


def _shared_reason(module: nn.Module, spec: MoeBlockSpec) -> str | None:
    mlp = module._modules.get(spec.shared)
    if mlp is None or any(mlp._modules.get(part) is None for part in _FFN):
        return f"{spec.shared} 不是 gate_proj、up_proj、down_proj 的门控 FFN"
    if is_hooked(mlp):
        return spec.shared + _BY_HOOKS
    reason = instance_reason(mlp) or ffn_reason(mlp)
    if reason is None and spec.shared_gate is not None:
        gate = getattr(module, spec.shared_gate)
        if not is_plain(gate) or gate.out_features != 1:
            reason = f"{spec.shared_gate} 不是输出一维的普通 nn.Linear"
    return reason


def _probe(module: nn.Module, spec: MoeBlockSpec, profile: Any) -> str | None:
    """几个词元走一遍原来的块，与整块替换的结果比较：transformers 换了写法也能发现。"""
    weight = getattr(module, spec.shared).gate_proj.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, weight.shape[1], generator=generator) * torch.tensor([[1.0], [1], [30]])
    x = x.to(weight.device, weight.dtype)
    patch = MoeBlockPatch(module, Runtime(profile), "", spec)
    # 训练模式下量化的专家不计算，核对的是 eval 时的写法
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False), evaluating(module):
        try:
            actual = type(module).forward(module, x)
            expected = patch(x)
        except (RuntimeError, TypeError, AttributeError, ValueError):
            return "forward 的参数或路由器的返回值与登记的写法不同"
        finally:
            patch_of(getattr(module, spec.experts)).load_counter.reset()
    return None if experts.close(actual, expected) else "forward 与登记的写法不同"
