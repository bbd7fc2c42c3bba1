"""``deepseek-opt verify``：一个模型目录，优化前后逐层、逐 token 比较。"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from safetensors import SafetensorError

from deepseek_opt.config import OptimizationProfile
from deepseek_opt.errors import InputError, UnsupportedError

_DTYPES = ("auto", "float32", "bfloat16", "float16")
_DEFAULT_PROMPT = '''def read_lines(path):
    """Return the lines of a text file without trailing newlines."""
    with open(path, encoding="utf-8") as stream:
'''


def register(app: typer.Typer) -> None:
    """登记命令。"""
    app.command("verify", help="核对：优化前后的输出、每层误差与贪心生成是否一致")(verify)


def verify(  # pylint: disable=too-many-arguments,too-many-positional-arguments
    model_dir: Annotated[
        Path, typer.Argument(metavar="MODEL_DIR", help="transformers 格式的模型目录")
    ],
    profile_file: Annotated[
        Path | None, typer.Option("--profile", help="配置文件（.yaml、.json、.toml）")
    ] = None,
    preset: Annotated[
        str, typer.Option("--preset", help="预设的名字；给了 --profile 时不用")
    ] = "compatible",
    prompt_file: Annotated[
        Path | None, typer.Option("--prompt-file", help="UTF-8 文本，作为输入")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="、".join(_DTYPES))] = "float32",
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="输入至多取多少个 token")] = 512,
) -> None:
    """优化一份模型并与原模型比较；一致时退出码为 0，否则为 1。"""
    if dtype not in _DTYPES:
        raise InputError.expected("--dtype", "、".join(_DTYPES) + " 之一", dtype)
    if max_tokens < 1:
        raise InputError.expected("--max-tokens", "大于 0 的整数", max_tokens)
    profile = _profile(profile_file, preset)
    prompt = _DEFAULT_PROMPT if prompt_file is None else _read(prompt_file)
    model, tokenizer = load_model(model_dir, dtype)
    inputs = _encode(tokenizer, prompt, max_tokens)

    import deepseek_opt

    report = deepseek_opt.optimize(model, profile)
    typer.echo(report.render())
    result = deepseek_opt.verify(model, inputs)
    typer.echo(result.render())
    raise typer.Exit(0 if result.passed else 1)


def _profile(path: Path | None, preset: str) -> OptimizationProfile:
    if path is not None:
        return OptimizationProfile.from_file(path)
    return OptimizationProfile.preset(preset)


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"读不了 --prompt-file {path}：{error}") from error
    if not text.strip():
        raise InputError(f"--prompt-file {path} 是空的")
    return text


def load_model(folder: Path, dtype: str) -> tuple[Any, Any]:
    """从本地目录读取模型与分词器；不联网，不执行目录里的代码，只读 safetensors。"""
    if not (folder / "config.json").is_file():
        raise InputError(f"MODEL_DIR {folder} 不是 transformers 的模型目录：没有 config.json")
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UnsupportedError(
            "deepseek-opt verify 需要 transformers：请运行 pip install 'transformers>=5.17'"
        ) from error
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise InputError(f"读不了模型 {folder}：{error}") from error
    return model.eval(), tokenizer


def _encode(tokenizer: Any, prompt: str, max_tokens: int) -> dict[str, Any]:
    encoded = tokenizer(prompt, return_tensors="pt", truncation=True, max_length=max_tokens)
    if encoded["input_ids"].shape[-1] == 0:
        raise InputError("输入没有任何 token：请换一段文字")
    return {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}
