"""一个模块的量化专家：怎样计算、占多少字节、原权重怎样释放与还原。

量化的张量只放在补丁上，不是参数或缓冲区：保留原权重时 state_dict、save_pretrained、restore 与没有量化时一样。
释放之后原来的参数换成同形状的 meta 张量，存取 state_dict 时报错并指出该用什么。
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepseek_opt import ops
from deepseek_opt.config import format_bytes
from deepseek_opt.errors import InputError, UnsupportedError
from deepseek_opt.integrations.stamp import stamp
from deepseek_opt.quantize import QuantizedExperts, dequantize

RELEASED = "原权重已经释放（keep_original_weights=False，或由量化文件读入）"


class Scheme(NamedTuple):
    """怎样量化；由 MOEConfig 得到，省略的取默认值。"""

    bits: int
    group_size: int
    symmetric: bool
    floating: bool = False

    @property
    def kind(self) -> str:
        """配置里的名字。"""
        return "fp8" if self.floating else f"int{self.bits}"

    def __str__(self) -> str:
        if not self.group_size:
            return self.kind
        return f"{self.kind}（{self.group_size} 个一组{'' if self.symmetric else '，带零点'}）"


class SharedTensors(NamedTuple):
    """交给算子的共享专家：三个权重，可再带逐词元的系数；量化的另有尺度与零点。"""

    tensors: Sequence[Tensor] = ()
    scale: Sequence[Tensor] = ()
    zero: Sequence[Tensor] = ()


class ExpertStore:
    """一个模块的量化专家；名字是相对于模块的路径，例如 ``gate_up_proj``、``shared_experts.up_proj.weight``。

    属性：
        scheme: 怎样量化的。
        layout: 路由专家原权重的布局与激活（ExpertsLayout），没有路由专家为 None；量化之后总是 gate 在前、
            up 在后，不转置。
        parts: 名字 -> 量化的权重；共享专家的是 [1, N, K]。
        routed: 路由专家的两个名字；只有共享专家时为空。
        shared: 共享专家的 gate、up、down 的名字；没有为空。
        original_bytes: 原权重的字节数（释放之后仍是原来的数）。
        released: 原权重已经释放。
    """

    def __init__(
        self,
        scheme: Scheme,
        layout: Any,
        parts: dict[str, QuantizedExperts],
        module: nn.Module,
        shared: tuple[str, ...] = (),
    ):
        self.scheme, self.layout, self.parts, self.shared = scheme, layout, parts, shared
        self.routed = tuple(name for name in parts if name not in shared)
        sources = self._current(module)
        self.original_bytes = sum(p.numel() * p.element_size() for p in sources)
        self.released = any(p.is_meta for p in sources)
        found = [parts[name] for name in shared]
        zeros = [part.zero[0] for part in found if part.zero is not None]
        self._shared = ([p.packed[0] for p in found], [p.scale[0] for p in found], zeros)
        self._joint_bias: tuple[Tensor, Any, Tensor] | None = None
        self._follow(() if self.released else sources)

    def compute(
        self,
        x: Tensor,
        indices: Tensor,
        weights: Tensor,
        shared: SharedTensors | None = None,
        biases: Sequence[Tensor | None] = (None, None),
    ) -> Tensor:
        """x [T, H] -> [T, H]；共享专家也在这里交给算子。"""
        layout, (gate_up, down) = self.layout, self.pair
        shared = SharedTensors() if shared is None else shared
        out = ops.moe_experts_quantized(
            x,
            indices.to(torch.int64),
            weights,
            *gate_up[:3],
            *down[:3],
            shared.tensors,
            self.scheme.group_size,
            layout.activation,
            layout.alpha,
            layout.limit,
            gated=layout.gated,
            shared_scale=shared.scale,
            shared_zero=shared.zero,
            gate_up_bias=biases[0],
            down_bias=biases[1],
        )
        return out.to(x.dtype)  # autocast 里算子按低精度输出

    def shared_tensors(self, coefficient: Sequence[Tensor] = ()) -> SharedTensors:
        """量化的共享专家；coefficient 为空，或一个逐词元的系数 [T]（不量化）。"""
        packed, scale, zero = self._shared
        return SharedTensors([*packed, *coefficient], scale, zero)

    def biases(self, module: nn.Module) -> Sequence[Tensor | None]:
        """路由专家的偏置，gate 在前、up 在后。偏置不量化、不释放，改动了下一次就生效。"""
        if not getattr(module, "has_bias", False):
            return (None, None)
        found = [getattr(module, f"{name}_bias") for name in self.routed]
        if not self.layout.interleaved:
            return found
        joint, mark, memo = found[0], stamp(found[0]), self._joint_bias
        if memo is None or memo[0] is not joint or memo[1] != mark:
            memo = (joint, mark, joint.detach()[:, deinterleaved(joint.shape[1])])
            if not torch.compiler.is_compiling():  # 图里的张量不能留到图外
                self._joint_bias = memo
        return (memo[2], found[1])

    @property
    def pair(self) -> tuple[QuantizedExperts, QuantizedExperts]:
        """路由专家的 (gate_up, down)。"""
        first, last = self.routed
        return self.parts[first], self.parts[last]

    def refusal(self, module: nn.Module) -> str | None:
        """这次不能用量化专家的原因；可以则为 None。"""
        if module.training:
            return "量化的专家只做推理，训练模式用原权重"
        if self.is_fresh(module):
            return None
        kind = "专家" if self.routed else "共享专家"
        return f"{kind}的原权重在量化之后被改动，量化的已不是同一份"

    def is_fresh(self, module: nn.Module) -> bool:
        """原权重还是量化时的那一份（释放之后总是）。"""
        if self.released:
            return True
        current = self._current(module)
        same = all(a is b for a, b in zip(current, self._sources, strict=True))
        return same and self._versions == _versions(current)

    @property
    def nbytes(self) -> int:
        """量化的权重的字节数。"""
        return sum(part.nbytes for part in self.parts.values())

    def describe(self, keep: bool) -> str:
        """报告里的一句话；keep 为是否保留原权重。"""
        state = "保留" if keep and not self.released else "已释放"
        size = format_bytes(self.nbytes)
        origin = f"原权重 {format_bytes(self.original_bytes)}（{state}）"
        if not self.routed:
            return f"共享专家也是 {self.scheme}，{size}，{origin}"
        pair = self.pair
        each = sum(part.nbytes for part in pair) / pair[0].shape[0] / 2**20
        note = "（含共享专家）" if self.shared else ""
        return f"{self.scheme}，每个专家 {each:.3g} MiB；本层{note} {size}，{origin}"

    # ---- 原权重 ----

    def release(self, module: nn.Module) -> None:
        """释放原权重：参数换成同形状的 meta 张量。已经释放的不变。"""
        for path in self.parts:
            owner, key = _place(module, path)
            old = owner._parameters[key]
            if not old.is_meta:
                empty = torch.empty_like(old, device="meta")
                owner._parameters[key] = nn.Parameter(empty, requires_grad=old.requires_grad)
            if _refuse_state_dict not in owner._state_dict_pre_hooks.values():
                owner.register_state_dict_pre_hook(_refuse_state_dict)
                owner.register_load_state_dict_pre_hook(_refuse_loading)
        self.released = True
        self._follow(())

    def rebuild(self, module: nn.Module) -> None:
        """把量化的权重还原成原来布局、类型的参数（近似值），取代 meta 张量。"""
        for path, weight in self.parts.items():
            owner, key = _place(module, path)
            owner._parameters[key] = self._dense(path, weight, owner._parameters[key])
            for hooks, mine in (
                (owner._state_dict_pre_hooks, _refuse_state_dict),
                (owner._load_state_dict_pre_hooks, _refuse_loading),
            ):
                for k in [k for k, hook in hooks.items() if getattr(hook, "hook", hook) is mine]:
                    del hooks[k]

    @contextmanager
    def borrowed(self, module: nn.Module) -> Iterator[None]:
        """块内 module 的参数是由量化还原的，之后换回 meta 张量：没有原权重时用来核对 forward。"""
        undo = []
        try:
            for path, weight in self.parts.items() if self.released else ():
                owner, key = _place(module, path)
                undo.append((owner, key, owner._parameters[key]))
                owner._parameters[key] = self._dense(path, weight, undo[-1][2])
            yield
        finally:
            for owner, key, old in undo:
                owner._parameters[key] = old

    def stand_in(self, module: nn.Module) -> nn.Module:
        """与 module 同类、只有首末两个专家、权重由量化还原的小替身：没有原权重时用来核对 forward。"""
        count = self.pair[0].shape[0]
        picked = torch.tensor(sorted({0, count - 1}))
        small = copy.copy(module)
        small.__dict__["num_experts"] = len(picked)
        small.__dict__["_parameters"] = dict(module._parameters)
        small.__dict__.pop("forward", None)
        for name in self.routed:
            weight = self.parts[name]
            zero = None if weight.zero is None else weight.zero[picked]
            part = weight._replace(
                packed=weight.packed[picked],
                scale=weight.scale[picked],
                zero=zero,
                shape=(len(picked), *weight.shape[1:]),
            )
            old = module._parameters[name]
            small._parameters[name] = self._dense(name, part, old).requires_grad_(False)
            bias = module._parameters.get(f"{name}_bias")
            if bias is not None:
                small._parameters[f"{name}_bias"] = nn.Parameter(bias.detach()[picked], False)
        return small

    def _dense(self, path: str, weight: QuantizedExperts, old: nn.Parameter) -> nn.Parameter:
        """按 old 的布局、类型还原。"""
        dense = dequantize(weight, old.dtype)
        if path in self.shared:
            dense = dense[0]
        else:
            if path == self.routed[0] and self.layout.interleaved:
                dense = dense[:, deinterleaved(dense.shape[1]).argsort()]
            dense = dense.mT.contiguous() if self.layout.transposed else dense
        return nn.Parameter(dense, requires_grad=old.requires_grad)

    # ---- 深拷贝、pickle ----

    def _current(self, module: nn.Module) -> tuple[Any, ...]:
        return tuple(weight_at(module, path) for path in self.parts)

    def _follow(self, sources: tuple[Tensor, ...]) -> None:
        self._sources, self._versions = sources, _versions(sources)

    def __getstate__(self) -> dict[str, Any]:
        # 副本的张量从头计改写次数：只记下此刻是不是同一份
        fresh = self._versions == _versions(self._sources)
        return {**self.__dict__, "_versions": fresh, "_joint_bias": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._versions = _versions(self._sources) if state["_versions"] else ()


def weight_at(module: nn.Module, path: str) -> nn.Parameter | None:
    """module 上点分路径的参数；没有（例如已被参数化、换成 LoRA）为 None。"""
    owner, key = _place(module, path)
    return None if owner is None else owner._parameters.get(key)


def deinterleaved(rows: int) -> Tensor:
    """交错的 (gate, up, gate, up, …) 换成 gate 在前、up 在后的行次序。"""
    return torch.arange(rows).view(-1, 2).T.reshape(-1)


def _place(module: nn.Module, path: str) -> tuple[Any, str]:
    *parents, key = path.split(".")
    for name in parents:
        module = None if module is None else module._modules.get(name)
    return module, key


def _versions(tensors: Sequence[Tensor | None]) -> tuple[int, ...]:
    return tuple(stamp(t)[1] for t in tensors)


def _refuse_state_dict(_module: nn.Module, prefix: str, _keep: bool) -> None:
    raise UnsupportedError(
        f"{prefix.rstrip('.') or '专家'} 的{RELEASED}，state_dict、save_pretrained 存不了它们；"
        "请用 save_quantized(model, 文件) 保存，用 load_quantized 读入"
    )


def _refuse_loading(_module: nn.Module, _state: Any, prefix: str, *_: Any) -> None:
    raise InputError(
        f"{prefix.rstrip('.') or '专家'} 的{RELEASED}，load_state_dict 没有可以写入的参数；"
        "请先用 restore(model, dequantize=True)"
    )
