"""演示的输入：随包的小模型，以及它训练时没见过的标准库源文件。"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from deepseek_opt.corpus import HELD_OUT_MODULES, held_out_files, read_text, stdlib_root
from deepseek_opt.errors import InputError, UnsupportedError

MODEL_FOLDER = Path(__file__).resolve().parents[1] / "assets" / "stdlib_model"


def require_transformers() -> None:
    """抛出 UnsupportedError：没有装 transformers。"""
    try:
        import transformers  # noqa: F401  # pylint: disable=unused-import
    except ImportError as error:
        raise UnsupportedError(
            "演示要与 transformers 比较：请运行 pip install 'transformers>=5.17'"
        ) from error


def load_model(folder: Path, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """从本地目录读模型（eval、不求导）；不联网，只读 safetensors。

    抛出 InputError：目录不是 transformers 的模型。
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # 演示自己有进度条
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} 不是 transformers 的模型目录：没有 config.json")
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention,
        local_files_only=True,
        use_safetensors=True,
    )
    return model.eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """目录里的分词器；超过模型长度的文本由演示自己截断，不需要它警告。"""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.model_max_length = int(1e9)
    return tokenizer


def held_out_sources() -> Iterator[Path]:
    """留出模块的源文件：先是模块本身，再是它们的测试（没有装测试时就没有）。"""
    root, seen = stdlib_root(), set()
    for name in HELD_OUT_MODULES:
        single = root / f"{name}.py"
        found = [single] if single.is_file() else sorted((root / name).glob("*.py"))
        for path in found:
            seen.add(path)
            yield path
    yield from (path for path in held_out_files() if path not in seen)


def held_out_texts() -> Iterator[tuple[str, str]]:
    """(相对标准库的名字, 全文)。"""
    root = stdlib_root()
    for path in held_out_sources():
        yield path.relative_to(root).as_posix(), read_text(path)


def continuation_source() -> tuple[str, str]:
    """续写用的留出文件 (名字, 全文)：textwrap.py，没有就取第一个。

    抛出 UnsupportedError：这个 Python 没有标准库的源文件。
    """
    path = stdlib_root() / "textwrap.py"
    if path.is_file():
        return path.name, read_text(path)
    for found in held_out_texts():
        return found
    raise _no_sources()


def _no_sources() -> UnsupportedError:
    return UnsupportedError(f"{stdlib_root()} 下没有标准库的源文件，演示没有真实输入可用")


def held_out_stream(tokenizer: Any, count: int) -> list[int]:
    """留出源码首尾相接的前 count 个词元；不够时从头再来。

    抛出 UnsupportedError：这个 Python 没有标准库的源文件（例如打成了压缩包）。
    """
    ids: list[int] = []
    for _, text in held_out_texts():
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= count:
            break
    if not ids:
        raise _no_sources()
    return (ids * -(-count // len(ids)))[:count]


def prompts(tokenizer: Any, batch: int, length: int) -> torch.Tensor:
    """batch 个留出文件各取开头的 length 个词元：[batch, length]，不需要填充。

    短于 length 的文件略过；文件不够时用留出词元流补足。
    """
    rows: list[list[int]] = []
    for _, text in held_out_texts():
        if len(rows) == batch:
            break
        ids = tokenizer(text)["input_ids"]
        if len(ids) >= length:
            rows.append(ids[:length])
    missing = batch - len(rows)
    if missing:
        stream = held_out_stream(tokenizer, missing * length)
        rows += [stream[i * length : (i + 1) * length] for i in range(missing)]
    return torch.tensor(rows)
