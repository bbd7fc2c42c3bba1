"""每个接入 experts 接口的 transformers 架构：替换后与它自己的 eager 专家对照；新架构必须列入。"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from deepseek_opt import MOEConfig, OptimizationProfile, optimize, restore
from deepseek_opt.integrations import moe_block
from deepseek_opt.integrations.experts import ExpertsPatch
from deepseek_opt.integrations.moe_block import MoeBlockPatch
from deepseek_opt.integrations.patch import patch_of
from tests.moe_models import (
    MODELS,
    available,
    experts_in,
    make_ids,
    make_moe,
    output_of,
    transformers,
)

HERE = [name for name in MODELS if available(name)]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
PROFILE = {"moe": MOEConfig()}

# 不替换的架构及报告里应有的原因：融合核没有这种激活，或专家之后另有归一化。
SKIPPED = {
    "inkling2": "激活不是",
    "muse_spark": "has_post_expert_norm",
}
# 有共享专家、登记了块、却要分开算的架构及原因。
APART = {
    "glm5_next": "专家是截断的门控",
    "hy_v4": "专家是截断的门控，共享专家不截断",
}
# 登记了块、连同共享专家一次算完的架构。
FUSED = {path.split(".")[2] for path in moe_block.BLOCKS} - set(SKIPPED) - set(APART)
# 块只在别的（没有小模型的）部分里。
FUSED -= {"qwen3_omni_moe"}


def results(model):
    """输出与全部参数的梯度。"""
    model.zero_grad()
    torch.manual_seed(0)
    out = output_of(model, make_ids())
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * weight).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.detach(), grads


def compare(model, actual, expected):
    torch.testing.assert_close(actual[0], expected[0], **TOLERANCE)
    assert actual[1].keys() == expected[1].keys()
    assert any("experts" in name for name in expected[1]), type(model).__name__
    # 真值为 0 的梯度只剩舍入误差，随整个模型的梯度的大小
    noise = 1e-7 * max(float(grad.abs().max()) for grad in expected[1].values())
    for name, grad in expected[1].items():
        limit = max(1e-4 * max(float(grad.abs().max()), 1e-3), noise)
        if grad.numel() == 1:  # 单个系数的梯度是大量互相抵消的项之和
            limit = max(limit, 5e-5)
        torch.testing.assert_close(
            actual[1][name], grad, rtol=1e-3, atol=limit, msg=lambda m, n=name: f"{n}：{m}"
        )


@pytest.mark.parametrize("model_type", HERE)
def test_matches_eager(model_type):
    model = make_moe(model_type).train()
    found = experts_in(model)
    if not found and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("这个版本的 transformers 里它还没有接入 experts 接口")
    assert found
    expected = results(model)
    report = optimize(model, OptimizationProfile(**PROFILE), strict=model_type not in SKIPPED)
    entries = {entry.name: entry for entry in report.entries}
    for name, module in found.items():
        assert entries[name].replaced is (model_type not in SKIPPED)
        if model_type in SKIPPED:
            assert SKIPPED[model_type] in entries[name].reason and patch_of(module) is None
    blocks = [m for m in model.modules() if isinstance(patch_of(m), MoeBlockPatch)]
    assert bool(blocks) is (model_type in FUSED), report
    compare(model, results(model), expected)
    assert not report.fallbacks
    counted = [int(p.load_counter.snapshot().sum()) for p in map(patch_of, found.values()) if p]
    assert not counted or any(counted)
    restore(model)
    again = results(model)
    assert torch.equal(again[0], expected[0])


@pytest.mark.parametrize("model_type", HERE)
def test_registered_implementation_matches_eager(model_type):
    model = make_moe(model_type)
    ids = make_ids()
    from deepseek_opt.integrations import register_experts

    register_experts()
    with torch.no_grad():
        expected = output_of(model, ids)
        model.set_experts_implementation("deepseek_opt")
        torch.testing.assert_close(output_of(model, ids), expected, **TOLERANCE)


def _sources():
    root = Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if re.search(r"(?m)^@use_experts_implementation", text):
            yield path, text


def test_every_experts_file_is_known():
    files = {path.parent.name for path, _ in _sources()}
    assert files and files <= set(MODELS), f"没有列入 tests/moe_models.py：{files - set(MODELS)}"
    assert set(SKIPPED) <= set(MODELS)


def _forwards():
    """(类的完整路径, forward 去掉说明后的源码)。"""
    for path, text in _sources():
        module = f"transformers.models.{path.parent.name}.{path.stem}"
        for node in ast.parse(text).body:
            if not isinstance(node, ast.ClassDef):
                continue
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "forward":
                    body = [s for s in item.body if not isinstance(s, ast.Expr)]
                    yield f"{module}.{node.name}", "\n".join(ast.unparse(s) for s in body)


def test_blocks_with_the_same_forward_are_all_registered():
    """与 DeepSeek-V3、Qwen2-MoE 的块逐句相同的类，一个不漏，登记的写法也一样。"""
    forwards = dict(_forwards())
    for model_type, name in (
        ("deepseek_v3", "DeepseekV3MoE"),
        ("qwen2_moe", "Qwen2MoeSparseMoeBlock"),
    ):
        known = moe_block.BLOCKS[f"transformers.models.{model_type}.modeling_{model_type}.{name}"]
        same = {path for path, source in forwards.items() if source == forwards[known.path]}
        assert known.path in same
        for path in same:
            assert path in moe_block.BLOCKS, f"没有登记 {path}"
            spec = moe_block.BLOCKS[path]
            assert (spec.shared, spec.shared_gate, spec.flat_gate) == (
                known.shared,
                known.shared_gate,
                known.flat_gate,
            )


def test_registered_blocks_exist():
    for path in moe_block.BLOCKS:
        module, name = path.rsplit(".", 1)
        if not available(module.split(".")[2]):
            continue
        cls = getattr(importlib.import_module(module), name, None)
        assert inspect.isclass(cls), path


@pytest.mark.parametrize("model_type", [n for n in ("deepseek_v3", "qwen2_moe") if n in HERE])
def test_greedy_tokens_match(model_type):
    model = make_moe(model_type)
    ids = make_ids()
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 12,
        "do_sample": False,
    }
    expected = model.generate(ids, **options)
    optimize(model, OptimizationProfile(**PROFILE), strict=True)
    assert torch.equal(model.generate(ids, **options), expected)


_EIGHT = {"n_routed_experts": 8, "num_experts": 8, "num_local_experts": 8}
VARIANTS = [
    ("deepseek_v3", {**_EIGHT, "n_group": 4, "topk_group": 2}),
    ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}),
    ("deepseek_v3", {"n_shared_experts": 3}),
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("mixtral", {"hidden_act": "gelu"}),
    ("mixtral", {"hidden_act": "gelu_pytorch_tanh"}),
    ("mixtral", {"hidden_act": "gelu_new"}),
    ("mixtral", {"hidden_act": "relu"}),
    ("mixtral", {"hidden_act": "relu2"}),
    ("deepseek_v3", {"hidden_act": "gelu"}),
    ("gpt_oss", {"num_local_experts": 8, "num_experts_per_tok": 4}),
]


@pytest.mark.parametrize(("model_type", "overrides"), VARIANTS)
def test_variants_match_eager(model_type, overrides):
    if not available(model_type):
        pytest.skip("这个版本没有")
    model = make_moe(model_type, **overrides).train()
    expected = results(model)
    report = optimize(model, OptimizationProfile(**PROFILE), strict=True)
    assert all(isinstance(patch_of(m), ExpertsPatch) for m in experts_in(model).values())
    compare(model, results(model), expected)
    assert not report.fallbacks
    blocks = [m for m in model.modules() if isinstance(patch_of(m), MoeBlockPatch)]
    silu = overrides.get("hidden_act", "silu") == "silu"
    assert bool(blocks) is (silu and model_type in FUSED)


def test_unknown_activation_is_skipped():
    model = make_moe("mixtral", hidden_act="quick_gelu")
    expected = output_of(model, make_ids())
    report = optimize(model, OptimizationProfile(**PROFILE))
    assert not report.replaced and all("激活不是" in e.reason for e in report.skipped)
    assert torch.equal(output_of(model, make_ids()), expected)
