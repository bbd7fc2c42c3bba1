"""偏置更新：方向、步长、只计训练、检查点、梯度累积、DDP、Trainer。"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepseek_opt import MOEConfig, MoEFeedForward, update_expert_bias
from deepseek_opt.errors import InputError
from deepseek_opt.load import LoadCounter
from tests.processes import leave

ROOT = Path(__file__).parent.parent


def make(seed=0, **fields):
    torch.manual_seed(seed)
    fields = {"num_experts": 4, "num_experts_per_tok": 1, **fields}
    return MoEFeedForward(MOEConfig(balance_strategy="bias_update", **fields), 8, 4)


def bias(layer):
    return layer.router.e_score_correction_bias


def test_busy_experts_go_down_and_idle_ones_up():
    layer = make(bias_update_rate=0.25)
    layer.load_counter.add(torch.tensor([7, 3, 2, 0]), training=True)
    weight = layer.router.weight.clone()
    assert update_expert_bias(layer) == 1
    assert bias(layer).tolist() == [-0.25, 0.0, 0.25, 0.25]
    assert torch.equal(layer.router.weight, weight)
    layer.load_counter.add(torch.tensor([0, 0, 0, 4]), training=True)
    update_expert_bias(layer, rate=1.0)  # 给了 rate 就不用配置的；上次的计数已清零
    assert bias(layer).tolist() == [0.75, 1.0, 1.25, -0.75]


def test_default_rate_is_the_published_one():
    layer = make()
    layer.load_counter.add(torch.tensor([2, 0, 0, 0]), training=True)
    update_expert_bias(layer)
    torch.testing.assert_close(bias(layer), torch.tensor([-1e-3, 1e-3, 1e-3, 1e-3]))


def test_repeated_updates_balance_the_load():
    layer = make(scoring_func="sigmoid", num_experts=8, num_experts_per_tok=2)
    with torch.no_grad():
        layer.router.weight.normal_(std=0.5)
        layer.router.weight[0] += 1.0  # 偏爱 0 号
    x = torch.randn(256, 8) + 0.5

    def worst():
        counts = layer.router(x).counts
        return float(counts.max() / counts.float().mean())

    before = worst()
    for _ in range(100):
        layer(x)
        update_expert_bias(layer, 0.01)
    assert before > 2 and worst() < 1.2


def test_evaluation_is_not_counted():
    layer = make()
    layer(torch.randn(6, 8))
    pending = layer.load_counter.pending()
    layer.eval()
    layer(torch.randn(6, 8))
    assert torch.equal(layer.load_counter.pending(), pending)
    assert layer.load_counter.snapshot().sum() == 12


def test_checkpointed_training_counts_once_and_the_gradients_are_the_same():
    layer, x = make(sequence_aux_loss_weight=0.1), torch.randn(2, 6, 8)
    (layer(x).square().sum() + layer.aux_loss).backward()
    want = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    layer.load_counter.reset()
    out = checkpoint(layer, x, use_reentrant=False)
    (out.square().sum() + layer.aux_loss).backward()
    assert layer.load_counter.pending().sum() == 12
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], msg=name)


def test_accumulated_steps_equal_one_big_batch():
    whole, parts, x = make(), make(), torch.randn(12, 8)
    whole(x).sum().backward()
    for part in x.chunk(3):
        parts(part).sum().backward()
    assert torch.equal(whole.load_counter.pending(), parts.load_counter.pending())
    for layer in (whole, parts):
        update_expert_bias(layer)
    assert torch.equal(bias(whole), bias(parts)) and bias(whole).any()


def test_half_precision_bias_is_kept_in_fp32():
    layer = make().to(torch.bfloat16)
    for _ in range(3):
        layer.load_counter.add(torch.tensor([2, 0, 0, 0]), training=True)
        update_expert_bias(layer, 1e-3)
    assert bias(layer).dtype == torch.float32
    torch.testing.assert_close(bias(layer), torch.tensor([-3e-3, 3e-3, 3e-3, 3e-3]))
    assert bias(layer) is dict(layer.named_buffers())["router.e_score_correction_bias"]


def test_patched_gate_with_its_own_buffer():
    class Patch:
        def __init__(self, gate):
            self.load_counter, self.gate = LoadCounter(2), gate

        @property
        def balance_bias(self):
            return self.gate.e_score_correction_bias

    gate = nn.Linear(4, 2)
    gate.register_buffer("e_score_correction_bias", torch.zeros(2))
    gate.__dict__["forward"] = Patch(gate)
    model = nn.ModuleDict({"gate": gate})
    gate.__dict__["forward"].load_counter.add(torch.tensor([5, 1]), training=True)
    assert update_expert_bias(model, 0.5) == 1
    assert gate.e_score_correction_bias.tolist() == [-0.5, 0.5]


def test_counter_on_the_experts_uses_the_gate_beside_them():
    block = nn.ModuleDict({"gate": nn.Linear(4, 2), "experts": nn.Linear(4, 4)})
    block["gate"].register_buffer("e_score_correction_bias", torch.zeros(2))
    block["experts"].load_counter = LoadCounter(2)
    block["experts"].load_counter.add(torch.tensor([1, 5]), training=True)
    assert update_expert_bias(nn.Sequential(block), 0.5) == 1
    assert block["gate"].e_score_correction_bias.tolist() == [0.5, -0.5]


def test_without_statistics_nothing_changes():
    layer = make().eval()
    layer(torch.randn(3, 8))
    with pytest.raises(InputError, match="没有负载统计"):
        update_expert_bias(layer)
    assert not bias(layer).any()
    layer.train()(torch.randn(3, 8))
    update_expert_bias(layer)
    moved = bias(layer).clone()
    with pytest.raises(InputError, match="没有负载统计"):
        update_expert_bias(layer)  # 同一步里不会更新两次
    assert torch.equal(bias(layer), moved)


def test_models_without_a_bias_and_bad_rates():
    plain = MoEFeedForward(MOEConfig(num_experts=2, num_experts_per_tok=1), 8, 4)
    plain(torch.randn(3, 8))
    for model in (plain, nn.Linear(2, 2)):
        with pytest.raises(InputError, match="没有可更新的路由偏置"):
            update_expert_bias(model)
    with pytest.raises(InputError, match="model"):
        update_expert_bias(None)
    layer = make()
    layer(torch.randn(3, 8))
    for rate in (0, -1.0, float("nan"), float("inf"), "1"):
        with pytest.raises(InputError, match="rate：应为正数"):
            update_expert_bias(layer, rate)
    assert not bias(layer).any() and layer.load_counter.pending().any()


# ---- 多进程 ----


def halves():
    """两个进程各自的词元：偏向不同，所以只看自己会得出不同的偏置。"""
    x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(1))
    return x + torch.tensor([[[1.0]], [[-1.0]]])


def _worker(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    layer = make()
    wrapped = nn.parallel.DistributedDataParallel(layer)
    wrapped(halves()[rank]).square().sum().backward()
    local = layer.load_counter.pending()
    update_expert_bias(wrapped, 0.5)
    try:
        update_expert_bias(wrapped, 0.5)  # 都没有统计：各进程一起报错，不会有谁在等
    except InputError:
        torch.save((local, bias(layer)), f"{folder}/{rank}.pt")
    leave()


def test_counts_are_summed_over_processes(tmp_path):
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    (first, got), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = make()
    whole(halves())
    assert torch.equal(first + second, whole.load_counter.pending())
    update_expert_bias(whole, 0.5)
    assert torch.equal(got, bias(whole)) and torch.equal(other, bias(whole))
    directions = [torch.sign(n.float().mean() - n) for n in (first, second)]
    assert not torch.equal(*directions)


# ---- transformers Trainer ----


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe = make()

    def forward(self, x):
        return {"loss": self.moe(x).square().mean()}


def test_trainer_updates_once_per_optimizer_step(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from deepseek_opt import BalanceCallback

    model, seen, moved = _Net(), [], []

    class Spy(BalanceCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.append(int(model.moe.load_counter.pending().sum()))
            super().on_optimizer_step(args, state, control, model=model, **kwargs)
            moved.append(float(bias(model.moe).abs().max()))

    args = transformers.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = [{"x": torch.randn(5, 8)} for _ in range(12)]
    transformers.Trainer(model, args, train_dataset=data, callbacks=[Spy(0.5)]).train()
    assert seen == [30, 30]  # 两步，每步 3 次前向 × 2 行 × 5 个词元
    assert moved[0] == 0.5 and len(moved) == 2


def test_importing_needs_no_transformers():
    code = """
    import sys
    sys.modules["transformers"] = None
    from deepseek_opt import BalanceCallback, update_expert_bias
    assert BalanceCallback(0.1).rate == 0.1
    try:
        BalanceCallback(-1)
    except ValueError as error:
        assert "rate：应为正数" in str(error)
    else:
        raise AssertionError
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
