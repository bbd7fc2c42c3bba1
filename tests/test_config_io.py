"""配置文件：三种格式、加固的 YAML、行号、坏文件。"""

import builtins
import os

import pytest

from deepseek_opt.config import MLAConfig, MOEConfig, MTPConfig, OptimizationProfile
from deepseek_opt.errors import ConfigError

SUFFIXES = (".yaml", ".yml", ".json", ".toml")


@pytest.fixture
def load(tmp_path):
    """写一份文件再读。"""

    def _load(text, suffix=".yaml"):
        path = tmp_path / f"profile{suffix}"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return OptimizationProfile.from_file(path)

    return _load


@pytest.fixture
def fails(load):
    """读取必须失败；返回异常。"""

    def _fails(text, suffix=".yaml"):
        with pytest.raises(ConfigError) as info:
            load(text, suffix)
        assert f"profile{suffix}" in str(info.value)
        return info.value

    return _fails


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", list(OptimizationProfile.presets()))
def test_presets_round_trip(tmp_path, suffix, name):
    profile = OptimizationProfile.preset(name)
    path = profile.to_file(tmp_path / f"p{suffix}")
    assert OptimizationProfile.from_file(path) == profile
    assert [entry.name for entry in tmp_path.iterdir()] == [f"p{suffix}"]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_empty_profile_round_trips(tmp_path, suffix):
    path = OptimizationProfile().to_file(tmp_path / f"p{suffix}")
    assert OptimizationProfile.from_file(path) == OptimizationProfile()


def test_formats_agree(load):
    expected = OptimizationProfile(
        mla=MLAConfig(memory_budget_bytes="2GB", rope_interleaved=True),
        moe=MOEConfig(balance_strategy="bias_update", bias_update_rate=1e-4),
    )
    yaml_text = """
    mla: {memory_budget_bytes: 2GB, rope_interleaved: true}
    moe:
      balance_strategy: bias_update
      bias_update_rate: 1e-4
    """
    json_text = """{"mla": {"memory_budget_bytes": "2GB", "rope_interleaved": true},
\t"moe": {"balance_strategy": "bias_update", "bias_update_rate": 1e-4}}"""
    toml_text = """
    [mla]
    memory_budget_bytes = "2GB"
    rope_interleaved = true
    [moe]
    balance_strategy = "bias_update"
    bias_update_rate = 1e-4
    """
    assert load(yaml_text) == expected
    assert load(json_text, ".json") == expected
    assert load(toml_text, ".toml") == expected
    assert load(b"\xef\xbb\xbf" + json_text.encode(), ".json") == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E+2", 100.0),
        ("2.", 2.0),
        (".5", 0.5),
        ("+3", 3.0),
        ("1_000", 1000.0),
        ("~", None),
        ("null", None),
        ("", None),
    ],
)
def test_yaml_numbers(load, text, value):
    assert load(f"moe: {{z_loss_weight: {text}}}").moe.z_loss_weight == value


@pytest.mark.parametrize("text", ["yes", "No", "on", "off", "y", "'true'", "1", "010", "1:30"])
def test_yaml_words_are_not_booleans(fails, text):
    error = fails(f"mla:\n  rope_interleaved: {text}")
    assert error.problems[0].path == "mla.rope_interleaved"
    assert error.problems[0].line == 2


@pytest.mark.parametrize("text", ["010", "0x10", "1:30", "2020-01-01", "0o7"])
def test_yaml_odd_integers_are_not_guessed(fails, text):
    error = fails(f"mla:\n  kv_lora_rank: {text}")
    assert error.problems[0].message.startswith("应为整数")


@pytest.mark.parametrize("text", [".inf", "-.INF", ".nan", "1e999"])
def test_yaml_non_finite(fails, text):
    assert "有限" in fails(f"moe: {{z_loss_weight: {text}}}").problems[0].message


@pytest.mark.parametrize(
    ("suffix", "text", "lines"),
    [
        (".yaml", "mla:\n  kv_lora_rank: 1\n  v_head_dim: 2\n  kv_lora_rank: 3\n", (2, 4)),
        (".json", '{"mla": {\n"kv_lora_rank": 1,\n\t"kv_lora_rank": 3}}', (2, 3)),
        (".toml", "[mla]\nkv_lora_rank = 1\n\nkv_lora_rank = 3\n", (2, 4)),
    ],
)
def test_duplicate_keys_name_both_lines(fails, suffix, text, lines):
    problem = fails(text, suffix).problems[0]
    assert problem.path == "mla.kv_lora_rank"
    assert f"第 {lines[0]} 行和第 {lines[1]} 行" in problem.message


def test_duplicate_tables(fails):
    assert "第 1 行和第 3 行" in fails("[mla]\n[moe]\n[mla]\n", ".toml").problems[0].message
    assert "第 1 行和第 2 行" in fails("mla: {}\nmla: {}\n").problems[0].message


def test_duplicates_and_other_mistakes_come_together(fails):
    error = fails("mla:\n  kv_lora_rank: 1\n  kv_lora_rank: 0\n  nothing: 1\n")
    assert [p.path for p in error.problems] == [
        "mla.kv_lora_rank",
        "mla.kv_lora_rank",
        "mla.nothing",
    ]


def test_duplicate_in_json_that_yaml_cannot_read(fails):
    # 行号取自 YAML 解析器；DEL 字符在 JSON 里合法，在 YAML 里不合法，于是没有行号。
    problem = fails('{"mla": {}, "mla": {}, "name": "\x7f"}', ".json").problems[0]
    assert (problem.path, problem.line, problem.message) == ("mla", None, "重复的字段")


@pytest.mark.parametrize(
    ("suffix", "text", "line"),
    [
        (".yaml", "name: a\nmla:\n  # 注释\n  kv_lora_rank: x\n", 4),
        (".json", '{\n "mla":\n {"v_head_dim": 1,\n "kv_lora_rank": "x"}}', 4),
        (".toml", 'name = "a"\n[mla]\n# 注释\nkv_lora_rank = "x"\n', 4),
        (".toml", 'name = "a"\nmla.kv_lora_rank = "x"\n', 2),
        (".toml", 'name = "a"\nmla = {kv_lora_rank = "x"}\n', 2),
    ],
)
def test_line_numbers(fails, suffix, text, line):
    problem = fails(text, suffix).problems[0]
    assert (problem.path, problem.line) == ("mla.kv_lora_rank", line)


def test_empty_part_in_a_file_is_ambiguous(fails):
    problem = fails("mla:\n").problems[0]
    assert (problem.path, problem.line) == ("mla", 1)
    assert "启用请写 {}" in problem.message
    assert fails('{"dense": null}', ".json").problems[0].path == "dense"


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (".yaml", "", "实际是空"),
        (".yaml", "# 只有注释\n", "实际是空"),
        (".yaml", "- 1\n", "实际是列表"),
        (".yaml", "abc", "实际是字符串"),
        (".yaml", "mla: [", "不是合法的 YAML"),
        (".yaml", "a: b: c", "第 1 行"),
        (".yaml", "mla: {}\n---\nmla: {}\n", "一个文档"),
        (".yaml", "mla: &a {}\nmoe: *a\n", "第 2 行，不支持别名"),
        (".yaml", "name: !!python/object/apply:os.system [ls]\n", "不支持标签"),
        (".yaml", "name: !x y\n", "不支持标签"),
        (".yaml", "1: 2\n", "字段名应为字符串"),
        (".yaml", "? [a]\n: 1\n", "字段名应为字符串"),
        (".yaml", "name: \x01\n", "不是合法的 YAML"),
        (".yaml", "{a: " * 3000, "嵌套过深"),
        (".yaml", "mla: {kv_lora_rank: " + "9" * 5000 + "}", "位数过多"),
        (".json", "3", "实际是整数"),
        (".json", "", "不是合法的 JSON"),
        (".json", '{"mla": {},}', "第 1 行"),
        (".json", "[" * 100000, "嵌套过深"),
        (".json", '{"mla": {"kv_lora_rank": ' + "9" * 5000 + "}}", "位数过多"),
        (".toml", "mla = ", "不是合法的 TOML"),
        (".toml", "a = " + "9" * 5000, "位数过多"),
    ],
)
def test_broken_files(fails, suffix, text, message):
    assert message in str(fails(text, suffix))


def test_json_non_finite(fails):
    error = fails('{"moe": {"z_loss_weight": NaN, "capacity_factor": Infinity}}', ".json")
    assert len(error.problems) == 2
    assert all("有限" in problem.message for problem in error.problems)


def test_not_utf8(fails):
    assert "第 2 行，不是 UTF-8" in str(fails(b"name: a\n# \xff\n"))


def test_too_large(fails):
    assert "1 MiB" in str(fails("# " + "x" * (1 << 20)))


def test_unreadable(tmp_path):
    with pytest.raises(ConfigError, match="文件不存在"):
        OptimizationProfile.from_file(tmp_path / "no.yaml")
    with pytest.raises(ConfigError, match="后缀应为.*实际是 .ini"):
        OptimizationProfile.from_file(tmp_path / "a.ini")
    with pytest.raises(ConfigError, match="实际没有后缀"):
        OptimizationProfile().to_file(tmp_path / "a")
    (tmp_path / "d.yaml").mkdir()
    with pytest.raises(ConfigError, match="这是目录"):
        OptimizationProfile.from_file(tmp_path / "d.yaml")
    with pytest.raises(ConfigError, match="读不了"):
        OptimizationProfile.from_file(tmp_path / ("x" * 300 + ".yaml"))


def test_write_failure_keeps_the_old_file(tmp_path, monkeypatch):
    path = OptimizationProfile(name="旧").to_file(tmp_path / "p.yaml")

    def broken(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(ConfigError, match="写不了"):
        OptimizationProfile(name="新").to_file(path)
    monkeypatch.undo()
    assert OptimizationProfile.from_file(path).name == "旧"
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ConfigError, match="写不了"):
        OptimizationProfile().to_file(tmp_path / "none" / "p.yaml")


def test_toml_without_writer(tmp_path, monkeypatch):
    real = builtins.__import__

    def no_writer(name, *args, **kwargs):
        if name == "tomli_w":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_writer)
    with pytest.raises(ConfigError, match="pip install tomli-w"):
        OptimizationProfile().to_file(tmp_path / "p.toml")
    assert not list(tmp_path.iterdir())


def test_lists_become_immutable(load):
    weights = load("mtp: {loss_weights: [1, 0.5]}").mtp.loss_weights
    assert weights == (1.0, 0.5)
    assert MTPConfig(loss_weights=(1, 0.5)).loss_weights == weights


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "1e-4",
        "010",
        "null",
        "",
        " a ",
        "0x1",
        "1:30",
        "~",
        "<<",
        "\x85",
        "a\u2028b\n c\r\n",
        "\x00\x7f",
        "\ufeff😀",
    ],
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_strings_that_look_like_something_else(tmp_path, text, suffix):
    profile = OptimizationProfile(name=text)
    assert OptimizationProfile.from_file(profile.to_file(tmp_path / f"p{suffix}")) == profile
