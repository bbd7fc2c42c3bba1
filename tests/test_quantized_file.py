"""save_quantized、load_quantized、empty_parameters：往返逐位相同；文件不符时一次列出、模型不变。"""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import deepseek_opt as dso
from deepseek_opt import MLAConfig, MOEConfig, OptimizationProfile, optimize, restore
from deepseek_opt.errors import InputError, UnsupportedError
from deepseek_opt.integrations import quantized
from deepseek_opt.optimize import is_optimized
from tests.moe_models import (
    MODELS,
    available,
    experts_in,
    make_config,
    make_ids,
    make_moe,
    output_of,
    transformers,
)
from tests.tolerances import tol

pytest.importorskip("transformers.integrations.moe")

INT4 = {"quantization": "int4", "quantization_group_size": 32}
FORMS = {
    "int8": {"quantization": "int8"},
    "fp8": {"quantization": "fp8"},
    "fp8 分组": {"quantization": "fp8", "quantization_group_size": 128},
    "int4": INT4,
    "zero": {**INT4, "quantization_symmetric": False},
}
NAME = "model.layers.1.mlp.experts"


def profile(**fields):
    return OptimizationProfile(moe=MOEConfig(**fields))


@torch.no_grad()
def logits(model):
    return output_of(model, make_ids())


def hollow(model_type="deepseek_v3", **overrides):
    """参数都在 meta 上的同结构模型。"""
    cls = getattr(transformers, MODELS[model_type][1])
    with dso.empty_parameters():
        model = cls(make_config(model_type, **overrides)).eval()
    model.set_experts_implementation("eager")
    return model


def saved(tmp_path, model, **fields):
    """(文件, 量化模型的输出)；model 还原。"""
    optimize(model, profile(**fields))
    expected = logits(model)
    path = dso.save_quantized(model, tmp_path / "model.safetensors")
    restore(model)
    return path, expected


@pytest.fixture
def model():
    return make_moe("deepseek_v3")


@pytest.fixture
def path(tmp_path, model):
    return saved(tmp_path, model, **INT4)[0]


def edited(path, change=lambda tensors: None, **metadata):
    """改过的副本：change 改张量的字典；metadata 覆盖元数据，值为 None 的删去。"""
    with safe_open(path, "pt") as file:
        header = {**file.metadata(), **metadata}
    tensors = load_file(path)
    change(tensors)
    other = path.with_name("edited.safetensors")
    save_file(tensors, other, {k: v for k, v in header.items() if v is not None})
    return other


# ---- 往返 ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "model_type", ["deepseek_v3", "mixtral", "qwen2_moe", "nemotron_h", "aria"]
)
def test_round_trip_into_a_model_that_never_had_the_weights(model_type, form, tmp_path):
    if not available(model_type) or not experts_in(make_moe(model_type)):
        pytest.skip("这个版本的 transformers 没有这个架构，或它没有接入 experts 接口")
    path, expected = saved(tmp_path, make_moe(model_type), **FORMS[form])
    model = hollow(model_type)
    report = dso.load_quantized(model, path, strict=True)
    assert torch.equal(logits(model), expected) and "已释放" in str(report)
    experts = next(iter(experts_in(model).values()))
    assert experts.down_proj.is_meta and not report.fallbacks
    others = [p for n, p in model.named_parameters() if "expert" not in n]
    assert others and not any(p.is_meta for p in others)
    again = dso.save_quantized(model, tmp_path / "again.safetensors")
    first, second = load_file(path), load_file(again)
    assert list(first) == list(second) and all(torch.equal(second[k], v) for k, v in first.items())
    with pytest.raises(UnsupportedError, match="已经释放"):
        restore(model)


@pytest.mark.parametrize("keep", [True, False])
def test_into_a_loaded_model(path, model, keep):
    optimize(model, profile(**INT4))
    expected, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    restore(model)
    settings = OptimizationProfile(
        mla=MLAConfig(), moe=MOEConfig(**INT4, keep_original_weights=keep)
    )
    report = dso.load_quantized(model, path, settings, strict=True)
    assert {e.part for e in report.replaced} == {"mla", "moe"}
    torch.testing.assert_close(logits(model), expected, **tol("fixed_point"))
    assert model.model.layers[1].mlp.experts.down_proj.is_meta is not keep
    if keep:
        restore(model)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_tied_weights_and_dtype_follow_the_model(tmp_path):
    source = make_moe("qwen2_moe", tie_word_embeddings=True)
    path, expected = saved(tmp_path, source, **INT4)
    model = hollow("qwen2_moe", tie_word_embeddings=True)
    dso.load_quantized(model, path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), expected)
    half = hollow("qwen2_moe", tie_word_embeddings=True).to(torch.bfloat16)
    dso.load_quantized(half, path)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert (logits(half).float() - expected).abs().max() <= 0.1 * expected.abs().max()


def test_only_the_experts_are_missing(path, model):
    """其余权重已有数据时不动，只读专家。"""
    optimize(model, profile(**INT4))
    expected = logits(model)
    restore(model)
    for module in experts_in(model).values():
        module.to("meta")
    norm = model.model.norm.weight
    dso.load_quantized(model, path)
    assert torch.equal(logits(model), expected) and model.model.norm.weight is norm


def test_own_layers(tmp_path):
    config = MOEConfig(num_experts=4, num_experts_per_tok=2, num_shared_experts=1)
    layer, x = dso.MoEFeedForward(config, 32, 48).eval(), torch.randn(3, 32)
    optimize(layer, profile(**INT4))
    path = dso.save_quantized(layer, tmp_path / "own.safetensors")
    with dso.empty_parameters():
        other = dso.MoEFeedForward(config, 32, 48).eval()
    dso.load_quantized(other, path)
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))


def test_layers_left_out_by_filter_fn_are_saved_as_they_are(tmp_path):
    source = make_moe("mixtral")
    first = next(iter(experts_in(source)))
    optimize(source, profile(**INT4), filter_fn=lambda name, _: name != first)
    expected = logits(source)
    path = dso.save_quantized(source, tmp_path / "part.safetensors")
    model = hollow("mixtral")
    dso.load_quantized(model, path)
    assert list(quantized.stores_in(model)) == list(experts_in(model))[1:]
    torch.testing.assert_close(logits(model), expected, **tol(torch.float32))


def test_empty_parameters_is_undone():
    with dso.empty_parameters():
        inside = nn.Linear(2, 2)
    assert inside.weight.is_meta and not nn.Linear(2, 2).weight.is_meta


# ---- 保存时的错误 ----


def test_nothing_to_save(model, tmp_path):
    target = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match="没有量化的专家"):
        dso.save_quantized(model, target)
    optimize(model, profile(**INT4))
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(2)
    with pytest.raises(InputError, match=r"layers\.1.*被改动"):
        dso.save_quantized(model, target)
    switched = dso.switch(model, profile(**INT4))
    model.model.norm.to("meta")
    with pytest.raises(InputError, match="norm.weight.*meta"):
        dso.save_quantized(model, target)
    assert switched.replaced and not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(path, model, monkeypatch):
    for bad in (path.parent / "没有的目录" / "x.safetensors", path.parent):
        with pytest.raises(InputError, match="已有目录里的一个文件"):
            dso.save_quantized(model, bad)
    old = path.read_bytes()

    def full(_tensors, name, _metadata):
        name.write_bytes(b"half")
        raise OSError("磁盘满了")

    optimize(model, profile(**INT4))
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="磁盘满了"):
        dso.save_quantized(model, path)
    assert path.read_bytes() == old and list(path.parent.iterdir()) == [path]


# ---- 读入时的错误 ----


def drop(*parts):
    def change(tensors):
        for key in [k for k in tensors if any(part in k for part in parts)]:
            del tensors[key]

    return change


def put(key, function):
    def change(tensors):
        tensors[key] = function(tensors[key]).contiguous()

    return change


BAD = {
    "少尺度": (drop(f"{NAME}.down_proj.scale"), {}, r"experts\.down_proj\.scale：文件里没有"),
    "少专家": (
        put(f"{NAME}.down_proj.packed", lambda t: t[:3]),
        {},
        r"down_proj\.packed：应为 U8 \[4, 32, 16\]，文件里是 U8 \[3",
    ),
    "类型": (put(f"{NAME}.down_proj.packed", lambda t: t.to(torch.int8)), {}, "文件里是 I8"),
    "尺度无穷": (put(f"{NAME}.down_proj.scale", lambda t: t * float("inf")), {}, "尺度含有 NaN"),
    "组大小": (lambda _: None, {"group_size": "48"}, "group_size=48"),
    "另一组大小": (lambda _: None, {"group_size": "64"}, r"packed：应为 U8 \[4, 32, 32\]"),
    "位数": (lambda _: None, {"bits": "3"}, "bits=3"),
    "版本": (lambda _: None, {"version": "7"}, "版本是 7"),
    "格式": (lambda _: None, {"format": None}, "不是 save_quantized 写的"),
    "元数据": (lambda _: None, {"symmetric": None}, "元数据不完整.*symmetric"),
    "没有这层": (
        lambda _: None,
        {"layers": "{}"},
        r"layers\.1.*文件里没有这一层的 gate_up_proj、down_proj",
    ),
    "其余": (drop("norm.weight"), {}, r"model\.norm\.weight：文件里没有"),
    "其余形状": (put("lm_head.weight", lambda t: t[:5]), {}, r"lm_head.weight：.*\[5, 32\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_and_change_nothing(case, path):
    change, metadata, message = BAD[case]
    other, model = edited(path, change, **metadata), hollow()
    before = [id(p) for p in model.parameters()]
    with pytest.raises(InputError, match=message):
        dso.load_quantized(model, other)
    assert [id(p) for p in model.parameters()] == before and not is_optimized(model)
    dso.load_quantized(model, path)


def test_all_problems_at_once(path):
    other = edited(path, drop(".scale", "norm.weight"))
    with pytest.raises(InputError) as caught:
        dso.load_quantized(hollow(), other)
    text = str(caught.value)
    assert all(f"{NAME}.{key}.scale" in text for key in ("gate_up_proj", "down_proj"))
    assert "model.norm.weight" in text and len(text.splitlines()) > 4
    many = edited(path, lambda tensors: [tensors.pop(k) for k in list(tensors)[1:]])
    with pytest.raises(InputError, match="另有"):
        dso.load_quantized(hollow(), many)


def test_other_structure(path):
    for overrides, message in (
        ({"n_routed_experts": 8, "num_local_experts": 8}, r"模型的形状是 .*\(8,"),
        ({"hidden_act": "gelu"}, "模型的布局或激活"),
        ({"first_k_dense_replace": 2}, "模型里没有这个专家层"),
    ):
        with pytest.raises(InputError, match=message):
            dso.load_quantized(hollow(**overrides), path)


def test_experts_with_a_bias_cannot_be_read(path):
    with pytest.raises(InputError, match="模型里没有这个专家层"):
        dso.load_quantized(hollow("gpt_oss"), path)


def test_not_a_file(model, tmp_path, path):
    with pytest.raises(InputError, match="已有的文件"):
        dso.load_quantized(model, tmp_path / "没有")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="不是完整的 safetensors"):
        dso.load_quantized(model, cut)


def test_bad_arguments(model, path):
    for settings in (profile(), profile(quantization="int8"), OptimizationProfile()):
        with pytest.raises(InputError, match="与文件相同的 int4"):
            dso.load_quantized(model, path, settings)
    with pytest.raises(InputError, match="profile"):
        dso.load_quantized(model, path, "int4")
    optimize(model, profile())
    with pytest.raises(InputError, match="已经优化过"):
        dso.load_quantized(model, path)


def test_failure_after_filling_is_undone(path):
    model = hollow()
    before = [id(p) for p in model.parameters()]
    with pytest.raises(UnsupportedError, match="filter_fn"):
        dso.load_quantized(model, path, filter_fn=lambda *_: False)
    assert [id(p) for p in model.parameters()] == before and not is_optimized(model)


def test_buffers_on_meta_are_named(path):
    with torch.device("meta"):
        model = transformers.DeepseekV3ForCausalLM(make_config("deepseek_v3")).eval()
    with pytest.raises(InputError, match="inv_freq.*empty_parameters"):
        dso.load_quantized(model, path)
