"""内存估算与预算：在分配之前就知道一次长输入要多少内存、放不放得下、最长能放多少。

估算对象是一次预填充（不求导）：权重、潜变量缓存、激活峰值；并与标准多头注意力（逐步计算、SDPA）和
transformers 自己的 MLA 比较。公式逐项数前向各阶段同时存活的张量，与 Linux 上实测的常驻内存峰值相差
不超过 :data:`TOLERANCE` 与 :data:`FIXED_BYTES` 中较大者（tests/test_memory.py 验证）。
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from html import escape
from typing import Any

import torch

from deepseek_opt.config import OptimizationProfile, format_bytes, parse_bytes
from deepseek_opt.errors import InputError, MemoryBudgetError
from deepseek_opt.geometry import ModelGeometry, read_geometry
from deepseek_opt.integrations.prefill import AUTO_TOKENS

TOLERANCE = 0.25
"""估算的工作内存与实测峰值的相对误差上限（另有 :data:`FIXED_BYTES` 的固定误差）。"""

FIXED_BYTES = 12 << 20
"""不随长度增长、估算不计的部分：BLAS 等库首次遇到一种形状时的暂存，实测约 8 MiB。"""

MIN_CHUNK = 64
"""自动分块的最小块（词元）：再小时矩阵乘法的效率掉得厉害。"""

_MAX_LENGTH = 1 << 30
_CACHE_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

_TITLES = {
    "standard_eager": "标准注意力（逐步计算）",
    "standard_sdpa": "标准注意力（SDPA）",
    "transformers_eager": "transformers 的 MLA（eager）",
    "transformers_sdpa": "transformers 的 MLA（SDPA）",
}


@dataclass(frozen=True)
class Alternative:
    """另一种实现的用量（字节）：name 为键名，title 为中文名。"""

    name: str
    title: str
    cache_bytes: int
    prefill_bytes: int

    @property
    def working_bytes(self) -> int:
        """缓存 + 激活峰值。"""
        return self.cache_bytes + self.prefill_bytes


@dataclass(frozen=True)
class MemoryEstimate:
    """一次预填充的内存估算；单位都是字节。

    batch、length : 行数与每行词元数。chunk : 每次送入的词元数（等于 length 即不分块）。
    dtype : 激活的 dtype。weight_bytes : 权重。cache_bytes : 潜变量缓存。
    prefill_bytes : 激活峰值（不含权重与缓存）。alternatives : 其他实现，见 :class:`Alternative`。
    """

    batch: int
    length: int
    chunk: int
    dtype: torch.dtype
    weight_bytes: int
    cache_bytes: int
    prefill_bytes: int
    alternatives: tuple[Alternative, ...]

    @property
    def working_bytes(self) -> int:
        """缓存 + 激活峰值：配置里的 memory_budget_bytes 管的就是它。"""
        return self.cache_bytes + self.prefill_bytes

    @property
    def total_bytes(self) -> int:
        """权重 + 缓存 + 激活峰值。"""
        return self.weight_bytes + self.working_bytes

    def against(self, name: str) -> Alternative:
        """按键名取另一种实现（``standard_eager``、``standard_sdpa``、``transformers_eager``、
        ``transformers_sdpa``）。"""
        for entry in self.alternatives:
            if entry.name == name:
                return entry
        raise InputError.expected("name", f"{'、'.join(_TITLES)} 之一", name)

    def saving(self, name: str) -> float:
        """工作内存比另一种实现少的比例，例如 0.4 为少 40%。"""
        return 1 - self.working_bytes / self.against(name).working_bytes

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        mine = ("本库", self.cache_bytes, self.prefill_bytes, self.working_bytes, "")
        rows = [mine] + [
            (a.title, a.cache_bytes, a.prefill_bytes, a.working_bytes, f"{self.saving(a.name):.1%}")
            for a in self.alternatives
        ]
        return [(r[0], *(format_bytes(n) for n in r[1:4]), r[4]) for r in rows]

    def _title(self) -> str:
        chunk = "不分块" if self.chunk >= self.length else f"每块 {self.chunk} 词元"
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"内存估算：{self.batch} 行 x {self.length} 词元，{kind}，{chunk}；"
            f"权重 {format_bytes(self.weight_bytes)}，合计 {format_bytes(self.total_bytes)}"
        )

    def render(self) -> str:
        """可读的表格（终端）。"""
        header = ("实现", "缓存", "激活峰值", "缓存 + 激活", "本库省下")
        rows = [header, *self._rows()]
        widths = [max(_columns(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(cell + " " * (width - _columns(cell)) for cell, width in zip(row, widths))
            for row in rows
        ]
        return "\n".join([self._title(), *(line.rstrip() for line in lines)])

    __str__ = render

    def _repr_html_(self) -> str:
        """Jupyter 里的表格。"""
        header = "".join(
            f"<th>{name}</th>" for name in ("实现", "缓存", "激活峰值", "缓存 + 激活", "本库省下")
        )
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._rows()
        )
        return f"<p>{escape(self._title())}</p><table><tr>{header}</tr>{body}</table>"


def estimate_memory(
    model: Any,
    batch: int,
    length: int,
    *,
    dtype: torch.dtype | None = None,
    profile: OptimizationProfile | None = None,
    chunk_size: int | None = None,
) -> MemoryEstimate:
    """估算对 batch 行、每行 length 个词元做一次预填充要多少内存；不分配任何大块内存。

    参数
    ----
    model : 带 MLA 的 transformers 模型或其配置，或含 :class:`~deepseek_opt.MLAAttention` 的自建模型。
    dtype : 激活（与 ``cache_dtype="auto"`` 时的缓存）的 dtype，默认随参数；给出时权重也按它计。
    profile : 用其 mla 部分的 cache_dtype、prefill_chunk_size、memory_budget_bytes 和 dense 部分的 ffn。
    chunk_size : 每次送入的词元数；默认为优化后的模型实际会用的：profile 的 prefill_chunk_size，没有时
        transformers 模型在长输入上自动分块，再不超过 memory_budget_bytes 允许的。

    返回 :class:`MemoryEstimate`。抛出 :class:`~deepseek_opt.errors.UnsupportedError`（看不出 MLA）、
    :class:`~deepseek_opt.errors.InputError`（batch、length 不是正整数）。

    示例
    ----
    >>> from deepseek_opt import MLAAttention, MLAConfig, estimate_memory
    >>> layer = MLAAttention(MLAConfig(num_attention_heads=16), 2048)
    >>> estimate = estimate_memory(layer, batch=1, length=8192)
    >>> estimate.saving("standard_eager") > 0.4
    True
    """
    shape = read_geometry(model)
    plan = _plan(shape, batch, length, dtype, profile)
    chunk = chunk_size or _configured_chunk(shape, plan, profile)
    plan = replace(plan, chunk=min(_positive("chunk_size", chunk), length))
    itemsize = plan.dtype.itemsize
    return MemoryEstimate(
        batch=batch,
        length=length,
        chunk=plan.chunk,
        dtype=plan.dtype,
        weight_bytes=shape.weight_bytes if dtype is None else shape.numel * itemsize,
        cache_bytes=_cache_bytes(shape, plan),
        prefill_bytes=_prefill_bytes(shape, plan),
        alternatives=tuple(_alternative(name, shape, plan) for name in _TITLES),
    )


def largest_length(
    model: Any,
    batch: int,
    budget: int | str,
    *,
    dtype: torch.dtype | None = None,
    profile: OptimizationProfile | None = None,
) -> int:
    """缓存与激活放得进 budget（字节，或 ``"2GB"``）的最大长度（词元 / 行）；放不下 1 个时为 0。

    允许自动分块（最小块 :data:`MIN_CHUNK`）；权重不计在内。参数同 :func:`estimate_memory`。
    """
    shape = read_geometry(model)
    return _largest(shape, _plan(shape, batch, 1, dtype, profile), budget_bytes(budget))


def plan_prefill(
    model: Any,
    batch: int,
    length: int,
    budget: int | str,
    *,
    dtype: torch.dtype | None = None,
    profile: OptimizationProfile | None = None,
) -> int:
    """在 budget 之内预填充 length 个词元时，每次送入多少个词元。

    放得下就不分块（返回 length），否则返回放得下的最大块（:data:`MIN_CHUNK` 的倍数）。参数同
    :func:`estimate_memory`。抛出 :class:`~deepseek_opt.errors.MemoryBudgetError`：最小的块也放不下，
    消息里有放得下的最大长度。

    示例
    ----
    >>> from deepseek_opt import MLAAttention, MLAConfig
    >>> from deepseek_opt.memory import plan_prefill
    >>> layer = MLAAttention(MLAConfig(num_attention_heads=16), 2048)
    >>> plan_prefill(layer, 1, 4096, "8GB")
    4096
    """
    shape = read_geometry(model)
    return _planned_chunk(shape, _plan(shape, batch, length, dtype, profile), budget_bytes(budget))


def check_budget(
    model: Any,
    batch: int,
    length: int,
    budget: int | str,
    *,
    dtype: torch.dtype | None = None,
    profile: OptimizationProfile | None = None,
) -> None:
    """放不下就在分配之前抛出 :class:`~deepseek_opt.errors.MemoryBudgetError`，说明放得下的最大长度。

    参数同 :func:`plan_prefill`。
    """
    plan_prefill(model, batch, length, budget, dtype=dtype, profile=profile)


def budget_bytes(budget: int | str) -> int:
    """``"2GB"``、``"512MiB"`` 或字节数 -> 字节数；抛出 :class:`~deepseek_opt.errors.InputError`。"""
    try:
        value = parse_bytes(budget)
    except ValueError as error:
        raise InputError(f"参数 budget：{error}") from None
    return _positive("budget", value)


# ---- 公式 ----


@dataclass(frozen=True)
class _Plan:
    """一次预填充：dtype 为激活的类型；latent_size、rope_size、scale_size 为缓存每元素、每词元的字节数。"""

    batch: int
    length: int
    chunk: int
    dtype: torch.dtype
    latent_size: int
    rope_size: int
    scale_size: int
    fused_ffn: bool


def _plan(shape: ModelGeometry, batch, length, dtype, profile) -> _Plan:
    _positive("batch", batch)
    _positive("length", length)
    kind = shape.dtype if dtype is None else dtype
    if not kind.is_floating_point:
        raise InputError.expected("dtype", "浮点类型", str(kind))
    mla = None if profile is None else profile.mla
    store = "auto" if mla is None else mla.cache_dtype
    latent_size, rope_size, scale_size = kind.itemsize, kind.itemsize, 0
    if store in ("int8", "float8_e4m3fn"):
        latent_size, rope_size, scale_size = 1, 2, 4
    elif store != "auto":
        latent_size = rope_size = _CACHE_ITEMSIZE[store]
    dense = None if profile is None else profile.dense
    fused = dense is not None and dense.ffn is not False
    return _Plan(batch, length, length, kind, latent_size, rope_size, scale_size, fused)


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError.expected(name, "正整数", value)
    return value


def _cache_bytes(shape: ModelGeometry, plan: _Plan) -> int:
    latent, rope = shape.latent_width
    token = latent * plan.latent_size + rope * plan.rope_size + shape.layers * plan.scale_size
    return plan.batch * plan.length * token


def _prefill_bytes(shape: ModelGeometry, plan: _Plan) -> int:
    """我们的核：从不生成分数矩阵，也不展开整段 K、V。"""
    d, size = shape.dims, plan.dtype.itemsize
    chunk = plan.batch * plan.chunk
    # 自建的层只在注意力内部分块：残差流、FFN、潜变量仍是整段的。
    whole = plan.batch * plan.length if shape.own else chunk
    attention = chunk * (d.q_out + (d.q_lora_rank or 0) + d.num_heads * d.v_head_dim)
    attention += 2 * whole * d.latent_width + whole * shape.hidden_size
    lse = 4 * chunk * d.num_heads
    ffn = _ffn_elements(shape, plan.fused_ffn) * whole
    stages = (attention * size + lse, ffn * size, *_other_stages(shape, plan.batch, whole, size))
    peak = _base_bytes(shape, whole, size) + max(stages)
    if not shape.own and plan.chunk < plan.length:  # 各块的输出拼成的 last_hidden_state
        peak += plan.batch * plan.length * shape.hidden_size * size
    return peak


def _base_bytes(shape: ModelGeometry, tokens: int, size: int) -> int:
    """残差流与归一化之后的输入，前向中一直存活。"""
    return 2 * tokens * shape.hidden_size * size


def _other_stages(shape: ModelGeometry, batch: int, tokens: int, size: int) -> tuple[int, int]:
    """注意力与 FFN 之外的两个阶段：RMSNorm 的 fp32 中间结果、logits。"""
    norm = tokens * shape.hidden_size * (8 if size < 4 else 4)
    return norm, (tokens if shape.all_logits else batch) * shape.vocab_size * size


def _ffn_elements(shape: ModelGeometry, fused: bool) -> int:
    """FFN 阶段每词元同时存活的元素数（残差与输入之外）。"""
    copies = 3 if shape.gated else 2  # 带门：act(gate)、up、乘积；不带门：激活前后
    if fused and shape.gated:
        copies = 1
    dense = max(copies * shape.ffn_width, shape.ffn_width + shape.hidden_size)
    if not shape.top_k:
        return dense
    # transformers 的专家：按专家重排的输入，gate_up、激活、乘积；随后是加权前后的输出。
    routed = shape.top_k * (
        shape.hidden_size + max(4 * shape.expert_width, shape.expert_width + 2 * shape.hidden_size)
    )
    return max(dense, routed + shape.hidden_size, copies * shape.shared_width + shape.hidden_size)


def _alternative(name: str, shape: ModelGeometry, plan: _Plan) -> Alternative:
    d, size = shape.dims, plan.dtype.itemsize
    kind = name.split("_")[0]
    tokens = plan.batch * plan.length
    value = d.num_heads * d.v_head_dim
    elements = 2 * d.q_out + 3 * value + shape.hidden_size  # q、k、v，输出及其转置后的副本
    width = shape.layers * d.standard_width
    if kind == "transformers":
        # 拼接前后两份 q，kv_b_proj 的输出（v 是它的视图），拼出来的 k。
        elements = 3 * d.q_out + d.kv_out + 2 * value + shape.hidden_size + (d.q_lora_rank or 0)
        width = sum(shape.latent_width)
    attention = tokens * elements * size + _score_bytes(name, shape, plan)
    ffn = _ffn_elements(shape, False) * tokens * size
    stages = (attention, ffn, *_other_stages(shape, plan.batch, tokens, size))
    peak = _base_bytes(shape, tokens, size) + max(stages)
    return Alternative(name, _TITLES[name], tokens * width * size, peak)


def _score_bytes(name: str, shape: ModelGeometry, plan: _Plan) -> int:
    """S x S 的分数与掩码。每个分数的字节数由前向逐行数出，见 tests/test_memory.py 的实测。"""
    size = plan.dtype.itemsize
    pairs = plan.batch * plan.length * plan.length
    if name == "standard_sdpa":
        return 0  # q、k、v 同宽时 CPU 走分块的实现
    if name == "transformers_sdpa":
        if shape.dims.qk_head_dim == shape.dims.v_head_dim:
            return 0
        # q、k 与 v 的维度不同时 torch 在 CPU 上退回普通实现：fp32 分数、softmax、每分数 1 字节的检查。
        copies = plan.batch * plan.length * shape.dims.standard_width * 4 if size < 4 else 0
        return pairs * (9 * shape.dims.num_heads + 5) + copies
    per_score = 8 if size == 4 else size + 8  # 16 位：原分数、转成 fp32、softmax 的结果
    return pairs * (per_score * shape.dims.num_heads + size)


# ---- 预算 ----


def _working(shape: ModelGeometry, plan: _Plan, length: int, chunk: int) -> int:
    plan = replace(plan, length=length, chunk=min(chunk, length))
    return _cache_bytes(shape, plan) + _prefill_bytes(shape, plan)


def _largest(shape: ModelGeometry, plan: _Plan, budget: int) -> int:
    low, high = 0, 1
    while high < _MAX_LENGTH and _working(shape, plan, high, MIN_CHUNK) <= budget:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if _working(shape, plan, middle, MIN_CHUNK) <= budget:
            low = middle
        else:
            high = middle
    return low


def _planned_chunk(shape: ModelGeometry, plan: _Plan, budget: int) -> int:
    length = plan.length
    if _working(shape, plan, length, length) <= budget:
        return length
    needed = _working(shape, plan, length, MIN_CHUNK)
    if needed > budget:
        largest = _largest(shape, plan, budget)
        raise MemoryBudgetError(
            f"{plan.batch} 行、每行 {length} 词元至少要 {format_bytes(needed)}（缓存与激活，"
            f"已按最小块 {MIN_CHUNK} 词元），超出预算 {format_bytes(budget)}；"
            f"在此预算内每行最多 {largest} 词元",
            required_bytes=needed,
            budget_bytes=budget,
            max_length=largest,
        )
    low, high = 1, -(-length // MIN_CHUNK)  # 以 MIN_CHUNK 为单位：low 放得下，high 放不下
    while high - low > 1:
        middle = (low + high) // 2
        if _working(shape, plan, length, middle * MIN_CHUNK) <= budget:
            low = middle
        else:
            high = middle
    return low * MIN_CHUNK


def _configured_chunk(shape: ModelGeometry, plan: _Plan, profile) -> int:
    """不另外指定时实际会用的块：配置的，其次（transformers 模型）自动的，再不超过预算允许的。"""
    mla = None if profile is None else profile.mla
    chunk = plan.length
    if mla is not None and mla.prefill_chunk_size is not None:
        chunk = mla.prefill_chunk_size
    elif not shape.own and plan.batch * plan.length >= 2 * AUTO_TOKENS:
        chunk = max(MIN_CHUNK, AUTO_TOKENS // plan.batch)
    if mla is not None and mla.memory_budget_bytes is not None:
        chunk = min(chunk, _planned_chunk(shape, plan, mla.memory_budget_bytes))
    return chunk


def _columns(text: str) -> int:
    """终端里占的列数：中文占两列。"""
    return sum(2 if ord(char) > 0x2E7F else 1 for char in text)
