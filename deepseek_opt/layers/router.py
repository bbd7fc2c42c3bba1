"""ExpertRouter：自建模型用的 MoE 路由层。"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepseek_opt import ops
from deepseek_opt.config import MOEConfig
from deepseek_opt.errors import ConfigError, ConfigProblem, InputError, UnsupportedError

_EPS = 1e-20  # 归一化的分母：与 transformers 相同
_DEFAULT_TOP_K = 2
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_GROUP_SCORE = {"top2_sum": "top2", "max": "max"}


class RoutingResult(NamedTuple):
    """一次路由的结果；T 为词元数，E 为专家数，k 为每个词元的专家数。

    属性：
        logits: [T, E] fp32。
        weights: [T, k] fp32，混合权重。
        indices: [T, k] int64，按得分从高到低。
        counts: [E] int64，各专家的词元数。

    示例::

        logits, weights, indices, counts = router(hidden)
        assert counts.sum() == indices.numel()
    """

    logits: Tensor
    weights: Tensor
    indices: Tensor
    counts: Tensor


class ExpertRouter(nn.Module):
    """MoE 路由：每个词元选出专家、混合权重，并数出各专家的词元数；打分与选择一律 fp32。

    参数
    ----
    config : :class:`~deepseek_opt.MOEConfig`；改动它，下一次调用生效（num_experts 除外：改动则报错）。
        num_experts 必须给出，其余省略时：

        - num_experts_per_tok：2（不超过可选的专家数）；
        - scoring_func：``sigmoid``；norm_topk_prob：True；routed_scaling_factor：1；
        - n_group：1，即不分组；topk_group：n_group，即各组都可选；
        - group_score：scoring_func 为 ``softmax`` 时 ``max``，否则 ``top2_sum``；
        - normalize_before_topk：True。只对 ``softmax`` 有区别：False 时先选再对所选的做 softmax
          （gpt-oss）；逐元素的打分与次序无关；
        - router_jitter：0。大于 0 且在训练模式时，路由的输入乘以 [1 - j, 1 + j] 上均匀的随机数。
    hidden_size : 输入的宽度。
    device、dtype : weight 的设备与类型。

    参数 ``weight`` [E, hidden_size] 与缓冲区 ``e_score_correction_bias`` [E] 的名字同 DeepSeek-V3。
    后者初值为 0，只影响选择、没有梯度，供无辅助损失的负载均衡逐步更新；整个模型转成半精度时它仍是 fp32，
    否则 0.001 的步长会被舍去。

    示例
    ----
    >>> import torch
    >>> from deepseek_opt import ExpertRouter, MOEConfig
    >>> config = MOEConfig(num_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2)
    >>> router = ExpertRouter(config, hidden_size=32)
    >>> result = router(torch.randn(2, 5, 32))
    >>> result.weights.shape, int(result.counts.sum())
    (torch.Size([10, 4]), 40)
    """

    def __init__(
        self,
        config: MOEConfig,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self._rule, self._revision = _rule_of(config), config.revision
        if not isinstance(hidden_size, int) or isinstance(hidden_size, bool) or hidden_size < 1:
            raise InputError.expected("hidden_size", "正整数", hidden_size)
        self.config = config
        self.hidden_size = hidden_size
        self.num_experts = config.num_experts
        shape = (self.num_experts, hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        bias = torch.empty(self.num_experts, device=device, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight 按 nn.Linear 的办法初始化，e_score_correction_bias 置 0。"""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        nn.init.zeros_(self.e_score_correction_bias)

    def forward(self, hidden: Tensor) -> RoutingResult:
        """路由 hidden [..., hidden_size]；T 为前面各维之积。

        返回 :class:`RoutingResult`。抛出 :class:`~deepseek_opt.errors.InputError`（形状、dtype 不符）、
        :class:`~deepseek_opt.errors.ConfigError`（建层之后把 config 改得不能用）。
        """
        self._check(hidden)
        if self.config.revision != self._revision:
            self._refresh()
        x, jitter = hidden.reshape(-1, self.hidden_size), self.config.router_jitter
        if self.training and jitter:
            x = x * torch.empty_like(x).uniform_(1 - jitter, 1 + jitter)
        bias = self.e_score_correction_bias
        return RoutingResult(*ops.moe_route(x, self.weight, None, bias, **self._rule))

    def _refresh(self) -> None:
        rule = _rule_of(self.config)
        if self.config.num_experts != self.num_experts:
            message = f"建层之后不能改动（原值 {self.num_experts}）"
            problem = ConfigProblem("moe.num_experts", message, self.config.num_experts)
            raise ConfigError("MoE 的配置与已建的路由层不符", [problem])
        self._rule, self._revision = rule, self.config.revision

    def _check(self, hidden: Tensor) -> None:
        want = f"[..., {self.hidden_size}] 的 float32、bfloat16 或 float16 张量"
        if not isinstance(hidden, Tensor) or hidden.dtype not in _FLOATS:
            raise InputError.expected("hidden", want, hidden)
        if hidden.dim() == 0 or hidden.shape[-1] != self.hidden_size:
            raise InputError.expected("hidden", want, hidden)

    def _apply(self, fn, recurse=True):
        """``.to(bfloat16)`` 等：e_score_correction_bias 换设备，但保持 fp32、不经过半精度。"""
        name = "e_score_correction_bias"
        before = self.get_buffer(name)
        super()._apply(fn, recurse)
        after = self.get_buffer(name)
        if after.dtype != torch.float32:
            source = after if before.device.type == "meta" else before
            kept = source.to(device=after.device, dtype=torch.float32)
            self.register_buffer(name, kept)
        return self

    def extra_repr(self) -> str:
        """打印模型时的一行：专家数、每词元的专家数、打分。"""
        chosen = f"top_k={self._rule['top_k']}, score={self._rule['score']}"
        return f"{self.hidden_size}, experts={self.num_experts}, {chosen}"


def _rule_of(config: MOEConfig) -> dict[str, Any]:
    """MOEConfig 换成 ops.moe_route 的参数；矛盾与不支持的在这里报错。"""
    if not isinstance(config, MOEConfig):
        raise InputError.expected("config", "MOEConfig", config)
    problems = list(_problems(config))
    if problems:
        raise ConfigError("MoE 的配置不能用来建路由层", problems)
    if config.routing_strategy == "expert_choice":
        raise UnsupportedError(
            "ExpertRouter：不支持 routing_strategy = expert_choice（由专家选词元）；"
            "请用 topk 或 group_limited"
        )
    experts, score = config.num_experts, config.scoring_func or "sigmoid"
    groups = config.n_group or 1
    open_groups = config.topk_group or groups
    group_score = config.group_score or ("max" if score == "softmax" else "top2_sum")
    return {
        "top_k": config.num_experts_per_tok or min(_DEFAULT_TOP_K, experts // groups * open_groups),
        "score": score,
        "normalize": config.norm_topk_prob is not False,
        "softmax_after": score == "softmax" and config.normalize_before_topk is False,
        "n_group": groups,
        "topk_group": open_groups,
        "group_score": _GROUP_SCORE[group_score],
        "scaling": config.routed_scaling_factor or 1.0,
        "eps": _EPS,
    }


def _problems(config: MOEConfig):
    """单看 MOEConfig 合法，但不足以建层，或会被悄悄忽略的组合。"""
    if config.num_experts is None:
        yield ConfigProblem("moe.num_experts", "建路由层必须给出专家数")
    grouped = (config.n_group or 1) > 1
    if config.routing_strategy == "group_limited" and not grouped:
        message = "routing_strategy 为 group_limited 时应大于 1"
        yield ConfigProblem("moe.n_group", message, config.n_group)
    if config.routing_strategy == "topk" and grouped:
        message = "routing_strategy 为 topk 时不分组，应省略或为 1"
        yield ConfigProblem("moe.n_group", message, config.n_group)
    if not grouped and (config.topk_group or 1) > 1:
        message = f"不能大于 n_group = {config.n_group or 1}"
        yield ConfigProblem("moe.topk_group", message, config.topk_group)
