"""MoE 反向的各条 CUDA 路径与 fp64 参考比较：有 GPU 就在 GPU 上，没有就在主机模拟上。"""

from __future__ import annotations

import pytest
import torch

from deepseek_opt import reference
from tests.cuda.device import DEVICE, ON_GPU, marks
from tests.cuda.test_gpu_moe import HALF, LAYOUTS, NAMES, on_device, skewed
from tests.moe_cases import Experts, Layout, close, experts
from tests.moe_list_cases import Lists
from tests.op_cases import randn
from tests.tolerances import tol

pytestmark = marks
OPS = torch.ops.deepseek_opt
BF16 = torch.bfloat16


def check(case: Experts, **more) -> dict[str, torch.Tensor]:
    """全部梯度；以最大值归一后比较。"""
    grad = randn(case.x.shape[0], case.exact().run(reference.moe_experts).shape[1])
    grad = grad.to(case.x.dtype)
    want = case.exact().gradients(grad.double(), reference.moe_experts)
    got = on_device(case).gradients(grad.to(DEVICE), **more)
    for name, tensor in case.tensors().items():
        assert got[name].dtype == tensor.dtype, name
        limit = max((case.x.dtype, tensor.dtype), key=lambda d: tol(d)["atol"])
        close(got[name].cpu(), want[name], limit, f"{case.layout} d{name}")
    return got


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("way", LAYOUTS, ids=NAMES)
def test_layouts(way, dtype):
    """跨过块的边：行数、列数、K 都不是块的倍数；有、没有偏置；有的专家没有词元，有哨兵。"""
    index = skewed(150, 5)
    for bias in (False, True):
        case = experts((150, 72, 88, 136), 5, dtype=dtype, layout=way, bias=bias, indices=index)
        found = check(case, recompute=bias)
        assert (found["gate_up"][4] == 0).all() and (found["down"][4] == 0).all()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shared", [3, 4])
def test_shared(shared, dtype):
    case = experts((140, 40, 23, 48), 5, dtype=dtype, shared=shared, indices=skewed(140, 5))
    check(case)  # 中间宽 24 对齐，23 不对齐：走通用路径
    case = experts((140, 40, 31, 48), 5, dtype=dtype, shared=shared, indices=skewed(140, 5))
    check(
        case.but(gate_up=case.gate_up[:, :48].contiguous(), down=case.down[..., :24].contiguous())
    )


@pytest.mark.sanitize
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 127, 128, 129, 300])
def test_tile_boundaries(tokens):
    """一个专家得到全部词元：权重梯度的 k 从不满一级到填满流水；别的专家没有。"""
    index = torch.full((tokens, 1), 2)
    check(experts((tokens, 32, 40, 48), 4, dtype=BF16, indices=index))


@pytest.mark.parametrize("depth", [8, 24, 32, 40, 96, 136, 264])
def test_depths(depth):
    for transposed in (False, True):
        way = Layout(transposed=transposed)
        check(experts((20, depth, depth, 16), 3, dtype=BF16, layout=way), recompute=True)


@pytest.mark.sanitize
@pytest.mark.parametrize("transposed", [False, True])
def test_deep(transposed):
    """各步都多于流水的级数，一块里两组都有行，一个专家有几块：Hopper 上两组错开、CTA 常驻。"""
    way = Layout(transposed=transposed)
    index = torch.randint(2, (400, 1))
    check(experts((400, 264, 136, 328), 2, dtype=BF16, layout=way, bias=True, indices=index))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_nothing_to_do(dtype):
    """没有词元、全是哨兵、没有选择：梯度是 0，不是没有写过的数。"""
    check(experts((0, 16, 24, 32), 3, dtype=dtype, bias=True, shared=4))
    check(experts((9, 16, 24, 32), 3, dtype=dtype, bias=True, indices=torch.full((9, 2), 3)))
    none = torch.zeros(9, 0, dtype=torch.int64)
    check(experts((9, 16, 24, 32), 3, dtype=dtype, shared=4, indices=none))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_deterministic(dtype):
    case = on_device(experts((300, 64, 72, 80), 6, 3, dtype=dtype, bias=True, shared=4))
    grad = randn(300, 80, dtype=dtype).to(DEVICE)
    first = case.gradients(grad)
    for _ in range(2):
        again = case.gradients(grad)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_nan_stays_with_its_experts(transposed, dtype):
    """一个词元里的 NaN 不进别的词元的 dx、别的专家的权重：块里越过专家末尾的行不读。"""
    case = experts((150, 40, 48, 24), 4, 1, dtype=dtype, layout=Layout(transposed=transposed))
    case.x[7, 3] = torch.nan
    used = case.indices[7, 0].item()
    got = on_device(case).gradients(randn(150, 24, dtype=dtype).to(DEVICE))
    others, experts_left = torch.arange(150) != 7, torch.arange(4) != used
    assert got["x"].cpu()[others].isfinite().all() and got["x"][7].isnan().any()
    for name in ("gate_up", "down"):
        assert got[name].cpu()[experts_left].isfinite().all(), name
        assert got[name][used].isnan().any(), name


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("joint", [False, True])
def test_lists(joint, dtype):
    """每个专家是单独的张量：与成叠的逐位相同。"""
    case = experts((150, 40, 48, 24), 5, dtype=dtype, bias=True, indices=skewed(150, 5), shared=4)
    grad = randn(150, 24, dtype=dtype).to(DEVICE)
    case = on_device(case)
    mine, want = Lists.of(case, joint), case.gradients(grad)
    want = Lists.of(case.but(**{n: want[n] for n in want if "[" not in n}), joint)
    got = dict(zip(range(99), mine.gradients(grad), strict=False))
    for i, one in enumerate(want.flat()[: -len(case.shared)]):
        assert torch.equal(got[i], one), i


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("way", LAYOUTS[::2], ids=NAMES[::2])
def test_accumulates_into_the_gradient(way, dtype):
    """加进已有的 .grad：没有词元的专家的原值不变；共享专家的另外返回，不加。"""
    options = {"layout": way, "bias": True, "indices": skewed(150, 5)}
    if way.gated and not way.transposed:
        options["shared"] = 4
    case = experts((150, 40, 48, 24), 5, dtype=dtype, **options)
    case, grad = on_device(case), randn(150, 24, dtype=dtype).to(DEVICE)
    plain = case.gradients(grad, recompute=True)
    old = [torch.randn_like(case.gate_up), torch.randn_like(case.down)]
    into = [t.clone() for t in old]
    found = OPS.moe_experts_backward_into(grad, *case.args(), True, True, *into)
    for name, got, one in zip(("gate_up", "down"), into, old, strict=True):
        close(got.cpu(), (one.double() + plain[name].double()).cpu(), dtype, name)
        assert torch.equal(got[4], one[4])
    apart = ["x", "weights", "gate_up_bias", "down_bias"]
    apart += [f"shared[{i}]" for i in range(len(case.shared))]
    for name, got in zip(apart, found, strict=False):
        assert torch.equal(got, plain[name]), name


def test_unaligned_gradients():
    """.grad 没有对齐到 16 字节（例如展平的参数里的一段）：改走通用路径，结果照样对。"""
    case = on_device(experts((40, 16, 24, 32), 3, dtype=BF16))
    grad = randn(40, 32, dtype=BF16).to(DEVICE)
    plain = case.gradients(grad)
    into = []
    for t in (case.gate_up, case.down):
        flat = torch.zeros(t.numel() + 1, dtype=BF16, device=DEVICE)
        into.append(flat[1:].view(t.shape))
    OPS.moe_experts_backward_into(grad, *case.args(), True, True, *into)
    for name, got in zip(("gate_up", "down"), into, strict=True):
        close(got.cpu(), plain[name].double().cpu(), BF16, name)


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_route(score):
    """路由的反向；下标重复时两份都算。"""
    logits = torch.randn(70, 37)
    index = torch.rand(70, 37).argsort(-1)[:, :6].contiguous()
    index[3, 1] = index[3, 0]
    given = randn(70, 37), randn(70, 6)
    for after in (False, True) if score == "softmax" else (False,):
        for normalize in (False, True):
            rule = (score, normalize, after, 2.5, 1e-20)
            want = route_gradient(*given, logits, index, *rule)
            moved = (t.to(DEVICE) for t in (*given, logits, index))
            got = OPS.moe_route_backward(*moved, *rule)
            close(got.cpu(), want, torch.float32, f"{score} {after} {normalize}")


def route_gradient(d_logits, d_weights, logits, index, score, normalize, after, scaling, eps):
    z = logits.double().requires_grad_()
    if score == "softmax":
        picked = z.gather(1, index).softmax(-1) if after else z.softmax(-1).gather(1, index)
    else:
        s = torch.sigmoid(z) if score == "sigmoid" else torch.nn.functional.softplus(z).sqrt()
        picked = s.gather(1, index)
    if normalize:
        picked = picked / (picked.sum(-1, keepdim=True) + eps)
    (grad,) = torch.autograd.grad((picked * scaling * d_weights.double()).sum(), z)
    return grad + d_logits.double()


@pytest.mark.skipif(not ON_GPU, reason="要真的 GPU")
def test_large():
    """许多专家、长短悬殊：一个专家占一半的词元。"""
    tokens, count = 4096, 64
    index = torch.rand(tokens, count).argsort(-1)[:, :4].contiguous()
    index[::2, 0] = 7
    check(experts((tokens, 256, 192, 256), count, 4, dtype=BF16, indices=index))
