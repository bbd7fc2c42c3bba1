"""docs/配置.md：每个字段都有说明，每段示例都能运行。"""

import re
from pathlib import Path

import pytest

from deepseek_opt.config import (
    DenseConfig,
    MLAConfig,
    MOEConfig,
    MTPConfig,
    OptimizationProfile,
)

TEXT = (Path(__file__).parent.parent / "docs" / "配置.md").read_text(encoding="utf-8")
ALL = (OptimizationProfile, MLAConfig, DenseConfig, MTPConfig, MOEConfig)


def _blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("model", ALL, ids=lambda m: m.__name__)
def test_every_field_is_documented_and_nothing_else(model):
    section = re.search(rf"^## {model.__name__}\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| `(\w+)` \|", section[1], re.MULTILINE)
    assert rows == list(model.model_fields) or set(rows) == set(model.model_fields)
    for name, field in model.model_fields.items():
        assert field.description, name


def test_every_choice_is_documented():
    for model in ALL:
        for field in model.model_fields.values():
            for choice in re.findall(r"'(\w+)'", str(field.annotation)):
                assert f"`{choice}`" in TEXT, choice


def test_every_preset_is_documented():
    for name in OptimizationProfile.presets():
        assert f"| `{name}` |" in TEXT


@pytest.mark.parametrize("code", _blocks("python"))
def test_python_examples_run(code):
    exec(compile(code, "docs/配置.md", "exec"), {})  # pylint: disable=exec-used


@pytest.mark.parametrize("language", ["yaml", "json", "toml"])
def test_file_examples_load(tmp_path, language):
    for text in _blocks(language):
        path = tmp_path / f"example.{language}"
        path.write_text(text, encoding="utf-8")
        assert OptimizationProfile.from_file(path).mla.cache_dtype == "int8"
