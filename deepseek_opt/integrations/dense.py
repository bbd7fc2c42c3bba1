"""稠密部分的替换：门控 FFN（SiLU）、LM head、其余普通 nn.Linear、RMSNorm。"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_opt import ops
from deepseek_opt.integrations.experts import close
from deepseek_opt.integrations.patch import Patch, patch_of
from deepseek_opt.integrations.projections import is_plain, is_rms_norm, norm_eps
from deepseek_opt.integrations.runtime import Runtime

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FFN = ("gate_proj", "up_proj", "down_proj")


class Candidate(NamedTuple):
    """一个可能替换的模块；reason 不为 None 时不替换。"""

    name: str
    module: nn.Module
    kind: str
    required: bool
    make: Callable[[nn.Module, Runtime, str], Patch]
    reason: str | None


class _DensePatch(Patch):
    kind = "dense"
    op = ""  # 用哪个算子

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            reason = _input_reason(args[0], self.op) or self._reason()
            if reason is None:
                return self._run(args[0])
        else:
            reason = "调用方式不是 forward(x)"
        self.runtime.count(self.name, reason)
        return self.call_original(*args, **kwargs)

    def _reason(self) -> str | None:
        raise NotImplementedError

    def _run(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class GatedFFNPatch(_DensePatch):
    """down(silu(gate x) * up x) 融合。"""

    op = "swiglu_mlp"

    def _reason(self) -> str | None:
        return ffn_reason(self.module)

    def _run(self, x: Tensor) -> Tensor:
        weights = (getattr(self.module, name).weight for name in _FFN)
        return ops.swiglu_mlp(x, *weights)


class LinearPatch(_DensePatch):
    """普通 nn.Linear。"""

    op = "linear"

    def _reason(self) -> str | None:
        return None if type(self.module) is nn.Linear else "不再是普通 nn.Linear"

    def _run(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.module.weight, self.module.bias)


class NormPatch(_DensePatch):
    """RMSNorm。"""

    op = "rms_norm"

    def _reason(self) -> str | None:
        return None

    def _run(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.module.weight, norm_eps(self.module))


def candidates(model: nn.Module, config: Any) -> Iterator[Candidate]:
    """按 DenseConfig 列出候选；每个模块至多一次，已换掉的层里面的投影不再单独替换。"""
    owned: set[int] = set()
    for module in model.modules():
        if patch_of(module) is not None:
            owned.update(id(m) for m in module.modules())
    head = _output_embeddings(model)
    for kind, wanted, find in (
        ("门控 FFN", config.ffn, _find_ffn),
        ("LM head", config.lm_head, lambda m: _find_head(m, head)),
        ("投影", config.projections, lambda m: _find_linear(m, head)),
        ("RMSNorm", config.norms, _find_norms),
    ):
        if wanted is False:
            continue
        found = False
        for name, module, make, reason in find(model):
            if id(module) in owned:
                continue
            found = True
            owned.update(id(m) for m in module.modules())
            yield Candidate(name, module, kind, wanted is True, make, reason)
        if wanted is True and not found:
            yield Candidate("", model, kind, True, LinearPatch, f"模型里没有{kind}")


_Found = Iterator[tuple[str, nn.Module, Callable[..., Patch], str | None]]


def _find_ffn(model: nn.Module) -> _Found:
    checked: dict[type, str | None] = {}
    for name, module in model.named_modules():
        if not all(isinstance(getattr(module, part, None), nn.Module) for part in _FFN):
            continue
        reason = ffn_reason(module) or instance_reason(module)
        if reason is None:
            cls = type(module)
            if cls not in checked:
                checked[cls] = probe_ffn(module)
            reason = checked[cls]
        yield name, module, GatedFFNPatch, reason


def _find_head(model: nn.Module, head: nn.Module | None) -> _Found:
    for name, module in model.named_modules():
        if module is head and isinstance(module, nn.Linear):
            yield name, module, LinearPatch, _linear_reason(module)


def _find_linear(model: nn.Module, head: nn.Module | None) -> _Found:
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module is not head:
            yield name, module, LinearPatch, _linear_reason(module)


def _find_norms(model: nn.Module) -> _Found:
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__ and is_rms_norm(module):
            yield name, module, NormPatch, instance_reason(module)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else getattr(model, "lm_head", None)


def _linear_reason(module: nn.Module) -> str | None:
    reason = instance_reason(module)
    if reason is None and type(module) is not nn.Linear:
        reason = f"是 {type(module).__name__}，不是普通 nn.Linear"
    return reason


def instance_reason(module: nn.Module) -> str | None:
    if "_hf_hook" in module.__dict__:
        return "accelerate 的设备钩子改写了 forward"
    if "forward" in module.__dict__ and patch_of(module) is None:
        return "forward 已被别的库在实例上改写"
    return None


def ffn_reason(module: nn.Module) -> str | None:
    for part in _FFN:
        linear = module._modules[part]
        if not is_plain(linear):
            return f"{part} 是 {type(linear).__name__} 或带有钩子，不是普通 nn.Linear"
        if linear._parameters["bias"] is not None:
            return f"{part} 带偏置"
    return None if _is_silu(module) else "激活函数不是 SiLU"


def is_plain_ffn(module: nn.Module) -> bool:
    """没有替换、也没有被改写的 SiLU 门控 FFN，各投影是普通的 nn.Linear。"""
    parts = all(isinstance(module._modules.get(part), nn.Module) for part in _FFN)
    return parts and "forward" not in module.__dict__ and ffn_reason(module) is None


def _is_silu(module: nn.Module) -> bool:
    act = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    if act is None:
        return False
    if act is F.silu or isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation":
        return True
    return False


def probe_ffn(module: nn.Module) -> str | None:
    """用随机数核对这个类的 forward 就是 down(silu(gate x) * up x)；每个类只做一次。放大的一行会碰到截断。"""
    gate, up, down = (getattr(module, part).weight for part in _FFN)
    if gate.is_meta:
        return "权重还在 meta 设备上"
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, 2, gate.shape[1], generator=generator) * torch.tensor([[1.0], [1e3]])
    probe = probe.to(gate.device, gate.dtype)
    with torch.no_grad():
        try:
            actual = type(module).forward(module, probe)
        except (RuntimeError, TypeError):
            return "forward 的参数不是 forward(x)"
        expected = F.linear(F.silu(F.linear(probe, gate)) * F.linear(probe, up), down)
    return None if close(actual, expected) else "forward 不是 down(silu(gate x) * up x)"


def _input_reason(x: Any, op: str) -> str | None:
    if not isinstance(x, Tensor):
        return "输入不是张量"
    if x.dtype not in _DTYPES:
        return f"数据类型 {x.dtype} 不受支持"
    return ops.missing(x, op)
