"""替换一个 transformers ``*Experts`` 实例的 forward：全部专家一次 ``ops.moe_experts`` 算完。

认的是接口而不是类名：类经过 ``use_experts_implementation`` 装饰，参数的形状与它的标志吻合，激活与整个
forward 用一小段随机数核对过。核对不上的如实跳过；运行中条件变了的逐次交给原 forward，并在报告里计数。
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deepseek_opt import ops
from deepseek_opt.integrations.expert_store import ExpertStore, SharedTensors
from deepseek_opt.integrations.patch import QuantizablePatch
from deepseek_opt.integrations.runtime import Runtime
from deepseek_opt.load import LoadCounter
from deepseek_opt.reference.moe import activate

_INTERFACE = "transformers.integrations.moe"
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# 核对激活用的点：覆盖各种饱和、截断与 gelu 两种写法差别最大之处；两两配成 (gate, up)。
_POINTS = (0.0, 0.1, 0.5, 1.0, 2.0, 3.0, 6.0, 8.0, 11.0, 30.0, 100.0, 1000.0)


class ExpertsLayout(NamedTuple):
    """怎样把一个 Experts 实例交给 ``ops.moe_experts``。

    scalars 是截断的激活用到的 (属性名, 值)，之后被改动就不再适用。
    """

    activation: str
    alpha: float
    limit: float
    transposed: bool
    interleaved: bool
    gated: bool
    scalars: tuple[tuple[str, float], ...]


class ExpertsPatch(QuantizablePatch):
    """一个 Experts 实例的新 forward；``load_counter`` 累计各专家分到的词元数。

    有 ``store`` 时用量化的专家；训练模式、原权重被改动时用原权重（已释放则报错）。
    """

    kind = "moe"

    def __init__(self, module: nn.Module, runtime: Runtime, name: str, layout: ExpertsLayout):
        super().__init__(module, runtime, name)
        self.layout = layout
        self.activation = getattr(module, "act_fn", None)
        self.load_counter = LoadCounter(module.num_experts)

    def __call__(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        self.runtime.require_moe()
        self.load_counter.add_indices(top_k_index, training=self.module.training)
        reason = self.refusal(hidden_states)
        if args or kwargs:
            reason = "调用方式不是 forward(hidden_states, top_k_index, top_k_weights)"
        elif reason is None and hidden_states.dim() != 2:
            reason = f"hidden_states 是 {hidden_states.dim()} 维，不是 [T, H]"
        if reason is None:
            return self.compute(hidden_states, top_k_index, top_k_weights)
        self.give_way(reason)
        return self.call_original(hidden_states, top_k_index, top_k_weights, *args, **kwargs)

    def compute(
        self, x: Tensor, indices: Tensor, weights: Tensor, shared: SharedTensors | None = None
    ) -> Tensor:
        """x [T, H] -> [T, H]。"""
        module, store = self.module, self.store
        if store is not None:
            return store.compute(x, indices, weights, shared, store.biases(module))
        tensors = () if shared is None else shared.tensors
        recompute = self.runtime.recompute_experts
        return compute(module, self.layout, x, indices, weights, tensors, recompute=recompute)

    def refusal(self, hidden: Tensor) -> str | None:
        """这次调用不能由本库计算的原因；可以则为 None。"""
        module, layout = self.module, self.layout
        if getattr(module, "act_fn", None) is not self.activation:
            return "激活函数在优化之后被换掉了"
        if any(getattr(module, name, None) != value for name, value in layout.scalars):
            return "激活的参数（alpha、limit）在优化之后被改动了"
        if self.store is not None:
            reason = input_reason(hidden, "moe_experts_quantized") or parallel_reason(module)
            return reason or self.store.refusal(module)
        return input_reason(hidden) or state_reason(module, hidden)


def looks_like_experts(module: nn.Module) -> bool:
    """是否是接入 experts 接口的类的实例（不论能否替换）。"""
    state = module.__dict__
    return all(name in state for name in _FLAGS) and hasattr(module, "num_experts")


def resembles_experts(module: nn.Module) -> bool:
    """带有成叠的专家权重，但没有接入 experts 接口。"""
    weights = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    return not looks_like_experts(module) and all(w is not None and w.dim() == 3 for w in weights)


def layout_of(
    module: nn.Module, store: ExpertStore | None = None
) -> tuple[ExpertsLayout | None, str | None]:
    """(布局, 不能替换的原因)，恰有一个为 None；store 是没有原权重时的量化专家。"""
    reason = _class_reason(module)
    if reason is None and store is not None:
        module = store.stand_in(module)
    reason = reason or state_reason(module)
    if reason is not None:
        return None, reason
    layout = identify(module)
    if layout is None:
        return None, f"激活不是本库支持的任何一种（{'、'.join(ops.ACTIVATIONS)}）"
    reason = _probe(module, layout)
    return (None, reason) if reason else (layout, None)


def compute(
    module: nn.Module,
    layout: ExpertsLayout,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    shared: Sequence[Tensor] = (),
    *,
    recompute: bool = False,
) -> Tensor:
    """x [T, H] -> [T, H]；权重此刻才读，因此参数化（PEFT 等）之后的有效权重也对。"""
    up, down = (getattr(module, name) for name in weight_names(module))
    up_bias, down_bias = _biases(module)
    stacked = (up, up_bias, down, down_bias, shared)
    act = (layout.activation, layout.alpha, layout.limit)
    out = ops.moe_experts(
        x,
        indices.to(torch.int64),
        weights,
        *stacked,
        *act,
        transposed=layout.transposed,
        interleaved=layout.interleaved,
        gated=layout.gated,
        recompute=recompute,
    )
    return out.to(x.dtype)  # autocast 里算子按低精度输出，原实现仍是 x 的类型


def original_forward(module: nn.Module) -> Any:
    """装饰之前的（eager）forward 函数。"""
    return inspect.unwrap(type(module).forward)


def input_reason(hidden: Tensor, *names: str) -> str | None:
    """这个输入不能由本库计算的原因；names 是要用的算子。"""
    if hidden.dtype not in _DTYPES:
        return f"数据类型 {hidden.dtype} 不受支持"
    return ops.missing(hidden, *(names or ("moe_experts",)))


def parallel_reason(module: nn.Module) -> str | None:
    """专家并行时不能用。"""
    parallel = module.__dict__.get("_is_expert_parallel")
    return "专家并行：每个进程只有一部分专家" if parallel else None


def state_reason(module: nn.Module, hidden: Tensor | None = None) -> str | None:
    """这个实例此刻的权重与状态（给了输入时连同设备）不能用的原因；每次调用都看。"""
    reason = parallel_reason(module)
    if reason is not None:
        return reason
    names = weight_names(module)
    up, down = (_weight(module, name) for name in names)
    if not (_is_plain_weight(up) and _is_plain_weight(down)):
        for name, weight in zip(names, (up, down), strict=True):
            reason = weight_reason(name, weight)
            if reason is not None:
                return reason
    if up.dtype != down.dtype:
        return f"上、下投影的类型不同：{up.dtype} 与 {down.dtype}"
    where = up.device if hidden is None else hidden.device
    if up.device != where or down.device != where:
        return f"权重在 {up.device}、{down.device} 上，与输入（{where}）不在同一设备上"
    return _shape_reason(module, up, down)


# ---- 内部 ----


def _weight(module: nn.Module, name: str) -> Any:
    """权重；参数化（PEFT 等）之后不在 _parameters 里，经属性得到。"""
    found = module._parameters.get(name)
    return getattr(module, name, None) if found is None else found


def _is_plain_weight(weight: Any) -> bool:
    """常见的情形先放行：每层每步都要看。"""
    return (
        type(weight) is nn.Parameter
        and (weight.is_cpu or weight.is_cuda)
        and weight.dtype in _DTYPES
    )


def weight_names(module: nn.Module) -> tuple[str, str]:
    """上（或合并的 gate、up）、下投影的参数名。"""
    return ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")


def _biases(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    if not module.has_bias:
        return None, None
    up, down = weight_names(module)
    return getattr(module, up + "_bias"), getattr(module, down + "_bias")


def _class_reason(module: nn.Module) -> str | None:
    cls = type(module)
    if getattr(cls.forward, "__globals__", {}).get("__name__") != _INTERFACE:
        return f"{cls.__name__} 的 forward 被改写，不再是 transformers 的 experts 接口"
    if getattr(module, "has_post_expert_norm", False):
        return "每个专家的输出之后有归一化（has_post_expert_norm），融合核不做"
    return None


def weight_reason(name: str, weight: Any) -> str | None:
    """这个权重不能由核读取的原因。"""
    if not isinstance(weight, Tensor):
        return f"没有权重 {name}（可能已被量化）"
    if is_traceable_wrapper_subclass(weight):
        return f"{name} 是 {type(weight).__name__}，不是普通张量"
    if weight.is_meta:
        return f"{name} 还在 meta 设备上"
    if weight.dtype not in _DTYPES:
        return f"{name} 的类型 {weight.dtype} 不受支持"
    return None


def _shape_reason(module: nn.Module, up: Tensor, down: Tensor) -> str | None:
    first, last = up.shape, down.shape
    if len(first) != 3 or len(last) != 3:
        return f"专家权重不是三维：{list(first)}、{list(last)}"
    width, inner = (2, 1) if module.is_transposed else (1, 2)
    times = 2 if module.has_gate else 1
    experts = module.num_experts
    if first[0] != experts or last[0] != experts:
        return f"专家权重的个数不是 num_experts={experts}：{list(first)}、{list(last)}"
    if first[width] != times * last[inner]:
        return f"专家权重的形状对不上：{list(first)}、{list(last)}"
    return None


def identify(module: nn.Module) -> ExpertsLayout | None:
    """用固定的点核对激活；与哪一种都对不上为 None。"""
    # 双精度：gelu 的尾部在单精度里只剩舍入
    points = torch.tensor(sorted({*_POINTS, *(-p for p in _POINTS)}), dtype=torch.float64)
    gate, up = torch.cartesian_prod(points, points).T
    transposed, gated = bool(module.is_transposed), bool(module.has_gate)
    with torch.no_grad():
        for interleaved in (not module.is_concatenated, bool(module.is_concatenated)):
            actual = _activated(module, gate, up, interleaved)
            for name, alpha, limit, scalars in _choices(module):
                if not gated and name in ops.CLIPPED:
                    continue
                expected = activate(gate, up if gated else None, name, alpha, limit)
                if actual is not None and _same(actual, expected):
                    flags = (transposed, gated and interleaved, gated)
                    return ExpertsLayout(name, alpha, limit, *flags, scalars)
    return None


def _activated(module: nn.Module, gate: Tensor, up: Tensor, interleaved: bool) -> Tensor | None:
    """模块自己的激活的结果 [n]。"""
    try:
        if not module.has_gate:
            return module.act_fn(gate)
        pair = torch.stack((gate, up), -1).flatten() if interleaved else torch.cat((gate, up))
        return module._apply_gate(pair[None])[0]
    except (RuntimeError, TypeError, AttributeError):
        return None


def _choices(module: nn.Module) -> list[tuple[str, float, float, tuple]]:
    """(激活, alpha, limit, 用到的属性)；截断的两个数取自实例上名字以 alpha、limit 结尾的属性。"""
    plain = [(name, 1.702, 7.0, ()) for name in ops.ACTIVATIONS if name not in ops.CLIPPED]
    numbers = {k: v for k, v in module.__dict__.items() if isinstance(v, (int, float))}
    alphas = [(k, float(v)) for k, v in numbers.items() if k.endswith("alpha")]
    limits = [(k, float(v)) for k, v in numbers.items() if k.endswith("limit")]
    clipped = [("clipped_silu", 1.702, limit[1], (limit,)) for limit in limits]
    clipped += [("clipped", a[1], b[1], (a, b)) for a in alphas for b in limits]
    return plain + clipped


def _same(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and torch.allclose(
        actual.double(), expected, rtol=1e-4, atol=1e-5
    )


def _probe(module: nn.Module, layout: ExpertsLayout) -> str | None:
    """几个词元走一遍装饰之前的 forward，与本库的结果比较；放大的一行会碰到截断。"""
    up = getattr(module, weight_names(module)[0])
    experts, width = module.num_experts, up.shape[1 if layout.transposed else 2]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, width, generator=generator) * torch.tensor([[1.0], [1.0], [30.0]])
    indices = torch.tensor([[0, experts - 1]] * 3, device=up.device)[:, : min(2, experts)]
    weights = torch.tensor([[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]])[:, : indices.shape[1]]
    x, weights = x.to(up.device, up.dtype), weights.to(up.device, up.dtype)
    with torch.no_grad(), torch.autocast(up.device.type, enabled=False):
        reason = ops.missing(up, "moe_experts")
        if reason is not None:
            return reason
        try:
            actual = original_forward(module)(module, x, indices, weights)
        except (RuntimeError, TypeError, AttributeError):
            return "forward 的参数不是 (hidden_states, top_k_index, top_k_weights)"
        expected = compute(module, layout, x, indices, weights)
    return None if close(actual, expected) else "forward 与 experts 接口约定的计算不同"


def close(actual: Any, expected: Tensor) -> bool:
    """逐行按各自的大小比较：核对的是“是不是同一个计算”，不是精度。"""
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return False
    actual, expected = actual.float(), expected.float()
    if not torch.equal(actual.isfinite(), expected.isfinite()):
        return False
    actual, expected = (t.nan_to_num(0.0, 0.0, 0.0) for t in (actual, expected))
    scale = expected.abs().amax(-1, keepdim=True)
    return bool(((actual - expected).abs() <= 0.03 * scale + 1e-6).all())
