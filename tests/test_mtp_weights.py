"""读入 MTP 权重：各种不完整都逐个列出，模型不变。"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_opt import MTPConfig, attach_mtp, detach_mtp
from deepseek_opt.errors import InputError

from .mtp_models import NAMES, attached, make

PREFIX = "model.layers.2."


@pytest.fixture(name="saved")
def saved_checkpoint(tmp_path):
    """一份带 MTP 的 DeepSeek-V3 检查点：(模型, 张量, 文件)。"""
    model = attached("deepseek_v3")[0]
    model.save_pretrained(tmp_path)
    detach_mtp(model)
    file = tmp_path / "model.safetensors"
    return model, load_file(file), file


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_read_again_to_the_bit(name, tmp_path):
    model, predictor = attached(name, depth=2, shared_layers=False)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == 2
    again = type(model).from_pretrained(tmp_path)
    for key, value in detach_mtp(model).adapter.model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    found = attach_mtp(again, tmp_path)  # 没有给出 config：按检查点里的层数
    assert found.depth == 2
    wanted = predictor.state_dict()
    assert list(found.state_dict()) == list(wanted)
    for key, value in found.state_dict().items():
        assert torch.equal(value, wanted[key]), key


def test_file_has_the_published_layout(saved):
    tensors = saved[1]
    names = {name.removeprefix(PREFIX) for name in tensors if name.startswith(PREFIX)}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"} <= names
    assert "input_layernorm.weight" in names and "self_attn.q_a_proj.weight" in names
    assert not any(name.startswith("mtp.") for name in tensors)


def test_layer_in_its_own_file(saved):
    """MTP 层单独放在 mtp.safetensors：attach_mtp 读得到，transformers 载入时没有多余的权重。"""
    model, tensors, file = saved
    wanted = attach_mtp(model, tensors).state_dict()
    parts = {True: {}, False: {}}
    for name, value in tensors.items():
        parts[name.startswith(PREFIX)][name] = value
    save_file(parts[False], file, metadata={"format": "pt"})
    save_file(parts[True], file.with_name("mtp.safetensors"))
    again, info = type(model).from_pretrained(file.parent, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    found = attach_mtp(again).state_dict()
    assert list(found) == list(wanted)
    for key, value in found.items():
        assert torch.equal(value, wanted[key]), key


def test_per_expert_weights_are_merged(saved):
    """公开的检查点逐专家存放；合并之后就是 gate 在前、up 在后。"""
    model, tensors, _ = saved
    split = {name: value for name, value in tensors.items() if ".experts." not in name}
    for name, value in tensors.items():
        if not name.startswith(PREFIX + "mlp.experts."):
            continue
        for expert in range(4) if value.dim() == 3 else ():
            one = name.replace(".experts.", f".experts.{expert}.") + ".weight"
            if "gate_up" in name:
                gate, up = value[expert].chunk(2)
                split[one.replace("gate_up", "gate")], split[one.replace("gate_up", "up")] = (
                    gate,
                    up,
                )
            else:
                split[one] = value[expert]
        if value.dim() == 2:
            split[name] = value
    predictor = attach_mtp(model, split)
    assert not any("experts.gate_up" in name for name in split)
    got = predictor.layers[0].block.mlp.experts.gate_up_proj[3]
    gate, up = (split[f"{PREFIX}mlp.experts.3.{n}_proj.weight"] for n in ("gate", "up"))
    assert torch.equal(got, torch.cat([gate, up]))


def test_every_missing_and_misshaped_tensor_is_named(saved):
    model, tensors, file = saved
    del tensors[PREFIX + "hnorm.weight"]
    lost = next(name for name in tensors if name.startswith(PREFIX) and "q_b_proj" in name)
    tensors[lost] = tensors[lost][:-1].contiguous()
    tensors[PREFIX + "self_attn.extra.weight"] = torch.zeros(1)
    save_file(tensors, file)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        attach_mtp(model, file.parent)
    text = str(error.value)
    assert f"{PREFIX}hnorm.weight：没有" in text and f"{lost}：应为" in text
    assert f"{PREFIX}self_attn.extra.weight：不认得" in text and "fresh=True" in text
    assert not hasattr(model, "mtp")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_checkpoint_without_mtp(saved):
    model, tensors, _ = saved
    base = {name: value for name, value in tensors.items() if not name.startswith(PREFIX)}
    with pytest.raises(InputError, match=r"model\.layers\.2\.\*：没有"):
        attach_mtp(model, base)


def test_quantised_weights_are_refused(saved):
    model, tensors, _ = saved
    name = PREFIX + "eh_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[name + "_scale_inv"] = torch.ones(1, 1)
    with pytest.raises(InputError) as error:
        attach_mtp(model, tensors)
    assert f"{name}：类型是" in str(error.value) and f"{name}_scale_inv：是量化的尺度" in str(
        error.value
    )


def test_wrong_numbers(saved):
    model, tensors, _ = saved
    moved = {name.replace("layers.2.", "layers.4."): value for name, value in tensors.items()}
    with pytest.raises(InputError) as error:
        attach_mtp(model, moved)
    assert "model.layers.2.*：没有" in str(error.value)
    assert "model.layers.4.enorm.weight：编号不对" in str(error.value)


def test_fewer_layers_than_declared_or_asked(saved):
    model, tensors, _ = saved
    with pytest.raises(InputError, match=r"model\.layers\.3\.\*：没有"):
        attach_mtp(model, tensors, MTPConfig(depth=2, shared_layers=False))
    model.config.num_nextn_predict_layers = 2
    with pytest.raises(InputError, match=r"model\.layers\.3\.\*：没有"):
        attach_mtp(model, tensors)


def test_copies_of_the_embedding_and_the_head(saved):
    model, tensors, _ = saved
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    copies = {
        f"{PREFIX}embed_tokens.weight": embedding.detach().clone(),
        f"{PREFIX}shared_head.head.weight": head.detach().clone(),
    }
    attach_mtp(model, {**tensors, **copies})
    detach_mtp(model)
    copies[f"{PREFIX}shared_head.head.weight"] += 1
    with pytest.raises(
        InputError, match=r"shared_head\.head\.weight：与主模型的不同.*shared_head=False"
    ):
        attach_mtp(model, {**tensors, **copies})
    found = attach_mtp(model, {**tensors, **copies}, MTPConfig(shared_head=False))
    assert torch.equal(found.layers[0].shared_head.head.weight, head + 1)
    detach_mtp(model)
    with pytest.raises(InputError, match=r"embed_tokens\.weight：没有"):
        attach_mtp(model, tensors, MTPConfig(shared_embedding=False))


def test_sharded_checkpoints(tmp_path):
    model, predictor = attached("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    found = attach_mtp(make("llama"), tmp_path)
    for key, value in found.state_dict().items():
        assert torch.equal(value, predictor.state_dict()[key]), key


def test_bad_sources(tmp_path):
    model = make("llama")
    for source, text in ((3, "source"), ({"a": 1}, "张量"), (tmp_path, "model.safetensors")):
        with pytest.raises(InputError, match=text):
            attach_mtp(model, source)
    (tmp_path / "model.safetensors").write_bytes(b"xx")
    with pytest.raises(InputError, match="不是完整的 safetensors"):
        attach_mtp(model, tmp_path)
    with pytest.raises(InputError, match="没有.*fresh=True|fresh=True"):
        attach_mtp(model)
