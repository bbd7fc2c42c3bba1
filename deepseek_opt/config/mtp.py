"""MTP（多 token 预测）的配置：``attach_mtp``、``mtp_loss`` 用它训练与读写，``optimize`` 用它生成。"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from deepseek_opt.config.base import ConfigBase, Conflict
from deepseek_opt.config.fields import Tokens, Weight, expected, tuple_from_list

_MAX_DEPTH = 8

Depth = Annotated[int, Field(ge=1, le=_MAX_DEPTH)]
Fraction01 = Annotated[float, Field(gt=0, le=1)]


def _check_draft(value: Any) -> Any:
    # 不用联合类型：pydantic 会对每个分支各报一条错误，读起来像两处错。
    if value is None or value == "adaptive":
        return value
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and 1 <= value <= _MAX_DEPTH:
        return value
    raise expected(f"应为 1 到 {_MAX_DEPTH} 的整数，或 adaptive（至多 {_MAX_DEPTH} 个）")


DraftLength = Annotated[Any, BeforeValidator(_check_draft)]


class MTPConfig(ConfigBase):
    """MTP 的配置；所有字段都可省略，省略即“与模型一致”。

    生成时每步起草几个按实测的用时与接受率选，不合算就不起草；draft_length 是上限。lossless 的输出与逐个词元生成的
    相同；lossy_ 开头的接受得多一些，输出会不同。

    示例::

        MTPConfig(depth=1, loss_weight=0.3, final_loss_weight=0.1, loss_weight_steps=10000)
        MTPConfig(shared_layers=True, draft_length=4)
    """

    depth: Depth | None = Field(None, description="预测深度：除下一个 token 外再预测几个")
    loss_weight: Weight | None = Field(None, description="损失权重 λ 的初值")
    final_loss_weight: Weight | None = Field(None, description="损失权重 λ 的终值")
    loss_weight_steps: Tokens | None = Field(None, description="从初值换到终值的训练步数")
    loss_weights: tuple_from_list(Weight, _MAX_DEPTH) | None = Field(
        None, description="各深度的损失权重，长度等于预测深度"
    )
    depth_decay: Fraction01 | None = Field(
        None, description="各深度权重的衰减 β：第 k 层为 β^(k-1)"
    )
    shared_layers: bool | None = Field(None, description="各深度是否共用同一个物理层")
    shared_head: bool | None = Field(None, description="是否与主模型共用输出头")
    shared_embedding: bool | None = Field(None, description="是否与主模型共用词嵌入")
    detach_hidden: bool | None = Field(None, description="是否截断回传到主模型的梯度")
    draft_length: DraftLength | None = Field(
        None, description="每步至多起草几个 token，1 到 8；缺省 adaptive，即至多 8 个"
    )
    fixed_draft_length: bool | None = Field(
        None, description="是否每步都恰好起草 draft_length 个，不按实测开销增减"
    )
    acceptance: Literal["lossless", "lossy_typical", "lossy_relaxed"] | None = Field(
        None, description="接受规则：lossless 不改变输出分布；lossy_ 开头的会改变"
    )
    acceptance_threshold: Fraction01 | None = Field(None, description="有损接受规则的阈值")

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterable[Conflict]:
        yield from _weight_conflicts(values)
        draft, depth = values.get("draft_length"), values.get("depth")
        separate = values.get("shared_layers") is False
        if separate and isinstance(draft, int) and depth is not None and draft > depth:
            yield Conflict(
                ("draft_length", "depth", "shared_layers"),
                f"不能大于 depth = {depth}：各深度不共用层时没有更深的预测层",
                draft,
            )
        if values.get("fixed_draft_length") and not isinstance(draft, int):
            yield Conflict(
                ("fixed_draft_length", "draft_length"),
                "需要同时给出 draft_length（1 到 8 的整数）",
                True,
            )
        threshold, rule = values.get("acceptance_threshold"), values.get("acceptance")
        if threshold is not None and rule in (None, "lossless"):
            yield Conflict(
                ("acceptance_threshold", "acceptance"),
                "只用于 acceptance 为 lossy_typical 或 lossy_relaxed 时",
                threshold,
            )


def _weight_conflicts(values: Mapping[str, Any]) -> Iterable[Conflict]:
    weights, depth = values.get("loss_weights"), values.get("depth")
    if weights is not None:
        if depth is not None and len(weights) != depth:
            message = f"应有 {depth} 项（等于 depth），实际 {len(weights)} 项"
            yield Conflict(("loss_weights", "depth"), message, weights)
        for other in ("loss_weight", "depth_decay"):
            if values.get(other) is not None:
                message = f"与 {other} 只能给出一个"
                yield Conflict(("loss_weights", other), message, weights)
    final, steps = values.get("final_loss_weight"), values.get("loss_weight_steps")
    if (final is None) != (steps is None):
        given, lacking = ("final_loss_weight", "loss_weight_steps")
        if final is None:
            given, lacking = lacking, given
        yield Conflict((given, lacking), f"需要同时给出 {lacking}", values[given])
    if final is not None and values.get("loss_weight") is None:
        yield Conflict(("final_loss_weight", "loss_weight"), "需要同时给出初值 loss_weight", final)
