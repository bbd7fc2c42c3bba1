"""transformers 的主模型里循环直接用到的各部分：是哪些，有没有被换掉、被改动。"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from deepseek_opt.integrations.patch import is_taken


def parts_of(model: Any) -> tuple[Any, ...]:
    """(基础模型, 词嵌入, 输出头, 各层, 最后的归一化, 旋转模块)；没有的为 None。"""
    decoder = model.get_decoder()
    return (
        decoder,
        model.get_input_embeddings(),
        model.get_output_embeddings(),
        *(getattr(decoder, name, None) for name in ("layers", "norm", "rotary_emb")),
    )


def same_parts(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    """是不是同样的那些对象。"""
    return all(a is b for a, b in zip(left, right, strict=True))


def altered(model: Any) -> str | None:
    """直接调用算子、录进 CUDA graph 会绕过的改动（钩子、改写的 forward、LoRA 等）；没有则为 None。"""
    decoder, embedding, head, *_, rotary = parts_of(model)
    if _has_any_global_hook():
        return "有全局的模块钩子"
    if any(part is not None and is_taken(part) for part in (decoder, rotary)):
        return "基础模型或旋转模块上有钩子，或 forward 被改写"
    for part, kind, name in ((head, nn.Linear, "输出头"), (embedding, nn.Embedding, "词嵌入")):
        if not isinstance(part, kind) or type(part).forward is not kind.forward or is_taken(part):
            return f"{name}不是普通的 nn.{kind.__name__}，或有钩子"
    return None
