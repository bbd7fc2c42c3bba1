"""``deepseek-opt doctor --model``：一个模型的专家权重，各种量化各占多少内存。"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from deepseek_opt.cli.checks import Check
from deepseek_opt.errors import InputError

_GROUP = "专家权重的内存"


def expert_checks(folder: Path) -> list[Check]:
    """folder 是 transformers 的模型目录；只读 config.json，不读权重。

    抛出 InputError：目录不是模型。
    """
    from deepseek_opt.config import format_bytes
    from deepseek_opt.demo.data import require_transformers

    require_transformers()
    if not (folder / "config.json").is_file():
        raise InputError.expected("--model", "有 config.json 的模型目录", str(folder))
    shapes, layers, width = _shapes(folder)
    if not shapes:
        return [Check(_GROUP, folder.name, "warn", "没有认得的 MoE 专家，量化不起作用")]
    original = width * sum(math.prod(shape) for shape in shapes)
    checks = [Check(_GROUP, "原权重", "ok", f"{format_bytes(original)}，{layers} 层")]
    for title, *form in _forms():
        size = sum(_size(shape, *form) for shape in shapes)
        both = format_bytes(size + original)
        value = f"{format_bytes(size)}；保留原权重（keep_original_weights）时共 {both}"
        checks.append(Check(_GROUP, title, "ok", value))
    return checks


def _forms() -> list[tuple[Any, ...]]:
    """(名称, 位数, 组大小, 对称, 码是不是浮点)。"""
    from deepseek_opt.quantize import (
        DEFAULT_GROUP_SIZE,
        DEFAULT_SYMMETRIC,
        FP8_GROUP_SIZE,
        GROUP_SIZES,
    )

    grouped = f"fp8（{FP8_GROUP_SIZE} 个一组）"
    forms = [
        ("int8", 8, 0, True, False),
        ("fp8", 8, 0, True, True),
        (grouped, 8, FP8_GROUP_SIZE, True, True),
    ]
    for group in GROUP_SIZES:
        for symmetric in (True, False):
            note = "" if symmetric else "，带零点"
            chosen = (group, symmetric) == (DEFAULT_GROUP_SIZE, DEFAULT_SYMMETRIC)
            title = f"int4（{group} 个一组{note}）" + ("，默认" if chosen else "")
            forms.append((title, 4, group, symmetric, False))
    return forms


def _shapes(folder: Path) -> tuple[list[tuple[int, int, int]], int, int]:
    """(各专家权重 [E, N, K] 的形状（共享专家 E = 1）, 层数, 一个元素的字节数)。"""
    from transformers import AutoConfig, AutoModelForCausalLM

    from deepseek_opt.integrations import experts, moe_block
    from deepseek_opt.integrations.expert_store import weight_at
    from deepseek_opt.quantized_file import empty_parameters

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with empty_parameters():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    found: list[Any] = []
    layers = 0
    for module in model.modules():
        spec = moe_block.find_block(module)
        if experts.looks_like_experts(module):
            layers += 1
            weights = [module._parameters[name] for name in experts.weight_names(module)]
            found += [w.mT if module.is_transposed else w for w in weights]
        elif spec is not None:
            found += [
                weight_at(module, path)[None] for path in moe_block.shared_paths(module, spec)
            ]
    width = found[0].element_size() if found else 0
    return [tuple(w.shape) for w in found], layers, width


def _size(
    shape: tuple[int, int, int], bits: int, group: int, symmetric: bool, floating: bool
) -> int:
    from deepseek_opt.quantize import packed_shapes

    parts = packed_shapes(shape, bits, group, symmetric, floating).values()
    return sum(dtype.itemsize * math.prod(size) for dtype, size in parts)
