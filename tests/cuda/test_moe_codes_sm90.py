"""moe_experts 的 int4、一块至多 8 个词元的 Hopper 路径（moe_codes_sm90.cu）：对照 fp64 与原来的路径，次序、切分无关。

有 Hopper 的卡就在卡上，没有就在主机模拟上。
"""

from __future__ import annotations

import pytest
import torch

from deepseek_opt.quantize import quantize_experts
from tests import quantized_cases as quantized
from tests.cuda import host_library
from tests.cuda.device import ON_GPU, marks
from tests.cuda.test_gpu_moe import check_quantized, quantized_on_device
from tests.cuda.test_orders import same_in_every_order
from tests.moe_cases import close, experts
from tests.op_cases import randn

pytestmark = marks
BF16 = torch.bfloat16
FORMS = quantized.FORMATS[1:]
INT4 = (4, 64, True)
simulated = pytest.mark.skipif(ON_GPU, reason="要在主机模拟上")


@pytest.fixture(autouse=True)
def _hopper(monkeypatch):
    """模拟一块 Hopper 的卡；这条路径默认不用。"""
    monkeypatch.setenv("DSO_HOST_MAJOR", "9")
    monkeypatch.setenv("DEEPSEEK_OPT_CUDA_CODES", "1")


def boxes(run) -> tuple[torch.Tensor, int]:
    """run() 的结果，其中 TMA 读了几个框：词元少时只有这条路径用它。"""
    library = host_library.load()
    library.dso_host_reset_counts()
    return run(), library.dso_host_boxes()


def check(case, dtype=BF16, used=True):
    """对照 fp64；走的是不是这条路径；与原来的路径只差舍入。"""
    check_quantized(case, dtype)
    if ON_GPU:
        return
    got, count = boxes(case.run)
    assert (count > 0) == used
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSO_HOST_MAJOR", "8")
        old, count = boxes(case.run)
    assert count == 0
    close(got, old.double(), dtype)


def spread(tokens: int, count: int, top_k: int = 2) -> torch.Tensor:
    """各个专家都有几个词元，第 1 个没有；有几个不在本地的。"""
    index = (torch.arange(tokens * top_k) * 7 % count).view(tokens, top_k)
    index[index == 1] = 0
    index[::5, 0] = count + 2
    return index


def make(sizes, form=INT4, count=13, **options):
    """专家多，所以一块 8 行。"""
    options.setdefault("dtype", BF16)
    options.setdefault("indices", spread(sizes[0], count))
    return quantized.make(sizes, form, count=count, **options)


def with_shared(case, inner: int, form=INT4, scaled=False):
    """加上量化的共享专家，中间宽 inner；form 为 None 时不量化。"""
    k, n, dtype = case.x.shape[1], case.down.shape[1], case.x.dtype
    weights = [randn(1, r, c, scale=c**-0.5) for r, c in ((inner, k), (inner, k), (n, inner))]
    extra = [torch.rand(len(case.x)).to(dtype)] if scaled else []
    if form is None:
        return case.but(shared=(*(w[0].to(dtype) for w in weights), *extra))
    stacks = [quantize_experts(w, *form) for w in weights]
    zeros = () if form[2] else tuple(q.zero[0] for q in stacks)
    shared = (*(q.packed[0] for q in stacks), *extra)
    scales = tuple(q.scale[0] for q in stacks)
    return case.but(shared=shared, shared_scale=scales, shared_zero=zeros)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tokens, dtype", [(5, torch.float16), (17, BF16)])
def test_forms(form, tokens, dtype):
    """各种组的大小；有、没有零点与偏置；列不是 16 的倍数、K 不满一级。"""
    k, inner = (264, 72) if form[2] else (form[1] * 4, form[1] * 4)  # 有零点时一行的组数是 4 的倍数
    check(make((tokens, k, inner, 40), form, dtype=dtype), dtype)
    case = make((tokens, form[1] * 4, form[1] * 4, 24), form, dtype=dtype)
    check(quantized.with_bias(case, dtype), dtype)
    check(make((tokens, k, k, 24), form, dtype=dtype, gated=False, activation="relu2"), dtype)


@pytest.mark.parametrize("tokens", [5, 64])
def test_tokens(tokens):
    """词元都到一个专家（几块）、分散；一块满、不满。"""
    sizes, count = (tokens, 320, 136, 136), 37
    check(make(sizes, count=count))
    check(make(sizes, count=count, indices=torch.full((tokens, 1), 3)))
    index = torch.arange(tokens * 2).view(tokens, 2) * 5 % count
    index[:, 0] = 3
    check(make(sizes, count=count, indices=index))


@pytest.mark.parametrize("stages", [1, 2, 5, 9])
def test_pieces(stages):
    """一份几级、几段；列少得有的 warp、CTA 没有事做，一份分在几个 warp。"""
    case = make(
        (9, 256 * stages - 64, 256 * stages - 64, 24), count=3, indices=torch.ones(9, 1).long()
    )
    check(case)
    check(make((6, 256 * stages, 8, 8), count=7))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "clipped", "clipped_silu"])
def test_activations(activation):
    check(quantized.with_bias(make((9, 128, 72, 40), activation=activation)))


def test_large_zero_points():
    """零点可以是任意的 8 位数。"""
    for form in ((4, 32, False), (4, 128, False)):
        case = make((9, 512, 512, 40), form)
        up, down = (q._replace(zero=torch.randint_like(q.zero, 256)) for q in (case.up, case.down))
        check(case.but(up=up, down=down))


@pytest.mark.parametrize("form", [INT4, (4, 128, False), (4, 32, True)], ids=str)
@pytest.mark.parametrize("tokens, scaled", [(5, True), (17, False)])
def test_shared(tokens, form, scaled):
    """同样量化的共享专家，一起做：更宽、更窄。"""
    for inner in (24, 520) if form[2] else (512,):
        check(with_shared(make((tokens, 512, 512, 72), form), inner, form, scaled))


@pytest.mark.parametrize("tokens", [5, 17])
def test_shared_of_another_kind(tokens):
    """共享专家的存法不同：各启动一次，只有 int4 的走这条路径。"""
    case = make((tokens, 272, 80, 40))
    check(with_shared(case, 48, None, True))
    check(with_shared(case, 48, quantized.INT8))
    everyone = torch.full((tokens, 1), 99)  # 路由的都不在本地
    check(with_shared(case.but(indices=everyone, weights=case.weights[:, :1].contiguous()), 48))


@pytest.mark.parametrize("form", [INT4, (4, 64, False)], ids=str)
def test_shared_in_either_order(form):
    """共享专家的 gate、up 是两个张量，哪个在前都可以。"""
    case = with_shared(make((7, 256, 256, 40), form), 40, form)
    gate, up, down = case.shared
    for first, second in ((0, 1), (1, 0)):
        both = torch.empty(2, *gate.shape, dtype=gate.dtype)
        both[first], both[second] = gate, up
        scales = torch.empty(2, *case.shared_scale[0].shape)
        scales[first], scales[second] = case.shared_scale[:2]
        scale = (scales[first], scales[second], case.shared_scale[2])
        check(case.but(shared=(both[first], both[second], down), shared_scale=scale))


def test_nan_stays_in_its_token():
    case = make((9, 264, 72, 40))
    clean = quantized_on_device(case).run().cpu()
    x = case.x.clone()
    x[[3, 8]] = torch.nan
    rest = torch.ones(9, dtype=torch.bool)
    rest[[3, 8]] = False
    torch.use_deterministic_algorithms(True)  # empty 填上 NaN
    try:
        got = quantized_on_device(case.but(x=x)).run().cpu()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(got[rest], clean[rest]) and got[~rest].isnan().all()


def test_order_of_tokens_does_not_matter():
    """词元换个次序，落在别的块、别的 CTA、别的 warp：各词元的结果逐位相同。"""
    case = with_shared(make((17, 1288, 328, 40), indices=spread(17, 13, 3)), 48)
    first, order = quantized_on_device(case).run().cpu(), torch.randperm(17)
    moved = case.but(x=case.x[order], indices=case.indices[order], weights=case.weights[order])
    assert torch.equal(quantized_on_device(moved).run().cpu(), first[order])
    alone = case.but(x=case.x[:5], indices=case.indices[:5], weights=case.weights[:5])
    assert torch.equal(quantized_on_device(alone).run().cpu(), first[:5])


@simulated
@pytest.mark.parametrize("sms", [1, 2, 7, 40])
def test_grid_does_not_matter(monkeypatch, sms):
    case = make((11, 776, 328, 40))
    first = case.run()
    monkeypatch.setenv("DSO_HOST_SMS", str(sms))
    assert torch.equal(case.run(), first)


@simulated
@pytest.mark.parametrize("form", [INT4, (4, 128, False), (4, 32, True)], ids=str)
def test_every_order_gives_the_same_bits(monkeypatch, form):
    index = spread(19, 13)
    index[:, 1] = 4  # 一个专家几块
    case = with_shared(make((19, 1024, 512, 40), form, indices=index), 512, form)
    same_in_every_order(monkeypatch, lambda: (case.run(),))
    if form[2]:
        case = make((9, 264, 72, 40), form)
        same_in_every_order(monkeypatch, lambda: (case.run(),))


@simulated
def test_falls_back(monkeypatch):
    """零点的行不是 4 的倍数、共享内存放不下：原来的路径。"""
    check(make((9, 320, 64, 40), (4, 64, False)), used=False)
    check(make((9, 320, 256, 40), (4, 64, False)))  # 只有 o 的一步
    case = make((9, 320, 64, 40))
    first = case.run()
    monkeypatch.setenv("DSO_HOST_SHARED", str(99 << 10))
    got, count = boxes(case.run)
    assert count > 0 and torch.equal(got, first)
    monkeypatch.setenv("DSO_HOST_SHARED", str(48 << 10))
    check(case, used=False)
    monkeypatch.delenv("DSO_HOST_SHARED")
    check(make((4, 320, 64, 40)), used=False)  # 不排序
    plain = experts((9, 64, 72, 40), 13, dtype=BF16)
    assert boxes(plain.run)[1] == 0


@simulated
@pytest.mark.parametrize("limit", [128, 227])
def test_large_depth(monkeypatch, limit):
    """x 占得多：级数少到独占一个 SM；再多就放不下。"""
    monkeypatch.setenv("DSO_HOST_SHARED", str(limit << 10))
    check(make((5, 6144, 16, 8), count=3), used=True)
