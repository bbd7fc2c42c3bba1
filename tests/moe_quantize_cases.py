"""optimize 时量化专家：各种格式，与“权重换成量化再还原的值”的模型。几个测试文件共用。"""

from __future__ import annotations

import copy

import torch

from deepseek_opt import MOEConfig, OptimizationProfile, optimize
from deepseek_opt.integrations.moe_block import MoeBlockPatch
from deepseek_opt.integrations.patch import patch_of
from deepseek_opt.quantize import dequantize, quantize_experts
from tests.moe_models import experts_in, make_ids, output_of

INT4 = {"quantization": "int4", "quantization_group_size": 32}
FP8 = {"quantization": "fp8"}
FORMS = {
    "int8": ({"quantization": "int8"}, (8, None, True)),
    "fp8": (FP8, (8, None, True, True)),
    "fp8 分组": ({**FP8, "quantization_group_size": 128}, (8, 128, True, True)),
    "int4": (INT4, (4, 32, True)),
    "int4 带零点": ({**INT4, "quantization_symmetric": False}, (4, 32, False)),
}


def profile(**fields):
    return OptimizationProfile(moe=MOEConfig(**fields))


@torch.no_grad()
def logits(model):
    return output_of(model, make_ids())


def rounded(model, form):
    """model 的副本，量化的专家权重换成量化再还原的值；布局按 transformers 的标志换算。"""
    twin = copy.deepcopy(model)
    for module in experts_in(twin).values():
        for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
            weight = getattr(module, name)
            plain = weight.data.mT if module.is_transposed else weight.data
            if name == "gate_up_proj" and not module.is_concatenated:
                plain = torch.cat((plain[:, ::2], plain[:, 1::2]), 1)
            plain = dequantize(quantize_experts(plain, *form), weight.dtype)
            if name == "gate_up_proj" and not module.is_concatenated:
                plain = torch.stack(plain.chunk(2, 1), 2).flatten(1, 2)
            weight.data.copy_(plain.mT if module.is_transposed else plain)
    optimize(tried := copy.deepcopy(model), profile(quantization="int8"))
    for name in blocks_in(tried):
        for weight in shared_of(twin.get_submodule(name)):
            weight.data.copy_(dequantize(quantize_experts(weight.data[None], *form))[0])
    return twin


def blocks_in(model):
    """连同共享专家一次算完的块的名字。"""
    return [n for n, m in model.named_modules() if isinstance(patch_of(m), MoeBlockPatch)]


def shared_of(block):
    """共享专家的三个权重。"""
    names = ("shared_experts", "shared_expert", "shared_mlp")
    mlp = next(getattr(block, name) for name in names if hasattr(block, name))
    return [getattr(mlp, part).weight for part in ("gate_proj", "up_proj", "down_proj")]


def block_of(model):
    return model.model.layers[1].mlp


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model, state):
    now = model.state_dict()
    return list(now) == list(state) and all(torch.equal(now[k], v) for k, v in state.items())
