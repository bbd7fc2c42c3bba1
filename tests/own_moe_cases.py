"""自己写的 MoE（门 + nn.ModuleList 的专家）与对照的办法，几个测试文件共用。"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from deepseek_opt import MOEConfig, MoeAdapter, OptimizationProfile, optimize, register_moe, restore
from tests.tolerances import tol

H, INNER, EXPERTS = 16, 24, 6
PROFILE = OptimizationProfile(moe=MOEConfig())
NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


class Expert(nn.Module):
    """Mixtral 的写法。"""

    def __init__(self, act=F.silu, bias=False):
        super().__init__()
        self.w1, self.w3 = nn.Linear(H, INNER, bias=bias), nn.Linear(H, INNER, bias=bias)
        self.w2, self.act = nn.Linear(INNER, H, bias=bias), act

    def forward(self, x):
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class OwnMoe(nn.Module):
    """逐个专家循环；各种写法由参数给出。"""

    def __init__(self, make=Expert, top_k=2, shared=None, **options):
        super().__init__()
        self.gate = nn.Linear(H, EXPERTS, bias=False)
        self.experts = nn.ModuleList([make() for _ in range(EXPERTS)])
        self.shared = shared
        self.top_k, self.options = top_k, options

    def route(self, x):
        scores = self.gate(x).float().softmax(-1)
        weights, index = scores.topk(self.top_k)
        return self.gate(x), weights / weights.sum(-1, keepdim=True), index

    def forward(self, hidden):
        x = hidden.reshape(-1, H)
        logits, weights, index = self.route(x)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, place = torch.where(index == e)
            out.index_add_(0, token, (expert(x[token]) * weights[token, place, None]).to(x.dtype))
        if self.shared is not None:
            out = out + self.shared(x)
        return self.finish(out.view(hidden.shape), logits)

    def finish(self, out, _logits):
        return out


class Model(nn.Module):
    """归一化加 MoE，两层。"""

    def __init__(self, make):
        super().__init__()
        self.layers = nn.ModuleList([make() for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(F.rms_norm(x, (H,)))
        return x


def prepared(block=OwnMoe, **fields):
    """登记 block 的类并建好模型。"""
    model = Model(block)
    register_moe(MoeAdapter(cls=type(model.layers[0]), **{**NAMES, **fields}))
    return model


def results(model, dtype=torch.float32):
    model.zero_grad()
    x = torch.randn(2, 7, H, generator=torch.Generator().manual_seed(1)).to(dtype)
    x.requires_grad_()
    out = model(x)
    out.square().sum().backward()
    grads = [x.grad, *(p.grad.clone() for p in model.parameters())]
    return out.detach(), grads


def assert_same(actual, expected, dtype=torch.float32):
    for a, b in zip([actual[0], *actual[1]], [expected[0], *expected[1]], strict=True):
        size = b.abs().max().float().clamp(min=1.0)
        torch.testing.assert_close(a.float() / size, b.float() / size, **tol(dtype))


def reason_of(model):
    """没有替换的那一层的原因。"""
    report = optimize(model, PROFILE)
    (entry, *_) = report.skipped
    assert entry.part == "moe" and entry.required and not report.replaced
    restore(model)
    return entry.reason


class ReturnsLogits(OwnMoe):
    def forward(self, hidden):
        return super().forward(hidden)[0]

    def finish(self, out, logits):
        return (out, logits)
