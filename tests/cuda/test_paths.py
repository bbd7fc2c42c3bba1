"""CUDA 核的每条路径：能走矩阵单元的形状、跨过块边的长度、分组展开、共享内存小的卡；对照 fp64。

在 scripts/cuda_host.sh 里（主机模拟）运行；tests/test_mla_*.py 另在同样的模拟上跑一般的形状。
"""

from __future__ import annotations

import os

import pytest
import torch

from deepseek_opt import LatentCache, MLAConfig, OptimizationProfile, ops, optimize, reference
from tests.faults import state, unchanged
from tests.moe_cases import Layout, experts
from tests.moe_list_cases import Lists
from tests.op_cases import QUANTIZED, assert_no_worse, attention, eager_attention
from tests.tolerances import tol

pytestmark = pytest.mark.skipif(
    os.environ.get("DSO_HOST") != "1", reason="要在 scripts/cuda_host.sh 里"
)
HALF = [torch.bfloat16, torch.float16]
SMALL_CARD = 99 << 10  # sm_86、sm_89 每块的共享内存
# (r, dr, dn, dv)：反向的四种宽度、没有旋转部分、dv 不是块宽。
PREFILL_DIMS = [(64, 16, 32, 64), (32, 0, 96, 40), (64, 64, 128, 128), (32, 32, 160, 136)]
# (T, S)：不满一块、正好一块、多一个、长的缓存接短的查询。
LENGTHS = [(1, 1), (63, 64), (65, 65), (130, 200), (3, 129)]


def close(got, want, dtype):
    torch.testing.assert_close(got.double(), want, **tol(dtype))


def prefill_with_grads(case, function, kind=None):
    leaves = case.leaves(kind)
    out = function(*case.with_leaves(leaves).args())
    out = out[0] if isinstance(out, tuple) else out
    torch.manual_seed(1)
    out.backward(torch.randn(*out.shape).to(case.q.dtype).to(out.dtype))
    return (out.detach(), *(leaf.grad for leaf in leaves))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dims", PREFILL_DIMS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_prefill(dims, lengths, dtype):
    case = attention(2, *lengths, 2, dims, dtype=dtype, masked=True)
    out, lse = ops.mla_prefill(*case.args())
    exact = case.exact()
    close(out, exact[0], dtype)
    torch.testing.assert_close(lse.double(), exact[1], **tol(dtype))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dims", PREFILL_DIMS, ids=str)
def test_prefill_gradients(dims, causal):
    case = attention(2, 70, 90, 3, dims, dtype=torch.bfloat16, causal=causal)
    runs = [
        prefill_with_grads(case, ops.mla_prefill),
        prefill_with_grads(case, lambda *args: eager_attention(case_of(case, args))),
        prefill_with_grads(case, reference.mla_prefill, torch.float64),
    ]
    for ours, eager, exact in zip(*runs, strict=True):
        if exact.numel():  # 没有旋转部分时它的梯度是空的
            assert_no_worse(ours, eager, exact)


def case_of(case, args):
    names = ("q", "latent", "rope", "scale", "kv_b", "spans", "kv_mask")
    return case.but(**dict(zip(names, args[:7], strict=True)))


def test_heads_in_groups(monkeypatch):
    """K、V 一次展开全部头、逐个头展开：out、lse、dq 逐位相同，跨头求和的梯度只差舍入。"""
    case = attention(1, 70, 90, 5, (64, 16, 32, 64), dtype=torch.bfloat16)
    together = prefill_with_grads(case, ops.mla_prefill)
    exact = prefill_with_grads(case, reference.mla_prefill, torch.float64)
    monkeypatch.setenv("DSO_HOST_EXPAND", "1")
    apart = prefill_with_grads(case, ops.mla_prefill)
    for index, (one, other, want) in enumerate(zip(together, apart, exact, strict=True)):
        if index in (0, 1, 4):  # out、dq、dkv_b 各头互不相干
            assert torch.equal(one, other)
        assert_no_worse(other, one, want, 1.2)


@pytest.mark.parametrize("dims", PREFILL_DIMS, ids=str)
def test_small_shared_memory(monkeypatch, dims):
    """99 KiB 的卡：单级流水，放不下的形状改走通用路径。"""
    case = attention(1, 70, 90, 2, dims, dtype=torch.bfloat16, masked=True)
    wide = prefill_with_grads(case, ops.mla_prefill)
    decoded = ops.mla_decode(*case.args())
    monkeypatch.setenv("DSO_HOST_SHARED", str(SMALL_CARD))
    exact = prefill_with_grads(case, reference.mla_prefill, torch.float64)
    narrow = prefill_with_grads(case, ops.mla_prefill)
    for ours, before, want in zip(narrow, wide, exact, strict=True):
        if want.numel():
            assert_no_worse(ours, before, want, 1.2)
    close(ops.mla_decode(*case.args()), decoded.double(), torch.bfloat16)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_with_small_shared_memory(monkeypatch, transposed):
    """99 KiB 的卡：流水少一级，前向与反向的结果逐位不变；K 比几级都长。"""
    way = Layout(transposed=transposed)
    case = experts((70, 264, 72, 200), 2, dtype=torch.bfloat16, layout=way)
    grad = torch.randn(70, 200).bfloat16()
    before = case.run(), *case.gradients(grad).values()
    monkeypatch.setenv("DSO_HOST_SHARED", str(SMALL_CARD))
    after = case.run(), *case.gradients(grad).values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_too_wide_for_shared_memory(monkeypatch):
    """放不进共享内存的维度：先报错，指明是哪些维。"""
    monkeypatch.setenv("DSO_HOST_SHARED", "4096")
    case = attention(1, 2, 4, 2, (256, 4, 8, 8))
    with pytest.raises(ValueError, match="放不进共享内存"):
        ops.mla_prefill(*case.args())
    with pytest.raises(ValueError, match="mla_decode：kv_lora_rank 256 加 qk_rope_head_dim 4 太大"):
        ops.mla_decode(*case.args())


def test_launch_failure(monkeypatch):
    """核启动失败：说出是哪个算子；之后照常能用。第二次启动（合并）失败也一样。"""
    case = attention(2, 1, 70, 4, (64, 16, 8, 8), dtype=torch.bfloat16)
    want = ops.mla_decode(*case.args())
    for nth in ("1", "2"):
        monkeypatch.setenv("DSO_HOST_FAIL", nth)
        with pytest.raises(RuntimeError, match="mla_decode 启动失败"):
            ops.mla_decode(*case.args())
        monkeypatch.delenv("DSO_HOST_FAIL")
        assert torch.equal(ops.mla_decode(*case.args()), want)


def test_launch_failure_in_the_experts(monkeypatch):
    case = experts((6, 64, 24, 40), 2, dtype=torch.bfloat16, shared=16)
    grad = torch.randn(6, 40).bfloat16()
    want, wanted = case.run(), case.gradients(grad)
    for nth in ("1", "2"):
        monkeypatch.setenv("DSO_HOST_FAIL", nth)
        with pytest.raises(RuntimeError, match="moe_experts 启动失败"):
            case.run()
        monkeypatch.delenv("DSO_HOST_FAIL")
        assert torch.equal(case.run(), want)
    leaves = case.leaves()
    y = leaves.run()
    monkeypatch.setenv("DSO_HOST_FAIL", "1")
    with pytest.raises(RuntimeError, match="moe_experts_backward 启动失败"):
        y.backward(grad)
    monkeypatch.delenv("DSO_HOST_FAIL")
    found = case.gradients(grad)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@torch.no_grad()
def test_launch_failure_in_a_model(monkeypatch):
    """一步里第几个核起都启动失败（设备出错）：撤回也启动不了，缓存仍由主机的长度写回；之后照常。"""
    from tests.tiny_models import make_inputs, make_model  # 没有 transformers 时只跳过这一项

    model = make_model("youtu")
    optimize(model, OptimizationProfile(mla=MLAConfig()))
    ids, _ = make_inputs(2, 6)
    step = ids[:, :1]
    monkeypatch.setenv("DSO_HOST_RESIDENT", "1")
    for ragged in (False, True):
        cache, other = LatentCache(2), LatentCache(2)
        for one in (cache, other):
            model(input_ids=ids, past_key_values=one)
            if ragged:
                one.crop_rows([6, 4])
        before, nth, failed = state(cache), 0, True
        while failed:
            nth += 1
            monkeypatch.setenv("DSO_HOST_FAIL", str(nth))
            try:
                logits = model(input_ids=step, past_key_values=cache).logits
                failed = False
            except RuntimeError as error:
                assert "启动失败" in str(error)
                unchanged(cache, before)
            monkeypatch.delenv("DSO_HOST_FAIL")
            if failed:
                ops.rms_norm(torch.ones(1, 8), torch.ones(8), 1e-6)  # 让它从头数起
        assert nth > 6
        assert torch.equal(logits, model(input_ids=step, past_key_values=other).logits)


def test_first_tensor_elsewhere(monkeypatch):
    """第一个张量留在 CPU 上：说清楚，而不是“设备 cuda:-1”或切换设备的错误。"""
    x = torch.randn(3, 6)
    case, grad = experts((3, 6, 8, 5), 2, shared=4), torch.randn(3, 5)
    lists, calls = Lists.of(case), torch.ops.deepseek_opt
    into = [torch.zeros_like(t) for t in (case.gate_up, case.down)]
    attempts = [
        (x, lambda: ops.linear(x, torch.randn(4, 6))),
        (x, lambda: ops.rms_norm(x, torch.ones(6), 1e-6)),
        (case.x, case.run),
        (lists.x, lists.run),
        (case.x, lambda: calls.moe_experts_backward(grad, *case.args(), True, True, True)),
        (case.x, lambda: calls.moe_experts_backward_into(grad, *case.args(), True, True, *into)),
        (lists.x, lambda: calls.moe_experts_list_backward(grad, *lists.args(), True, True, True)),
    ]
    for first, attempt in attempts:
        monkeypatch.setenv("DSO_HOST_AWAY", str(first.data_ptr()))
        with pytest.raises(ValueError, match="全部张量应在同一设备上，实际有的在 CPU 上"):
            attempt()
        monkeypatch.delenv("DSO_HOST_AWAY")
        attempt()
    weight = torch.ones(6)
    monkeypatch.setenv("DSO_HOST_AWAY", str(weight.data_ptr()))
    with pytest.raises(ValueError, match="weight 应与其他张量同在设备"):
        ops.rms_norm(x, weight, 1e-6)


def test_unsupported_architecture(monkeypatch):
    monkeypatch.setenv("DSO_HOST_MAJOR", "7")
    case = attention(1, 1, 4, 2, (16, 4, 8, 8))
    with pytest.raises(RuntimeError, match="mla_decode 启动失败：这块 GPU 太旧，需要计算能力 8.0"):
        ops.mla_decode(*case.args())


@pytest.mark.parametrize("cache", [None, *QUANTIZED], ids=["同类型", "int8", "fp8"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rank, rope", [(512, 64), (256, 32), (128, 0), (80, 16)])
@pytest.mark.parametrize("heads", [1, 9, 17, 65])
def test_decode(heads, rank, rope, dtype, cache):
    case = attention(2, 2, 70, heads, (rank, rope, 8, 8), dtype=dtype, cache=cache or dtype)
    got = ops.mla_decode(*case.args())
    close(got, case.exact()[0], torch.int8 if cache else dtype)  # 对照的是同样的码


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 500])
def test_decode_lengths(length):
    """一行的键分给几个 CTA、各行长短悬殊：合并的结果对。"""
    case = attention(3, 1, 520, 4, (64, 16, 8, 8), dtype=torch.bfloat16)
    spans = torch.tensor([[0, 1, 0, length], [1, 2, 520, 521], [2, 3, 1040, 1040 + 520]])
    case = case.but(spans=spans)
    close(ops.mla_decode(*case.args()), case.exact()[0], torch.bfloat16)


@pytest.mark.parametrize("rank", [64, 130, 33])
@pytest.mark.parametrize("sms", [12, 40])
def test_one_row_on_many_ctas(monkeypatch, sms, rank):
    """一行分给许多 CTA：合并时由几个 warp 分着加，位数不变。"""
    monkeypatch.setenv("DSO_HOST_SMS", str(sms))
    case = attention(1, 1, 3000, 4, (rank, 16, 8, 8), dtype=torch.bfloat16)
    got = ops.mla_decode(*case.args())
    close(got, case.exact()[0], torch.bfloat16)
    monkeypatch.setenv("DSO_HOST_ORDER", "random:3")
    assert torch.equal(ops.mla_decode(*case.args()), got)


@pytest.mark.parametrize(
    "sms, shape",
    [(400, (8, 1, 2200, 8, (160, 8, 8, 8))), (30, (24, 1, 80, 8, (513, 6, 9, 5)))],
    ids=["登记表不止一块", "一组线程一行"],
)
def test_many_split_groups(monkeypatch, sms, shape):
    """合并的任务一轮做不完；一行由几组线程、一组线程加。"""
    monkeypatch.setenv("DSO_HOST_SMS", str(sms))
    rows, slots = shape[0], shape[2]
    end = [slots - 9 * i % 50 for i in range(rows)]
    case = attention(*shape, begin=[5 * i % 30 for i in range(rows)], end=end)
    close(ops.mla_decode(*case.args()), case.exact()[0], torch.float32)


def test_device_spans_are_not_read():
    """spans 在设备上时不检查：这里的“设备”就是 CPU，只能核对空的查询范围也照常。"""
    case = attention(2, 3, 40, 4, (64, 16, 8, 8), dtype=torch.bfloat16)
    spans = torch.tensor([[0, 0, 0, 40], [3, 6, 40, 80], [3, 3, 40, 40]])
    case = case.but(spans=spans)
    close(ops.mla_decode(*case.args()), case.exact()[0], torch.bfloat16)
    close(ops.mla_prefill(*case.args())[0], case.exact()[0], torch.bfloat16)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", [8, 256, 264, 1024, 1032, 2048, 2056, 8192, 8200])
def test_norms(dim, dtype):
    """一行留在寄存器里的几种深度与留不下的：与权重是 fp32 的（不留）逐位相同。"""
    x, residual, weight = (torch.randn(*shape).to(dtype) for shape in ((3, dim), (3, dim), (dim,)))
    got = ops.rms_norm(x, weight, 1e-6), *ops.add_rms_norm(x, residual, weight, 1e-6)
    weight = weight.float()
    want = ops.rms_norm(x, weight, 1e-6), *ops.add_rms_norm(x, residual, weight, 1e-6)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
