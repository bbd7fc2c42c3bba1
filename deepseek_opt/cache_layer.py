"""潜变量缓存的一层：缓冲区、写入、截断、重排；整个缓存见 ``cache.py``。只依赖 PyTorch。"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_opt import ops
from deepseek_opt.errors import InputError, MemoryBudgetError
from deepseek_opt.row_lengths import Parts, RowLengths

QUANTIZED = (torch.int8, torch.float8_e4m3fn)
_STORE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, *QUANTIZED)
_DTYPE_NAMES = {
    "auto": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


def cache_dtype(value: str | torch.dtype | None) -> torch.dtype | None:
    """把配置里的名字（``"auto"``、``"bfloat16"``、``"int8"`` 等）换成 torch 的 dtype；auto 为 None。"""
    if isinstance(value, str):
        if value not in _DTYPE_NAMES:
            raise InputError.expected("dtype", f"{'、'.join(_DTYPE_NAMES)} 之一", value)
        return _DTYPE_NAMES[value]
    if value is not None and value not in _STORE_DTYPES:
        raise InputError.expected(
            "dtype", "float32、bfloat16、float16、int8 或 float8_e4m3fn", str(value)
        )
    return value


def token_bytes(rank: int, rope_dim: int, store: torch.dtype, rope_store: torch.dtype) -> int:
    """每行每个词元占用的字节数；量化的另有 4 字节的 scale。"""
    scale = 4 if store in QUANTIZED else 0
    return rank * store.itemsize + rope_dim * rope_store.itemsize + scale


class LatentLayer(RowLengths):
    """一层的缓存：latent [B, C, r]、rope [B, C, dr]、scale [B, C]（仅量化时），C 为容量。

    第一次写入时才分配；容量翻倍增长，不超过 ``max_length`` 与 ``budget_bytes``。
    int8、float8_e4m3fn 时 latent 逐词元量化，rope 保持写入时的类型（fp32 降为 bf16）。
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype | None = None,
        max_length: int | None = None,
        budget_bytes: int | None = None,
        name: str = "",
    ):
        super().__init__(name)
        self.store_dtype = dtype
        self.max_length = max_length
        self.budget_bytes = budget_bytes
        self.latent: Tensor | None = None
        self.rope: Tensor | None = None
        self.scale: Tensor | None = None

    # ---- 状态 ----

    def buffers(self) -> list[Tensor]:
        found = (self.latent, self.rope, self.scale)
        return [buffer for buffer in found if buffer is not None]

    def replace(self, buffers: Sequence[Tensor] | None) -> None:
        if buffers is None:
            self.latent = self.rope = self.scale = None
        else:
            self.latent, self.rope, *scale = buffers
            self.scale = scale[0] if scale else None

    def dequantized(self) -> Tensor | None:
        """latent 的前 length 个槽位 [B, S, r]；量化时还原成 rope 的类型（新张量），否则是视图。"""
        if self.latent is None:
            return None
        self.tidy()
        part = self.latent[:, : self._length]
        if self.scale is None:
            return part
        values = part.float() * self.scale[:, : self._length, None]
        return values.to(self.rope.dtype)

    # ---- 写入 ----

    def append(self, latent: Tensor, rope: Tensor) -> int:
        """写入 latent [B, T, r]、rope [B, T, dr]（不记录梯度）；返回写入后的最大长度。

        所有检查都在改动之前；抛出 InputError 或 MemoryBudgetError 时缓存不变。
        """
        self.prepare(latent, rope)
        return self.write(latent, rope)

    def has_room(self, hidden: Tensor, rank: int, rope_dim: int) -> bool:
        """已分配，且不必增长就能再写入 hidden [B, T, ...] 的各词元。"""
        mine = self.latent
        if mine is None or self._offsets is None:
            return False
        batch, steps = hidden.shape[:2]
        same = mine.shape[0] == batch and mine.shape[2] == rank and self.rope.shape[2] == rope_dim
        return same and self._length + steps <= mine.shape[1] and mine.device == hidden.device

    def prepare(self, latent: Tensor, rope: Tensor) -> None:
        """检查 latent、rope 能否写入，并保证容量；已有内容不变。"""
        self._check(latent, rope)
        total = self._length + latent.shape[1]
        if self.latent is None or total > self.latent.shape[1]:
            self.reserve(total, latent, rope)

    def write(self, latent: Tensor, rope: Tensor) -> int:
        """:meth:`prepare` 之后的写入；返回写入后的最大长度。"""
        if latent.requires_grad or rope.requires_grad:
            latent, rope = latent.detach(), rope.detach()
        ops.mla_cache_write(self.latent, self.rope, self.scale, latent, rope, self._offsets)
        self._offsets += latent.shape[1]
        return self.advance(latent.shape[1])

    def reserve(self, length: int, latent: Tensor, rope: Tensor) -> None:
        """保证容量至少 length；latent、rope 给出形状、类型与设备，内容不读。"""
        limit = self._limit(latent, rope)
        if limit is not None and length > limit[0]:
            self._raise_full(length, limit, latent)
        store, rope_store = self._stores(latent, rope)
        tails = [((latent.shape[2],), store), ((rope.shape[2],), rope_store)]
        if store in QUANTIZED:
            tails.append(((), torch.float32))
        parts = Parts(latent.shape[0], latent.device, tails)
        self.grow(length, None if limit is None else limit[0], parts, torch.empty)

    def extend(self, length: int) -> None:
        """已分配的缓冲区增长到至少 length 个槽位，不超过上限。"""
        limit = self._limit(self.latent, self.rope)
        length = length if limit is None else min(length, limit[0])
        if length > self.capacity:
            self.reserve(length, self.latent[:, :0], self.rope[:, :0])

    def load(self, latent: Tensor, rope: Tensor) -> None:
        """丢弃已有内容，换成 latent [B, S, r]、rope [B, S, dr]。"""
        self.reset()
        if latent.shape[1]:
            self.append(latent, rope)

    def _stores(self, latent: Tensor, rope: Tensor) -> tuple[torch.dtype, torch.dtype]:
        store = self.store_dtype or latent.dtype
        if store not in QUANTIZED:
            return store, store if self.store_dtype is not None else rope.dtype
        return store, torch.bfloat16 if rope.dtype == torch.float32 else rope.dtype

    def _limit(self, latent: Tensor, rope: Tensor) -> tuple[int, str] | None:
        """(放得下的最大长度, 受什么限制)；没有限制为 None。"""
        limit = None if self.max_length is None else (self.max_length, "max_length")
        if self.budget_bytes is not None:
            size = token_bytes(latent.shape[2], rope.shape[2], *self._stores(latent, rope))
            fits = self.budget_bytes // (size * latent.shape[0])
            if limit is None or fits < limit[0]:
                limit = (fits, "budget")
        return limit

    def _raise_full(self, length: int, limit: tuple[int, str], latent: Tensor) -> None:
        largest, kind = limit
        if kind == "max_length":
            raise self.full(length, largest)
        raise MemoryBudgetError(
            f"{self.name}缓存超出内存预算：{latent.shape[0]} 行、每行 {length} 个词元放不进本层的"
            f" {self.budget_bytes} 字节；在此预算内每行最多 {largest} 个词元",
            budget_bytes=self.budget_bytes,
            max_length=largest,
        )

    def _check(self, latent: Tensor, rope: Tensor) -> None:
        if latent.dim() != 3 or rope.dim() != 3 or latent.shape[:2] != rope.shape[:2]:
            raise InputError(
                f"{self.name}latent、rope 应为 [B, T, r] 与 [B, T, dr]，得到 "
                f"{list(latent.shape)} 与 {list(rope.shape)}"
            )
        if rope.device != latent.device:
            where = f"与 latent 同在 {latent.device} 的张量"
            raise InputError.expected(f"{self.name}rope", where, rope)
        if not latent.is_floating_point():
            raise InputError.expected(f"{self.name}latent", "浮点张量", latent)
        mine = self.latent
        if mine is None:
            return
        if latent.shape[0] != mine.shape[0]:
            raise InputError(
                f"{self.name}缓存有 {mine.shape[0]} 行，这次传入 {latent.shape[0]} 行；"
                "换一批输入请用新的缓存或先 reset()"
            )
        if latent.shape[2] != mine.shape[2] or rope.shape[2] != self.rope.shape[2]:
            raise InputError(
                f"{self.name}缓存来自另一个模型：缓存的维度是 r={mine.shape[2]}、"
                f"dr={self.rope.shape[2]}，这次是 r={latent.shape[2]}、dr={rope.shape[2]}"
            )
        if latent.device != mine.device:
            raise InputError(
                f"{self.name}缓存在 {mine.device}，传入的 latent、rope 在 {latent.device}；"
                "请放到同一设备"
            )
