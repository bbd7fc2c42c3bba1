"""专家怎样量化：由配置得到的方式、由原权重得到的量化专家、模型里已有的与可以沿用的。"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from deepseek_opt.errors import UnsupportedError
from deepseek_opt.integrations.expert_store import (
    RELEASED,
    ExpertStore,
    Scheme,
    deinterleaved,
    weight_at,
)
from deepseek_opt.integrations.patch import patch_of
from deepseek_opt.quantize import (
    DEFAULT_GROUP_SIZE,
    DEFAULT_SYMMETRIC,
    quantize_experts,
    require_finite,
)


def scheme_of(config: Any) -> Scheme | None:
    """MOEConfig 要求的量化；没有要求为 None。"""
    kind = getattr(config, "quantization", None)
    if kind in (None, "none"):
        return None
    group, symmetric = config.quantization_group_size, config.quantization_symmetric
    if kind == "int8":
        return Scheme(8, 0, True)
    if kind == "fp8":
        return Scheme(8, group or 0, True, floating=True)
    symmetric = DEFAULT_SYMMETRIC if symmetric is None else symmetric
    return Scheme(4, group or DEFAULT_GROUP_SIZE, symmetric)


class Known(NamedTuple):
    """已有的量化专家：换配置时原来的，或由文件读入的。

    属性：
        stores: 模块名 -> ExpertStore。
        exclusive: 只用这些，其余的层不量化。
    """

    stores: Mapping[str, ExpertStore]
    exclusive: bool = False


NOTHING_KNOWN = Known({})


def quantize_module(
    module: nn.Module,
    layout: Any,
    scheme: Scheme,
    name: str,
    routed: tuple[str, ...],
    shared: tuple[str, ...] = (),
) -> ExpertStore:
    """量化 module 的路由专家（routed 两个参数）与共享专家（shared 三个），不改 module；name 用在报错里。

    逐个专家处理：转置、交错的布局在量化时换成核的布局，另占的内存是一个专家的几倍。
    """
    options = scheme._replace(group_size=scheme.group_size or None)
    parts = {}
    for key in routed:
        weight = module._parameters[key]
        weight = weight.mT if layout.transposed else weight
        joint = key == routed[0] and layout.interleaved
        order = deinterleaved(weight.shape[1]) if joint else None
        parts[key] = quantize_experts(weight, *options, order=order, name=_path(name, key))
    for key in shared:
        weight = weight_at(module, key).detach()
        require_finite(weight.float(), _path(name, key))
        parts[key] = quantize_experts(weight[None], *options)
    return ExpertStore(scheme, layout, parts, module, shared)


def _path(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def why_not(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """这个模块的专家不能量化的原因；可以则为 None。"""
    if any(weight_at(module, name) is None for name in names):
        return "专家的权重不是普通参数（例如 PEFT 的参数化）；仍用原权重计算"
    return None


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
            f"{_span(names)} 的{RELEASED}，{purpose}；请重新读入模型，"
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
        f"{name} 的{RELEASED}，只有 {store.scheme} 的，这份配置要求{wanted}；请重新读入模型，"
        "或先用 restore(model, dequantize=True) 由量化的权重还原（近似值）"
    )


def require_reused(known: Known, model: nn.Module) -> None:
    """原权重已释放的层都要沿用原来的量化；有没替换的（filter_fn 排除等）抛出 UnsupportedError。"""
    current = stores_in(model)
    for name, store in known.stores.items():
        if store.released and name not in current:
            raise UnsupportedError(
                f"{name} 的{RELEASED}，只能由量化的专家计算，而这份配置或 filter_fn 不替换它"
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


def _span(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} 等 {len(names)} 层"
