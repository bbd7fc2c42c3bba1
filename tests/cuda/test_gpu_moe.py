"""moe_experts 的各条 CUDA 路径与 fp64 参考比较：有 GPU 就在 GPU 上，没有就在主机模拟上。"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from deepseek_opt import ops, reference
from deepseek_opt.quantize import quantize_experts
from tests import quantized_cases as quantized
from tests.cuda.device import DEVICE, ON_GPU, marks, needs_gpu
from tests.moe_cases import Experts, Layout, close, experts

pytestmark = marks
HALF = [torch.bfloat16, torch.float16]
LAYOUTS = [
    Layout(),
    Layout("gelu", interleaved=True),
    Layout("clipped", transposed=True, interleaved=True),
    Layout("clipped_silu", transposed=True),
    Layout("relu2", gated=False),
    Layout("gelu_tanh", transposed=True, gated=False),
]
NAMES = ["-".join(map(str, vars(way).values())) for way in LAYOUTS]


def on_device(case: Experts) -> Experts:
    moved = case.map(lambda t: t.to(DEVICE))
    return moved.but(indices=case.indices.to(DEVICE))


def check(case: Experts) -> torch.Tensor:
    want = case.exact().run(reference.moe_experts)
    got = on_device(case).run()
    assert got.dtype == case.x.dtype and got.is_contiguous()
    close(got.cpu(), want, case.x.dtype, str(case.layout))
    return got


def skewed(tokens: int, count: int) -> torch.Tensor:
    """全部词元选 0 号，第二个分散在 1 到 count - 2；最后一个专家没有词元；有几个哨兵。"""
    second = torch.randint(1, count - 1, (tokens,))
    second[::7] = count + 3
    return torch.stack((torch.zeros(tokens, dtype=torch.int64), second), -1)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("way", LAYOUTS, ids=NAMES)
def test_layouts(way, dtype):
    """跨过块的边：行数、列数、K 都不是块的倍数；有、没有偏置。"""
    index = skewed(150, 5)
    for bias in (False, True):
        case = experts((150, 72, 88, 136), 5, dtype=dtype, layout=way, bias=bias, indices=index)
        check(case)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shared", [3, 4])
def test_shared(shared, dtype):
    case = experts((140, 40, 23, 48), 5, dtype=dtype, shared=shared, indices=skewed(140, 5))
    check(case)  # 中间宽 24 对齐，23 不对齐：走通用路径
    case = experts((140, 40, 31, 48), 5, dtype=dtype, shared=shared, indices=skewed(140, 5))
    inner = case.but(
        gate_up=case.gate_up[:, :48].contiguous(), down=case.down[..., :24].contiguous()
    )
    check(inner)


@pytest.mark.sanitize
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 127, 128, 129, 300])
def test_tile_boundaries(tokens):
    """一个专家得到全部词元；别的专家没有。"""
    index = torch.full((tokens, 1), 2)
    check(experts((tokens, 32, 40, 48), 4, dtype=torch.bfloat16, indices=index))


@pytest.mark.sanitize
@pytest.mark.parametrize("depth", [8, 24, 32, 40, 96, 128, 264])
def test_depths(depth):
    """K 从不满一级到填满流水。"""
    for transposed in (False, True):
        way = Layout(transposed=transposed)
        check(experts((20, depth, depth, 16), 3, dtype=torch.bfloat16, layout=way))


def test_deterministic():
    case = on_device(experts((300, 64, 72, 80), 6, 3, dtype=torch.bfloat16))
    first = case.run()
    assert all(torch.equal(first, case.run()) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_nothing_to_do(dtype):
    """没有词元、全是哨兵、没有选择。"""
    empty = on_device(experts((0, 16, 24, 32), 3, dtype=dtype))
    assert empty.run().shape == (0, 32)
    everyone = experts((9, 16, 24, 32), 3, dtype=dtype, indices=torch.full((9, 2), 3))
    assert (on_device(everyone).run() == 0).all()
    check(experts((9, 16, 24, 32), 3, dtype=dtype, shared=3, indices=torch.full((9, 2), 3)))
    none = torch.zeros(9, 0, dtype=torch.int64)
    check(experts((9, 16, 24, 32), 3, dtype=dtype, shared=4, indices=none))


def test_many_slots():
    """slot 多于一个 CTA 排的：直方图、前缀和、写出三个核。"""
    for tokens, count in ((700, 7), (3000, 200)) if ON_GPU else ((700, 7),):
        check(experts((tokens, 8, 8, 8), count, 6, dtype=torch.bfloat16))
        check(experts((tokens, 3, 5, 7), count, 6))
    check(experts((70, 8, 8, 8), 300, 8, dtype=torch.bfloat16))  # 专家多于一块的线程


# ---- 量化的权重 ----

SIZES = [(9, 64, 96, 40), (140, 160, 32, 72), (70, 48, 80, 16)]
ALL_FORMATS = [*quantized.FORMATS, *quantized.FP8_FORMATS]


def quantized_on_device(case):
    def move(value):
        if isinstance(value, torch.Tensor):
            return value.to(DEVICE)
        if type(value) is tuple:
            return tuple(move(v) for v in value)
        if isinstance(value, tuple):  # QuantizedExperts
            return value._replace(**{k: move(v) for k, v in value._asdict().items()})
        return value

    return case.but(**{f.name: move(getattr(case, f.name)) for f in dataclasses.fields(case)})


def check_quantized(case, dtype):
    want = case.exact()
    got = quantized_on_device(case).run()
    assert got.dtype == case.x.dtype and got.is_contiguous()
    close(got.cpu(), want, dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("form", ALL_FORMATS, ids=str)
def test_quantized(form, dtype):
    for sizes in SIZES:
        index = skewed(sizes[0], 5)
        case = quantized.make(sizes, form, count=5, dtype=dtype, indices=index)
        check_quantized(case, dtype)
        check_quantized(quantized.with_bias(case), dtype)
    case = quantized.make(SIZES[0], form, dtype=dtype, gated=False, activation="relu2")
    check_quantized(case, dtype)


@pytest.mark.parametrize("form", [quantized.INT8, quantized.INT4, *quantized.FP8_FORMATS], ids=str)
@pytest.mark.parametrize("tokens", [3, 150])
def test_quantized_with_shared(tokens, form):
    """共享专家没有量化、同样量化、int8 的共享配 int4、fp8 的路由。"""
    dtype = torch.bfloat16
    case = quantized.make((tokens, 64, 96, 48), form, dtype=dtype)
    shared = experts((tokens, 64, 31, 48), 1, 1, dtype=dtype, shared=4).shared
    check_quantized(case.but(shared=shared), dtype)
    stacks = [
        quantize_experts(torch.randn(1, *size) / 8, 8) for size in ((32, 64), (32, 64), (48, 32))
    ]
    packed = {"shared": tuple(q.packed[0] for q in stacks)}
    packed["shared_scale"] = tuple(q.scale[0] for q in stacks)
    check_quantized(case.but(**packed), dtype)
    check_quantized(quantized.with_shared(case, form, 4), dtype)


@pytest.mark.parametrize("form", quantized.FP8_FORMATS, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 33, 140])
def test_fp8_shapes(tokens, form):
    """K 跨过、不满一组（128）、一步（64）、一级（32）；不是 16 的倍数的走通用路径；词元都到一个专家。"""
    for dtype in HALF:
        for k, inner, n in ((16, 48, 8), (272, 144, 40), (130, 33, 15)):
            case = quantized.make((tokens, k, inner, n), form, dtype=dtype)
            check_quantized(case, dtype)
            check_quantized(case.but(indices=torch.zeros_like(case.indices)), dtype)
    check_quantized(quantized.make((tokens, 200, 40, 24), form), torch.float32)


@pytest.mark.parametrize("form", quantized.FP8_FORMATS, ids=str)
@pytest.mark.parametrize("tokens", [3, 20, 140])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_fp8_codes(tokens, form, dtype):
    """全部 254 个有限的码都对；NaN 的码给出 NaN，只影响它那一列。"""
    index = torch.zeros(tokens, 1, dtype=torch.int64)
    case = quantized.make((tokens, 256, 16, 16), form, dtype=dtype, indices=index, count=1)
    codes = torch.arange(256, dtype=torch.uint8)
    codes[[127, 255]] = 0
    packed = codes.expand(1, 32, 256).contiguous().view(torch.float8_e4m3fn)
    scale = torch.full_like(case.up.scale, 1e-3)
    case = case.but(up=case.up._replace(packed=packed, scale=scale))
    check_quantized(case, dtype)
    broken = case.down.packed.clone()
    broken.view(torch.uint8)[0, 3, 9] = 0xFF
    got = quantized_on_device(case.but(down=case.down._replace(packed=broken))).run().cpu()
    assert got[:, 3].isnan().all()
    got[:, 3] = 0
    assert got.isfinite().all()


# ---- 词元少的路径 ----


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 20, 33, 64])
def test_few_tokens(tokens, dtype):
    """1、2、4 份 8 个词元的块，多于一块的专家；K 不满一步、不满一段。"""
    for way in (Layout(), Layout("gelu", interleaved=True), Layout("relu2", gated=False)):
        case = experts((tokens, 136, 40, 48), 6, dtype=dtype, layout=way, bias=True)
        check(case)
        check(case.but(indices=torch.zeros_like(case.indices)))
    check(experts((tokens, 8, 2048 if tokens == 1 else 8, 8), 2, dtype=dtype))
    check(experts((tokens, 520, 31, 24), 3, dtype=dtype, shared=4))


@pytest.mark.parametrize("form", ALL_FORMATS, ids=str)
@pytest.mark.parametrize("tokens", [1, 12, 40])
def test_few_tokens_quantized(tokens, form):
    for depth in (48, 144, 400):
        case = quantized.make((tokens, depth, depth, 24), form, dtype=torch.bfloat16)
        check_quantized(quantized.with_bias(case), torch.bfloat16)
    case = quantized.make((tokens, 64, 32, 72), form, dtype=torch.float16, gated=False)
    check_quantized(case, torch.float16)


@pytest.mark.sanitize
@pytest.mark.parametrize("tokens", [4, 6, 20])
@pytest.mark.parametrize("form", [None, quantized.INT8, (4, 64, False), quantized.FP8_128], ids=str)
def test_many_columns(form, tokens):
    """列多时一个 CTA 的 warp 各管各的列（不分 K，或两个一分）；最后一个 CTA 的列不满。
    专家多，所以一块 8 行：3 号专家的词元分成几块。"""
    sizes, index = (tokens, 48, 352, 728), torch.arange(tokens * 8).view(-1, 8) * 7 % 40
    index[:, 0] = 3
    if form is None:
        check(experts(sizes, 40, dtype=torch.bfloat16, bias=True, indices=index))
        return
    case = quantized.make(sizes, form, count=40, dtype=torch.bfloat16, indices=index)
    check_quantized(quantized.with_bias(case), torch.bfloat16)


@pytest.mark.parametrize("form", [None, *quantized.FORMATS, *quantized.FP8_FORMATS], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_few_long_rows(rows, form):
    """K 长：一个 warp 走好几圈；int4 的 x 分几段搬进共享内存。组数是、不是 4 的倍数；最后一步不满。"""
    index = torch.zeros(rows, 1, dtype=torch.int64)
    if rows == 3:  # 一块 3 行，而不走一个词元一块的路径
        index = torch.tensor([[0], [1], [0], [1], [1], [0]])
    for k, inner in ((2048, 16), (2192, 16), (48, 1040), (48, 2048)):
        sizes = (len(index), k, inner, 8)
        if form is None:
            check(experts(sizes, 2, 1, dtype=torch.bfloat16, indices=index))
        else:
            case = quantized.make(sizes, form, count=2, dtype=torch.bfloat16, indices=index)
            check_quantized(case, torch.bfloat16)


def test_large_zero_points():
    """零点可以是任意的 8 位数：减法仍精确。"""
    case = quantized.make((5, 64, 96, 40), (4, 32, False), dtype=torch.bfloat16)
    up, down = (q._replace(zero=torch.randint_like(q.zero, 256)) for q in (case.up, case.down))
    check_quantized(case.but(up=up, down=down), torch.bfloat16)


@pytest.mark.sanitize
@pytest.mark.parametrize("shared", [0, 3, 4])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5])
def test_direct(tokens, shared):
    """不排序的路径（至多 4 个词元）：哨兵、重复的选择、共享专家、偏置；列数不是 16 的倍数。"""
    index = torch.tensor([[0, 5, 2, 2], [6, 9, 7, 2**40], [3, 3, 3, 3], [1, 2, 3, 4], [0, 0, 6, 8]])
    sizes = (tokens, 136, 79, 40)  # 共享专家的中间宽是 80
    for dtype in HALF:
        case = experts(sizes, 7, dtype=dtype, bias=True, shared=shared, indices=index[:tokens])
        up, down = case.gate_up[:, :144].contiguous(), case.down[..., :72].contiguous()
        check(case.but(gate_up=up, gate_up_bias=case.gate_up_bias[:, :144], down=down))


# ---- 要真的 GPU 的：图、同步、大的形状 ----


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 4, 40, 700])
def test_graph_replay_after_the_routing_changed(tokens):
    """录进 CUDA graph；重放之前换掉下标，结果跟着变。"""
    case = on_device(experts((tokens, 256, 128, 256), 16, 4, dtype=torch.bfloat16))
    case.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run()
    for seed in range(3):
        torch.manual_seed(seed)
        case.indices.copy_(torch.randint(0, 18, case.indices.shape))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, case.run())
        close(out, case.exact().run(reference.moe_experts), torch.bfloat16)


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 40, 700])
def test_no_host_synchronisation(tokens):
    """路由、专家、计数都不等 GPU（等了就报错）。"""
    case = on_device(experts((tokens, 256, 128, 256), 16, 4, dtype=torch.bfloat16, shared=4))
    gate = torch.randn(16, 256, device=DEVICE, dtype=torch.bfloat16)
    ops.moe_route(case.x, gate, top_k=4)
    case.run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.moe_route(case.x, gate, top_k=4)
        case.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("tokens", [1, 5, 64, 300, 4000])
def test_model_sizes(tokens):
    """E=64、K=6 的一层：各路径在真的大小上。"""
    case = experts((tokens, 1024, 704, 1024), 64, 6, dtype=torch.bfloat16)
    got = on_device(case).run()
    wide = on_device(case).map(lambda t: t.double())
    close(got, wide.run(reference.moe_experts), torch.bfloat16)


@pytest.mark.parametrize("tokens", [8, 9, 32, 33])
def test_counts_start_from_zero(tokens):
    """一块写、几块累加，由算 logits 的核清零、单独清零：结果与这块内存里原来的数无关。"""
    x = torch.randn(tokens, 64, device=DEVICE)
    weight = torch.randn(16, 64, device=DEVICE)
    for _ in range(3):
        _, _, indices, counts = ops.moe_route(x, weight, top_k=4)
        want = torch.bincount(indices.flatten(), minlength=16)
        assert torch.equal(counts, want)
        counts.fill_(1 << 40)
        del counts  # 下一次多半分到同一块


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("count, depth", [(5, 8), (40, 248), (77, 1288)])
def test_route_few_tokens(count, depth, dtype):
    """logits 由 mma 分几份算、由 moe_route 的核相加：专家、K 都不是块的倍数；一个词元的结果与别的词元无关。"""
    x = torch.randn(64, depth, device=DEVICE).to(dtype)
    weight = (torch.randn(count, depth, device=DEVICE) / depth**0.5).to(dtype)
    bias = torch.randn(count, device=DEVICE)
    exact = x.double() @ weight.double().T + bias.double()
    want = ops.moe_route(x, weight, bias, bias, top_k=3)
    torch.testing.assert_close(want[0].double(), exact, rtol=1e-5, atol=1e-5)
    for tokens in (1, 8, 9, 17, 33):
        got = ops.moe_route(x[:tokens], weight, bias, bias, top_k=3)
        for a, b in zip(got[:3], want[:3], strict=True):
            assert torch.equal(a, b[:tokens])
        assert torch.equal(got[3], torch.bincount(got[2].flatten(), minlength=count))


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize(
    "count, groups, chosen, top_k",
    [(24, 6, 4, 8), (256, 8, 4, 8), (300, 20, 7, 32), (512, 32, 3, 9), (520, 8, 3, 5),
     (80, 40, 30, 6), (200, 1, 1, 40)],
)  # fmt: skip
@pytest.mark.parametrize("score", ops.SCORES)
def test_route_choice(tokens, count, groups, chosen, top_k, score):
    """在寄存器里选的（每线程 8、16 个），专家、组、top_k 太多、在共享内存里选的；许多平局。"""
    logits = torch.randint(-3, 4, (tokens, count), device=DEVICE).float()
    options = (top_k, score, True, False, groups, chosen, "top2", 2.5, 1e-20)
    got = torch.ops.deepseek_opt.moe_route(logits, None, None, None, *options)
    want = reference.moe_route(logits.double(), None, None, None, *options)
    assert torch.equal(got[2], want[2]) and torch.equal(got[3], want[3])
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-6)


@needs_gpu
def test_route_on_the_device():
    """logits 由自己的核、由 cuBLAS（16 位输入、fp32 输出）、由 fp32 的矩阵乘得到。"""
    cases = [(1, torch.bfloat16), (64, torch.bfloat16), (300, torch.bfloat16), (300, torch.float32)]
    for tokens, dtype in cases:
        x = torch.randn(tokens, 512, device=DEVICE).to(dtype)
        weight = torch.randn(64, 512, device=DEVICE).to(dtype) / 20
        options = (6, "sigmoid", True, False, 8, 3, "top2", 2.5, 1e-20)
        logits, weights, indices, counts = torch.ops.deepseek_opt.moe_route(
            x, weight, None, None, *options
        )
        exact = x.double() @ weight.double().T
        torch.testing.assert_close(logits.double(), exact, rtol=1e-4, atol=1e-4)
        want = reference.moe_route(logits.double(), None, None, None, *options)
        assert torch.equal(indices, want[2]) and torch.equal(counts, want[3])
        torch.testing.assert_close(weights.double(), want[1], rtol=1e-4, atol=1e-5)
