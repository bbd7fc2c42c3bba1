"""把模型里的 nn.MultiheadAttention 换成 MLA，以及换回去。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from deepseek_opt.config import MLAConfig
from deepseek_opt.errors import DeepSeekOptError, InputError
from deepseek_opt.layers.mha import LatentMultiheadAttention

_RECORD = "_deepseek_opt_replaced_mha"
_TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

FilterFn = Callable[[str, nn.MultiheadAttention], bool]


@dataclass(frozen=True)
class ReplacedAttention:
    """一个 nn.MultiheadAttention 的处理结果。

    name : 模块路径。replaced : 是否已替换。reason : 为什么没有替换，或替换时值得知道的事。
    parameters_before、parameters_after : 参数个数；没有替换时两者相同。
    """

    name: str
    replaced: bool
    reason: str
    parameters_before: int
    parameters_after: int


class ReplacementReport(list[ReplacedAttention]):
    """:func:`replace_mha` 的结果：:class:`ReplacedAttention` 的列表，打印出来是一张表。"""

    @property
    def replaced(self) -> list[ReplacedAttention]:
        """已替换的。"""
        return [entry for entry in self if entry.replaced]

    @property
    def skipped(self) -> list[ReplacedAttention]:
        """没有替换的。"""
        return [entry for entry in self if not entry.replaced]

    def render(self) -> str:
        """可读的文本。"""
        lines = [
            f"nn.MultiheadAttention：替换 {len(self.replaced)} 个，跳过 {len(self.skipped)} 个"
        ]
        for entry in self:
            state = "已替换" if entry.replaced else "跳过"
            sizes = f"参数 {entry.parameters_before:,} -> {entry.parameters_after:,}"
            lines.append(f"  {entry.name}  {state}  {sizes}  {entry.reason}")
        return "\n".join(lines)

    __str__ = render


def replace_mha(
    model: nn.Module,
    config: MLAConfig,
    filter_fn: FilterFn | None = None,
    *,
    rope: bool | Literal["auto"] = "auto",
    ignore_dropout: bool = False,
    **options: Any,
) -> ReplacementReport:
    """把 model 里的 nn.MultiheadAttention 原地换成 :class:`LatentMultiheadAttention`。

    **换上的是全新的权重**：模型的输出随之改变，需要训练；原来的层留着，:func:`restore_mha` 换回。
    （把训练好的权重转换成 MLA 是另一回事，不在这里。）换掉参数之后要重新建立优化器。

    参数
    ----
    model : 含 nn.MultiheadAttention 的模块，例如 nn.TransformerEncoder、nn.Transformer。
    config : :class:`~deepseek_opt.MLAConfig`；没有给出的维度逐层由原来的宽度与头数推出。
    filter_fn : ``filter_fn(路径, 模块) -> bool``，False 的不替换。
    rope : ``"auto"`` 时，nn.TransformerEncoderLayer 与 nn.TransformerDecoderLayer 的自注意力旋转，
        其余（交叉注意力、看不出用途的）不旋转；也可以一律 True 或 False。
    ignore_dropout : 原层的注意力 dropout 不为 0 时默认跳过（核内没有 dropout）；True 则替换并放弃它。
    options : 其余传给 :class:`LatentMultiheadAttention`（rope_theta、rope_scaling 等）。

    返回 :class:`ReplacementReport`。抛出 :class:`~deepseek_opt.errors.DeepSeekOptError`：维度不成立
    （此时模型不变）、已经替换过、model 本身就是 nn.MultiheadAttention。

    示例
    ----
    >>> import torch
    >>> from torch import nn
    >>> from deepseek_opt import MLAConfig
    >>> from deepseek_opt.layers import replace_mha, restore_mha
    >>> layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
    >>> encoder = nn.TransformerEncoder(layer, num_layers=2)
    >>> len(replace_mha(encoder, MLAConfig()).replaced)
    2
    >>> encoder(torch.randn(2, 5, 64)).shape
    torch.Size([2, 5, 64])
    >>> restore_mha(encoder)
    2
    """
    if isinstance(model, nn.MultiheadAttention):
        raise InputError("model 本身就是 nn.MultiheadAttention：请传包含它的模块，才能在其中替换")
    if _RECORD in model.__dict__:
        raise DeepSeekOptError(
            "这个模型已经替换过 nn.MultiheadAttention；请先调用 restore_mha(model)"
        )
    report, swaps = ReplacementReport(), []
    made: dict[int, LatentMultiheadAttention] = {}  # 同一个模块挂在两处时，替换后仍是同一个
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.MultiheadAttention):
            continue
        if filter_fn is not None and not filter_fn(name, module):
            report.append(_entry(name, module, None, "filter_fn 排除"))
            continue
        reason = _why_not(module, ignore_dropout)
        if reason:
            report.append(_entry(name, module, None, reason))
            continue
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        if id(module) not in made:
            turn = _is_torch_self_attention(parent, child) if rope == "auto" else rope
            made[id(module)] = _build(module, config, turn, options)
        swaps.append((parent, child, module))
        report.append(_entry(name, module, made[id(module)], _remark(module, made[id(module)])))
    _swap(model, swaps, made)
    return report


def restore_mha(model: nn.Module) -> int:
    """换回原来的 nn.MultiheadAttention（连同原来的权重），返回换回的个数。

    抛出 :class:`~deepseek_opt.errors.DeepSeekOptError`：这个模型没有替换过。

    示例见 :func:`replace_mha`。
    """
    record = model.__dict__.get(_RECORD)
    if record is None:
        raise DeepSeekOptError("这个模型没有替换过 nn.MultiheadAttention，无可恢复")
    for parent, child, module in record["swaps"]:
        module.train(getattr(parent, child).training)
        setattr(parent, child, module)
    for encoder, value in record["encoders"]:
        encoder.use_nested_tensor = value
    del model.__dict__[_RECORD]
    return len(record["swaps"])


def _swap(model: nn.Module, swaps: list, made: dict[int, LatentMultiheadAttention]) -> None:
    """全部建好之后才动模型：中途出错时模型不变。"""
    if not swaps:
        return
    encoders = []
    for parent, child, module in swaps:
        setattr(parent, child, made[id(module)])
    for module in model.modules():
        # 嵌套张量路径读原层的融合权重；替换后不再适用，与 PyTorch 自己对不支持的层的处理相同。
        if isinstance(module, nn.TransformerEncoder) and getattr(
            module, "use_nested_tensor", False
        ):
            if any(isinstance(m, LatentMultiheadAttention) for m in module.modules()):
                encoders.append((module, module.use_nested_tensor))
                module.use_nested_tensor = False
    model.__dict__[_RECORD] = {"swaps": swaps, "encoders": encoders}


def _why_not(module: nn.MultiheadAttention, ignore_dropout: bool) -> str:
    if type(module) is not nn.MultiheadAttention:
        return f"是 nn.MultiheadAttention 的子类 {type(module).__name__}，行为可能不同"
    if module.bias_k is not None or module.bias_v is not None:
        return "用了 add_bias_kv，MLA 没有对应的参数"
    if module.add_zero_attn:
        return "用了 add_zero_attn，MLA 没有对应的行为"
    if module.kdim != module.vdim:
        return f"kdim（{module.kdim}）与 vdim（{module.vdim}）不同，而 MLA 的键和值出自同一输入"
    if module.dropout and not ignore_dropout:
        return (
            f"注意力 dropout 为 {module.dropout}，核内没有 dropout；"
            "建层时设为 0，或传 ignore_dropout=True 放弃它"
        )
    return ""


def _build(module: nn.MultiheadAttention, config: MLAConfig, rope: bool, options: dict[str, Any]):
    weight = module.out_proj.weight
    settings = {"bias": module.in_proj_bias is not None, "dtype": weight.dtype}
    settings |= {"device": weight.device, "rope": rope, **options}
    layer = LatentMultiheadAttention(
        config,
        module.embed_dim,
        num_heads=module.num_heads,
        kdim=module.kdim,
        batch_first=module.batch_first,
        **settings,
    )
    return layer.train(module.training)


def _is_torch_self_attention(parent: nn.Module, child: str) -> bool:
    return isinstance(parent, _TORCH_LAYERS) and child == "self_attn"


def _remark(module: nn.MultiheadAttention, layer: LatentMultiheadAttention) -> str:
    parts = ["新权重", "旋转位置编码" if layer.rotary_emb is not None else "不旋转"]
    if module.dropout:
        parts.append(f"放弃了注意力 dropout {module.dropout}")
    return "，".join(parts)


def _entry(name: str, module: nn.Module, layer: nn.Module | None, reason: str) -> ReplacedAttention:
    before = sum(p.numel() for p in module.parameters())
    after = before if layer is None else sum(p.numel() for p in layer.parameters())
    return ReplacedAttention(name, layer is not None, reason, before, after)
