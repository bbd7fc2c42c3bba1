"""MoE（混合专家）的配置：自建模型的 :class:`~deepseek_opt.MoEFeedForward` 由它构造。

对 transformers 模型，描述结构的字段是核对值；改变路由与均衡的字段只对本库的 MoE 层起作用。
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from deepseek_opt.config.base import ConfigBase, Conflict
from deepseek_opt.config.fields import Count, CountOrZero, PositiveFloat, Weight, expected

_GROUP_SIZES = (32, 64, 128)
_FP8_GROUP_SIZE = 128
_QUANTIZED = ("int8", "int4", "fp8")

# (字段, 它依赖的字段, 依赖字段允许的取值)：依赖不满足时该字段不起作用，按错误报出。
_DEPENDENT = (
    ("bias_update_rate", "balance_strategy", ("bias_update",)),
    ("aux_loss_weight", "balance_strategy", ("sequence_aux_loss", "global_aux_loss")),
    ("sequence_aux_loss_weight", "balance_strategy", ("bias_update",)),
    ("quantization_group_size", "quantization", ("int4", "fp8")),
    ("quantization_symmetric", "quantization", _QUANTIZED),
    ("keep_original_weights", "quantization", _QUANTIZED),
)

# 由专家选 token 时每个专家恰好取满容量：没有分组，没有丢弃，也没有逐 token 的归一化。
_NOT_FOR_EXPERT_CHOICE = (
    "n_group",
    "topk_group",
    "group_score",
    "norm_topk_prob",
    "drop_policy",
    "drop_renormalize",
    "pad_to_capacity",
)


def _check_group_size(value: Any) -> Any:
    if value is None or (isinstance(value, int) and value in _GROUP_SIZES):
        return value
    raise expected("应为 32、64 或 128")


GroupSize = Annotated[int, BeforeValidator(_check_group_size)]


class MOEConfig(ConfigBase):
    """MoE 的配置；所有字段都可省略，省略即“与模型一致”。

    自建模型用它构造 :class:`~deepseek_opt.MoEFeedForward`，那时 ``num_experts`` 与
    ``num_experts_per_tok`` 必须给出，其余省略为常用的默认值。

    ``optimize`` 替换 transformers 模型的专家计算：专家数、分组等描述结构的字段是核对值，不一致即报错；
    改变路由、均衡与容量的字段对这些模型不起作用，报告里逐项写明（strict 时报错）；``quantization`` 等由
    ``optimize`` 执行，对 :class:`~deepseek_opt.MoEFeedForward` 也起作用。

    示例::

        MOEConfig(num_experts=64, num_experts_per_tok=6, scoring_func="sigmoid")
        MOEConfig(balance_strategy="bias_update", bias_update_rate=0.001)
    """

    num_experts: Count | None = Field(None, description="路由专家总数")
    num_experts_per_tok: Count | None = Field(None, description="每个 token 激活的专家数")
    num_shared_experts: CountOrZero | None = Field(None, description="共享专家数")
    shared_expert_gate: bool | None = Field(
        None, description="共享专家的输出是否乘以逐 token 的 sigmoid 门"
    )
    routing_strategy: Literal["topk", "group_limited", "expert_choice"] | None = Field(
        None, description="路由策略：取前 k、先选组再取前 k、由专家选 token"
    )
    scoring_func: Literal["softmax", "sigmoid", "sqrtsoftplus"] | None = Field(
        None, description="打分函数"
    )
    normalize_before_topk: bool | None = Field(
        None, description="打分归一化在取前 k 之前（true）还是之后（false）"
    )
    n_group: Count | None = Field(None, description="专家分组数，须整除专家总数")
    topk_group: Count | None = Field(None, description="每个 token 可选的组数")
    group_score: Literal["top2_sum", "max"] | None = Field(
        None, description="组得分：组内最高两项之和，或最高一项"
    )
    routed_scaling_factor: PositiveFloat | None = Field(None, description="路由权重的缩放系数")
    norm_topk_prob: bool | None = Field(None, description="是否把选中专家的权重归一化")
    router_jitter: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="训练时路由输入的抖动幅度"
    )
    balance_strategy: (
        Literal["none", "bias_update", "sequence_aux_loss", "global_aux_loss", "forced"] | None
    ) = Field(None, description="负载均衡策略")
    bias_update_rate: PositiveFloat | None = Field(
        None, description="无辅助损失均衡的偏置更新步长 γ"
    )
    aux_loss_weight: Weight | None = Field(None, description="均衡辅助损失的权重")
    sequence_aux_loss_weight: Weight | None = Field(
        None, description="偏置更新之外，再加的序列级辅助损失的权重（DeepSeek-V3 为 1e-4）"
    )
    z_loss_weight: Weight | None = Field(None, description="路由 z 损失的权重")
    capacity_factor: PositiveFloat | None = Field(
        None, description="容量系数：每个专家至多处理 系数·token 数·k/专家数 个 token"
    )
    drop_policy: Literal["position", "probability"] | None = Field(
        None, description="超出容量时丢弃谁：按位置靠后，或按权重最低"
    )
    drop_renormalize: bool | None = Field(
        None, description="丢弃之后，是否把其余专家的权重放大到原来的总和"
    )
    pad_to_capacity: bool | None = Field(
        None, description="是否把每个专家的输入补齐到容量；结果不变，CPU 核不需要补齐"
    )
    recompute_experts: bool | None = Field(
        None, description="训练时专家的 gate、up 是否在反向里重算：激活更少，反向更慢"
    )
    quantization: Literal["none", "int8", "int4", "fp8"] | None = Field(
        None, description="专家权重的量化方式；fp8 是 float8_e4m3fn"
    )
    quantization_group_size: GroupSize | None = Field(
        None, description="int4 的分组大小：32、64、128；fp8 分组时只能是 128，不写为每行一个尺度"
    )
    quantization_symmetric: bool | None = Field(None, description="量化是否对称（无零点）")
    keep_original_weights: bool | None = Field(
        None, description="量化后是否保留原权重（保留才能 restore）"
    )

    # 只影响训练时的损失、丢弃、偏置更新与重算，不决定权重形状：改动从下一次调用起生效。
    live_fields: ClassVar[frozenset[str]] = frozenset(
        {
            "router_jitter",
            "bias_update_rate",
            "aux_loss_weight",
            "sequence_aux_loss_weight",
            "z_loss_weight",
            "capacity_factor",
            "drop_policy",
            "drop_renormalize",
            "pad_to_capacity",
            "recompute_experts",
        }
    )

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterable[Conflict]:
        yield from _routing_conflicts(values)
        yield from _group_conflicts(values)
        for field, on, allowed in _DEPENDENT:
            value = values.get(field)
            if value is not None and values.get(on) not in allowed:
                message = f"只用于 {on} 为 {' 或 '.join(allowed)} 时"
                yield Conflict((field, on), message, value)
        yield from _quantization_conflicts(values)
        for field in ("drop_policy", "drop_renormalize", "pad_to_capacity"):
            value = values.get(field)
            if value is not None and value is not False and values.get("capacity_factor") is None:
                yield Conflict((field, "capacity_factor"), "需要同时给出 capacity_factor", value)


def _quantization_conflicts(values: Mapping[str, Any]) -> Iterable[Conflict]:
    kind, group = values.get("quantization"), values.get("quantization_group_size")
    if kind in ("int8", "fp8") and values.get("quantization_symmetric") is False:
        message = f"{kind} 没有零点，只能是 true"
        yield Conflict(("quantization_symmetric", "quantization"), message, False)
    if kind == "fp8" and group not in (None, _FP8_GROUP_SIZE):
        message = f"fp8 分组时只能是 {_FP8_GROUP_SIZE}"
        yield Conflict(("quantization_group_size", "quantization"), message, group)


def _routing_conflicts(values: Mapping[str, Any]) -> Iterable[Conflict]:
    experts, active = values.get("num_experts"), values.get("num_experts_per_tok")
    if experts is not None and active is not None and active > experts:
        yield Conflict(
            ("num_experts_per_tok", "num_experts"), f"不能大于 num_experts = {experts}", active
        )
    balance = values.get("balance_strategy")
    if values.get("routing_strategy") == "expert_choice":
        if balance not in (None, "none"):
            yield Conflict(
                ("balance_strategy", "routing_strategy"),
                "expert_choice 由专家选 token，负载本来就均衡，不能再给均衡策略",
                balance,
            )
        for field in _NOT_FOR_EXPERT_CHOICE:
            if values.get(field):
                message = "不能与 routing_strategy = 'expert_choice' 同用：由专家选 token，每个专家取满容量"
                yield Conflict((field, "routing_strategy"), message, values[field])
    if values.get("shared_expert_gate") and values.get("num_shared_experts") == 0:
        yield Conflict(
            ("shared_expert_gate", "num_shared_experts"), "需要 num_shared_experts 大于 0", True
        )


def _group_conflicts(values: Mapping[str, Any]) -> Iterable[Conflict]:
    experts, active = values.get("num_experts"), values.get("num_experts_per_tok")
    groups, chosen = values.get("n_group"), values.get("topk_group")
    if groups is None:
        return
    if values.get("routing_strategy") == "topk" and chosen is not None and chosen < groups:
        message = "routing_strategy 为 topk 时不先选组；请改为 group_limited，或去掉 topk_group"
        yield Conflict(("topk_group", "n_group", "routing_strategy"), message, chosen)
    if experts is not None and experts % groups:
        message = f"应整除 num_experts = {experts}"
        yield Conflict(("n_group", "num_experts"), message, groups)
    if chosen is not None and chosen > groups:
        yield Conflict(("topk_group", "n_group"), f"不能大于 n_group = {groups}", chosen)
    elif chosen is not None and experts is not None and active is not None:
        reachable = experts // groups * chosen
        if reachable < active <= experts:
            message = (
                f"选中的 {chosen} 组只有 {reachable} 个专家，少于 num_experts_per_tok = {active}"
            )
            yield Conflict(
                ("topk_group", "n_group", "num_experts", "num_experts_per_tok"), message, chosen
            )
