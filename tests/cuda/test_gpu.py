"""CUDA 算子与参考实现比较：有 GPU 就在 GPU 上，没有就在主机模拟上。"""

from __future__ import annotations

import threading

import pytest
import torch

from deepseek_opt import _native, ops, reference
from tests.cuda.cases import CACHE_SHAPES, DTYPES, NORM_SHAPES, ROPE_SHAPES, randn
from tests.cuda.device import DEVICE, LARGE, ON_GPU, marks, needs_gpu
from tests.op_cases import QUANTIZED, attention, bits, paged
from tests.tolerances import tol

pytestmark = marks
EPS = 1e-6
# 真卡上才跑的大形状：模拟太慢。
BIG_NORMS = [(1000, 2048), (4096, 7168), (100_003, 512)] if LARGE else []
BIG_ROPES = [(2, 1000, 16, 64)] if LARGE else []
# (B, T, S, H, (r, dr, dn, dv))：三种行数、三种秩、通用路径；真卡上另有模型的大小。
DECODES = [
    (2, 1, 70, 4, (128, 32, 16, 16)),
    (1, 2, 150, 12, (256, 0, 16, 16)),
    (2, 3, 90, 20, (512, 64, 16, 16)),
    (2, 2, 40, 3, (33, 6, 9, 5)),
]
PREFILLS = [(2, 70, 90, 2, (64, 16, 32, 64)), (1, 130, 130, 2, (64, 64, 128, 128)), DECODES[-1]]
if LARGE:
    DECODES += [(32, 1, 4096, 16, (512, 64, 128, 128)), (8, 4, 1000, 128, (512, 64, 128, 128))]
    PREFILLS += [(2, 1000, 1500, 16, (512, 64, 128, 128))]


@needs_gpu
def test_library_is_loaded():
    assert _native.cuda_loaded(), _native.cuda_load_error()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, dim", [*NORM_SHAPES, *BIG_NORMS])
def test_rms_norm(rows, dim, dtype):
    x = randn(rows, dim, dtype=dtype).to(DEVICE)
    weight = randn(dim, dtype=dtype, seed=1).to(DEVICE)
    expected = reference.rms_norm(x, weight, EPS)
    torch.testing.assert_close(ops.rms_norm(x, weight, EPS), expected, **tol(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, dim", NORM_SHAPES)
def test_add_rms_norm(rows, dim, dtype):
    x, residual = (
        randn(rows, dim, dtype=dtype).to(DEVICE),
        randn(rows, dim, dtype=dtype, seed=2).to(DEVICE),
    )
    weight = randn(dim, dtype=dtype, seed=1).to(DEVICE)
    y, total = ops.add_rms_norm(x, residual, weight, EPS)
    expected, added = reference.add_rms_norm(x, residual, weight, EPS)
    torch.testing.assert_close(total, added, rtol=0, atol=0)
    torch.testing.assert_close(y, expected, **tol(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, dim", [*NORM_SHAPES, *BIG_NORMS[:1]])
def test_rms_norm_backward(rows, dim, dtype):
    """经过 autograd：输入与权重的梯度对 fp64 参考。"""
    x = randn(rows, dim, dtype=dtype).to(DEVICE).requires_grad_()
    weight = randn(dim, dtype=dtype, seed=1).to(DEVICE).requires_grad_()
    grad = randn(rows, dim, dtype=dtype, seed=3).to(DEVICE)
    ops.rms_norm(x, weight, EPS).backward(grad)
    wide = x.detach().double().requires_grad_()
    scale = weight.detach().double().requires_grad_()
    reference.rms_norm(wide, scale, EPS).backward(grad.double())
    limits = tol(dtype)
    torch.testing.assert_close(x.grad, wide.grad.to(dtype), **limits)
    limits["atol"] *= rows**0.5  # rows 项之和
    torch.testing.assert_close(weight.grad, scale.grad.to(dtype), **limits)


def test_rms_norm_backward_is_deterministic():
    x, weight, grad = (
        randn(*s, seed=i).to(DEVICE) for i, s in enumerate([(999, 512), (512,), (999, 512)])
    )
    first = torch.ops.deepseek_opt.rms_norm_backward(grad, x, weight, EPS)
    for _ in range(5):
        again = torch.ops.deepseek_opt.rms_norm_backward(grad, x, weight, EPS)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved, keep", [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [*ROPE_SHAPES, *BIG_ROPES])
def test_rope(shape, inverse, interleaved, keep, dtype):
    batch, steps, _, dim = shape
    x = randn(*shape, dtype=dtype).to(DEVICE)
    angle = randn(batch, steps, dim // 2, seed=4).to(DEVICE)
    for rows in (1, batch):
        cos, sin = angle[:rows].cos(), angle[:rows].sin()
        y = ops.rope(x, cos, sin, interleaved, inverse, keep)
        expected = reference.rope(x, cos, sin, interleaved, inverse, keep)
        torch.testing.assert_close(y, expected, **tol(dtype))


def test_rope_strided_heads():
    q = randn(2, 30, 4, 192, dtype=torch.bfloat16).to(DEVICE)
    angle = randn(1, 30, 32, seed=4).to(DEVICE)
    x = q[..., 128:]
    expected = reference.rope(x, angle.cos(), angle.sin(), True)
    torch.testing.assert_close(
        ops.rope(x, angle.cos(), angle.sin(), True), expected, **tol(x.dtype)
    )


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", [*DTYPES, *QUANTIZED], ids=str)
@pytest.mark.parametrize("where", sorted({"cpu", DEVICE}))
@pytest.mark.parametrize("shape", CACHE_SHAPES)
def test_mla_cache_write(shape, where, target, source):
    batch, steps, capacity, rank, rope_dim = shape
    keys = source if target in QUANTIZED else target
    latent = randn(batch, steps, rank, dtype=source).to(DEVICE)
    rope = randn(batch, steps, rope_dim, dtype=source, seed=1).to(DEVICE)
    offsets = torch.arange(batch, device=where) % (capacity - steps + 1)

    def caches():
        scale = torch.full((batch, capacity), 9.0, device=DEVICE) if target in QUANTIZED else None
        full = torch.full((batch, capacity, rank), 7, device=DEVICE).to(target)
        return full, torch.full((batch, capacity, rope_dim), 7, device=DEVICE).to(keys), scale

    mine, expected = caches(), caches()
    ops.mla_cache_write(*mine, latent, rope, offsets)
    reference.mla_cache_write(*expected, latent, rope, offsets)
    for ours, theirs in zip(mine, expected, strict=True):
        if ours is not None:
            limit = 1 if ours.dtype in QUANTIZED else 0  # 量化的差至多一个码
            torch.testing.assert_close(bits(ours), bits(theirs), rtol=1e-6, atol=limit)


def test_mla_cache_write_out_of_range():
    """CPU 上的 offsets 先检查：消息说清是哪一行，缓存不变。"""
    cache, keys = torch.ones(1, 4, 8, device=DEVICE), torch.ones(1, 4, 2, device=DEVICE)
    latent, rope = torch.zeros(1, 3, 8, device=DEVICE), torch.zeros(1, 3, 2, device=DEVICE)
    with pytest.raises(Exception, match="槽位"):
        ops.mla_cache_write(cache, keys, None, latent, rope, torch.tensor([2]))
    assert (cache == 1).all() and (keys == 1).all()


@needs_gpu
def test_mixed_devices():
    with pytest.raises(Exception, match="weight|device|设备"):
        torch.ops.deepseek_opt.rms_norm(torch.ones(2, 8, device=DEVICE), torch.ones(8), EPS)


@needs_gpu
def test_first_tensor_on_the_host():
    x, weight = torch.ones(2, 8), torch.ones(8, device=DEVICE)
    with pytest.raises(ValueError, match="rms_norm：全部.*x 在 cpu，weight 在 cuda:0"):
        ops.rms_norm(x, weight, EPS)
    with pytest.raises(ValueError, match="全部张量应在同一设备上，实际有的在 CPU 上"):
        torch.ops.deepseek_opt.rms_norm(x, weight, EPS)


@needs_gpu
def test_side_stream():
    """在当前流上启动：换一条流，结果一样且不必等默认流。"""
    x, weight = randn(64, 512).to(DEVICE), randn(512, seed=1).to(DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = ops.rms_norm(x, weight, EPS)
    stream.synchronize()
    torch.testing.assert_close(y, reference.rms_norm(x, weight, EPS), **tol(x.dtype))


@needs_gpu
def test_compile_and_graph():
    """torch.compile(fullgraph=True) 与 CUDA graph 都能用。"""
    x, weight = (
        randn(64, 512, dtype=torch.bfloat16).to(DEVICE),
        torch.ones(512).to(DEVICE).bfloat16(),
    )
    angle = randn(1, 4, 32, seed=4).to(DEVICE)

    def step(value):
        y = ops.rms_norm(value, weight, EPS)
        return ops.rope(y.view(4, 4, 32, 64), angle.cos(), angle.sin(), True)

    expected = step(x)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(x), expected, **tol(x.dtype))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@needs_gpu
def test_early_launch_changes_nothing(monkeypatch):
    """一长串短核，缓冲反复分到同一块：提前启动与否、录不录成图，逐位相同。"""
    x = randn(8, 2048, dtype=torch.bfloat16).to(DEVICE)
    weight = torch.ones(2048, device=DEVICE, dtype=torch.bfloat16)

    def chain():
        total = x
        for _ in range(200):
            y = ops.rms_norm(total, weight, EPS)
            y, total = ops.add_rms_norm(y, total, weight, EPS)
        return y, total

    monkeypatch.setenv("DEEPSEEK_OPT_CUDA_PDL", "0")
    want = chain()
    monkeypatch.setenv("DEEPSEEK_OPT_CUDA_PDL", "1")
    early = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = chain()
    graph.replay()
    torch.cuda.synchronize()
    for got in (early, recorded):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def on_device(case, spans: bool = False):
    """case 的张量送到设备；spans 默认留在 CPU 上（由绑定检查）。"""
    moved = {
        name: None if value is None else value.to(DEVICE)
        for name, value in vars(case).items()
        if value is None or isinstance(value, torch.Tensor)
    }
    if not spans:
        moved["spans"] = case.spans
    return case.but(**moved)


@pytest.mark.sanitize
@pytest.mark.parametrize("resident", [False, True], ids=["主机的 spans", "设备的 spans"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", DECODES, ids=str)
def test_mla_decode(shape, dtype, resident):
    case = attention(*shape, dtype=dtype, masked=True)
    got = ops.mla_decode(*on_device(case, resident).args())
    exact = on_device(case, True).exact()[0]  # 大的形状在 CPU 上太慢
    torch.testing.assert_close(got.double(), exact, **tol(dtype))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("cache", QUANTIZED, ids=str)
def test_mla_decode_quantized(cache, dtype):
    case = attention(2, 1, 150, 16, (512, 64, 16, 16), dtype=dtype, cache=cache, masked=True)
    got = ops.mla_decode(*on_device(case).args())
    torch.testing.assert_close(got.cpu().double(), case.exact()[0], **tol(torch.int8))


@pytest.mark.sanitize
@pytest.mark.parametrize("where", sorted({"cpu", DEVICE}))
@pytest.mark.parametrize("page_size", [1, 25, 64])
@pytest.mark.parametrize("cache", [torch.bfloat16, *QUANTIZED], ids=str)
@pytest.mark.parametrize("dims", [(512, 64, 16, 16), (33, 6, 9, 5)], ids=str)
def test_mla_decode_paged(dims, cache, page_size, where):
    slots = page_size * -(-150 // page_size)
    case = attention(2, 2, slots, 9, dims, dtype=torch.bfloat16, cache=cache, masked=True)
    *args, table = (a.to(DEVICE) if torch.is_tensor(a) else a for a in paged(case, page_size))
    args[5] = args[5].to(where)
    wide = torch.full((2, table.shape[1] + 3), -9, dtype=torch.int32, device=where)
    wide[:, : table.shape[1]] = table
    got = ops.mla_decode(*args, wide[:, : table.shape[1]])  # 一张宽表的前几列
    torch.testing.assert_close(got.cpu().double(), case.exact()[0], **tol(torch.bfloat16))


@pytest.mark.parametrize("page_size", [8, 16, 24, 64])
@pytest.mark.parametrize("heads", [8, 64, 128])
def test_mla_decode_paged_rows(heads, page_size):
    """各行从页的中间起、长短不一；行少、行多与一个 cluster 的路径。"""
    slots = page_size * -(-250 // page_size)
    begin, end = [3, 100, 63, 0], [slots, 181, 64, 200]
    shape = (4, 1, slots, heads, (512, 64, 16, 16))
    case = attention(*shape, dtype=torch.bfloat16, begin=begin, end=end)
    want = case.exact()[0]
    args = (a.to(DEVICE) if torch.is_tensor(a) else a for a in paged(case, page_size))
    got = ops.mla_decode(*args)
    torch.testing.assert_close(got.cpu().double(), want, **tol(torch.bfloat16))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", PREFILLS, ids=str)
def test_mla_prefill_and_gradients(shape, dtype):
    case = attention(*shape, dtype=dtype, masked=True)
    exact = case.leaves(torch.float64)
    want, sums = reference.mla_prefill(*case.with_leaves(exact).args())
    grad = torch.randn_like(want)
    want.backward(grad)
    device = on_device(case)
    leaves = device.leaves()
    out, lse = ops.mla_prefill(*device.with_leaves(leaves).args())
    out.backward(grad.to(DEVICE, out.dtype))
    torch.testing.assert_close(out.cpu().double(), want.detach(), **tol(dtype))
    torch.testing.assert_close(lse.cpu().double(), sums.detach(), **tol(dtype))
    for ours, theirs in zip(leaves, exact, strict=True):
        limits = tol(dtype)  # 梯度是许多项之和：绝对误差按它自己的大小
        limits["atol"] *= max(1.0, theirs.grad.abs().max().item())
        torch.testing.assert_close(ours.grad.cpu().double(), theirs.grad, **limits)


def test_attention_is_deterministic():
    """再算几次逐位相同：没有原子加，划分只取决于形状。"""
    case = on_device(attention(3, 2, 500, 16, (512, 64, 16, 16), dtype=torch.bfloat16))
    first = ops.mla_decode(*case.args())
    for _ in range(3 if ON_GPU else 1):
        assert torch.equal(first, ops.mla_decode(*case.args()))
    case = on_device(attention(1, 90, 90, 2, (64, 16, 32, 64), dtype=torch.bfloat16))
    out, lse = ops.mla_prefill(*case.args())
    args = (out, case.q, case.latent, case.rope, case.kv_b, case.spans, None, out, lse)
    backward = torch.ops.deepseek_opt.mla_prefill_backward
    options = (case.softmax_scale, case.v_head_dim, True)
    first = backward(*args, *options)
    for _ in range(3 if ON_GPU else 1):
        for one, other in zip(first, backward(*args, *options), strict=True):
            assert torch.equal(one, other)


def test_callers_in_threads():
    """几个线程同时调用：各自的结果都对。"""
    cases = [
        on_device(attention(1, 1, 60 + n, 4, (64, 16, 8, 8), dtype=torch.bfloat16))
        for n in range(4)
    ]
    alone = [ops.mla_decode(*case.args()) for case in cases]
    found = [None] * 4

    def work(index: int) -> None:
        for _ in range(3):
            found[index] = ops.mla_decode(*cases[index].args())

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, found, strict=True):
        assert torch.equal(one, other)


@needs_gpu
def test_decode_in_a_graph():
    """mla_decode 收进 CUDA graph；重放时长度变了（spans 在设备上改），结果跟着变。"""
    case = on_device(attention(4, 1, 600, 16, (512, 64, 16, 16), dtype=torch.bfloat16), True)
    ops.mla_decode(*case.args())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.mla_decode(*case.args())
    for length in (600, 1, 333):
        case.spans[:, 3] = case.spans[:, 2] + length
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, ops.mla_decode(*case.args()))


@needs_gpu
def test_no_host_synchronisation():
    """一切在设备上时，解码不等 GPU（等了就报错）。"""
    case = on_device(attention(4, 1, 600, 16, (512, 64, 16, 16), dtype=torch.bfloat16), True)
    ops.mla_decode(*case.args())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.mla_decode(*case.args())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_attention_on_a_side_stream():
    case = on_device(attention(2, 1, 300, 16, (512, 64, 16, 16), dtype=torch.bfloat16))
    expected = ops.mla_decode(*case.args())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = ops.mla_decode(*case.args())
    stream.synchronize()
    assert torch.equal(got, expected)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="要两块 GPU")
def test_second_device():
    case = attention(2, 1, 300, 16, (512, 64, 16, 16), dtype=torch.bfloat16)
    first = on_device(case)
    second = first.but(
        **{k: v.to("cuda:1") for k, v in vars(first).items() if getattr(v, "is_cuda", False)}
    )
    assert torch.equal(ops.mla_decode(*first.args()), ops.mla_decode(*second.args()).to("cuda:0"))
    with pytest.raises(Exception, match="latent"):
        ops.mla_decode(*first.but(latent=second.latent).args())
