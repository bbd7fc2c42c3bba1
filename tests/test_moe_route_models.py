"""moe_route 与 transformers 各模型的路由逐一比较：下标集合、权重、梯度。"""

from __future__ import annotations

import pytest
import torch

from deepseek_opt import ops
from tests.op_cases import randn
from tests.tolerances import tol

F32 = torch.float32


def same_routing(theirs, ours):
    """下标集合与权重（按下标对齐）相同。"""
    order = [indices.argsort(-1) for indices in (theirs[2], ours[2])]
    a, b = (r[2].gather(1, o) for r, o in zip((theirs, ours), order, strict=True))
    assert torch.equal(a, b)
    torch.testing.assert_close(ours[0], theirs[0].float(), **tol(F32))
    a, b = (r[1].gather(1, o) for r, o in zip((theirs, ours), order, strict=True))
    torch.testing.assert_close(b, a.float(), **tol(F32))


def transformers_router(family, config_class, router_class, **options):
    modules = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    configs = pytest.importorskip(f"transformers.models.{family}.configuration_{family}")
    config = getattr(configs, config_class)(hidden_size=64, **options)
    router = getattr(modules, router_class)(config)
    with torch.no_grad():
        for tensor in (*router.parameters(), *router.buffers()):
            tensor.copy_(torch.randn_like(tensor) * 0.3)
    return router


ROUTERS = {
    "DeepseekV3": (
        ("deepseek_v3", "DeepseekV3Config", "DeepseekV3TopkRouter"),
        {"n_routed_experts": 32, "num_experts_per_tok": 6, "n_group": 8, "topk_group": 3},
        {"top_k": 6, "n_group": 8, "topk_group": 3, "scaling": 2.5},
    ),
    "DeepseekV2 greedy": (
        ("deepseek_v2", "DeepseekV2Config", "DeepseekV2TopkRouter"),
        {"n_routed_experts": 32, "num_experts_per_tok": 6, "topk_method": "greedy"},
        {"top_k": 6, "score": "softmax", "normalize": False},
    ),
    "DeepseekV2 group": (
        ("deepseek_v2", "DeepseekV2Config", "DeepseekV2TopkRouter"),
        {
            "n_routed_experts": 32,
            "num_experts_per_tok": 6,
            "topk_method": "group_limited_greedy",
            "n_group": 8,
            "topk_group": 3,
            "routed_scaling_factor": 16.0,
        },
        {
            "top_k": 6,
            "score": "softmax",
            "normalize": False,
            "n_group": 8,
            "topk_group": 3,
            "group_score": "max",
            "scaling": 16.0,
        },
    ),
    "DeepseekV4": (
        ("deepseek_v4", "DeepseekV4Config", "DeepseekV4TopKRouter"),
        {"n_routed_experts": 32, "num_experts_per_tok": 6, "routed_scaling_factor": 1.5},
        {"top_k": 6, "score": "sqrtsoftplus", "scaling": 1.5},
    ),
    "Mixtral": (
        ("mixtral", "MixtralConfig", "MixtralTopKRouter"),
        {"num_local_experts": 8, "num_experts_per_tok": 2},
        {"top_k": 2, "score": "softmax"},
    ),
    "Qwen3Moe": (
        ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeTopKRouter"),
        {"num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": False},
        {"top_k": 4, "score": "softmax", "normalize": False},
    ),
    "GptOss": (
        ("gpt_oss", "GptOssConfig", "GptOssTopKRouter"),
        {"num_local_experts": 16, "num_experts_per_tok": 4},
        {"top_k": 4, "score": "softmax", "normalize": False, "softmax_after": True},
    ),
}


@pytest.mark.parametrize("tokens", [1, 70, 150])
@pytest.mark.parametrize("name", ROUTERS)
def test_against_transformers(name, tokens):
    names, config, options = ROUTERS[name]
    router = transformers_router(*names, **config)
    biases = (getattr(router, "bias", None), getattr(router, "e_score_correction_bias", None))
    x = randn(tokens, 64)
    theirs, ours = router(x), ops.moe_route(x, router.weight, *biases, **options)
    same_routing(theirs, ours)
    weigh = torch.randn(ours[0].shape)
    grads = []
    for _, weights, indices in (theirs, ours[:3]):
        loss = (weights * weigh.gather(1, indices)).sum()
        grads.append(torch.autograd.grad(loss, list(router.parameters())))
    for a, b in zip(*grads, strict=True):
        size = max(1.0, a.abs().max().item())
        torch.testing.assert_close(b / size, a / size, **tol(F32))
