"""配置类：默认值、校验、矛盾、动态修改、预设。"""

import copy
import pickle

import pytest

from deepseek_opt.config import (
    DenseConfig,
    MLAConfig,
    MOEConfig,
    MTPConfig,
    OptimizationProfile,
    format_bytes,
    parse_bytes,
)
from deepseek_opt.errors import ConfigError

ALL = (MLAConfig, MTPConfig, MOEConfig, DenseConfig, OptimizationProfile)
V2_LITE = {
    "num_attention_heads": 16,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def problems(call, *args, **kwargs):
    """调用必须抛 ConfigError；返回 {路径: 说明}。"""
    with pytest.raises(ConfigError) as info:
        call(*args, **kwargs)
    return {problem.path: problem.message for problem in info.value.problems}


@pytest.mark.parametrize("model", ALL)
def test_everything_has_a_default_meaning_as_the_model(model):
    config = model()
    assert config.to_dict() == {}
    assert all(value in (None, "auto") for value in config.snapshot().values())


def test_profile_parts():
    profile = OptimizationProfile(mla=MLAConfig(), moe=MOEConfig())
    assert list(profile.parts()) == ["mla", "moe"]
    assert profile.to_dict() == {"mla": {}, "moe": {}}


@pytest.mark.parametrize("model", ALL)
def test_unknown_field_is_an_error(model):
    assert "没有这个字段" in problems(model, no_such_thing=1)["no_such_thing"]


def test_unknown_field_suggests_the_right_one():
    found = problems(OptimizationProfile, mla={"kv_lora_rnak": 512}, dens={})
    assert found["mla.kv_lora_rnak"] == "没有这个字段；是不是想写 kv_lora_rank？"
    assert found["dens"] == "没有这个字段；是不是想写 dense？"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_attention_heads", 0, "应大于或等于 1"),
        ("num_attention_heads", True, "应为整数"),
        ("num_attention_heads", 2.5, "应为整数"),
        ("num_attention_heads", "16", "应为整数（数字不要加引号）"),
        ("num_attention_heads", "abc", "应为整数"),
        ("num_attention_heads", 1 << 30, "应小于或等于 1048576"),
        ("num_attention_heads", 10**400, "应小于或等于 1048576"),
        ("kv_compression_ratio", float("nan"), "应为有限的数字，不能是无穷大或 NaN"),
        ("kv_compression_ratio", 0, "应大于 0"),
        ("qk_rope_head_dim", 63, "应为偶数：旋转位置按两维一对转动"),
        (
            "rope_interleaved",
            "yes",
            "应为 true 或 false（yes/no/on/off 和带引号的文字不会当作真假值）",
        ),
        ("rope_interleaved", 1, "应为 true 或 false"),
        ("cache_dtype", "fp16", "应为 auto、float32、bfloat16、float16、int8、float8_e4m3fn 之一"),
        ("cache_dtype", None, "应为 auto、float32、bfloat16、float16、int8、float8_e4m3fn 之一"),
    ],
)
def test_field_messages(field, value, message):
    found = problems(MLAConfig, **{field: value})
    assert found[field].startswith(message)


@pytest.mark.parametrize("part", ["mla", "mtp", "moe", "dense"])
@pytest.mark.parametrize("value", [3, "x", [1], True])
def test_part_of_wrong_type(part, value):
    assert problems(OptimizationProfile, **{part: value})[part].startswith("应为一组“字段: 值”")


def test_every_mistake_is_listed_at_once():
    found = problems(
        OptimizationProfile.model_validate,
        {
            "log_level": "LOUD",
            "mla": {"num_attention_heads": -1, "qk_rope_head_dim": 3, "typo": 1},
            "moe": {"num_experts": 4, "num_experts_per_tok": 5, "norm_topk_prob": "no"},
            "mtp": {"loss_weights": [0.5, -1, "x"], "draft_length": 0},
        },
    )
    assert set(found) == {
        "log_level",
        "mla.num_attention_heads",
        "mla.qk_rope_head_dim",
        "mla.typo",
        "moe.num_experts_per_tok",
        "moe.norm_topk_prob",
        "mtp.loss_weights[1]",
        "mtp.loss_weights[2]",
        "mtp.draft_length",
    }


def test_a_wrong_value_causes_no_follow_up_conflict():
    # drop_policy 需要 capacity_factor：后者给了，只是值不对，不应再说缺少它。
    found = problems(MOEConfig, capacity_factor=-1.0, drop_policy="position")
    assert set(found) == {"capacity_factor"}


@pytest.mark.parametrize(
    ("model", "values", "path"),
    [
        (MTPConfig, {"depth": 2, "loss_weights": [1.0]}, "loss_weights"),
        (MTPConfig, {"loss_weight": 0.3, "loss_weights": [1.0]}, "loss_weights"),
        (MTPConfig, {"depth_decay": 0.5, "loss_weights": [1.0]}, "loss_weights"),
        (MTPConfig, {"loss_weight": 0.3, "final_loss_weight": 0.1}, "final_loss_weight"),
        (MTPConfig, {"loss_weight": 0.3, "loss_weight_steps": 10}, "loss_weight_steps"),
        (MTPConfig, {"final_loss_weight": 0.1, "loss_weight_steps": 9}, "final_loss_weight"),
        (MTPConfig, {"shared_layers": False, "depth": 1, "draft_length": 2}, "draft_length"),
        (MTPConfig, {"acceptance_threshold": 0.5}, "acceptance_threshold"),
        (
            MTPConfig,
            {"acceptance": "lossless", "acceptance_threshold": 0.5},
            "acceptance_threshold",
        ),
        (MOEConfig, {"num_experts": 8, "num_experts_per_tok": 9}, "num_experts_per_tok"),
        (MOEConfig, {"num_experts": 8, "n_group": 3}, "n_group"),
        (MOEConfig, {"n_group": 2, "topk_group": 3}, "topk_group"),
        (
            MOEConfig,
            {"num_experts": 8, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
            "topk_group",
        ),
        (MOEConfig, {"bias_update_rate": 0.1}, "bias_update_rate"),
        (MOEConfig, {"balance_strategy": "bias_update", "aux_loss_weight": 0.1}, "aux_loss_weight"),
        (
            MOEConfig,
            {"routing_strategy": "expert_choice", "balance_strategy": "forced"},
            "balance_strategy",
        ),
        (MOEConfig, {"drop_policy": "position"}, "drop_policy"),
        (MOEConfig, {"pad_to_capacity": True}, "pad_to_capacity"),
        (
            MOEConfig,
            {"quantization": "int8", "quantization_group_size": 32},
            "quantization_group_size",
        ),
        (
            MOEConfig,
            {"quantization": "int4", "quantization_group_size": 48},
            "quantization_group_size",
        ),
        (MOEConfig, {"keep_original_weights": True}, "keep_original_weights"),
        (MOEConfig, {"router_jitter": 1.0}, "router_jitter"),
    ],
)
def test_impossible_combinations(model, values, path):
    assert set(problems(model, **values)) == {path}


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (MTPConfig, {"depth": 2, "loss_weights": [0.3, 0.1], "draft_length": "adaptive"}),
        (MTPConfig, {"loss_weight": 0.3, "final_loss_weight": 0.1, "loss_weight_steps": 100}),
        (MTPConfig, {"depth": 1, "draft_length": 4}),
        (MTPConfig, {"acceptance": "lossy_typical", "acceptance_threshold": 0.3}),
        (
            MOEConfig,
            {"num_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4},
        ),
        (MOEConfig, {"balance_strategy": "bias_update", "bias_update_rate": 1e-3}),
        (MOEConfig, {"capacity_factor": 1.25, "drop_policy": "position", "pad_to_capacity": True}),
        (MOEConfig, {"quantization": "int4", "quantization_group_size": 64}),
        (MOEConfig, {"pad_to_capacity": False}),
    ],
)
def test_sensible_combinations(model, values):
    assert model(**values).to_dict() == values


# ---- 压缩比率 ----


def test_ratio_is_derived():
    assert MLAConfig(kv_lora_rank=512, **V2_LITE).compression_ratio == 16 * 320 / 576
    assert MLAConfig(kv_lora_rank=512).compression_ratio is None
    assert MLAConfig(kv_compression_ratio=4).compression_ratio == 4.0


def test_rank_is_derived_from_the_ratio():
    assert MLAConfig(kv_compression_ratio=8.89, **V2_LITE).latent_dim == 512
    assert MLAConfig(kv_compression_ratio=8.89).latent_dim is None
    assert MLAConfig(kv_lora_rank=100).latent_dim == 100
    tiny = {**dict.fromkeys(V2_LITE, 1), "qk_rope_head_dim": 0}
    assert MLAConfig(kv_compression_ratio=1, **tiny).latent_dim == 2


def test_ratio_against_rank():
    MLAConfig(kv_lora_rank=512, kv_compression_ratio=8.9, **V2_LITE)
    found = problems(MLAConfig, kv_lora_rank=512, kv_compression_ratio=16, **V2_LITE)
    assert "算出的压缩比率是 8.889" in found["kv_compression_ratio"]


def test_ratio_too_large_for_any_rank():
    found = problems(MLAConfig, kv_compression_ratio=100, **V2_LITE)
    assert "最大为 78.77" in found["kv_compression_ratio"]


# ---- 字节数 ----


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2GB", 2 * 10**9),
        ("512MiB", 512 * 2**20),
        (" 1.5 gib ", 3 * 2**29),
        ("100", 100),
        ("7b", 7),
        ("3kB", 3000),
        ("1TiB", 2**40),
    ],
)
def test_parse_bytes(text, count):
    assert parse_bytes(text) == count
    assert MLAConfig(memory_budget_bytes=text).memory_budget_bytes == count


@pytest.mark.parametrize(
    "text", ["", "2G", "GB", "-1GB", "1e3MB", "2 GB x", "0.1B", "0", "9999999999PB"]
)
def test_bad_bytes(text):
    assert set(problems(MLAConfig, memory_budget_bytes=text)) == {"memory_budget_bytes"}


def test_format_bytes():
    texts = [format_bytes(n) for n in (5, 2048, 512 * 2**20, 2**50)]
    assert texts == ["5 B", "2.0 KiB", "512.0 MiB", "1024.0 TiB"]


# ---- 动态修改 ----


def test_assignment_validates_and_rolls_back():
    config = MLAConfig(kv_lora_rank=512, **V2_LITE)
    before, revision = config.snapshot(), config.revision
    assert "应大于或等于 1" in problems(setattr, config, "kv_lora_rank", 0)["kv_lora_rank"]
    assert "矛盾" in problems(setattr, config, "kv_compression_ratio", 2)["kv_compression_ratio"]
    assert "kv_lora_rank" in problems(setattr, config, "kv_lora_rnk", 1)["kv_lora_rnk"]
    assert (config.snapshot(), config.revision) == (before, revision)
    config.kv_lora_rank = 256
    assert config.revision > revision
    assert config.kv_lora_rank == 256


def test_update_is_atomic():
    config = MLAConfig(kv_lora_rank=512, kv_compression_ratio=8.889, **V2_LITE)
    problems(setattr, config, "kv_lora_rank", 256)
    config.update(kv_lora_rank=256, kv_compression_ratio=16.0, memory_budget_bytes="1KB")
    assert (config.latent_dim, config.memory_budget_bytes) == (256, 1000)
    problems(config.update, cache_dtype="int8", max_cache_length=-1)
    assert config.cache_dtype == "auto"


def test_profile_revision_covers_its_parts():
    part = MLAConfig()
    profile = OptimizationProfile(mla=part)
    seen = [profile.revision]
    part.cache_dtype = "int8"
    assert profile.mla is part
    seen.append(profile.revision)
    profile.mla = {"max_cache_length": 5}
    seen.append(profile.revision)
    profile.mla = None
    seen.append(profile.revision)
    assert seen == sorted(set(seen))


def test_live_and_frozen_fields():
    for model in ALL:
        assert model.live_fields | model.frozen_fields == set(model.model_fields)
        assert not model.live_fields & model.frozen_fields
    config = MLAConfig(kv_lora_rank=64)
    before = config.snapshot()
    config.update(cache_dtype="int8", prefill_chunk_size=7)
    assert config.require_live(before) == {"cache_dtype", "prefill_chunk_size"}
    config.kv_lora_rank = 32
    assert "kv_lora_rank" in config.changed_since(before)
    found = problems(config.require_live, before)
    assert "原值 64" in found["kv_lora_rank"]
    assert "权重的形状" in found["kv_lora_rank"]


def test_check_against_the_model():
    config = MLAConfig(num_attention_heads=16, kv_lora_rank=512)
    config.check_against({"num_attention_heads": 16, "kv_lora_rank": 512, "v_head_dim": 128})
    actual = {"num_attention_heads": 8, "kv_lora_rank": 64}
    found = problems(config.check_against, actual, "model.layers.0.self_attn")
    assert set(found) == {"num_attention_heads", "kv_lora_rank"}
    assert "model.layers.0.self_attn" in found["kv_lora_rank"]
    assert "64" in found["kv_lora_rank"]


def test_check_ratio_against_the_model():
    actual = {**V2_LITE, "kv_lora_rank": 512}
    MLAConfig(kv_compression_ratio=8.9).check_against(actual)
    found = problems(MLAConfig(kv_compression_ratio=4).check_against, actual)
    assert "8.8889" in found["kv_compression_ratio"]


# ---- 复制与比较 ----


def test_copies_are_equal_and_independent():
    profile = OptimizationProfile.preset("low_memory")
    copies = [
        copy.deepcopy(profile),
        pickle.loads(pickle.dumps(profile)),
        profile.model_copy(deep=True),
        OptimizationProfile.model_validate(profile.to_dict()),
        OptimizationProfile.model_validate_json(profile.model_dump_json()),
    ]
    for other in copies:
        assert other == profile
        other.mla.cache_dtype = "float32"
        assert other != profile
    assert profile.mla.cache_dtype == "int8"
    assert profile != profile.mla


def test_model_copy_validates_its_update():
    config = MLAConfig()
    assert config.model_copy(update={"max_cache_length": 3}).max_cache_length == 3
    problems(config.model_copy, update={"max_cache_length": -3})
    assert config.max_cache_length is None


def test_model_validate_reports_in_chinese():
    assert problems(MLAConfig.model_validate, 3)[""].startswith("应为一组")
    found = problems(MLAConfig.model_validate_json, '{"kv_lora_rank": 0.5}')
    assert found["kv_lora_rank"] == "应为整数"
    assert "JSON" in problems(MLAConfig.model_validate_json, "{")[""]


# ---- 预设 ----


def test_presets():
    described = OptimizationProfile.presets()
    assert {"long_context", "low_memory", "fast_decode", "training", "compatible"} <= set(described)
    for name, description in described.items():
        profile = OptimizationProfile.preset(name)
        assert (profile.name, profile.description) == (name, description)
        assert profile.mla is not None
        profile.mla.cache_dtype = "float16"
        assert OptimizationProfile.preset(name) != profile
    assert OptimizationProfile.preset("low_memory").mla.cache_dtype == "int8"
    assert OptimizationProfile.preset("compatible").mla == MLAConfig()


def test_unknown_preset():
    with pytest.raises(ConfigError, match="是不是想写 low_memory？"):
        OptimizationProfile.preset("low_memroy")
    with pytest.raises(ConfigError, match="可用的预设：compatible"):
        OptimizationProfile.preset("???")
