"""算子测试共用：随机输入、注意力的问题与 eager 写法、误差比较。"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from deepseek_opt import ops, reference
from deepseek_opt.reference.mla import quantize

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZED = (torch.int8, torch.float8_e4m3fn)


def bits(tensor: Tensor) -> Tensor:
    """一个字节的类型看成字节：torch 对 fp8 没有比较相等、按掩码写入的核。"""
    return tensor.view(torch.uint8) if tensor.dtype in QUANTIZED else tensor


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def strided(tensor: Tensor) -> Tensor:
    """数值相同、内存不连续的视图（最后一维步长仍为 1，行距更大）。"""
    wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 3), float("nan")).to(tensor.dtype)
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]


def flipped(tensor: Tensor) -> Tensor:
    """数值相同、最后一维步长不为 1 的视图。"""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def wide(value):
    """浮点张量升为 fp64；量化的（int8、fp8）与其余原样。"""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    floating = floating and value.dtype not in QUANTIZED
    return value.detach().double() if floating else value


def error(got: Tensor, want: Tensor) -> Tensor:
    return (got.double() - want).abs()


def assert_no_worse(got: Tensor, eager: Tensor, exact: Tensor, factor: float = 1.1) -> None:
    """均方根误差不超过 eager 的 factor 倍，最大误差（单个样本，起伏大）不超过 2 倍与 factor 的 1.5 倍。

    fp32 时 eager 的误差由 BLAS 的分块决定，随机器、线程数变化：至少放宽到 1.5 倍。
    """
    if got.dtype == torch.float32:
        factor = max(factor, 1.5)
    floor = 1e-3 * torch.finfo(got.dtype).eps * exact.abs().max().item()
    ours, theirs = error(got, exact), error(eager, exact)
    a, b = (e.square().mean().sqrt().item() for e in (ours, theirs))
    assert a <= factor * b + floor, f"均方根误差 {a:.3e} 大于 eager 的 {b:.3e}"
    a, b = ours.max().item(), theirs.max().item()
    assert a <= max(2, 1.5 * factor) * b + floor, f"最大误差 {a:.3e} 大于 eager 的 {b:.3e}"


@dataclasses.dataclass
class Attention:
    """mla_decode、mla_prefill 的一组参数；``args()`` 的次序与算子相同。"""

    q: Tensor
    latent: Tensor
    rope: Tensor
    scale: Tensor | None
    kv_b: Tensor
    spans: Tensor
    kv_mask: Tensor | None
    softmax_scale: float
    v_head_dim: int
    causal: bool

    def args(self) -> tuple:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def but(self, **changes) -> Attention:
        return dataclasses.replace(self, **changes)

    def exact(self) -> tuple[Tensor, Tensor]:
        """fp64 的 (out, lse)。"""
        return reference.mla_prefill(*(wide(value) for value in self.args()))

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """可求导的 (q, latent, rope, kv_b) 副本。"""
        values = (self.q, self.latent, self.rope, self.kv_b)
        return [v.detach().to(dtype or v.dtype).requires_grad_() for v in values]

    def with_leaves(self, leaves: list[Tensor]) -> Attention:
        q, latent, rope, kv_b = leaves
        return self.but(q=q, latent=latent, rope=rope, kv_b=kv_b)


def attention(
    batch: int,
    steps: int,
    slots: int,
    heads: int,
    dims: tuple[int, int, int, int],
    *,
    dtype: torch.dtype = torch.float32,
    cache: torch.dtype | None = None,
    causal: bool = True,
    begin=None,
    end=None,
    masked: bool = False,
) -> Attention:
    """dims = (kv_lora_rank, rope, nope, v)；cache 默认同 dtype，可为 int8、fp8。"""
    rank, rope_dim, nope, v = dims
    cache = cache or dtype
    latent, scale = randn(batch, slots, rank), None
    if cache in QUANTIZED:
        latent, scale = quantize(latent, cache)
    return Attention(
        q=randn(batch, steps, heads, nope + rope_dim, dtype=dtype),
        latent=latent.to(cache),
        rope=randn(batch, slots, rope_dim, dtype=dtype if cache in QUANTIZED else cache),
        scale=scale,
        kv_b=randn(heads * (nope + v), rank, dtype=dtype, scale=rank**-0.5),
        spans=ops.make_spans(batch, steps, slots, begin=begin, end=end, causal=causal),
        kv_mask=torch.rand(batch, slots) > 0.3 if masked else None,
        softmax_scale=(nope + rope_dim) ** -0.5,
        v_head_dim=v,
        causal=causal,
    )


def paged(case: Attention, page_size: int, spare: int = 2) -> tuple:
    """mla_decode 的参数：case 的缓存换成次序打乱的页，另有 spare 页没有用到；没有用到的页全是 NaN。

    槽位数是 page_size 的倍数；没有 span 看的页，页号也是乱的。
    """
    batch, slots = case.latent.shape[:2]
    per_row = slots // page_size
    table = torch.randperm(batch * per_row + spare)[: batch * per_row].view(batch, per_row)

    def stored(part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        shape = (batch * per_row + spare, page_size, *part.shape[2:])
        store = torch.full(shape, torch.nan if part.is_floating_point() else 99).to(part.dtype)
        bits(store)[table] = bits(part).reshape(batch, per_row, page_size, *part.shape[2:])
        return store

    seen = torch.zeros(batch, slots, dtype=torch.bool)
    for q_begin, q_end, kv_begin, kv_end in case.spans.tolist():
        seen.view(-1)[kv_begin:kv_end] |= q_begin < q_end
    used = seen.view(batch, per_row, page_size).any(-1)
    parts = {name: stored(getattr(case, name)) for name in ("latent", "rope", "scale")}
    return (*case.but(**parts).args(), torch.where(used, table, -7).to(torch.int32))


def eager_attention(case: Attention) -> Tensor:
    """transformers 的 eager 写法（各步在输入的 dtype 里，softmax 在 fp32 里），整行、因果或不因果。"""
    q, latent, rope, kv_b = case.q, case.latent, case.rope, case.kv_b
    batch, steps, heads, width = q.shape
    slots, v = latent.shape[1], case.v_head_dim
    nope = width - rope.shape[2]
    kv = torch.nn.functional.linear(latent, kv_b).view(batch, slots, heads, nope + v)
    key = torch.cat((kv[..., :nope], rope[:, :, None].expand(-1, -1, heads, -1)), -1)
    score = torch.einsum("bthd,bshd->bhts", q, key) * case.softmax_scale
    if case.causal:
        hidden = torch.ones(steps, slots, dtype=torch.bool).triu(slots - steps + 1)
        score = score.masked_fill(hidden, -torch.inf)
    prob = torch.softmax(score, -1, dtype=torch.float32).to(q.dtype)
    return torch.einsum("bhts,bshd->bthd", prob, kv[..., nope:])
