"""把训练好的稠密门控 FFN 精确地换成 MoE：换完输出不变，从那里接着训练。"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from deepseek_opt.config import MOEConfig
from deepseek_opt.errors import DeepSeekOptError, InputError, UnsupportedError
from deepseek_opt.layers.ffn_probe import FFN_NAMES, activation_of, why_not_gated
from deepseek_opt.layers.moe import MoEFeedForward

Method = Literal["duplicate", "split"]
FilterFn = Callable[[str, nn.Module], bool]

_RECORD = "_deepseek_opt_upcycled_ffn"
_ROUTER_STD = 0.02


def upcycle_ffn(
    module: nn.Module,
    config: MOEConfig,
    *,
    method: Method = "duplicate",
    parts: int | None = None,
    names: tuple[str, str, str] = FFN_NAMES,
    generator: torch.Generator | None = None,
) -> MoEFeedForward:
    """由一个稠密门控 FFN 建一个输出与它相同的 MoE 层；module 不变。

    - ``duplicate``：每个专家都是原 FFN 的副本，路由权重之和为 1，所以无论选谁输出都相同。每个词元的计算量
      是原来的 k 倍。副本完全相同时路由没有梯度（选谁都一样），训练一步、各专家分开之后才有；要立刻推动路由，
      配合均衡损失或 ``bias_update``。
    - ``split``：沿中间维切成 G 份，每份复制 E / G 个。同一套副本的 G 份在路由里用相同的行，得分相同，
      因此总是一起被选中；权重各为 1 / G，缩放 G 倍后恰好加成原来的 FFN。k = G 时计算量与原来相同，
      参数是 E / G 倍；路由从第一步起就有梯度。

    共享专家（num_shared_experts）的下投影置零，起初不影响输出。

    参数
    ----
    module : 有三个普通 nn.Linear（无偏置）的门控 FFN：down(act(gate x) * up x)，act 为 silu、gelu、
        gelu_tanh、relu 或 relu2。用一小段随机数核对它确实这样计算。
    config : 必须给出 num_experts 与 num_experts_per_tok；与精确性矛盾的取值会报错：norm_topk_prob 为
        False、别的 routed_scaling_factor、capacity_factor、expert_choice、forced，split 时的分组。
    parts : split 的份数 G，默认 num_experts_per_tok；须整除 E、k 与中间宽。
    names : gate、up、down 三个投影的属性名。
    generator : 路由器初始化用的随机数生成器。

    返回 :class:`~deepseek_opt.MoEFeedForward`，设备、类型与 module 的权重相同。抛出 InputError：config 或
    parts 不成立；UnsupportedError：module 不是这样的 FFN（说明哪里不同）。

    示例
    ----
    >>> import torch
    >>> from torch import nn
    >>> from deepseek_opt import MOEConfig, upcycle_ffn
    >>> class FFN(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate_proj = nn.Linear(8, 16, bias=False)
    ...         self.up_proj = nn.Linear(8, 16, bias=False)
    ...         self.down_proj = nn.Linear(16, 8, bias=False)
    ...         self.act_fn = nn.SiLU()
    ...     def forward(self, x):
    ...         return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    >>> ffn, x = FFN(), torch.randn(3, 8)
    >>> moe = upcycle_ffn(ffn, MOEConfig(num_experts=4, num_experts_per_tok=2), method="split")
    >>> torch.allclose(moe(x), ffn(x), atol=1e-5)
    True
    """
    exact, count = _exact_config(config, method, parts)
    reason = _refusal(module, names, count)
    if reason:
        raise UnsupportedError(f"不能升级 {type(module).__name__}：{reason}")
    return _build(module, exact, count, names, generator)


@dataclass(frozen=True)
class UpcycledFFN:
    """一个稠密 FFN 的处理结果。

    name : 模块路径。replaced : 是否已换成 MoE。reason : 没有换的原因。
    parameters_before、parameters_after : 参数个数；没有换时两者相同。
    """

    name: str
    replaced: bool
    reason: str
    parameters_before: int
    parameters_after: int


class UpcycleReport(list[UpcycledFFN]):
    """:func:`upcycle_model` 的结果：:class:`UpcycledFFN` 的列表，打印出来是一张表。

    config : 新层共用的配置（补上了精确升级所需的取值），改它的即时生效字段对各层一起生效。
    """

    def __init__(self, config: MOEConfig):
        super().__init__()
        self.config = config

    @property
    def replaced(self) -> list[UpcycledFFN]:
        """已换成 MoE 的。"""
        return [entry for entry in self if entry.replaced]

    @property
    def skipped(self) -> list[UpcycledFFN]:
        """没有换的。"""
        return [entry for entry in self if not entry.replaced]

    def render(self) -> str:
        """可读的文本。"""
        lines = [f"稠密 FFN 升级为 MoE：{len(self.replaced)} 个，跳过 {len(self.skipped)} 个"]
        for entry in self:
            state = "已升级" if entry.replaced else "跳过"
            sizes = f"参数 {entry.parameters_before:,} -> {entry.parameters_after:,}"
            lines.append(f"  {entry.name}  {state}  {sizes}  {entry.reason}".rstrip())
        return "\n".join(lines)

    __str__ = render


def upcycle_model(
    model: nn.Module,
    config: MOEConfig,
    filter_fn: FilterFn | None = None,
    *,
    method: Method = "duplicate",
    parts: int | None = None,
    names: tuple[str, str, str] = FFN_NAMES,
    generator: torch.Generator | None = None,
) -> UpcycleReport:
    """把 model 里的稠密门控 FFN 原地换成输出相同的 MoE 层；:func:`restore_ffn` 换回。

    已经是 MoE 的部分（专家、共享专家）不动。换掉参数之后要重新建立优化器；训练好的新权重不会写回原来的层。

    参数
    ----
    model : 含门控 FFN 的模块，例如 Llama 一类的 transformers 模型。
    filter_fn : ``filter_fn(路径, 模块) -> bool``，False 的不换。
    其余同 :func:`upcycle_ffn`。

    返回 :class:`UpcycleReport`。抛出 InputError：config 不成立；DeepSeekOptError：已经升级过，或没有
    一个可以升级（消息里有各自的原因）。抛出时模型不变。

    示例
    ----
    >>> import torch
    >>> from torch import nn
    >>> from deepseek_opt import MOEConfig, restore_ffn, upcycle_model
    >>> class FFN(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate_proj = nn.Linear(8, 16, bias=False)
    ...         self.up_proj = nn.Linear(8, 16, bias=False)
    ...         self.down_proj = nn.Linear(16, 8, bias=False)
    ...     def forward(self, x):
    ...         return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
    >>> model = nn.Sequential(FFN(), FFN())
    >>> len(upcycle_model(model, MOEConfig(num_experts=4, num_experts_per_tok=1)).replaced)
    2
    >>> restore_ffn(model)
    2
    """
    if not isinstance(model, nn.Module):
        raise InputError.expected("model", " nn.Module", model)
    if _RECORD in model.__dict__:
        raise DeepSeekOptError("这个模型已经升级过；请先调用 restore_ffn(model)")
    exact, count = _exact_config(config, method, parts)
    report, swaps = UpcycleReport(exact), []
    made: dict[int, MoEFeedForward] = {}  # 同一个模块挂在两处时，换上的仍是同一个
    for name, module, inside_moe in _candidates(model, names):
        if filter_fn is not None and not filter_fn(name, module):
            reason = "filter_fn 排除"
        elif inside_moe:
            reason = "是 MoE 的一部分"
        else:
            reason = "" if id(module) in made else _refusal(module, names, count)
        if not reason and id(module) not in made:
            made[id(module)] = _build(module, exact, count, names, generator)
        report.append(_entry(name, module, None if reason else made[id(module)], reason))
        if not reason:
            parent, _, child = name.rpartition(".")
            swaps.append((model.get_submodule(parent), child, module))
    if not swaps:
        raise DeepSeekOptError(f"没有可以升级的门控 FFN（{'、'.join(names)}）\n{report}")
    for parent, child, module in swaps:
        setattr(parent, child, made[id(module)])
    model.__dict__[_RECORD] = swaps
    return report


def restore_ffn(model: nn.Module) -> int:
    """换回 :func:`upcycle_model` 换掉的稠密 FFN（连同原来的权重），返回换回的个数。

    抛出 :class:`~deepseek_opt.errors.DeepSeekOptError`：这个模型没有升级过。

    示例见 :func:`upcycle_model`。
    """
    swaps = model.__dict__.get(_RECORD)
    if swaps is None:
        raise DeepSeekOptError("这个模型没有升级过，无可恢复")
    for parent, child, module in swaps:
        module.train(getattr(parent, child).training)
        setattr(parent, child, module)
    del model.__dict__[_RECORD]
    return len(swaps)


def _candidates(
    model: nn.Module, names: tuple[str, str, str]
) -> Iterator[tuple[str, nn.Module, bool]]:
    """(路径, 带三个投影的模块, 是否在 MoE 之内)。model 自己没有上级，换不了，不算。"""
    moe: set[int] = set()
    for module in model.modules():
        if isinstance(module, MoEFeedForward) or isinstance(
            getattr(module, "experts", None), nn.Module
        ):
            moe.update(id(part) for part in module.modules())
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and all(isinstance(getattr(module, part, None), nn.Module) for part in names):
            yield name, module, id(module) in moe


def _exact_config(config: MOEConfig, method: Method, parts: int | None) -> tuple[MOEConfig, int]:
    """(补全的配置, 切成几份)；与精确性矛盾的取值一次列出。"""
    if not isinstance(config, MOEConfig):
        raise InputError.expected("config", " MOEConfig", config)
    if method not in ("duplicate", "split"):
        raise InputError.expected("method", " duplicate 或 split", method)
    experts, top_k = config.num_experts, config.num_experts_per_tok
    if experts is None or top_k is None:
        raise InputError("参数 config：应给出 num_experts 与 num_experts_per_tok")
    count = _part_count(method, parts, experts, top_k)
    wrong = list(_inexact(config, method, float(count)))
    if wrong:
        raise InputError(f"参数 config：以下取值会使升级前后的输出不同：{'；'.join(wrong)}")
    changes = {"norm_topk_prob": True, "routed_scaling_factor": float(count)}
    return config.model_copy(update=changes), count


def _part_count(method: Method, parts: int | None, experts: int, top_k: int) -> int:
    if method == "duplicate":
        if parts is not None:
            raise InputError.expected("parts", " None（只用于 split）", parts)
        return 1
    count = top_k if parts is None else parts
    whole = isinstance(count, int) and not isinstance(count, bool) and count >= 1
    if not whole or experts % count or top_k % count:
        raise InputError.expected(
            "parts",
            f"整除 num_experts = {experts} 与 num_experts_per_tok = {top_k} 的正整数",
            count,
        )
    return count


def _inexact(config: MOEConfig, method: Method, scale: float) -> Iterator[str]:
    if config.norm_topk_prob is False:
        yield "norm_topk_prob 应为 True"
    if config.routed_scaling_factor not in (None, scale):
        yield f"routed_scaling_factor 应为 {scale}"
    if config.capacity_factor is not None:
        yield "capacity_factor 会丢弃词元"
    if config.routing_strategy == "expert_choice":
        yield "expert_choice 不保证每个词元的权重之和"
    if method == "split":
        if config.balance_strategy == "forced":
            yield "split 需要按得分选，不能用 balance_strategy = 'forced'"
        if (config.n_group or 1) > 1:
            yield "split 用相同的得分把各份绑在一起，不能再分组（n_group）"


def _refusal(module: nn.Module, names: tuple[str, str, str], parts: int) -> str:
    reason = why_not_gated(module, names)
    if reason:
        return reason
    inner = getattr(module, names[0]).weight.shape[0]
    return f"中间宽 {inner} 不能切成 {parts} 份" if inner % parts else ""


@torch.no_grad()
def _build(
    module: nn.Module,
    config: MOEConfig,
    parts: int,
    names: tuple[str, str, str],
    generator: torch.Generator | None,
) -> MoEFeedForward:
    gate, up, down = (getattr(module, name).weight for name in names)
    inner, hidden = gate.shape
    layer = MoEFeedForward(
        config,
        hidden,
        inner // parts,
        activation=activation_of(module, names),
        device=gate.device,
        dtype=gate.dtype,
    )
    copies = config.num_experts // parts  # 第 c 套副本的第 p 份是专家 c · parts + p
    joint = torch.stack([gate.unflatten(0, (parts, -1)), up.unflatten(0, (parts, -1))], 1)
    layer.gate_up_proj.copy_(_repeated(joint.flatten(1, 2), copies))
    layer.down_proj.copy_(_repeated(down.unflatten(1, (parts, -1)).transpose(0, 1), copies))
    rows = torch.empty(copies, hidden, dtype=torch.float32)
    rows.normal_(std=_ROUTER_STD, generator=generator)
    layer.router.weight.copy_(rows.repeat_interleave(parts, 0))
    if layer.shared_down is not None:
        layer.shared_down.zero_()
    return layer.train(module.training)


def _repeated(shares: Tensor, copies: int) -> Tensor:
    """[G, …] -> [copies · G, …]，一套接一套；只是视图，写入时才展开。"""
    return shares.expand(copies, *shares.shape).reshape(-1, *shares.shape[1:])


def _entry(name: str, module: nn.Module, layer: nn.Module | None, reason: str) -> UpcycledFFN:
    before = sum(p.numel() for p in module.parameters())
    after = before if layer is None else sum(p.numel() for p in layer.parameters())
    return UpcycledFFN(name, layer is not None, reason, before, after)
