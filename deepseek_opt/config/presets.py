"""预设：名字 → (中文说明, 各部分的取值)。

只包含本版本 ``optimize`` 真正会做的部分（MLA 与稠密部分）。
"""

from __future__ import annotations

from typing import Any

# 分块越小，预填充的工作区（各层激活）越小；但每块都要重新读一遍权重、重新展开已缓存的 K、V。
_LONG_CHUNK = 1024
_SMALL_CHUNK = 512

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "compatible": (
        "最稳妥：只替换 MLA 注意力，缓存类型等一切与模型一致",
        {"mla": {}},
    ),
    "long_context": (
        "长上下文：注意力与稠密层都优化，预填充每块 1024 个 token，工作区不随长度增长",
        {"mla": {"prefill_chunk_size": _LONG_CHUNK}, "dense": {}},
    ),
    "low_memory": (
        "省内存：潜在缓存用 int8（每 token 一个缩放系数，旋转部分保持 16 位），预填充每块 512 个 token",
        {"mla": {"cache_dtype": "int8", "prefill_chunk_size": _SMALL_CHUNK}, "dense": {}},
    ),
    "fast_decode": (
        "生成最快：注意力、门控 FFN、LM head、投影、归一化都换成本库的内核",
        {"mla": {}, "dense": {}},
    ),
    "training": (
        "训练：优化注意力与稠密层的前向和反向；LM head 留给原模型，以便配合融合的损失函数",
        {"mla": {}, "dense": {"lm_head": False}},
    ),
}
