"""自己写的 MoE 用上本库：登记、替换、核对、训练、还原，可以直接运行。

模型是 Mixtral 的写法：门 nn.Linear，专家是 nn.ModuleList 里的 MLP（w1、w3、w2），forward 逐个专家循环。
没有登记时 optimize 会说它像 MoE、怎样登记；登记之后一次算完全部专家，权重仍是那些 nn.Linear 的，优化器、
state_dict 照常。语料是标准库一个模块的源码，不下载任何东西。用法::

    python examples/own_moe.py              # 默认步数，约半分钟
    python examples/own_moe.py --steps 5    # 快速看一遍
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deepseek_opt as dso
from deepseek_opt import corpus

WIDTH, INNER, EXPERTS, TOP_K, LENGTH, BATCH = 128, 128, 8, 2, 64, 8


class MLP(nn.Module):
    """一个专家：w2(silu(w1 x) * w3 x)。"""

    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(WIDTH, INNER, bias=False)
        self.w3 = nn.Linear(WIDTH, INNER, bias=False)
        self.w2 = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SparseMoE(nn.Module):
    """softmax 打分，取 top_k，归一化，逐个专家循环。"""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList([MLP() for _ in range(EXPERTS)])
        self.top_k = TOP_K

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.gate(x).float().softmax(-1).topk(self.top_k)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, place = torch.where(chosen == index)
            out.index_add_(0, token, expert(x[token]) * weights[token, place, None])
        return out.view(hidden.shape)


class Model(nn.Module):
    """由前面 4 个字节预测下一个：嵌入相接，两层 MoE。"""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH // 4)
        self.layers = nn.ModuleList([SparseMoE() for _ in range(2)])
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids.unfold(1, 4, 1)).flatten(2)
        for layer in self.layers:
            x = x + layer(F.rms_norm(x, (WIDTH,)))
        return self.head(x)


def loss_of(model: Model, ids: Tensor) -> Tensor:
    """预测下一个字节。"""
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 4:].flatten())


def train(model: Model, text: Tensor, steps: int) -> tuple[list[float], float]:
    """训练 steps 步；返回每步的损失与每步的秒数（最快的一步）。"""
    torch.manual_seed(0)
    optimizer, losses, best = torch.optim.AdamW(model.parameters(), 2e-3), [], float("inf")
    for _ in range(steps):
        starts = torch.randint(0, text.numel() - LENGTH - 1, (BATCH, 1))
        begin = time.perf_counter()
        loss = loss_of(model, text[starts + torch.arange(LENGTH + 1)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        best = min(best, time.perf_counter() - begin)
        losses.append(loss.item())
    return losses, best


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """运行例子，返回两次训练的损失曲线。"""
    parser = argparse.ArgumentParser(description="自己写的 MoE 用上本库")
    parser.add_argument("--steps", type=int, default=60, help="训练的步数")
    steps = parser.parse_args(arguments).steps
    source = corpus.read_text(corpus.stdlib_root() / "argparse.py")
    text = torch.tensor(list(source.encode()))
    profile = dso.OptimizationProfile(moe=dso.MOEConfig())

    torch.manual_seed(0)
    model = Model()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    print("没有登记时：")
    print(dso.optimize(model, profile))
    dso.restore(model)
    plain, plain_seconds = train(model, text, steps)

    adapter = dso.MoeAdapter(cls=SparseMoE, gate_proj="w1", up_proj="w3", down_proj="w2")
    dso.register_moe(adapter)
    model.load_state_dict(start)
    print("登记之后：")
    print(dso.optimize(model, profile, strict=True))
    ours, seconds = train(model, text, steps)
    print(f"每步（最快的一步）：原来 {plain_seconds * 1e3:.1f} 毫秒，现在 {seconds * 1e3:.1f} 毫秒")
    print(f"最后一步的损失：原来 {plain[-1]:.4f}，现在 {ours[-1]:.4f}")
    print(dso.expert_statistics(model))

    sample = text[None, : LENGTH + 1]
    with torch.no_grad():
        fast = loss_of(model, sample)
        dso.restore(model)
        difference = abs(float(fast - loss_of(model, sample)))
    print(f"还原之后同一段的损失相差 {difference:.1e}")
    return {"plain": plain, "ours": ours}


if __name__ == "__main__":
    main()
