"""量化的专家存成一个 safetensors 文件，再读进模型：读入时不需要专家的原权重。

文件里是每个量化层的 packed、scale、zero，以及 state_dict 里其余的全部张量；元数据写明版本、位数、组大小、各层的
形状与布局。读入前逐项核对，有不符的一次全部列出，模型不变。
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from deepseek_opt.buffers import large_empty
from deepseek_opt.errors import InputError
from deepseek_opt.integrations import experts, moe_block, moe_layer, quantized
from deepseek_opt.integrations.expert_store import ExpertStore, Scheme, weight_at
from deepseek_opt.integrations.quantized import Known
from deepseek_opt.optimize import FilterFn, apply_profile, check_model, is_optimized, lock_of
from deepseek_opt.quantize import FP8_GROUP_SIZE, GROUP_SIZES, QuantizedExperts, packed_shapes
from deepseek_opt.report import OptimizationReport

FORMAT, VERSION = "deepseek_opt.quantized_experts", "2"
_LISTED = 20  # 一次错误里至多列出的条数


def save_quantized(model: nn.Module, path: str | Path) -> Path:
    """把 model 的量化专家与其余权重存成一个 safetensors 文件；返回路径。

    参数
    ----
    model : 由 ``optimize`` 量化过专家的模型，原权重保留与否都可以。
    path : 文件，例如 ``model-int4.safetensors``；已有的被整个替换，写到一半出错时原来的还在。

    抛出 InputError：目录不存在；没有量化的专家；专家的原权重在量化之后被改动；其余权重里有 meta 张量。

    示例::

        profile = OptimizationProfile(moe=MOEConfig(quantization="int4"))
        deepseek_opt.optimize(model, profile)
        deepseek_opt.save_quantized(model, "model-int4.safetensors")
    """
    from safetensors.torch import save_file

    check_model(model)
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise InputError.expected("path", "已有目录里的一个文件", str(path))
    with lock_of(model):
        stores = quantized.stores_in(model)
        tensors, metadata = _contents(model, stores)
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(tensors, partial, metadata)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    return path


def load_quantized(
    model: nn.Module,
    path: str | Path,
    profile: Any = None,
    *,
    strict: bool = False,
    filter_fn: FilterFn | None = None,
) -> OptimizationReport:
    """读入 :func:`save_quantized` 的文件并优化 model；返回报告，同 ``optimize``。

    参数
    ----
    model : 没有优化过的同结构模型。专家的权重可以在 meta 上（从未占用内存），读入之后就只有量化的；
        已有数据的专家原权重按 ``keep_original_weights`` 保留或释放。其余权重只要有一个在 meta 上，
        就全部从文件读；都已有数据时不动。
    path : 文件。
    profile : 默认只量化 MoE；自己给出时，其中 moe 的量化方式要与文件相同。
    strict, filter_fn : 同 ``optimize``。

    抛出 InputError：文件的版本、组大小、张量、形状有一项不符，逐个指出；模型不变。

    示例::

        with deepseek_opt.empty_parameters():
            model = AutoModelForCausalLM.from_config(config)
        report = deepseek_opt.load_quantized(model, "model-int4.safetensors")
    """
    check_model(model)
    with lock_of(model), _opened(Path(path)) as file:
        if is_optimized(model):
            raise InputError(f"这个 {type(model).__name__} 已经优化过；请先 restore 再读入")
        scheme, layers = _header(file)
        profile = _profile(profile, scheme)
        problems: list[str] = []
        rest = _missing_rest(model, layers)
        _check_layers(model, file, scheme, layers, problems)
        _check_rest(model, file, rest, problems)
        _raise(path, problems)
        stores = {name: _read_layer(model, file, scheme, layers[name], name) for name in layers}
        _raise(path, [f"{name} 的尺度含有 NaN 或无穷" for name in stores if _broken(stores[name])])
        undo = _fill(model, file, rest)
        try:
            known = Known(stores, exclusive=True)
            return apply_profile(model, profile, strict, filter_fn, known=known)
        except BaseException:
            for owner, name, old in undo:
                owner[name] = old
            raise


@contextmanager
def empty_parameters() -> Iterator[None]:
    """块内建的模块，参数都在 meta 上（不占内存），缓冲区照常：之后由 load_quantized 读入。

    与 ``torch.device("meta")`` 不同，旋转频率一类不进 state_dict 的缓冲区是真实的。

    示例
    ----
    >>> import torch
    >>> from deepseek_opt import empty_parameters
    >>> with empty_parameters():
    ...     layer = torch.nn.Linear(4, 4)
    >>> layer.weight.is_meta
    True
    """

    def hollow(_module: nn.Module, _name: str, value: Any) -> Any:
        if value is None or value.is_meta:  # 共享的参数仍是同一个
            return None
        return nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)

    handle = register_module_parameter_registration_hook(hollow)
    try:
        yield
    finally:
        handle.remove()


# ---- 写 ----


def _contents(
    model: nn.Module, stores: dict[str, tuple[nn.Module, ExpertStore]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(张量, 元数据)。"""
    if not stores:
        raise InputError(
            "模型里没有量化的专家；请先用 optimize(model, OptimizationProfile("
            'moe=MOEConfig(quantization="int4")))'
        )
    tensors, layers, skipped = {}, {}, set()
    for name, (module, store) in stores.items():
        if not store.is_fresh(module):
            raise InputError(f"{name} 的原权重在量化之后被改动；请先用 switch 重新量化再保存")
        layers[name] = {"layout": _plain(store.layout), "weights": {}}
        for key, weight in store.parts.items():
            layers[name]["weights"][key] = list(weight.shape)
            skipped.add(id(weight_at(module, key)))
            for part in ("packed", "scale", "zero"):
                if getattr(weight, part) is not None:
                    tensors[_key(name, key, part)] = getattr(weight, part).contiguous()
    for name, owner, key in _rest(model, skipped):
        if owner[key].is_meta:
            raise InputError(f"{name} 还在 meta 设备上，没有可以保存的数据")
        tensors[name] = owner[key].detach().contiguous()
    scheme = next(iter(stores.values()))[1].scheme
    numbers = {name: json.dumps(value) for name, value in scheme._asdict().items()}
    header = {"format": FORMAT, "version": VERSION, "layers": json.dumps(layers)}
    return tensors, {**header, **numbers}


def _key(*parts: str) -> str:
    """点分的名字；空的部分（模型本身）略去。"""
    return ".".join(filter(None, parts))


def _plain(layout: Any) -> dict[str, Any] | None:
    """写进元数据的布局；只有共享专家时为 None。"""
    return None if layout is None else json.loads(json.dumps(layout._asdict()))


def _rest(model: nn.Module, skipped: set[int]) -> Iterator[tuple[str, dict, str]]:
    """state_dict 里的 (名字, 所在的字典, 键)；同一个张量只给第一个，skipped 的 id 不给。"""
    seen = set(skipped)
    for prefix, module in model.named_modules():
        hidden = module._non_persistent_buffers_set
        for owner in (module._parameters, module._buffers):
            for key, value in owner.items():
                if value is None or id(value) in seen or key in hidden:
                    continue
                seen.add(id(value))
                yield _key(prefix, key), owner, key


# ---- 读 ----


class _Layer(NamedTuple):
    """文件里的一层：各权重 [E, N, K] 的形状（共享专家 E = 1）与路由专家的布局（没有为 None）。"""

    weights: dict[str, tuple[int, int, int]]
    layout: dict[str, Any] | None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError.expected("path", "已有的文件", str(path))
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise InputError(f"{path} 不是完整的 safetensors 文件：{error}") from error
    with file as opened:
        yield opened


def _header(file: Any) -> tuple[Scheme, dict[str, _Layer]]:
    data = file.metadata() or {}
    if data.get("format") != FORMAT:
        raise InputError(f"文件不是 save_quantized 写的：元数据里没有 format = {FORMAT}")
    if data.get("version") != VERSION:
        old = "（旧格式，共享专家没有量化；请由原权重重新 optimize、save_quantized）"
        raise InputError(
            f"文件的版本是 {data.get('version')}{old if data.get('version') == '1' else ''}，"
            f"这个版本的 deepseek_opt 只认 {VERSION}"
        )
    try:
        data.setdefault("floating", "false")  # 有 fp8 之前写的文件
        scheme = Scheme(*(json.loads(data[name]) for name in Scheme._fields))
        layers = {
            name: _Layer({k: tuple(map(int, v)) for k, v in one["weights"].items()}, one["layout"])
            for name, one in json.loads(data["layers"]).items()
        }
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"文件的元数据不完整：{error!r}") from error
    allowed = [Scheme(8, 0, True), *(Scheme(4, g, s) for g in GROUP_SIZES for s in (True, False))]
    allowed.extend(Scheme(8, group, True, True) for group in (0, FP8_GROUP_SIZE))
    if scheme not in allowed:
        raise InputError(
            f"文件的量化方式不认识：bits={scheme.bits}，group_size={scheme.group_size}，"
            f"symmetric={scheme.symmetric}，floating={scheme.floating}；应为 int8，int4 且组大小为 32、64、128，"
            "或 fp8 且不分组、组大小为 128"
        )
    return scheme, layers


def _profile(profile: Any, scheme: Scheme) -> Any:
    from deepseek_opt.config import MOEConfig, OptimizationProfile

    if profile is None:
        fields: dict[str, Any] = {"quantization": scheme.kind}
        if scheme.group_size:
            fields["quantization_group_size"] = scheme.group_size
        if scheme.bits == 4:
            fields["quantization_symmetric"] = scheme.symmetric
        return OptimizationProfile(moe=MOEConfig(**fields))
    if not isinstance(profile, OptimizationProfile):
        raise InputError.expected("profile", "OptimizationProfile", profile)
    wanted = quantized.scheme_of(profile.moe)
    if wanted != scheme:
        shown = "没有要求量化" if wanted is None else str(wanted)
        raise InputError.expected("profile.moe", f"与文件相同的 {scheme}", shown)
    return profile


def _check_layers(
    model: nn.Module, file: Any, scheme: Scheme, layers: dict[str, _Layer], problems: list[str]
) -> None:
    """文件里的每一层在模型里有同样的，张量齐全；模型里要量化的每一层在文件里都有。"""
    modules, keys = dict(model.named_modules()), set(file.keys())
    for name, layer in layers.items():
        module = modules.get(name)
        wanted = None if module is None else _expected(module)
        if wanted is None:
            problems.append(f"{name}：模型里没有这个专家层")
            continue
        if wanted != layer.weights:
            problems.append(f"{name}：模型的形状是 {wanted}，文件里是 {layer.weights}")
        layout = _plain(_identify(module))
        if layout != layer.layout:
            problems.append(f"{name}：模型的布局或激活是 {layout}，文件里是 {layer.layout}")
        for weight, shape in layer.weights.items():
            problems.extend(_check_weight(file, keys, scheme, (name, weight), shape))
    for name, module in modules.items():
        wanted = _expected(module)
        if wanted is None or name in layers:
            continue
        absent = [k for k in wanted if _key(name, k) not in keys]
        if absent:
            problems.append(f"{name}：文件里没有这一层的 {'、'.join(absent)}")


def _check_weight(
    file: Any, keys: set[str], scheme: Scheme, where: tuple[str, str], shape: tuple[int, int, int]
) -> Iterator[str]:
    wanted = packed_shapes(shape, *scheme)
    for part, (dtype, size) in wanted.items():
        key = _key(*where, part)
        if key not in keys:
            yield f"{key}：文件里没有"
            continue
        found = file.get_slice(key)
        got = (found.get_dtype(), tuple(found.get_shape()))
        if got != (_DTYPES[dtype], size):
            yield f"{key}：应为 {_DTYPES[dtype]} {list(size)}，文件里是 {got[0]} {list(got[1])}"


_DTYPES = {
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float32: "F32",
}


def _names(module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(路由专家, 共享专家) 里可以量化的权重的路径；都没有时为两个空的。"""
    spec = moe_block.find_block(module)
    if experts.looks_like_experts(module):
        found = experts.weight_names(module), ()
    elif moe_layer.is_moe_layer(module):
        found = experts.weight_names(module), moe_layer.shared_names(module)
    else:
        found = (), () if spec is None else moe_block.shared_paths(module, spec)
    return found if quantized.why_not(module, sum(found, ())) is None else ((), ())


def _expected(module: nn.Module) -> dict[str, tuple[int, int, int]] | None:
    """参数的路径 -> 核的布局下的形状 [E, N, K]；没有可以量化的为 None。"""
    routed, shared = _names(module)
    transposed = getattr(module, "is_transposed", False)
    weights = {k: weight_at(module, k) for k in routed}
    found = {k: tuple((w.mT if transposed else w).shape) for k, w in weights.items()}
    found.update({k: (1, *weight_at(module, k).shape) for k in shared})
    return found or None


def _identify(module: nn.Module) -> Any:
    if moe_layer.is_moe_layer(module):
        return moe_layer.layout_of(module)
    return experts.identify(module) if experts.looks_like_experts(module) else None


def _read_layer(
    model: nn.Module, file: Any, scheme: Scheme, layer: _Layer, name: str
) -> ExpertStore:
    module = model.get_submodule(name)
    found = {}
    for weight, shape in layer.weights.items():
        mapped, scale = (file.get_tensor(_key(name, weight, p)) for p in ("packed", "scale"))
        packed = large_empty(mapped.shape, mapped.dtype).copy_(mapped)  # 大页上，不再依赖文件
        zeroed = scheme.bits == 4 and not scheme.symmetric
        zero = file.get_tensor(_key(name, weight, "zero")) if zeroed else None
        found[weight] = QuantizedExperts(packed, scale, zero, *scheme[:2], shape)
    return ExpertStore(scheme, _identify(module), found, module, _names(module)[1])


def _broken(store: ExpertStore) -> bool:
    return not all(bool(part.scale.isfinite().all()) for part in store.parts.values())


def _missing_rest(model: nn.Module, layers: dict[str, _Layer]) -> list[tuple[str, dict, str]]:
    """量化的专家以外要从文件读的张量；都已有数据时为空。"""
    modules = dict(model.named_modules())
    skipped = {
        id(weight_at(modules[name], key))
        for name, layer in layers.items()
        for key in layer.weights
        if name in modules
    }
    rest = list(_rest(model, skipped))
    return rest if any(owner[key].is_meta for _, owner, key in rest) else []


def _check_rest(
    model: nn.Module, file: Any, rest: list[tuple[str, dict, str]], problems: list[str]
) -> None:
    keys = set(file.keys())
    for prefix, module in model.named_modules():
        for key in module._non_persistent_buffers_set:
            if module._buffers[key] is not None and module._buffers[key].is_meta:
                problems.append(
                    f"{_key(prefix, key)}：在 meta 上而不进 state_dict；请在 empty_parameters() 里建模型"
                )
    for name, owner, key in rest:
        if name not in keys:
            problems.append(f"{name}：文件里没有")
            continue
        wanted, got = list(owner[key].shape), list(file.get_slice(name).get_shape())
        if wanted != got:
            problems.append(f"{name}：模型的形状是 {wanted}，文件里是 {got}")


def _fill(
    model: nn.Module, file: Any, rest: list[tuple[str, dict, str]]
) -> list[tuple[dict, str, Any]]:
    """换上文件里的张量（类型随模型），共享的一起换；返回 (字典, 键, 原来的) 供撤销。"""
    new = {}
    for name, owner, key in rest:
        old = owner[key]
        value = file.get_tensor(name).to(old.dtype)
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        new[id(old)] = value
    undo = []
    for module in model.modules():
        for owner in (module._parameters, module._buffers):
            for key, old in owner.items():
                if id(old) in new:
                    undo.append((owner, key, old))
    for owner, key, old in undo:
        owner[key] = new[id(old)]
    return undo


def _raise(path: str | Path, problems: list[str]) -> None:
    if not problems:
        return
    shown = problems[:_LISTED]
    if len(problems) > len(shown):
        shown.append(f"……另有 {len(problems) - len(shown)} 处")
    raise InputError(f"{path} 与模型不符，模型没有改动：\n  " + "\n  ".join(shown))
