"""专家负载的统计：每个 MoE 模块一份，读取随时可以，不影响前向。"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from deepseek_opt.errors import InputError
from deepseek_opt.load import LoadCounter, load_holders
from deepseek_opt.report import html_tables, render_tables

_COLUMNS = ["模块", "专家", "词元", "有词元的专家", "熵", "最大/平均", "丢弃", "各专家的词元数"]
_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj", "shared_gate", "shared_up", "shared_down")
_SHOWN = 16  # 表里至多列出的专家数


@dataclass(frozen=True)
class ExpertStatistics:
    """一个 MoE 模块各专家的负载；没有词元时，比例一类的字段为 None。

    示例::

        found = deepseek_opt.expert_statistics(model)["layers.1.mlp"]
        print(found)                 # 笔记本里是表格
        found.max_over_mean          # 1.0 为完全均衡

    属性：
        tokens_per_expert: 选中每个专家的词元数（含因超出容量被丢弃的）。
        utilization: 分到过词元的专家的比例。
        entropy: 负载分布的熵除以 ln E，在 [0, 1]，1 为完全均衡；只有一个专家时为 1。
        max_over_mean: 最忙的专家与平均之比。
        dropped: 因超出容量被丢弃的（词元，专家）对数。
    """

    tokens_per_expert: tuple[int, ...]
    utilization: float | None
    entropy: float | None
    max_over_mean: float | None
    dropped: int = 0

    @classmethod
    def of(cls, counter: LoadCounter) -> ExpertStatistics:
        """由计数器当前的值算出。"""
        counts = counter.snapshot().tolist()
        total, experts = sum(counts), len(counts)
        if not total:
            return cls(tuple(counts), None, None, None, counter.dropped())
        shares = [count / total for count in counts if count]
        # 减去而不是取负：恰好一个专家时得 0.0 而不是 -0.0
        entropy = 0.0 - sum(p * math.log(p) for p in shares)
        return cls(
            tuple(counts),
            utilization=len(shares) / experts,
            entropy=min(entropy / math.log(experts), 1.0) if experts > 1 else 1.0,
            max_over_mean=max(counts) * experts / total,
            dropped=counter.dropped(),
        )

    def to_dict(self) -> dict[str, Any]:
        """全部字段（可写成 JSON）。"""
        return asdict(self)

    def __str__(self) -> str:
        return str(ExpertTable({"": self}))

    def _repr_html_(self) -> str:
        return ExpertTable({"": self})._repr_html_()


class ExpertTable(dict[str, ExpertStatistics]):
    """模块路径 -> :class:`ExpertStatistics`；打印出来是一张表。"""

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        return [("专家的负载", _COLUMNS, [_row(name, found) for name, found in self.items()])]

    def __str__(self) -> str:
        return render_tables(self._tables()) if self else "专家的负载：模型里没有计数的 MoE 模块"

    def _repr_html_(self) -> str:
        return html_tables(self._tables())


def expert_statistics(model: nn.Module) -> ExpertTable:
    """model 里每个 MoE 模块的专家负载，从建立（或上次清零）起累计。

    参数
    ----
    model : 含 :class:`~deepseek_opt.MoEFeedForward` 的模块，或 MoE 层被替换过的 transformers 模型。

    返回“模块路径 -> :class:`ExpertStatistics`”，打印出来是表格；没有 MoE 模块时为空。
    清零用模块的 ``load_counter.reset()``。抛出 InputError：model 不是 nn.Module。

    示例
    ----
    >>> import torch
    >>> from deepseek_opt import MOEConfig, MoEFeedForward, expert_statistics
    >>> layer = MoEFeedForward(MOEConfig(num_experts=4, num_experts_per_tok=2), 8, 16)
    >>> _ = layer(torch.randn(3, 8))
    >>> sum(expert_statistics(layer)[""].tokens_per_expert)
    6
    """
    if not isinstance(model, nn.Module):
        raise InputError.expected("model", " nn.Module", model)
    found = ExpertTable()
    for name, module in model.named_modules():
        for holder in load_holders(module):
            found[name] = ExpertStatistics.of(holder.load_counter)
    return found


def expert_bytes(model: nn.Module) -> tuple[int | None, int | None]:
    """(专家正在用的权重, 量化之后另外保留的原权重) 的字节数；没有替换、没有量化时为 None。

    与路由专家一次算完的共享专家也算在内。
    """
    used = original = None
    for module in model.modules():
        store = getattr(module.__dict__.get("forward"), "store", None)
        weights = None if store is not None else _own_weights(module)
        if store is None and weights is None:
            continue
        if store is None:
            size = sum(w.numel() * w.element_size() for w in weights)
        else:
            size = store.nbytes
            original = (original or 0) + (0 if store.released else store.original_bytes)
        used = (used or 0) + size
    return used, original


def _own_weights(module: nn.Module) -> list[Any] | None:
    """本库按原权重计算的专家（或一次算完的共享专家）的权重；不是这样的模块为 None。"""
    shared = getattr(module.__dict__.get("forward"), "shared_weights", None)
    if shared is not None:
        return shared()
    if not load_holders(module):
        return None
    return [w for name in _WEIGHTS if (w := module._parameters.get(name)) is not None]


def _row(name: str, found: ExpertStatistics) -> list[str]:
    counts = found.tokens_per_expert
    shown = " ".join(map(str, counts[:_SHOWN])) + (" …" if len(counts) > _SHOWN else "")
    return [
        name,
        str(len(counts)),
        str(sum(counts)),
        _number(found.utilization, ".1%"),
        _number(found.entropy, ".3f"),
        _number(found.max_over_mean, ".2f"),
        str(found.dropped),
        shown,
    ]


def _number(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)
