"""替换自己写的 MoE（:mod:`.moe_adapter` 里登记过的类）：全部专家一次 ``ops.moe_experts_list`` 算完。

权重就是各个 nn.Linear 的参数，原地读取，梯度写进它们自己的 .grad；门仍调用它自己，路由由 ``ops.moe_route`` 做。
换之前与类自己的 forward 核对：输出、返回值、有没有别的副作用（例如记下辅助损失）；运行中条件变了的逐次交给原 forward。
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt import ops
from deepseek_opt.integrations import experts
from deepseek_opt.integrations.dense import instance_reason
from deepseek_opt.integrations.moe_adapter import MoeAdapter, adapter_reason, resolve
from deepseek_opt.integrations.patch import Patch
from deepseek_opt.integrations.projections import has_hooks, is_plain
from deepseek_opt.integrations.runtime import Runtime
from deepseek_opt.load import LoadCounter

_PROBE_TOKENS, _PROBE_SCALED = 32, 4
_PROBE_ERRORS = (RuntimeError, TypeError, AttributeError, ValueError, KeyError, IndexError)


class OwnMoePatch(Patch):
    """一个自己写的 MoE 块的新 forward；``load_counter`` 累计各专家的词元数。

    train_reason : 训练模式下不能替换的原因（例如 dropout、抖动），那时逐次交给原 forward。
    """

    kind = "moe"

    def __init__(self, module: nn.Module, runtime: Runtime, name: str, adapter: MoeAdapter):
        super().__init__(module, runtime, name)
        self.adapter = adapter
        self.train_reason: str | None = None
        self.load_counter = LoadCounter(len(resolve(module, adapter.experts)))

    @property
    def balance_bias(self) -> Tensor | None:
        """:func:`~deepseek_opt.update_expert_bias` 更新的偏置。"""
        path = self.adapter.choice_bias
        return None if path is None else resolve(self.module, path)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.runtime.require_moe()
        reason = self._refusal(args, kwargs)
        if reason is not None:
            self.runtime.count(self.name, reason)
            return self.call_original(*args, **kwargs)
        return self.compute(args[0], count=True)

    def compute(self, hidden: Tensor, count: bool = False) -> Any:
        """本库的计算；count 为是否计入负载。"""
        module, adapter = self.module, self.adapter
        x = hidden.reshape(-1, hidden.shape[-1])
        logits, weights, indices, counts = route(module, adapter, x)
        if count:
            self.load_counter.add(counts, training=module.training)
        lists, biases = _weights(module, adapter)
        fused, extra = _shared(module, adapter, x)
        act = (adapter.activation, adapter.alpha, float(adapter.value(module, "limit")))
        out = ops.moe_experts_list(
            *(x, indices, weights, *lists, *biases, fused, *act),
            gated=adapter.gated,
            recompute=self.runtime.recompute_experts,
        )
        out = out.to(x.dtype)  # autocast 里算子按低精度输出
        out = (out if extra is None else out + extra).view(hidden.shape)
        return (out, logits) if adapter.returns_logits else out

    def _refusal(self, args: tuple, kwargs: dict[str, Any]) -> str | None:
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            return "调用方式不是 forward(hidden)"
        if self.module.training and self.train_reason is not None:
            return self.train_reason
        reason = experts.input_reason(args[0], "moe_route", "moe_experts_list")
        return reason or state_reason(self.module, self.adapter, args[0])


def route(module: nn.Module, adapter: MoeAdapter, x: Tensor) -> tuple[Tensor, ...]:
    """(门给出的 logits, 权重 [T, k], 下标 [T, k], 各专家的词元数 [E])。"""
    gate = resolve(module, adapter.gate)
    if adapter.gate_fp32:
        return _choose(module, adapter, x, gate.weight, getattr(gate, "bias", None))
    logits = gate(x)
    return (logits, *_choose(module, adapter, logits)[1:])


def _choose(module: nn.Module, adapter: MoeAdapter, *source: Tensor | None) -> tuple[Tensor, ...]:
    """source 是 logits，或 (x, 门的权重, 门的偏置)。"""
    bias = None if adapter.choice_bias is None else resolve(module, adapter.choice_bias)
    source += (None,) * (3 - len(source))
    bias = None if bias is None else bias.detach().float()
    return ops.moe_route(*source, bias, **adapter.rule(module))


def own_reason(module: nn.Module, adapter: MoeAdapter) -> str | None:
    """从一开始就不能替换的原因；此处还没有核对 forward。"""
    try:
        members = resolve(module, adapter.experts)
        if not isinstance(members, nn.ModuleList) or len(members) == 0:
            return f"{adapter.experts} 不是非空的 nn.ModuleList"
        structure(module, adapter)
        limit = adapter.limit if isinstance(adapter.limit, str) else None
        for path in (adapter.gate, adapter.choice_bias, adapter.shared, adapter.shared_gate, limit):
            if path is not None:
                resolve(module, path)
        return adapter_reason(module) or instance_reason(module) or state_reason(module, adapter)
    except AttributeError as error:
        return f"没有登记里写的属性：{error}"


def state_reason(
    module: nn.Module, adapter: MoeAdapter, hidden: Tensor | None = None
) -> str | None:
    """专家此刻的权重与状态（给了输入时连同设备）不能用的原因；每次调用都看。"""
    first = None
    for index, expert in enumerate(resolve(module, adapter.experts)):
        if has_hooks(expert):
            return f"专家 {index} 上有钩子或被改写的 forward，合在一起算就不会触发它"
        for path in _projections(adapter):
            reason = _linear_reason(resolve(expert, path), first)
            if reason is not None:
                return f"专家 {index} 的 {path} {reason}"
            weight = resolve(expert, path).weight
            first = weight if first is None else first
            where = first.device if hidden is None else hidden.device
            if weight.device != where:
                return f"专家 {index} 的 {path} 在 {weight.device} 上，应在 {where} 上"
    for path in _projections(adapter):
        biased = {resolve(e, path).bias is not None for e in resolve(module, adapter.experts)}
        if len(biased) > 1:
            return f"{path} 有的专家带偏置，有的不带"
    return None


def structure(module: nn.Module, adapter: MoeAdapter) -> dict[str, Any]:
    """这一层的实际结构，供配置核对。"""
    rule = adapter.rule(module)
    return {
        "num_experts": len(resolve(module, adapter.experts)),
        "num_experts_per_tok": rule["top_k"],
        "num_shared_experts": int(adapter.shared is not None),
        "scoring_func": rule["score"],
        "norm_topk_prob": bool(rule["normalize"]),
        "routed_scaling_factor": rule["scaling"],
        "n_group": rule["n_group"],
        "topk_group": rule["topk_group"],
        "routing_strategy": "group_limited" if rule["n_group"] > 1 else "topk",
    }


def probe(patch: OwnMoePatch) -> str | None:
    """与类自己的 forward 核对；不能替换时返回原因，只是训练模式不能时记在 ``patch.train_reason``。"""
    module = patch.module
    modes = {part: part.training for part in module.modules()}
    try:
        module.eval()
        reason = _probe(patch)
        if reason is None:
            module.train()
            again = _probe(patch)
            patch.train_reason = None if again is None else f"训练模式：{again}"
        return reason
    finally:
        for part, training in modes.items():
            part.training = training


# ---- 内部 ----


def _projections(adapter: MoeAdapter) -> list[str]:
    names = (adapter.gate_proj, adapter.up_proj, adapter.down_proj)
    return [name for name in names if name is not None]


def _linear_reason(linear: Any, first: Tensor | None) -> str | None:
    if not is_plain(linear):
        return f"是 {type(linear).__name__} 或带有钩子，不是普通 nn.Linear"
    reason = experts.weight_reason("权重", linear.weight)
    found = {t.dtype for t in (linear.weight, linear.bias, first) if t is not None}
    if reason is None and len(found) > 1:
        return f"的类型与别的权重（或偏置）不同：{'、'.join(sorted(map(str, found)))}"
    return reason


def _weights(module: nn.Module, adapter: MoeAdapter) -> tuple[list[list[Tensor]], list]:
    """(gate、up、down 的权重, 它们的偏置)，各是逐专家的列表；没有的是空列表。"""
    members = resolve(module, adapter.experts)
    lists, biases = [], []
    for path in (adapter.gate_proj, adapter.up_proj, adapter.down_proj):
        linears = [] if path is None else [resolve(expert, path) for expert in members]
        lists.append([linear.weight for linear in linears])
        biased = bool(linears) and linears[0].bias is not None
        biases.append([linear.bias for linear in linears] if biased else [])
    return lists, biases


def _shared(module: nn.Module, adapter: MoeAdapter, x: Tensor) -> tuple[list, Tensor | None]:
    """(与专家一次算完的共享专家的权重, 单独算出的共享专家的输出)，至多一个有内容。"""
    if adapter.shared is None:
        return [], None
    shared, scale = resolve(module, adapter.shared), None
    if adapter.shared_gate is not None:
        scale = torch.sigmoid(resolve(module, adapter.shared_gate)(x))
    parts = [] if adapter.fused or adapter.up_proj is None else _shared_linears(shared, adapter)
    if not parts:
        out = shared(x)
        return [], out if scale is None else scale * out
    tensors = [linear.weight for linear in parts]
    return tensors if scale is None else [*tensors, scale.squeeze(-1)], None


def _shared_linears(shared: nn.Module, adapter: MoeAdapter) -> list[nn.Linear]:
    """能一次算完的共享专家的三个投影；否则为空。"""
    if has_hooks(shared):
        return []
    try:
        found = [resolve(shared, path) for path in _projections(adapter)]
    except AttributeError:
        return []
    usable = all(_linear_reason(linear, None) is None and linear.bias is None for linear in found)
    return found if usable else []


def _probe(patch: OwnMoePatch) -> str | None:
    """一小批随机词元；近乎平局、选择不定的词元不比。"""
    module, adapter = patch.module, patch.adapter
    weight = resolve(resolve(module, adapter.experts)[0], adapter.gate_proj).weight
    devices, kind = [weight.device] if weight.is_cuda else [], weight.device.type
    with torch.no_grad(), torch.random.fork_rng(devices), torch.autocast(kind, enabled=False):
        torch.manual_seed(0)
        x = torch.randn(1, _PROBE_TOKENS, weight.shape[1])
        x[:, -_PROBE_SCALED:] *= 30.0  # 会碰到截断
        x = x.to(weight.device, weight.dtype)
        reason = ops.missing(x, "moe_route", "moe_experts_list")
        if reason is not None:
            return reason
        try:
            with _untouched(module) as touched:
                actual = type(module).forward(module, x)
            if touched:
                return f"forward 会改动 {'、'.join(sorted(touched))}，替换后就没有这个作用"
            clear = _clear(module, adapter, x[0])
            expected = patch.compute(x)
        except _PROBE_ERRORS as error:
            return f"forward 与登记的写法不同：{type(error).__name__}：{error}"
        return _difference(actual, expected, clear)


def _clear(module: nn.Module, adapter: MoeAdapter, x: Tensor) -> Tensor:
    """[T]：logits 上加一点随机数，选择不变的词元。"""
    logits, _, indices, _ = route(module, adapter, x)
    logits = logits.float()
    noise = torch.randn(logits.shape).to(logits.device)
    noisy = logits + noise * (logits.abs().mean() * 0.02 + 1e-6)
    again = _choose(module, adapter, noisy)[2]
    return (indices.sort(-1).values == again.sort(-1).values).all(-1)


def _difference(actual: Any, expected: Any, clear: Tensor) -> str | None:
    """clear [T]：选择明确的词元。"""
    if int(clear.sum()) < _PROBE_TOKENS // 2:
        return "门对多数词元给出近乎相同的得分（还没有初始化？），无法核对 forward"
    if isinstance(expected, tuple):
        same = isinstance(actual, tuple) and len(actual) == 2
        if not same or not experts.close(actual[1], expected[1]):
            return "forward 的返回值不是 (输出, logits)"
        actual, expected = actual[0], expected[0]
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return "forward 的返回值与登记的写法不同"
    same = experts.close(actual[0, clear], expected[0, clear])
    return None if same else "forward 与登记的写法不同：随机词元上的输出对不上"


@contextmanager
def _untouched(module: nn.Module) -> Iterator[set[str]]:
    """运行原 forward 而不留痕迹；给出的集合里是它改动过的属性与缓冲区。"""
    touched: set[str] = set()
    states = {name: (part, dict(part.__dict__)) for name, part in module.named_modules()}
    sizes = {(n, k): _size(v) for n, (_, state) in states.items() for k, v in state.items()}
    owned = {name: (part, dict(part._buffers)) for name, part in module.named_modules()}
    buffers = {name: (b, b.detach().clone(), b._version) for name, b in module.named_buffers()}
    try:
        yield touched
    finally:
        for name, (part, state) in states.items():
            for key in {*part.__dict__, *state}:
                value = part.__dict__.get(key)
                if value is not state.get(key) or _size(value) != sizes.get((name, key)):
                    touched.add(f"{name}.{key}".lstrip("."))
            part.__dict__.clear()
            part.__dict__.update(state)
        for name, (part, found) in owned.items():
            changed = [key for key, value in part._buffers.items() if value is not found.get(key)]
            touched.update(f"{name}.{key}".lstrip(".") for key in changed)
            part._buffers.clear()
            part._buffers.update(found)
        for name, (buffer, copy, version) in buffers.items():
            if buffer._version != version:
                touched.add(name)
                buffer.copy_(copy)


def _size(value: Any) -> int | None:
    return len(value) if isinstance(value, (list, dict, set)) else None
