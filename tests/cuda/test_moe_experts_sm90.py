"""moe_experts 的 Hopper 路径（TMA、wgmma）：对照 fp64，偏斜的路由，共享专家，NaN 不外泄，次序无关。

有 Hopper 的卡就在卡上，没有就在主机模拟上；形状都够大，不会落到词元少的路径。
"""

from __future__ import annotations

import pytest
import torch

from deepseek_opt import reference
from tests.cuda import host_library
from tests.cuda.device import ON_GPU, marks
from tests.cuda.test_gpu_moe import check, on_device, skewed
from tests.cuda.test_orders import same_in_every_order
from tests.moe_cases import Layout, experts
from tests.op_cases import assert_no_worse

pytestmark = marks
BF16 = torch.bfloat16
HALF = [BF16, torch.float16]
LAYOUTS = [
    Layout(),
    Layout("gelu", interleaved=True),
    Layout("gelu_tanh"),
    Layout("relu"),
    Layout("relu2", interleaved=True),
    Layout("clipped", interleaved=True),
    Layout("clipped_silu"),
    Layout("silu", gated=False),
    Layout("gelu", gated=False),
]


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """模拟一块 Hopper 的卡；写出、收集没有共享内存的库冲突。"""
    monkeypatch.setenv("DSO_HOST_MAJOR", "9")
    if ON_GPU:
        yield
        return
    library = host_library.load()
    library.dso_host_reset_counts()
    yield
    assert library.dso_host_conflicts() == 0


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("way", LAYOUTS, ids=lambda way: f"{way.activation}-{way.gated}")
def test_layouts(way, dtype):
    """有、没有偏置；行数、列数、K 都不是块的倍数；步数少于、多于级数。"""
    check(experts((130, 72, 88, 136), 5, dtype=dtype, layout=way, indices=skewed(130, 5)))
    case = experts((130, 264, 136, 264), 3, dtype=dtype, layout=way, bias=True)
    check(case.but(indices=skewed(130, 3)))


@pytest.mark.parametrize("tokens", [65, 127, 128, 129, 192, 193, 300])
def test_all_tokens_on_one_expert(tokens):
    """别的专家没有行；一块里只有一组有行、两组都有、多于一块。"""
    index = torch.full((tokens, 1), 2)
    check(experts((tokens, 32, 40, 48), 4, dtype=BF16, indices=index))


@pytest.mark.parametrize("depth", [8, 64, 72, 192, 256, 328])
def test_depths(depth):
    check(experts((70, depth, depth, 16), 2, dtype=BF16, indices=torch.zeros(70, 1).long()))


def test_more_work_than_ctas():
    """一个 CTA 依次做几份：行块、列块都不止一个，级接着用。"""
    check(experts((300, 320, 264, 520), 4, 3, dtype=BF16))


@pytest.mark.parametrize("shared", [3, 4])
def test_shared(shared):
    """共享专家的中间宽与路由的不同：更宽、更窄。"""
    for inner in (40, 280):
        case = experts((140, 264, 31, 136), 3, dtype=BF16, shared=shared, bias=True)
        wide = experts((140, 264, inner, 136), 3, dtype=BF16, bias=True)
        check(wide.but(shared=case.shared, indices=skewed(140, 3)))


def test_views():
    """行距大于行宽的 x、权重；隔一个的专家；expand 出来的（TMA 走不了，换别的路径）。"""
    case = experts((100, 80, 72, 88), 6, dtype=BF16)
    index, weights = case.indices % 3, case.weights

    def part(tensor):
        return tensor[::2, :, : tensor.shape[2] - 8]

    gate_up, down = part(case.gate_up), part(case.down)
    inner = case.but(indices=index, x=case.x[:, :72], gate_up=gate_up, down=down[:, :, :64])
    narrow = inner.but(gate_up=torch.cat((gate_up[:, :64], gate_up[:, 72:136]), 1))
    check(narrow.but(weights=weights))
    one = narrow.gate_up[:1].expand(3, -1, -1)
    check(narrow.but(gate_up=one, down=narrow.down[:1].expand(3, -1, -1)))


def test_nan_stays_in_its_token():
    """一个词元的 NaN 不影响同一块的别的行；没写过的 h（全是 NaN）不影响结果。"""
    case = experts((150, 72, 88, 136), 5, dtype=BF16, indices=skewed(150, 5), shared=0)
    clean = check(case)
    x = case.x.clone()
    x[[7, 100]] = torch.nan
    rest = torch.ones(150, dtype=torch.bool)
    rest[[7, 100]] = False
    torch.use_deterministic_algorithms(True)  # empty 填上 NaN
    try:
        got = on_device(case.but(x=x)).run()
        again = on_device(case).run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(again, clean)
    assert torch.equal(got[rest], clean[rest]) and got[~rest].isnan().all()


def test_order_of_tokens_does_not_matter():
    """词元换个次序，落在别的块、别的行：各词元的结果逐位相同。"""
    case = experts((200, 136, 72, 80), 3, dtype=BF16)
    first, order = on_device(case).run(), torch.randperm(200)
    moved = case.but(x=case.x[order], indices=case.indices[order], weights=case.weights[order])
    assert torch.equal(on_device(moved).run(), first[order.to(first.device)])


@pytest.mark.skipif(ON_GPU, reason="打乱次序要在主机模拟上")
@pytest.mark.parametrize("depth", [72, 328])
def test_every_order_gives_the_same_bits(monkeypatch, depth):
    case = experts((135, depth, depth, 136), 3, dtype=BF16, bias=True, indices=skewed(135, 3))
    same_in_every_order(monkeypatch, lambda: (case.run(),))
    plain = case.but(layout=Layout(gated=False))
    same_in_every_order(monkeypatch, lambda: (plain.but(down=wide(plain)).run(),))


def wide(case):
    """没有门时中间宽是 gate_up 的全部列。"""
    return torch.cat((case.down, case.down), 2)


def eager(case):
    """transformers 的写法：逐个专家，每一步都舍入到 bf16。"""
    y = torch.zeros(len(case.x), case.down.shape[1], dtype=BF16)
    for e, (gate_up, down) in enumerate(zip(case.gate_up, case.down, strict=True)):
        token, slot = torch.where(case.indices == e)
        gate, up = (case.x[token] @ gate_up.T).chunk(2, -1)
        out = (torch.nn.functional.silu(gate) * up) @ down.T
        y.index_add_(0, token, (out * case.weights[token, slot, None]).to(BF16))
    return y


def test_no_less_accurate_than_eager():
    case = experts((140, 264, 136, 200), 3, dtype=BF16)
    exact = case.exact().run(reference.moe_experts)
    assert_no_worse(on_device(case).run().cpu(), eager(case), exact)
