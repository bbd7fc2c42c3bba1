"""在 CUDA 的核上训练：替换之后的模型梯度与原模型的相同，autocast、激活检查点、torch.compile、DDP、FSDP2、梯度累积都是。

没有 GPU 时在主机模拟上：同样的绑定与核。
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deepseek_opt as dso
from tests import mla_layer_cases as mla
from tests.cuda.device import DEVICE, ON_GPU, marks, needs_gpu
from tests.processes import one_process
from tests.tiny_models import make_model

pytestmark = [*marks, pytest.mark.usefixtures("threads")]
BF16 = torch.bfloat16
MOE = dso.MOEConfig(num_experts=4, num_experts_per_tok=2, num_shared_experts=1)
PROFILE = dso.OptimizationProfile(
    mla=dso.MLAConfig(), moe=dso.MOEConfig(), dense=dso.DenseConfig(ffn=True, norms=True)
)


class OwnLayers(nn.Module):
    """自己的模型：本库的注意力与 MoE 层。"""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.attention = mla.layer()
        self.experts = dso.MoEFeedForward(MOE, mla.HIDDEN, 24)
        self.to(DEVICE, dtype)

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.experts(x)


def own_layers(dtype=torch.float32):
    torch.manual_seed(0)
    return OwnLayers(dtype)


def hidden(seed=0, dtype=torch.float32):
    return mla.hidden(2, 7, seed=seed).to(DEVICE, dtype)


@pytest.fixture(name="models")
def _models():
    """(替换之后的, 原来的)：同样的权重。"""
    plain = make_model("deepseek_v3").to(DEVICE).train()
    model = copy.deepcopy(plain)
    report = dso.optimize(model, PROFILE)
    yield model, plain
    assert not report.fallbacks


def loss_of(model, seed=0):
    ids = torch.randint(1, 90, (2, 9), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return model(input_ids=ids, labels=ids).loss


def same_grads(model, plain, **limits):
    found = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        grad = found[name].grad
        assert (grad is None) == (parameter.grad is None), name
        if grad is not None:
            whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            torch.testing.assert_close(whole, parameter.grad, **limits, msg=f"{name}：{{}}".format)


FP32 = {"rtol": 1e-3, "atol": 2e-5}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_accumulate(models, checkpointing):
    """两批的梯度加在一起；检查点在反向里重算前向。"""
    if checkpointing:
        models[0].gradient_checkpointing_enable({"use_reentrant": False})
    for model in models:
        for seed in range(2):
            loss_of(model, seed).backward()
    same_grads(*models, **FP32)


def test_autocast(models):
    """fp32 的权重，bf16 的矩阵乘；梯度是 fp32 的，误差是 bf16 的。"""
    losses = []
    for model in models:
        with torch.autocast(DEVICE, BF16):
            losses.append(loss_of(model))
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=2e-2, atol=2e-2)
    for model in models:
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    for name, parameter in models[1].named_parameters():
        if parameter.grad is not None:
            grad = dict(models[0].named_parameters())[name].grad
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(grad, parameter.grad, rtol=0, atol=0.1 * scale + 1e-6)


def test_distributed_data_parallel(models, tmp_path):
    model, plain = models
    loss_of(plain).backward()
    with one_process(tmp_path, "nccl" if ON_GPU else "gloo"):
        wrapped = nn.parallel.DistributedDataParallel(model)
        loss_of(wrapped).backward()
        del wrapped
    same_grads(model, plain, **FP32)


def test_fully_sharded(tmp_path):
    """各层一片；参数在前向里才合起来。"""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model, plain = own_layers(), own_layers()
    plain(hidden()).square().mean().backward()
    with one_process(tmp_path, "nccl" if ON_GPU else "gloo"):
        mesh = torch.distributed.device_mesh.init_device_mesh(DEVICE, (1,))
        for module in (model.attention, model.experts, model):
            fsdp.fully_shard(module, mesh=mesh)
        model(hidden()).square().mean().backward()
        same_grads(model, plain, **FP32)
        del model


def test_compiled():
    """前向与反向都在编译出的图里（aot_eager）。"""
    model, plain = own_layers(), own_layers()
    plain(hidden()).square().mean().backward()
    torch.compile(model, backend="aot_eager")(hidden()).square().mean().backward()
    same_grads(model, plain, **FP32)


def test_experts_add_into_grad():
    """accumulate_into_grad：专家的梯度直接加到已有的 .grad 上。"""
    model, plain = own_layers(), own_layers()
    for seed in range(2):
        plain(hidden(seed)).square().mean().backward()
    assert dso.accumulate_into_grad(model) > 0
    for seed in range(2):
        model(hidden(seed)).square().mean().backward()
    same_grads(model, plain, **FP32)


def trained(model, x):
    """一步的梯度，前向与反向都不等设备。"""
    model.zero_grad(set_to_none=False)
    model(x).square().mean().backward()


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_step_never_waits(dtype):
    model, x = own_layers(dtype), hidden(dtype=dtype)
    trained(model, x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trained(model, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_step_in_a_graph(dtype):
    """前向与反向录成一个 CUDA graph；换了输入（各词元选的专家也变了）再重放，梯度与逐个算子的相同。"""
    model, plain, x = own_layers(dtype), own_layers(dtype), hidden(dtype=dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            trained(model, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        trained(model, x)
    for seed in (1, 2):
        x.copy_(hidden(seed, dtype))
        graph.replay()
        trained(plain, x)
        same_grads(model, plain, rtol=0, atol=0)
