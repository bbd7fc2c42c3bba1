"""异常：继承关系、消息、序列化。"""

import pickle

import pytest
import torch

from deepseek_opt import errors
from deepseek_opt.errors import ConfigError, ConfigProblem, InputError, MemoryBudgetError


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("UnsupportedError", NotImplementedError),
        ("InputError", ValueError),
        ("MemoryBudgetError", MemoryError),
    ],
)
def test_hierarchy(name, builtin):
    error = getattr(errors, name)
    assert issubclass(error, errors.DeepSeekOptError)
    assert issubclass(error, builtin)


def test_expected_names_argument_expected_and_actual():
    text = str(InputError.expected("latent", "三维张量", torch.ones(2, 3, dtype=torch.float16)))
    assert (
        text == "参数 latent：应为三维张量，实际是形状 [2, 3]、类型 torch.float16、设备 cpu 的张量"
    )
    assert str(InputError.expected("a", "正数", "零")) == "参数 a：应为正数，实际是零"


class _Broken:
    def __repr__(self):
        raise ValueError("坏的 repr")


@pytest.mark.parametrize(
    ("value", "text"),
    [("x", "'x'"), (3, "3"), ("y" * 200, "'" + "y" * 78 + "…"), (_Broken(), "<_Broken>")],
)
def test_describe(value, text):
    assert errors.describe(value) == text


def test_describe_integer_too_long_for_decimal():
    assert errors.describe(10**5000) == "<int>"


def test_config_error_lists_every_problem():
    problems = [
        ConfigProblem("mla.kv_lora_rank", "应为整数", "a", 3),
        ConfigProblem("mla", "缺少"),
        ConfigProblem("", "整个文件都不对"),
    ]
    error = ConfigError("配置文件 a.yaml 有 3 处错误：", problems, "a.yaml")
    assert str(error).splitlines() == [
        "配置文件 a.yaml 有 3 处错误：",
        "  1. 第 3 行 mla.kv_lora_rank = 'a'：应为整数",
        "  2. mla：缺少",
        "  3. 整个文件都不对",
    ]
    assert (error.file, len(error.problems)) == ("a.yaml", 3)


def test_errors_survive_pickle():
    error = pickle.loads(pickle.dumps(ConfigError("错", [ConfigProblem("a", "b", 1)], "f")))
    assert (error.file, error.problems[0].path, str(error)) == ("f", "a", "错\n  1. a = 1：b")
    budget = MemoryBudgetError("放不下", required_bytes=10, budget_bytes=5, max_length=7)
    copy = pickle.loads(pickle.dumps(budget))
    assert (copy.required_bytes, copy.budget_bytes, copy.max_length) == (10, 5, 7)
    assert str(copy) == "放不下"
