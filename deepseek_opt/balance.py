"""无辅助损失的负载均衡：每个优化器步按负载调整一次路由偏置（DeepSeek-V3，arXiv 2412.19437）。"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepseek_opt.errors import InputError
from deepseek_opt.load import LoadCounter, load_holders

_RATE = 1e-3


class _Balanced(NamedTuple):
    """一处要更新的偏置：模块路径、计数器、偏置缓冲区、步长。"""

    name: str
    counter: LoadCounter
    bias: Tensor
    rate: float


@torch.no_grad()
def update_expert_bias(model: nn.Module, rate: float | None = None, *, group: Any = None) -> int:
    """按上次更新以来的负载调整各 MoE 层的路由偏置；在每个优化器步之后调用一次。

    偏置只影响选谁，不影响权重：``bias += rate · sign(平均负载 − 负载)``，以 fp32 计算；偏置被转成了半精度时
    先转回 fp32（否则千分之一的步长会被舍入掉）。只计训练模式的前向，激活检查点的重算不重复计；梯度累积的
    各次前向累计在一起；更新之后清零。torch.distributed 已初始化时先把各进程的计数相加，所以每个进程都要调用，
    结果相同。

    参数
    ----
    model : 含 ``balance_strategy="bias_update"`` 的 :class:`~deepseek_opt.MoEFeedForward`，或 MoE 层被
        替换过、路由带 e_score_correction_bias 的 transformers 模型。
    rate : 步长 γ；None 时用各层配置的 bias_update_rate，没有配置则为 0.001。
    group : 进程组，默认全部进程。

    返回更新了几个偏置。抛出 InputError：没有可更新的偏置，rate 不是正数，或者还没有训练中的前向
    （此时什么都不改）。

    示例
    ----
    >>> import torch
    >>> from deepseek_opt import MOEConfig, MoEFeedForward, update_expert_bias
    >>> config = MOEConfig(num_experts=4, num_experts_per_tok=1, balance_strategy="bias_update")
    >>> layer = MoEFeedForward(config, 8, 16)
    >>> _ = layer(torch.randn(5, 8))
    >>> update_expert_bias(layer)
    1
    """
    places = _places(model, rate)
    if not places:
        raise InputError(
            "参数 model：没有可更新的路由偏置；MoEFeedForward 应设 balance_strategy='bias_update'，"
            "transformers 模型的路由应带 e_score_correction_bias 且已由本库计数"
        )
    counts = _summed([place.counter.pending() for place in places], group)
    if not any(bool(count.any()) for count in counts):
        raise InputError(
            "没有负载统计：上次更新以来没有训练模式的前向；"
            "请在 model.train() 下做过前向与反向之后，每个优化器步调用一次"
        )
    for place, count in zip(places, counts, strict=True):
        bias = place.bias
        load = count.to(device=bias.device, dtype=torch.float64)
        step = torch.sign(load.mean() - load).float() * place.rate
        if bias.dtype != torch.float32:
            bias.data = bias.data.float()
        bias.add_(step)
        place.counter.clear_pending()
    return len(places)


def _places(model: nn.Module, rate: float | None) -> list[_Balanced]:
    """模型里各处（计数器、偏置）；共用的只算一次，次序固定，各进程相同。"""
    if not isinstance(model, nn.Module):
        raise InputError.expected("model", " nn.Module", model)
    if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate < float("inf")):
        raise InputError.expected("rate", "正数", rate)
    found: dict[int, _Balanced] = {}
    for name, module in model.named_modules():
        for holder in load_holders(module):
            bias = _bias_of(model, name, holder)
            if isinstance(bias, Tensor):
                step = getattr(holder, "balance_rate", _RATE) if rate is None else rate
                counter = holder.load_counter
                found[id(counter)] = _Balanced(name, counter, bias, float(step))
    for place in found.values():
        if place.bias.shape != (place.counter.num_experts,):
            expected = f"形状 [{place.counter.num_experts}] 的张量"
            raise InputError.expected(f"{place.name}.balance_bias", expected, place.bias)
    return list(found.values())


def _bias_of(model: nn.Module, name: str, holder: object) -> Tensor | None:
    """持有者自己的 balance_bias；没有这个属性时，看同级的 gate（transformers 的专家与路由是兄弟）。"""
    if hasattr(holder, "balance_bias"):
        return holder.balance_bias
    parent = model.get_submodule(name.rpartition(".")[0])
    return getattr(getattr(parent, "gate", None), "e_score_correction_bias", None)


def _summed(counts: list[Tensor], group: Any) -> list[Tensor]:
    """各进程的计数之和；全部层合成一次通信。"""
    if not (dist.is_available() and dist.is_initialized()):
        return counts
    device = counts[0].device
    joint = torch.cat([count.to(device) for count in counts])
    dist.all_reduce(joint, group=group)
    return list(joint.split([count.numel() for count in counts]))
