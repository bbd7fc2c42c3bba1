"""moe_experts_quantized 测试共用：量化的专家、一次调用、与 fp64 参考的比较。

form 是 ``quantize_experts`` 的（位数，组大小，对称，浮点），后面的可省略。
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from deepseek_opt import _native, ops, reference
from deepseek_opt.quantize import QuantizedExperts, quantize_experts
from tests.moe_cases import choose, close, experts
from tests.op_cases import FLOATS, randn

OP = torch.ops.deepseek_opt.moe_experts_quantized.default
# 整数的（位数，组大小，对称）；fp8 的再加浮点。
FORMATS = [(8, None, True), *itertools.product((4,), (32, 64, 128), (True, False))]
INT8, INT4 = FORMATS[0], (4, 32, False)
FP8, FP8_128 = (8, None, True, True), (8, 128, True, True)
FP8_FORMATS = [FP8, FP8_128]
# 某一维为 0 的 (T, K, I, N)，词元少与多。
EMPTY_SIZES = [
    (0, 3, 4, 5),
    (3, 0, 4, 5),
    (3, 4, 0, 5),
    (3, 4, 5, 0),
    (40, 4, 0, 5),
    (40, 0, 4, 5),
]


def accuracy(dtype: torch.dtype) -> torch.dtype | str:
    """容差表里的哪一行：有 VNNI 的指令集把激活化为 16 位定点。"""
    fixed = _native.isa() in ("avx512_vnni", "avx512_bf16")
    return "fixed_point" if fixed and dtype == torch.float32 else dtype


@dataclasses.dataclass
class Case:
    """一次调用；``exact`` 是它的 fp64 结果。"""

    x: Tensor
    indices: Tensor
    weights: Tensor
    up: QuantizedExperts
    down: QuantizedExperts
    shared: tuple[Tensor, ...] = ()
    activation: str = "silu"
    gated: bool = True
    shared_scale: tuple[Tensor, ...] = ()
    shared_zero: tuple[Tensor, ...] = ()
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def but(self, **changes) -> Case:
        return dataclasses.replace(self, **changes)

    def args(self) -> tuple:
        tensors = (self.x, self.indices, self.weights, *self.up[:3], *self.down[:3])
        options = (self.up.group_size, self.activation, 1.702, 0.7)
        return (*tensors, list(self.shared), *options)

    def run(self, function=ops.moe_experts_quantized) -> Tensor:
        more = {"shared_scale": self.shared_scale, "shared_zero": self.shared_zero}
        more.update(gate_up_bias=self.up_bias, down_bias=self.down_bias)
        return function(*self.args(), gated=self.gated, **more)

    def packed_args(self) -> tuple:
        """算子本身（没有默认值）的参数。"""
        more = (list(self.shared_scale), list(self.shared_zero), self.up_bias, self.down_bias)
        return (*self.args(), self.gated, *more)

    def exact(self) -> Tensor:
        shared = tuple(t.double() if t.dtype in FLOATS else t for t in self.shared)
        wide = self.but(x=self.x.double(), shared=shared)
        return wide.run(reference.moe_experts_quantized)

    def check(self) -> None:
        got, want = self.run(), self.exact()
        assert got.dtype == self.x.dtype and got.shape == want.shape and got.is_contiguous()
        close(
            got,
            want,
            accuracy(self.x.dtype),
            f"{self.up.bits} 位 {self.up.group_size} {self.x.dtype}",
        )


def make(sizes, form=INT4, *, count=4, dtype=torch.float32, gated=True, indices=None, **options):
    """sizes = (T, K, I, N)。"""
    tokens, k, inner, n = sizes
    wide = 2 * inner if gated else inner
    shared = options.pop("shared", 0)
    return Case(
        x=randn(tokens, k, dtype=dtype),
        indices=choose(tokens, count, 2) if indices is None else indices,
        weights=torch.rand(tokens, 2 if indices is None else indices.shape[1]),
        up=quantize_experts(randn(count, wide, k, scale=max(k, 1) ** -0.5), *form),
        down=quantize_experts(randn(count, n, inner, scale=max(inner, 1) ** -0.5), *form),
        shared=experts(sizes, 1, 1, dtype=dtype, shared=shared).shared if shared else (),
        gated=gated,
        **options,
    )


def with_shared(case: Case, form, count: int = 3) -> Case:
    """加上量化的共享专家（中间宽 29）；count 为 4 时带逐词元的系数。"""
    k, n = case.x.shape[1], case.down.shape[1]
    stacks = [
        quantize_experts(randn(1, rows, columns, scale=max(columns, 1) ** -0.5), *form)
        for rows, columns in ((29, k), (29, k), (n, 29))
    ]
    common = [q.packed[0] for q in stacks]
    if count == 4:
        common.append(torch.rand(len(case.x)).to(case.x.dtype))
    zeros = () if form[2] else tuple(q.zero[0] for q in stacks)
    scales = tuple(q.scale[0] for q in stacks)
    return case.but(shared=tuple(common), shared_scale=scales, shared_zero=zeros)


def with_bias(case: Case, dtype: torch.dtype = torch.float32) -> Case:
    """加上路由专家的偏置。"""
    up, down = (randn(*q.shape[:2], dtype=dtype) for q in (case.up, case.down))
    return case.but(up_bias=up, down_bias=down)


def check_rows(rows: int, form: tuple) -> None:
    """一个专家 rows 行：边读边解与先解开的分界（16 行）、寄存器块、行块的边界；计算格式一段的边界（256、512）。"""
    index = torch.zeros(rows, 1, dtype=torch.int64)
    for dtype in FLOATS[:2]:
        k = 513 if rows == 17 else 40
        make((rows, k, 12, 11), form, dtype=dtype, indices=index, shared=3).check()
