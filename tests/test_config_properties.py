"""配置的性质（hypothesis）：任意合法配置存取不变；任意输入要么合法，要么得到中文说明。"""

import re
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_opt.config import DenseConfig, MLAConfig, MOEConfig, MTPConfig, OptimizationProfile
from deepseek_opt.errors import ConfigError

PARTS = {"mla": MLAConfig, "mtp": MTPConfig, "moe": MOEConfig, "dense": DenseConfig}

_SPECIAL = {
    "draft_length": st.integers(1, 8) | st.just("adaptive"),
    "loss_weights": st.lists(st.floats(0, 1e6), min_size=1, max_size=8),
    "quantization_group_size": st.sampled_from([32, 64, 128]),
    "qk_rope_head_dim": st.integers(0, 64).map(lambda n: 2 * n),
    "depth": st.integers(1, 8),
    "memory_budget_bytes": st.integers(1, 2**63 - 1),
    "name": st.text(),
    "description": st.text(),
}


def _values(annotation):
    """一个字段的合法取值，由类型注解得出。"""
    leaves = _leaves(annotation)
    if bool in leaves:
        return st.booleans()
    if float in leaves:
        return st.floats(min_value=1e-9, max_value=0.999)
    if int in leaves:
        return st.integers(1, 4096)
    return st.sampled_from([leaf for leaf in leaves if isinstance(leaf, str)])


def _leaves(annotation):
    args = get_args(annotation)
    return [leaf for arg in args for leaf in _leaves(arg)] if args else [annotation]


def _fields(model):
    names = [name for name in model.model_fields if name not in PARTS]
    return {
        name: _SPECIAL[name] if name in _SPECIAL else _values(model.model_fields[name].annotation)
        for name in names
    }


@st.composite
def _valid(draw, model):
    """一份合法的配置：先任取，再去掉互相矛盾的字段。"""
    data = draw(st.fixed_dictionaries({}, optional=_fields(model)))
    while True:
        try:
            return model(**data)
        except ConfigError as error:
            for problem in error.problems:
                data.pop(problem.path.split("[")[0], None)


@st.composite
def profiles(draw):
    parts = {name: draw(st.none() | _valid(model)) for name, model in PARTS.items()}
    profile = draw(_valid(OptimizationProfile))
    profile.update(**parts)
    return profile


@pytest.mark.parametrize("suffix", [".yaml", ".json", ".toml"])
def test_round_trip_is_identical(tmp_path_factory, suffix):
    path = tmp_path_factory.mktemp("round") / f"p{suffix}"

    @settings(max_examples=60)
    @given(profiles())
    def check(profile):
        again = OptimizationProfile.from_file(profile.to_file(path))
        assert again == profile
        first = path.read_bytes()
        again.to_file(path)
        assert path.read_bytes() == first

    check()  # pylint: disable=no-value-for-parameter


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["yes", "int8", "2GB", "adaptive", "softmax", "1e3", 10**400]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def _anything(model):
    names = st.sampled_from([*model.model_fields, "unknown", "kv_lora_rnk"])
    return st.dictionaries(names, _json, max_size=5)


_documents = st.fixed_dictionaries(
    {}, optional={name: _anything(model) | _json for name, model in PARTS.items()}
)


@settings(max_examples=200)
@given(_documents)
def test_any_input_is_valid_or_explained_in_chinese(data):
    try:
        OptimizationProfile.model_validate(data)
    except ConfigError as error:
        assert error.problems
        for problem in error.problems:
            assert re.search(r"[\u4e00-\u9fff]", problem.message)
            # 没有翻译的错误种类会落到这句兜底的话上。
            assert "值不合要求" not in problem.message
            assert "Input should" not in str(problem)


@settings(max_examples=60)
@given(st.data())
def test_bad_updates_change_nothing(data):
    model = data.draw(st.sampled_from(list(PARTS.values())))
    config = data.draw(_valid(model))
    before, revision = config.snapshot(), config.revision
    changes = data.draw(_anything(model))
    try:
        config.update(**changes)
    except ConfigError:
        assert config.snapshot() == before
        assert config.revision == revision
    else:
        assert config.revision > revision
        assert model(**config.snapshot()) == config
