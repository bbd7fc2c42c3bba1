"""Muon（隐藏层矩阵）与 AdamW（嵌入、语言模型头、归一化权重、路由）合成的优化器。"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

# 五阶 Newton-Schulz 迭代的系数：把奇异值推到 1 附近，取自 Muon 的原始实现。
_NS = (3.4445, -4.7750, 2.0315)
_NS_STEPS = 5


def orthogonalize(matrix: Tensor) -> Tensor:
    """成批矩阵 [n, rows, cols] 的近似正交化，bf16 计算。"""
    a, b, c = _NS
    x = matrix.to(torch.bfloat16)
    tall = x.shape[1] > x.shape[2]
    x = x.mT.contiguous() if tall else x
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(_NS_STEPS):
        gram = torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x.mT if tall else x


def _is_hidden_matrix(name: str, param: Tensor) -> bool:
    return param.ndim >= 2 and not any(
        key in name for key in ("embed_tokens", "lm_head", "mlp.gate.weight")
    )


def _matrices(name: str, param: Tensor) -> list[Tensor]:
    """参数拆成各自正交化的矩阵视图：专家各一个，合并的 gate/up 分开。"""
    if param.ndim == 2:
        return [param]
    parts = param.chunk(2, dim=1) if name.endswith("gate_up_proj") else [param]
    return [matrix for part in parts for matrix in part.unbind(0)]


class HybridOptimizer:
    """按参数角色选择更新规则；学习率在每步以 ``scale`` 统一缩放。"""

    def __init__(self, model: nn.Module, muon_lr: float, embed_lr: float, other_lr: float):
        self.muon_lr, self.decay, self.steps = muon_lr, 0.01, 0
        self.hidden: dict[str, nn.Parameter] = {}
        embed, other = [], []
        for name, param in model.named_parameters():
            if _is_hidden_matrix(name, param):
                self.hidden[name] = param
            else:
                (embed if "embed_tokens" in name else other).append(param)
        self.momentum = {name: torch.zeros_like(p) for name, p in self.hidden.items()}
        self.adam = torch.optim.AdamW(
            [{"params": embed, "lr": embed_lr}, {"params": other, "lr": other_lr}],
            betas=(0.9, 0.95),
            eps=1e-10,
            weight_decay=0.0,
            foreach=True,
        )
        self.base_lr = [group["lr"] for group in self.adam.param_groups]

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """走一步并清空梯度；scale 是学习率相对峰值的比例。"""
        self.steps += 1
        for group, base in zip(self.adam.param_groups, self.base_lr, strict=True):
            group["lr"] = base * scale
        self.adam.step()
        self._muon_step(self.muon_lr * scale)
        for group in self.adam.param_groups:
            for param in group["params"]:
                param.grad = None
        for param in self.hidden.values():
            param.grad = None

    def _muon_step(self, lr: float) -> None:
        # 动量前 300 步从 0.85 升到 0.95：早期梯度方向变化快。
        beta = 0.85 + 0.10 * min(self.steps / 300, 1.0)
        groups: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for name, param in self.hidden.items():
            buffer = self.momentum[name]
            buffer.lerp_(param.grad, 1 - beta)
            update = param.grad.lerp(buffer, beta)
            for weight, direction in zip(_matrices(name, param), _matrices(name, update)):
                groups[tuple(weight.shape)].append((weight, direction))
        for (rows, cols), pairs in groups.items():
            size = max(rows / cols, 1.0) ** 0.5
            directions = orthogonalize(torch.stack([direction for _, direction in pairs]))
            for (weight, _), direction in zip(pairs, directions):
                weight.mul_(1 - lr * self.decay).add_(direction.to(weight.dtype), alpha=-lr * size)

    def state_dict(self) -> dict:
        """可保存的状态。"""
        return {"adam": self.adam.state_dict(), "momentum": self.momentum, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """恢复 :meth:`state_dict` 保存的状态。"""
        self.adam.load_state_dict(state["adam"])
        self.steps = state["steps"]
        for name, buffer in state["momentum"].items():
            self.momentum[name].copy_(buffer)
