"""读入 MTP 层的权重：先逐项核对，缺少、形状不对、量化过、编号不对的一次全部列出，从不留下随机数。"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_opt.errors import InputError
from deepseek_opt.mtp.adapter import MTPAdapter
from deepseek_opt.mtp.predictor import TokenPredictor

#: MTP 层可以单独放在文件夹里的这个文件：transformers 不读它，载入主模型时也就不报多余的权重。
SEPARATE = "mtp.safetensors"
_COPIES = {"embed_tokens.weight": "embedding", "shared_head.head.weight": "head"}
_OPTIONS = {"embedding": "shared_embedding", "head": "shared_head"}
_IGNORED = "rotary_emb.inv_freq"
_QUANTIZED = re.compile(r"(scale|scale_inv|scales|qweight|qzeros|g_idx|absmax|zero_point)$")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Entry(NamedTuple):
    """一个张量：形状、类型的名字、从哪里读。"""

    shape: tuple[int, ...]
    dtype: str
    place: Any


class Source:
    """MTP 权重的来源：检查点文件夹（也读其中的 ``mtp.safetensors``），或名字到张量的字典。"""

    def __init__(self, source: Any):
        self.label = "给出的字典"
        if isinstance(source, Mapping):
            self.entries = {name: _entry(name, value) for name, value in source.items()}
        elif isinstance(source, (str, Path)):
            self.label = str(source)
            self.entries = dict(_folder_entries(Path(source)))
        else:
            raise InputError.expected("source", "检查点文件夹或“名字 -> 张量”的字典", source)

    def read(self, name: str) -> Tensor:
        """读入一个张量。"""
        place = self.entries[name].place
        if isinstance(place, Tensor):
            return place.detach()
        from safetensors import safe_open

        with safe_open(place, framework="pt") as file:
            return file.get_tensor(name)

    def layers(self, adapter: MTPAdapter, declared: int) -> int:
        """有几个物理的 MTP 层；没有、编号不连续或比声明的少则报错。"""
        pattern = _layer_pattern(adapter)
        numbers = {int(m.group(1)) for name in self.entries if (m := pattern.match(name))}
        found = sorted(n for n in numbers if n >= adapter.num_layers)
        count = max(len(found), declared)
        wanted = list(range(adapter.num_layers, adapter.num_layers + count))
        if found and found == wanted:
            return count
        prefixes = [adapter.layer_prefix(i) + "*" for i in range(max(count, 1))]
        lines = [
            f"{name}：没有"
            for i, name in enumerate(prefixes)
            if i + adapter.num_layers not in found
        ]
        lines += [
            f"{name}：编号不对"
            for name in sorted(self.entries, key=_natural)
            if (m := pattern.match(name)) and int(m.group(1)) in set(found) - set(wanted)
        ]
        raise _error(self.label, lines)


def load_predictor(predictor: TokenPredictor, source: Source) -> None:
    """把 source 的权重读进 predictor；有一处不符就抛出 InputError，predictor 不变。"""
    adapter = predictor.adapter
    names = predictor.checkpoint_names()
    state = predictor.state_dict()
    direct = {names[key]: value for key, value in state.items()}
    if all(name in source.entries for name in direct):  # 没有拆开专家的 state_dict
        expected = direct
    else:
        expected = adapter.to_checkpoint({n: v.to("meta") for n, v in direct.items()})
    problems = [*_missing(source, expected), *_unknown(source, adapter, predictor, expected)]
    if problems:
        raise _error(source.label, problems)
    tensors = {name: source.read(name) for name in expected}
    found = tensors if expected is direct else adapter.from_checkpoint(tensors)
    with torch.no_grad():
        for key, value in state.items():
            value.copy_(found[names[key]])


def _missing(source: Source, expected: Mapping[str, Tensor]) -> Iterator[str]:
    for name in sorted(expected, key=_natural):
        entry, shape = source.entries.get(name), tuple(expected[name].shape)
        if entry is None:
            yield f"{name}：没有"
        elif entry.dtype not in _FLOATS:
            yield f"{name}：类型是 {entry.dtype}，像是量化过的；请先还原成 bf16 或 fp32"
        elif entry.shape != shape:
            yield f"{name}：应为 {list(shape)}，实际是 {list(entry.shape)}"


def _unknown(
    source: Source, adapter: MTPAdapter, predictor: TokenPredictor, expected: Mapping[str, Tensor]
) -> Iterator[str]:
    """MTP 层的前缀之下不认得的；与主模型共用的嵌入、输出头的副本要与主模型的相同。"""
    for index in range(len(predictor.layers)):
        prefix = adapter.layer_prefix(index)
        for name in sorted(source.entries, key=_natural):
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix) or name in expected or rest.endswith(_IGNORED):
                continue
            if rest in _COPIES:
                yield from _check_copy(source, name, adapter, _COPIES[rest])
            elif _QUANTIZED.search(rest):
                yield f"{name}：是量化的尺度；请先把 MTP 层还原成 bf16 或 fp32"
            else:
                yield f"{name}：不认得"


def _check_copy(source: Source, name: str, adapter: MTPAdapter, part: str) -> Iterator[str]:
    base = getattr(adapter, part).weight
    copy = source.read(name).to(base.device, base.dtype)
    if copy.shape != base.shape or not torch.equal(copy, base):
        yield f"{name}：与主模型的不同；要用它，请设 MTPConfig({_OPTIONS[part]}=False)"


def _layer_pattern(adapter: MTPAdapter) -> re.Pattern:
    path = adapter.layer_prefix(0).rstrip(".").rpartition(".")[0]
    return re.compile(re.escape(path) + r"\.(\d+)\.")


def _folder_entries(folder: Path) -> Iterator[tuple[str, Entry]]:
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(names))]
    else:
        files = [folder / "model.safetensors"]
    lacking = [str(path) for path in files if not path.is_file()]
    if lacking:
        raise InputError(
            f"参数 source：应为带 safetensors 权重的检查点文件夹，没有 {'、'.join(lacking)}；"
            "从头训练请用 fresh=True"
        )
    if (separate := folder / SEPARATE).is_file() and separate not in files:
        files.append(separate)
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    yield name, Entry(tuple(part.get_shape()), part.get_dtype(), path)
        except SafetensorError as error:
            raise InputError(f"{path} 不是完整的 safetensors 文件：{error}") from error


def _entry(name: str, value: Any) -> Entry:
    if not isinstance(value, Tensor):
        raise InputError.expected(f"source[{name!r}]", "张量", value)
    known = {dtype: text for text, dtype in _FLOATS.items()}
    return Entry(tuple(value.shape), known.get(value.dtype, str(value.dtype)), value)


def _natural(name: str) -> list[tuple[int, Any]]:
    return [(0, int(p)) if p.isdigit() else (1, p) for p in name.split(".")]


def _error(label: str, lines: list[str]) -> InputError:
    return InputError(
        f"{label} 里的 MTP 权重不能用，模型没有改动（从头训练请用 fresh=True）：\n  "
        + "\n  ".join(lines)
    )
