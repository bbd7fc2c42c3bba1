"""自建模型用的 MoE 前馈层。"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt import ops
from deepseek_opt.config import MOEConfig
from deepseek_opt.errors import InputError, UnsupportedError
from deepseek_opt.layers.balance_loss import balance_loss, routing_scores, z_loss
from deepseek_opt.layers.dispatch import (
    Dispatch,
    capacity,
    drop_over_capacity,
    expert_choice,
    forced_balance,
)
from deepseek_opt.layers.router import ExpertRouter, RoutingResult
from deepseek_opt.load import LoadCounter, in_backward

_RATE = 1e-3
# 两种均衡损失的默认权重：序列级只防极端失衡，全局的要独力维持均衡。
_AUX_WEIGHT = {"sequence_aux_loss": 1e-4, "global_aux_loss": 1e-2}


class MoEFeedForward(nn.Module):
    """混合专家的前馈层，放在原来 FFN 的位置：[..., hidden] -> [..., hidden]。

    每个词元由 ``router`` 选 k 个专家，各专家算 down(act(gate x) * up x)，按权重相加，再加上共享专家。

    参数
    ----
    config : :class:`~deepseek_opt.MOEConfig`，必须给出 num_experts 与 num_experts_per_tok。
    hidden_size : 输入与输出的宽度。
    intermediate_size : 每个专家的中间宽；共享专家为它的 num_shared_experts 倍。
    activation : 见 :func:`deepseek_opt.ops.moe_experts`，不含截断的（clipped、clipped_silu）。
    device, dtype : 参数的设备与类型。

    属性
    ----
    aux_loss : 最近一次前向的辅助损失（均衡损失与 z 损失，已乘权重），可求导的标量；没有配置则为 None。
        用 :func:`deepseek_opt.aux_loss` 把各层的加进训练损失。eval 时不算，为 None。
    load_counter : 各专家的计数，见 :func:`deepseek_opt.expert_statistics`。

    均衡的做法（``balance_strategy``）：``bias_update`` 配合 :func:`deepseek_opt.update_expert_bias`；
    ``sequence_aux_loss``、``global_aux_loss``（一次前向的全部词元）加辅助损失；``forced`` 轮流分配，
    只用于测速。给了 ``capacity_factor`` 时，每个专家至多处理 ⌈系数 · T · k / E⌉ 个词元，多出的按
    ``drop_policy`` 丢弃；丢弃在训练与推理时都有。

    ``routing_strategy="expert_choice"`` 由专家选词元：每个专家取得分最高的 ⌈系数 · T · k / E⌉ 个（系数
    默认 1）。一个词元被选与否取决于同批的其他词元，**包括它后面的**：因果语言模型训练时会看到未来，
    逐词元生成时又与训练不符，不可使用；只适合编码器一类一次看到全部输入的模型。

    激活检查点请用 ``use_reentrant=False``：另一种在第一遍前向里不记录梯度，辅助损失求不了导。

    抛出 InputError：缺少必需的字段，尺寸不是正整数，输入的形状或类型不对。UnsupportedError：要求量化。

    示例
    ----
    >>> import torch
    >>> from deepseek_opt import MOEConfig, MoEFeedForward
    >>> config = MOEConfig(num_experts=8, num_experts_per_tok=2, num_shared_experts=1)
    >>> layer = MoEFeedForward(config, hidden_size=16, intermediate_size=32)
    >>> layer(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        config: MOEConfig,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "silu",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        _check_arguments(config, hidden_size, intermediate_size, activation)
        self.config = config
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.activation = activation
        self.num_experts = config.num_experts
        self.top_k = config.num_experts_per_tok
        # 由专家选词元时路由器只出 logits，选择在这里做；给它一份普通的 topk 配置。
        self._choice = config.routing_strategy == "expert_choice"
        plain = config.model_copy(update={"routing_strategy": "topk"}) if self._choice else config
        where = {"device": device, "dtype": dtype}
        self.router = ExpertRouter(plain, hidden_size, **where)
        experts, inner = self.num_experts, intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden_size, **where))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, inner, **where))
        shared = inner * (config.num_shared_experts or 0)
        sizes = {
            "shared_gate": (shared, hidden_size),
            "shared_up": (shared, hidden_size),
            "shared_down": (hidden_size, shared),
            "shared_coefficient": (1, hidden_size) if config.shared_expert_gate else None,
        }
        for name, size in sizes.items():
            wanted = shared and size is not None
            value = nn.Parameter(torch.empty(size, **where)) if wanted else None
            self.register_parameter(name, value)
        self.load_counter = LoadCounter(experts)
        self.aux_loss: Tensor | None = None
        self._built_from, self._revision = config.snapshot(), config.revision
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """重新随机初始化专家（与 nn.Linear 相同：±1/√输入宽 的均匀分布）；路由器不动。"""
        for name, weight in self.named_parameters(recurse=False):
            bound = 1 / math.sqrt(weight.shape[-1])
            nn.init.uniform_(weight, -bound, bound)
            if name == "shared_coefficient":
                nn.init.zeros_(weight)

    @property
    def balance_bias(self) -> Tensor | None:
        """:func:`~deepseek_opt.update_expert_bias` 要更新的偏置；不是 bias_update 时为 None。"""
        if self.config.balance_strategy != "bias_update":
            return None
        return self.router.e_score_correction_bias

    @property
    def balance_rate(self) -> float:
        """偏置更新的步长 γ。"""
        return self.config.bias_update_rate or _RATE

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., hidden]，dtype 不变。"""
        return self.forward_with(hidden, self._compute)

    def forward_with(self, hidden: Tensor, compute: Callable[..., Tensor]) -> Tensor:
        """同 forward，专家由 compute(x, 下标, 权重, [共享专家的三个权重, 可再带系数]) 计算（例如量化的专家）。"""
        self._check_config()
        self._check_hidden(hidden)
        x = hidden.reshape(-1, self.hidden_size)
        routed = self.router(x)
        plan = self._dispatch(routed)
        self._record(hidden, routed, plan)
        return compute(x, plan.indices, plan.weights, self._shared(x)).view_as(hidden)

    def _compute(self, x: Tensor, indices: Tensor, weights: Tensor, shared: list[Tensor]) -> Tensor:
        experts = (self.gate_up_proj, None, self.down_proj, None, shared)
        again = bool(self.config.recompute_experts)
        return ops.moe_experts(x, indices, weights, *experts, self.activation, recompute=again)

    def _dispatch(self, routed: RoutingResult) -> Dispatch:
        config, tokens = self.config, routed.logits.shape[0]
        limit = capacity(tokens, self.top_k, self.num_experts, config.capacity_factor or 1.0)
        if self._choice:
            scores = routing_scores(routed.logits, config.scoring_func or "sigmoid")
            return expert_choice(scores, limit, config.routed_scaling_factor or 1.0)
        if config.balance_strategy == "forced":
            plan = forced_balance(routed.weights, self.num_experts)
        else:
            plan = Dispatch(routed.weights, routed.indices, routed.counts)
        if config.capacity_factor is None:
            return plan
        return drop_over_capacity(
            plan,
            limit,
            by_weight=config.drop_policy == "probability",
            renormalize=bool(config.drop_renormalize),
        )

    def _record(self, hidden: Tensor, routed: RoutingResult, plan: Dispatch) -> None:
        """计数与辅助损失。反向里重算的那一遍也要算损失（检查点要求两遍相同），但不记下来。"""
        self.load_counter.add(plan.counts, dropped=plan.dropped, training=self.training)
        loss = self._aux_loss(hidden, routed) if self.training and hidden.numel() else None
        if not in_backward():
            self.aux_loss = loss

    def _aux_loss(self, hidden: Tensor, routed: RoutingResult) -> Tensor | None:
        config, parts = self.config, []
        weight, per_sequence = self._balance_weight()
        if weight:
            sequences = math.prod(hidden.shape[:-2]) if per_sequence else 1
            kind = config.scoring_func or "sigmoid"
            parts.append(weight * balance_loss(routed.logits, routed.indices, kind, sequences))
        if config.z_loss_weight:
            parts.append(config.z_loss_weight * z_loss(routed.logits))
        return sum(parts) if parts else None

    def _balance_weight(self) -> tuple[float, bool]:
        """(均衡损失的权重, 是否逐序列)。"""
        config = self.config
        strategy = config.balance_strategy
        if strategy == "bias_update":
            return config.sequence_aux_loss_weight or 0.0, True
        if strategy not in _AUX_WEIGHT:
            return 0.0, False
        given = config.aux_loss_weight
        weight = _AUX_WEIGHT[strategy] if given is None else given
        return weight, strategy == "sequence_aux_loss"

    def _shared(self, x: Tensor) -> list[Tensor]:
        if self.shared_gate is None:
            return []
        weights = [self.shared_gate, self.shared_up, self.shared_down]
        if self.shared_coefficient is not None:
            weights.append(torch.sigmoid(x @ self.shared_coefficient[0]))
        return weights

    def _check_config(self) -> None:
        """config 是活的：决定结构的字段被改动时说明原因，而不是默默用旧的。"""
        if torch.compiler.is_compiling() or self.config.revision == self._revision:
            return
        changed = self.config.require_live(self._built_from)
        if self._choice:
            now = {name: getattr(self.config, name) for name in changed & {"router_jitter"}}
            self.router.config.update(**now)
        self._revision = self.config.revision

    def _check_hidden(self, hidden: Tensor) -> None:
        width = self.hidden_size
        if not isinstance(hidden, Tensor) or hidden.dim() < 1 or hidden.shape[-1] != width:
            raise InputError.expected("hidden", f"最后一维为 {width} 的张量", hidden)
        weight = self.router.weight  # 专家的权重可能已释放（量化之后）
        if hidden.device != weight.device:
            raise InputError.expected("hidden", f"设备 {weight.device} 上的张量", hidden)
        if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise InputError.expected("hidden", f"类型 {weight.dtype} 的张量（同权重）", hidden)

    def __getstate__(self) -> dict[str, Any]:
        # 辅助损失带着计算图，不能深拷贝也不该存盘。
        return {**self.__dict__, "aux_loss": None}

    def extra_repr(self) -> str:
        """打印模块时的概要。"""
        return (
            f"{self.num_experts} 个专家取 {self.top_k}，"
            f"hidden {self.hidden_size}，intermediate {self.intermediate_size}"
        )


def aux_loss(model: nn.Module) -> Tensor:
    """model 里各 MoE 层最近一次前向的辅助损失之和；都没有时为 0。

    各层的权重已乘好，直接加进训练损失即可。梯度累积时每次前向之后都要加。

    参数
    ----
    model : 含 :class:`MoEFeedForward` 的模块；其他模块若有 ``aux_loss`` 标量张量属性也算在内。

    抛出 InputError：model 不是 nn.Module。

    示例
    ----
    >>> import torch
    >>> from deepseek_opt import MOEConfig, MoEFeedForward, aux_loss
    >>> config = MOEConfig(num_experts=4, num_experts_per_tok=1, z_loss_weight=1e-3)
    >>> layer = MoEFeedForward(config, 8, 16)
    >>> loss = layer(torch.randn(3, 8)).square().mean() + aux_loss(layer)
    >>> loss.backward()
    """
    if not isinstance(model, nn.Module):
        raise InputError.expected("model", " nn.Module", model)
    found = [module.__dict__.get("aux_loss") for module in model.modules()]
    losses = [loss for loss in found if isinstance(loss, Tensor) and loss.dim() == 0]
    if losses:
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()
    first = next(model.parameters(), None)
    return torch.zeros((), device=None if first is None else first.device)


def _check_arguments(config: Any, hidden_size: int, intermediate_size: int, activation: str):
    if not isinstance(config, MOEConfig):
        raise InputError.expected("config", " MOEConfig", config)
    for name in ("num_experts", "num_experts_per_tok"):
        if getattr(config, name) is None:
            raise InputError.expected(f"config.{name}", "正整数（自建的层没有模型可以参照）", None)
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError.expected(name, "正整数", value)
    allowed = [name for name in ops.ACTIVATIONS if name not in ops.CLIPPED]
    if activation not in allowed:
        raise InputError.expected("activation", f" {'、'.join(allowed)} 之一", activation)
    if config.quantization not in (None, "none"):
        raise UnsupportedError(
            f"MoEFeedForward 的权重要能训练，不支持 quantization = {config.quantization!r}；"
            "请去掉 quantization，训练之后用 optimize(model, profile) 量化"
        )
