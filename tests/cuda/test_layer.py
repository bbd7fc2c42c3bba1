"""mla_layer_decode 在 CUDA 上：与分开的算子逐位相同；spans、offsets 在设备上时不读，在那里写出、前移。"""

from __future__ import annotations

import os

import pytest
import torch

from deepseek_opt import ops
from deepseek_opt.errors import DeviceMemoryError
from tests.faults import layer_failures, layer_unchanged
from tests.op_cases import FLOATS, QUANTIZED, attention, bits, paged
from tests.test_mla_layer_decode import HEADS, SLOTS, arguments, fresh

pytestmark = pytest.mark.skipif(
    os.environ.get("DSO_HOST") != "1", reason="要在 scripts/cuda_host.sh 里"
)
RANK, ROPE = 64, 16


def separate(args):
    """同样的一步，逐个算子；缓存原地写。"""
    hidden, q_a, _, q_norm, q_eps, q_weight, _, kv_a, _, kv_norm, kv_eps, kv_b, out = args[:13]
    cos, sin, pairs, *cache, offsets, _, _, softmax_scale, _ = args[14:25]
    keep = bool(args[25:] and args[25])
    low = hidden if q_a is None else ops.rms_norm(ops.linear(hidden, q_a), q_norm, q_eps)
    q = ops.linear(low, q_weight).unflatten(-1, (HEADS, -1))
    rope = 2 * cos.shape[-1]
    ops.rope_(q[..., -rope:], cos, sin, pairs, keep)
    joint, rank = ops.linear(hidden, kv_a), len(kv_norm)
    latent = ops.rms_norm(joint[..., :rank], kv_norm, kv_eps)
    keys = ops.rope(joint[..., None, rank:], cos, sin, pairs, keep_pairs=keep).squeeze(2)
    ops.mla_cache_write(*cache, latent, keys, offsets)
    batch, steps = hidden.shape[:2]
    ends = [int(end) + steps for end in offsets]
    spans = ops.make_spans(batch, steps, SLOTS, end=ends)
    value = kv_b.shape[0] // HEADS - (q.shape[-1] - rope)
    heads = ops.mla_decode(q, *cache, kv_b, spans, None, softmax_scale, value)
    return ops.linear(heads.flatten(2), out)


@pytest.mark.parametrize("cache", [None, *QUANTIZED])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("steps, q_rank, keep", [(1, 24, False), (1, None, True), (5, 24, False)])
def test_same_bits_as_separate_ops(dtype, cache, steps, q_rank, keep):
    args = (*arguments(3, steps, 48, q_rank, RANK, ROPE, dtype, cache=cache), keep)
    mine, apart = fresh(args), fresh(args)
    got, want = ops.mla_layer_decode(*mine), separate(apart)
    assert torch.equal(got, want)
    for ours, theirs in zip(mine[17:20], apart[17:20], strict=True):
        assert ours is None or torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("cache", [None, *QUANTIZED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank, rope, pairs", [(264, 32, True), (512, 64, False), (520, 16, True)])
def test_same_bits_for_wide_latents(monkeypatch, rank, rope, pairs, dtype, cache):
    """潜变量留在寄存器里（一个线程 2 个 8，不满的）与留不下的；词元多于一块的 warp。"""
    for module in ("tests.test_mla_layer_decode", __name__):
        monkeypatch.setattr(f"{module}.SLOTS", 40)
    args = [*arguments(1, 18, 48, 24, rank, rope, dtype, cache=cache), pairs and rank < 512]
    args[16] = pairs
    mine, apart = fresh(args), fresh(args)
    got, want = ops.mla_layer_decode(*mine), separate(apart)
    assert torch.equal(got, want)
    for ours, theirs in zip(mine[17:20], apart[17:20], strict=True):
        assert ours is None or torch.equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("steps", [1, 3, 11])
@pytest.mark.parametrize(
    "pairs, keep", [(False, False), (True, False), (True, True)], ids=["两半", "相邻", "仍相邻"]
)
@pytest.mark.parametrize("rope", [2, 64, 66])
def test_queries_are_turned_in_place(rope, pairs, keep, steps):
    """查询随写缓存一起旋转（更宽的另排一个核），与分开的相同：三种排列，一块放得下与放不下。"""
    args = [*arguments(2, steps, 48, 24, RANK, rope, torch.float32), keep]
    args[16] = pairs
    mine, apart = fresh(args), fresh(args)
    # fp32 的矩阵乘随内存的对齐差最后一位
    torch.testing.assert_close(ops.mla_layer_decode(*mine), separate(apart), rtol=1e-5, atol=1e-5)
    assert torch.equal(mine[18], apart[18])


@pytest.mark.parametrize("given", [False, True], ids=["自己写 spans", "给出 spans"])
def test_resident_positions(monkeypatch, given):
    """位置在设备上：结果、缓存、前移之后的位置都与在主机上时相同。"""
    args = list(arguments(3, 2, 48, 24, RANK, ROPE, torch.bfloat16))
    if given:
        ends = [int(end) + 2 for end in args[20]]
        args[21] = ops.make_spans(3, 2, SLOTS, end=ends)
    host, device = fresh(args), fresh(args)
    want = ops.mla_layer_decode(*host)
    monkeypatch.setenv("DSO_HOST_RESIDENT", "1")
    got = ops.mla_layer_decode(*device)
    for ours, theirs in ((got, want), *zip(device[17:21], host[17:21], strict=True)):
        assert ours is None or torch.equal(ours, theirs)
    assert torch.equal(device[20], args[20] + 2)


def test_resident_spans_and_offsets_of_the_parts(monkeypatch):
    case = attention(2, 3, 40, 4, (RANK, ROPE, 8, 8), dtype=torch.bfloat16, begin=[0, 7])
    want = ops.mla_decode(*case.args())
    monkeypatch.setenv("DSO_HOST_RESIDENT", "1")
    torch.testing.assert_close(ops.mla_decode(*case.args()), want)
    torch.testing.assert_close(ops.mla_decode(*paged(case, 8)), want)
    store, keys = torch.zeros(2, 5, RANK), torch.zeros(2, 5, ROPE)
    new = case.latent[:, :3].float(), case.rope[:, :3].float()
    ops.mla_cache_write(store, keys, None, *new, torch.tensor([0, 2]))
    assert torch.equal(store[1, 2:], new[0][1]) and not store[1, :2].any()


def test_weights_that_require_grad():
    """绑定里调用的 torch 算子不记录求导（写进现成张量的算子遇到要求导的参数会报错）。"""
    args = arguments(2, 1, 48, 24, RANK, ROPE, torch.float32)
    want = ops.mla_layer_decode(*fresh(args))
    wanted = [a.requires_grad_() if i in (5, 7, 11, 12) else a for i, a in enumerate(fresh(args))]
    assert torch.equal(ops.mla_layer_decode(*wanted).detach(), want)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("steps, dtype", [(1, torch.bfloat16), (5, torch.float32)])
@pytest.mark.parametrize("resident", [False, True], ids=["位置在主机上", "位置在设备上"])
def test_failed_allocations_change_nothing(monkeypatch, resident, steps, dtype):
    """每一处分配依次失败：写缓存的核已经前移的位置要撤回。"""
    args = arguments(3, steps, 48, 24, RANK, ROPE, dtype)
    if resident:
        monkeypatch.setenv("DSO_HOST_RESIDENT", "1")
    assert layer_failures(args) > 5


def test_failed_launches_change_nothing(monkeypatch):
    """每一个核依次启动失败：同样撤回；之后照常。"""
    args = arguments(3, 1, 48, 24, RANK, ROPE, torch.bfloat16)
    monkeypatch.setenv("DSO_HOST_RESIDENT", "1")
    mine, nth, done = fresh(args), 0, False
    while not done:
        nth += 1
        monkeypatch.setenv("DSO_HOST_FAIL", f"{nth}:1")
        try:
            got = ops.mla_layer_decode(*mine)
            done = True
        except RuntimeError as error:
            assert "启动失败" in str(error)
            layer_unchanged(mine, args)
        monkeypatch.delenv("DSO_HOST_FAIL")
        if not done:
            ops.rms_norm(torch.ones(1, 8), torch.ones(8), 1e-6)  # 让它从头数起
    assert nth > 6 and torch.equal(got, ops.mla_layer_decode(*fresh(args)))
    assert torch.equal(mine[20], args[20] + 1)


def test_torch_calls_are_named():
    """交给 torch 的矩阵乘放不下（cuBLAS 的工作区）：认得出，说得出是哪一个。"""

    def fail(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    args = arguments(3, 5, 48, 24, RANK, ROPE, torch.float32)
    library = torch.library.Library("aten", "IMPL")
    library.impl("bmm.out", fail, "CPU")
    try:
        with pytest.raises(DeviceMemoryError, match="算子 mla_layer_decode.*aten::bmm 失败"):
            ops.mla_layer_decode(*fresh(args))
    finally:
        library._destroy()
