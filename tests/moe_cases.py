"""moe_experts 测试共用：随机的专家、调用、梯度、与 fp64 参考的比较。"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_opt import ops, reference
from tests.op_cases import randn
from tests.tolerances import tol

LEAVES = ("x", "weights", "gate_up", "gate_up_bias", "down", "down_bias")


@dataclasses.dataclass
class Layout:
    """权重的布局与激活；clipped 的 limit 取得小，截断才常见。"""

    activation: str = "silu"
    transposed: bool = False
    interleaved: bool = False
    gated: bool = True
    alpha: float = 1.702
    limit: float = 0.7


@dataclasses.dataclass
class Experts:
    """一组参数；``args()`` 的次序与算子相同。"""

    x: Tensor
    indices: Tensor
    weights: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    shared: tuple[Tensor, ...]
    layout: Layout

    def args(self) -> tuple:
        tensors = [getattr(self, f.name) for f in dataclasses.fields(self)[:-2]]
        way = self.layout
        flags = (way.transposed, way.interleaved, way.gated)
        return (*tensors, list(self.shared), way.activation, way.alpha, way.limit, *flags)

    def but(self, **changes) -> Experts:
        return dataclasses.replace(self, **changes)

    def map(self, function) -> Experts:
        """function 作用于每个浮点张量。"""
        found = {name: getattr(self, name) for name in LEAVES}
        changed = {name: None if t is None else function(t) for name, t in found.items()}
        return self.but(**changed, shared=tuple(function(t) for t in self.shared))

    def tensors(self) -> dict[str, Tensor]:
        """全部可求导的张量。"""
        found = {name: getattr(self, name) for name in LEAVES}
        found.update({f"shared[{i}]": t for i, t in enumerate(self.shared)})
        return {name: t for name, t in found.items() if t is not None}

    def run(self, function=ops.moe_experts, **more) -> Tensor:
        *positional, transposed, interleaved, gated = self.args()
        flags = {"transposed": transposed, "interleaved": interleaved, "gated": gated}
        return function(*positional, **flags, **more)

    def exact(self) -> Experts:
        return self.map(lambda t: t.detach().double())

    def leaves(self) -> Experts:
        return self.map(lambda t: t.detach().clone().requires_grad_())

    def gradients(self, grad: Tensor, function=ops.moe_experts, **more) -> dict[str, Tensor]:
        """没有用到的张量得 0。"""
        leaves = self.leaves()
        y, tensors = leaves.run(function, **more), leaves.tensors()
        if not y.requires_grad:
            return {name: torch.zeros_like(t) for name, t in tensors.items()}
        found = torch.autograd.grad(
            y, list(tensors.values()), grad, allow_unused=True, materialize_grads=True
        )
        return dict(zip(tensors, found, strict=True))


def choose(tokens: int, count: int, top_k: int) -> Tensor:
    """不重复的随机选择；top_k 大于 count 时可重复。"""
    if top_k > count:
        return torch.randint(0, max(count, 1), (tokens, top_k))
    return torch.rand(tokens, count).argsort(-1)[:, :top_k].contiguous()


def experts(
    sizes: tuple[int, int, int, int],
    count: int = 4,
    top_k: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    layout: Layout | None = None,
    bias: bool = False,
    shared: int = 0,
    indices: Tensor | None = None,
) -> Experts:
    """sizes = (T, K, I, N)；shared 为 0、3、4 个张量（中间宽 I + 1）。"""
    tokens, k, inner, n = sizes
    way = layout or Layout()
    wide = 2 * inner if way.gated else inner
    gate_up = randn(count, wide, k, dtype=dtype, scale=max(k, 1) ** -0.5)
    down = randn(count, n, inner, dtype=dtype, scale=max(inner, 1) ** -0.5)
    if way.transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    common = [randn(inner + 1, k, dtype=dtype, scale=max(k, 1) ** -0.5) for _ in range(2)]
    common.append(randn(n, inner + 1, dtype=dtype, scale=(inner + 1) ** -0.5))
    common.append(torch.rand(tokens).to(dtype))
    return Experts(
        x=randn(tokens, k, dtype=dtype),
        indices=choose(tokens, count, top_k) if indices is None else indices,
        weights=torch.rand(tokens, top_k if indices is None else indices.shape[1]),
        gate_up=gate_up,
        gate_up_bias=randn(count, wide, dtype=dtype) if bias else None,
        down=down,
        down_bias=randn(count, n, dtype=dtype) if bias else None,
        shared=tuple(common[:shared]),
        layout=way,
    )


def kept_by(call: Callable[[], Tensor], *given: Tensor) -> tuple[Tensor, int]:
    """(call 的结果，它给反向留下的字节，given 除外)。"""
    known, sizes = {t.data_ptr() for t in given}, []

    def pack(t):
        sizes.append(0 if t.data_ptr() in known else t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    return out, sum(sizes)


def close(got: Tensor, want: Tensor, dtype: torch.dtype | str, what: str = "") -> None:
    """以最大值归一后比较。"""
    size = max(1.0, want.abs().max().item()) if want.numel() else 1.0

    def message(text: str) -> str:
        return f"{what}：{text}"

    torch.testing.assert_close(got.double() / size, want / size, **tol(dtype), msg=message)


def check(case: Experts) -> None:
    """前向与全部梯度对照 fp64 的参考实现与它的 autograd。"""
    dtype = case.x.dtype
    exact, got = case.exact(), case.run()
    want = exact.run(reference.moe_experts)
    assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
    close(got, want, dtype, f"{case.layout} y")
    grad = torch.randn_like(got)
    theirs = exact.gradients(grad.double(), reference.moe_experts)
    for recompute in (False, True) if dtype == torch.float32 else (False,):
        ours = case.gradients(grad, recompute=recompute)
        for name, tensor in case.tensors().items():
            assert ours[name].dtype == tensor.dtype, name
            limit = max((dtype, tensor.dtype), key=lambda d: tol(d)["atol"])
            close(ours[name], theirs[name], limit, f"{case.layout} 重算 {recompute} d{name}")
