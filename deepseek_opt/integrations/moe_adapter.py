"""自己写的 MoE：一个门加一组专家（``nn.ModuleList``）的类怎样取权重、怎样路由，全部是数据。

用 :func:`register_moe` 登记之后 ``optimize`` 就认得::

    from deepseek_opt import MoeAdapter, register_moe

    register_moe(MoeAdapter(cls=MyMoE, gate_proj="w1", up_proj="w3", down_proj="w2"))
    deepseek_opt.optimize(my_model, OptimizationProfile(moe=MOEConfig()))

登记只是声明；换上之前用随机数与类自己的 forward 核对过，对不上的不换，报告里写明。
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from deepseek_opt import ops
from deepseek_opt.errors import InputError
from deepseek_opt.integrations.specs import class_path


@dataclass(frozen=True)
class MoeAdapter:
    """一种自己写的 MoE 类的描述；字符串字段是属性名，可以带点（``"mlp.w1"``、``"0"``），None 为没有。

    块的 forward 应是 ``forward(hidden)``，[..., H] -> [..., H]：门给出 logits，每个词元选 top_k 个专家，
    y = Σ 权重 · down(a(gate x) * up x)，再加共享专家。

    属性：
        path: 类的完整路径 ``模块.类名``；或用 cls。
        cls: 类本身。
        gate: 门，输入 [T, H] 输出 logits [T, E] 的模块（通常是 nn.Linear）。
        gate_fp32: logits 由门的 weight、bias 以 fp32 计算，而不是调用门。
        experts: nn.ModuleList，各专家的写法相同。
        gate_proj、up_proj、down_proj: 专家里的投影。up_proj 为 None 时没有门：down(a(gate_proj x))。
        fused: gate 与 up 在同一个 nn.Linear（由 gate_proj 给出）里，前一半是 gate；此时 up_proj 应为 None。
        activation、alpha、limit: 见 :func:`deepseek_opt.ops.moe_experts`；limit 可以是块上的属性名。
        top_k: 每个词元的专家数，或块上的属性名。
        score、normalize、softmax_after、n_group、topk_group、group_score、scaling: 见
            :func:`deepseek_opt.ops.moe_route`；score、group_score 以外的也可以是块上的属性名。
        choice_bias: 只影响选择的偏置 [E]；给了它，:func:`deepseek_opt.update_expert_bias` 就更新它。
        shared: 共享专家，对每个词元都算的一个模块；投影与专家同名的一次算完，否则调用它。
        shared_gate: 共享专家的逐词元系数 sigmoid(x · g)，输出一维的模块。
        returns_logits: forward 返回 (输出, logits [T, E])，而不只是输出。

    示例::

        MoeAdapter(cls=MyMoE, gate_proj="w1", up_proj="w3", down_proj="w2", top_k="num_active")
    """

    path: str = ""
    cls: type | None = None
    gate: str = "gate"
    gate_fp32: bool = False
    experts: str = "experts"
    gate_proj: str = "gate_proj"
    up_proj: str | None = "up_proj"
    down_proj: str = "down_proj"
    fused: bool = False
    activation: str = "silu"
    alpha: float = 1.702
    limit: float | str = 7.0
    top_k: int | str = "top_k"
    score: str = "softmax"
    normalize: bool | str = True
    softmax_after: bool | str = False
    n_group: int | str = 1
    topk_group: int | str = 1
    group_score: str = "top2"
    scaling: float | str = 1.0
    choice_bias: str | None = None
    shared: str | None = None
    shared_gate: str | None = None
    returns_logits: bool = False

    @property
    def key(self) -> str:
        """登记用的名字。"""
        return self.path if self.cls is None else class_path(self.cls)

    @property
    def gated(self) -> bool:
        """专家有没有门。"""
        return self.fused or self.up_proj is not None

    def rule(self, module: nn.Module) -> dict[str, Any]:
        """``ops.moe_route`` 的关键字参数；属性是活的，改了下一次生效。"""
        names = ("top_k", "normalize", "softmax_after", "n_group", "topk_group", "scaling")
        found = {name: self.value(module, name) for name in names}
        found["scaling"] = float(found["scaling"])
        return {**found, "score": self.score, "group_score": self.group_score}

    def value(self, module: nn.Module, name: str) -> Any:
        """字段 name 的值；给的是属性名时到 module 上取。"""
        value = getattr(self, name)
        return resolve(module, value) if isinstance(value, str) else value


#: 类的完整路径 -> 描述。
ADAPTERS: dict[str, MoeAdapter] = {}


def register_moe(adapter: MoeAdapter) -> None:
    """登记一种自己写的 MoE 类，此后 ``optimize`` 认得它；同名的旧登记被替换。

    抛出 InputError：adapter 不是给出 path 或 cls 的 MoeAdapter，或某个字段不在允许的值之内。

    示例::

        deepseek_opt.register_moe(MoeAdapter(cls=MyMoE, activation="gelu"))
    """
    if not isinstance(adapter, MoeAdapter) or not adapter.key:
        raise InputError.expected("adapter", "给出 path 或 cls 的 MoeAdapter", adapter)
    allowed = {
        "activation": ops.ACTIVATIONS,
        "score": ops.SCORES,
        "group_score": ("top2", "max"),
    }
    for name, values in allowed.items():
        if getattr(adapter, name) not in values:
            given = getattr(adapter, name)
            raise InputError.expected(f"adapter.{name}", f" {'、'.join(values)} 之一", given)
    if adapter.fused and adapter.up_proj is not None:
        raise InputError.expected("adapter.up_proj", " None（fused 为 True 时）", adapter.up_proj)
    if not adapter.gated and (adapter.activation in ops.CLIPPED):
        raise InputError.expected("adapter.activation", "不截断的（没有门时）", adapter.activation)
    ADAPTERS[adapter.key] = adapter


def find_adapter(module: nn.Module) -> MoeAdapter | None:
    """module 的类（或父类）的登记；改写了 forward 的子类也返回，由 :func:`adapter_reason` 说明。"""
    return next((ADAPTERS[p] for p in map(class_path, type(module).__mro__) if p in ADAPTERS), None)


def adapter_reason(module: nn.Module) -> str | None:
    """登记不适用于这个实例的类的原因。"""
    for cls in type(module).__mro__:
        if class_path(cls) in ADAPTERS:
            if type(module).forward is not cls.forward:
                return f"{type(module).__name__} 改写了父类的 forward，行为未知；请单独登记它"
            return None
    return f"{type(module).__name__} 没有登记"


def resolve(module: nn.Module, path: str) -> Any:
    """module 上带点的属性；没有时抛出 AttributeError。"""
    for part in path.split("."):
        module = getattr(module, part)
    return module


def describe_unregistered(module: nn.Module) -> str | None:
    """没有登记、但像是 MoE（门 + 一组专家）的模块：写明像在哪里、怎样登记；不像则为 None。"""
    children = dict(module.named_children())
    for name, experts in children.items():
        if not isinstance(experts, nn.ModuleList) or not _are_experts(experts):
            continue
        for gate, linear in children.items():
            if getattr(linear, "out_features", None) == len(experts):
                return _advice(module, gate, name, experts)
    return None


def _are_experts(experts: nn.ModuleList) -> bool:
    """至少两个、同一个类、各有至少两个 nn.Linear。"""
    if len(experts) < 2 or len({type(expert) for expert in experts}) > 1:
        return False
    return len(list(_linears(experts[0]))) >= 2


def _linears(expert: nn.Module) -> Iterator[str]:
    return (name for name, part in expert.named_modules() if isinstance(part, nn.Linear) and name)


def _advice(module: nn.Module, gate: str, name: str, experts: nn.ModuleList) -> str:
    kind, parts = type(experts[0]).__name__, "、".join(_linears(experts[0]))
    changed = {"gate": gate, "experts": name}
    defaults = {field.name: field.default for field in fields(MoeAdapter)}
    shown = [f'{key}="{value}"' for key, value in changed.items() if defaults[key] != value]
    arguments = ", ".join([f"cls={type(module).__name__}", *shown, "gate_proj=…, up_proj=…"])
    return (
        f"像是 MoE（门 {gate}，{len(experts)} 个专家 {name}：{kind}，其中的 nn.Linear 有 {parts}），"
        f"但没有登记；可用 deepseek_opt.register_moe(MoeAdapter({arguments}, …)) 登记"
    )
