"""一个 MoE 模块的量化专家：怎样由原权重得到、怎样计算、占多少字节、原权重怎样释放。

量化的张量只放在补丁上（:class:`ExpertStore`），不是参数或缓冲区：保留原权重时 state_dict、save_pretrained、
restore 与没有量化时一样。释放之后原来的参数换成同形状的 meta 张量，存取 state_dict 时报错并指出该用什么。
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepseek_opt import ops
from deepseek_opt.config import format_bytes
from deepseek_opt.errors import InputError, UnsupportedError
from deepseek_opt.integrations.patch import patch_of
from deepseek_opt.integrations.stamp import stamp
from deepseek_opt.quantize import (
    DEFAULT_GROUP_SIZE,
    DEFAULT_SYMMETRIC,
    QuantizedExperts,
    dequantize,
    quantize_experts,
)

_BITS = {"int8": 8, "int4": 4}
_RELEASED = "原权重已经释放（keep_original_weights=False，或由量化文件读入）"


class Scheme(NamedTuple):
    """怎样量化；由 MOEConfig 得到，省略的取默认值。"""

    bits: int
    group_size: int
    symmetric: bool

    def __str__(self) -> str:
        if self.bits == 8:
            return "int8"
        return f"int4（{self.group_size} 个一组{'' if self.symmetric else '，带零点'}）"


def scheme_of(config: Any) -> Scheme | None:
    """MOEConfig 要求的量化；没有要求为 None。"""
    bits = _BITS.get(getattr(config, "quantization", None))
    if bits is None:
        return None
    if bits == 8:
        return Scheme(8, 0, True)
    symmetric = config.quantization_symmetric
    return Scheme(
        4,
        config.quantization_group_size or DEFAULT_GROUP_SIZE,
        DEFAULT_SYMMETRIC if symmetric is None else symmetric,
    )


class Known(NamedTuple):
    """已有的量化专家：换配置时原来的，或由文件读入的。

    属性：
        stores: 模块名 -> ExpertStore。
        exclusive: 只用这些，其余的层不量化。
    """

    stores: Mapping[str, ExpertStore]
    exclusive: bool = False


NOTHING_KNOWN = Known({})


class ExpertStore:
    """一个模块的量化专家。

    属性：
        scheme: 怎样量化的。
        layout: 原权重的布局与激活（ExpertsLayout）；量化之后总是 gate 在前、up 在后，不转置。
        gate_up、down: 量化的权重。
        names: 原来的两个参数名。
        original_bytes: 原权重的字节数（释放之后仍是原来的数）。
        released: 原权重已经释放。
    """

    def __init__(
        self,
        scheme: Scheme,
        layout: Any,
        weights: tuple[QuantizedExperts, QuantizedExperts],
        module: nn.Module,
        names: tuple[str, str],
    ):
        self.scheme, self.layout, self.names = scheme, layout, names
        self.gate_up, self.down = weights
        sources = tuple(module._parameters[name] for name in names)
        self.original_bytes = sum(p.numel() * p.element_size() for p in sources)
        self.released = any(p.is_meta for p in sources)
        self._follow(() if self.released else sources)

    def compute(
        self, x: Tensor, indices: Tensor, weights: Tensor, shared: Sequence[Tensor] = ()
    ) -> Tensor:
        """x [T, H] -> [T, H]；共享专家也在这里交给算子。"""
        layout = self.layout
        out = ops.moe_experts_quantized(
            x,
            indices.to(torch.int64),
            weights,
            *self.gate_up[:3],
            *self.down[:3],
            shared,
            self.scheme.group_size,
            layout.activation,
            layout.alpha,
            layout.limit,
            gated=layout.gated,
        )
        return out.to(x.dtype)  # autocast 里算子按低精度输出

    def refusal(self, module: nn.Module) -> str | None:
        """这次不能用量化专家的原因；可以则为 None。"""
        if module.training:
            return "量化的专家只做推理，训练模式用原权重"
        return None if self.is_fresh(module) else "专家的原权重在量化之后被改动，量化的已不是同一份"

    def is_fresh(self, module: nn.Module) -> bool:
        """原权重还是量化时的那一份（释放之后总是）。"""
        if self.released:
            return True
        current = tuple(module._parameters.get(name) for name in self.names)
        same = all(a is b for a, b in zip(current, self._sources, strict=True))
        return same and self._versions == _versions(current)

    @property
    def nbytes(self) -> int:
        """量化的权重的字节数。"""
        return self.gate_up.nbytes + self.down.nbytes

    def describe(self, keep: bool) -> str:
        """报告里的一句话；keep 为是否保留原权重。"""
        each = self.nbytes / self.gate_up.shape[0] / 2**20
        state = "保留" if keep and not self.released else "已释放"
        return (
            f"{self.scheme}，每个专家 {each:.3g} MiB；本层 {format_bytes(self.nbytes)}，"
            f"原权重 {format_bytes(self.original_bytes)}（{state}）"
        )

    # ---- 原权重 ----

    def release(self, module: nn.Module) -> None:
        """释放原权重：参数换成同形状的 meta 张量。已经释放的不变。"""
        for name in self.names:
            old = module._parameters[name]
            if not old.is_meta:
                empty = torch.empty_like(old, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=old.requires_grad)
        self.released = True
        self._follow(())
        if _refuse_state_dict not in module._state_dict_pre_hooks.values():
            module.register_state_dict_pre_hook(_refuse_state_dict)
            module.register_load_state_dict_pre_hook(_refuse_loading)

    def rebuild(self, module: nn.Module) -> None:
        """把量化的权重还原成原来布局、类型的参数（近似值），取代 meta 张量。"""
        for name, weight in zip(self.names, (self.gate_up, self.down), strict=True):
            old = module._parameters[name]
            dense = self._original_layout(dequantize(weight, old.dtype), name == self.names[0])
            module._parameters[name] = nn.Parameter(dense, requires_grad=old.requires_grad)
        for hooks, mine in (
            (module._state_dict_pre_hooks, _refuse_state_dict),
            (module._load_state_dict_pre_hooks, _refuse_loading),
        ):
            for key in [k for k, hook in hooks.items() if getattr(hook, "hook", hook) is mine]:
                del hooks[key]

    def stand_in(self, module: nn.Module) -> nn.Module:
        """与 module 同类、只有首末两个专家、权重由量化还原的小替身：没有原权重时用来核对 forward。"""
        count = self.gate_up.shape[0]
        picked = torch.tensor(sorted({0, count - 1}))
        small = copy.copy(module)
        small.__dict__["num_experts"] = len(picked)
        small.__dict__["_parameters"] = dict(module._parameters)
        small.__dict__.pop("forward", None)
        for name, weight in zip(self.names, (self.gate_up, self.down), strict=True):
            zero = None if weight.zero is None else weight.zero[picked]
            part = weight._replace(
                packed=weight.packed[picked],
                scale=weight.scale[picked],
                zero=zero,
                shape=(len(picked), *weight.shape[1:]),
            )
            dense = dequantize(part, module._parameters[name].dtype)
            dense = self._original_layout(dense, name == self.names[0])
            small._parameters[name] = nn.Parameter(dense, requires_grad=False)
        return small

    def _original_layout(self, weight: Tensor, joint: bool) -> Tensor:
        if joint and self.layout.interleaved:
            weight = weight[:, deinterleaved(weight.shape[1]).argsort()]
        return weight.mT.contiguous() if self.layout.transposed else weight

    # ---- 深拷贝、pickle ----

    def _follow(self, sources: tuple[Tensor, ...]) -> None:
        self._sources, self._versions = sources, _versions(sources)

    def __getstate__(self) -> dict[str, Any]:
        # 副本的张量从头计改写次数：只记下此刻是不是同一份
        fresh = self._versions == _versions(self._sources)
        return {**self.__dict__, "_versions": fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._versions = _versions(self._sources) if state["_versions"] else ()


def quantize_module(
    module: nn.Module, layout: Any, scheme: Scheme, name: str, names: tuple[str, str]
) -> ExpertStore:
    """量化 module 的专家（不改 module）；name 用在报错里。

    逐个专家处理：转置、交错的布局在量化时换成核的布局，另占的内存是一个专家的几倍。
    """
    found = []
    for key in names:
        weight = module._parameters[key]
        weight = weight.mT if layout.transposed else weight
        joint = key == names[0] and layout.interleaved
        order = deinterleaved(weight.shape[1]) if joint else None
        path = f"{name}.{key}" if name else key
        group = scheme.group_size or None
        packed = quantize_experts(
            weight, scheme.bits, group, scheme.symmetric, order=order, name=path
        )
        found.append(packed)
    return ExpertStore(scheme, layout, tuple(found), module, names)


def why_not(module: nn.Module, names: tuple[str, str]) -> str | None:
    """这个模块的专家不能量化的原因；可以则为 None。"""
    if getattr(module, "has_bias", False):
        return "专家带偏置，量化的核不做偏置；仍用原权重计算"
    if any(name not in module._parameters for name in names):
        return "专家的权重不是普通参数（例如 PEFT 的参数化）；仍用原权重计算"
    return None


def deinterleaved(rows: int) -> Tensor:
    """交错的 (gate, up, gate, up, …) 换成 gate 在前、up 在后的行次序。"""
    return torch.arange(rows).view(-1, 2).T.reshape(-1)


def stores_in(model: nn.Module) -> dict[str, tuple[nn.Module, ExpertStore]]:
    """模块名 -> (模块, 它的量化专家)。"""
    return {name: (module, store) for name, module, store in _stores(model)}


def scheme_in(model: nn.Module) -> Scheme | None:
    """专家怎样量化的；没有量化为 None。"""
    return next((store.scheme for _, _, store in _stores(model)), None)


def released_in(model: nn.Module) -> list[str]:
    """原权重已释放的模块名。"""
    return [name for name, _, store in _stores(model) if store.released]


def require_original(model: nn.Module, purpose: str) -> None:
    """有模块的原权重已释放时抛出 UnsupportedError。"""
    names = released_in(model)
    if names:
        raise UnsupportedError(
            f"{_span(names)} 的{_RELEASED}，{purpose}；请重新读入模型，"
            "或用 restore(model, dequantize=True) 由量化的权重还原（近似值）"
        )


def reusable(
    name: str, module: nn.Module, known: Known, scheme: Scheme | None
) -> ExpertStore | None:
    """已有的、这份配置可以沿用的量化专家；原权重已释放而又不能沿用时抛出 UnsupportedError。"""
    store = known.stores.get(name)
    if store is None or (store.scheme == scheme and store.is_fresh(module)):
        return store
    if not store.released:
        return None
    wanted = "不量化" if scheme is None else str(scheme)
    raise UnsupportedError(
        f"{name} 的{_RELEASED}，只有 {store.scheme} 的，这份配置要求{wanted}；请重新读入模型，"
        "或先用 restore(model, dequantize=True) 由量化的权重还原（近似值）"
    )


def require_reused(known: Known, model: nn.Module) -> None:
    """原权重已释放的层都要沿用原来的量化；有没替换的（filter_fn 排除等）抛出 UnsupportedError。"""
    current = stores_in(model)
    for name, store in known.stores.items():
        if store.released and name not in current:
            raise UnsupportedError(
                f"{name} 的{_RELEASED}，只能由量化的专家计算，而这份配置或 filter_fn 不替换它"
            )


def release_where(model: nn.Module, everything: bool) -> None:
    """释放原权重：everything 为全部已量化的模块；否则只是本来就没有原权重的。"""
    for module, store in stores_in(model).values():
        if everything or store.released:
            store.release(module)


def rebuild_released(model: nn.Module) -> None:
    """原权重已释放的模块由量化的权重还原。"""
    for module, store in stores_in(model).values():
        if store.released:
            store.rebuild(module)


def known_in(model: nn.Module) -> Known:
    """换配置时可以沿用的。"""
    return Known({name: store for name, (_, store) in stores_in(model).items()})


def _stores(model: nn.Module) -> Iterator[tuple[str, nn.Module, ExpertStore]]:
    for name, module in model.named_modules():
        store = getattr(patch_of(module), "store", None)
        if isinstance(store, ExpertStore):
            yield name, module, store


def _versions(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(stamp(t)[1] for t in tensors)


def _span(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} 等 {len(names)} 层"


def _refuse_state_dict(_module: nn.Module, prefix: str, _keep: bool) -> None:
    raise UnsupportedError(
        f"{prefix.rstrip('.') or '专家'} 的{_RELEASED}，state_dict、save_pretrained 存不了它们；"
        "请用 save_quantized(model, 文件) 保存，用 load_quantized 读入"
    )


def _refuse_loading(_module: nn.Module, _state: Any, prefix: str, *_: Any) -> None:
    raise InputError(
        f"{prefix.rstrip('.') or '专家'} 的{_RELEASED}，load_state_dict 没有可以写入的参数；"
        "请先用 restore(model, dequantize=True)"
    )
