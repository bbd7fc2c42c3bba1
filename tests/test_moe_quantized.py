"""量化专家：反量化的误差，前向对照 fp64，各指令集、格式、形状，坏输入，与 torch 的约定。"""

from __future__ import annotations

import itertools

import pytest
import torch

from deepseek_opt import ops, reference
from deepseek_opt.errors import InputError
from deepseek_opt.quantize import dequantize, quantize_experts
from tests.moe_cases import experts
from tests.op_cases import FLOATS, flipped, randn, strided
from tests.quantized_cases import (
    EMPTY_SIZES,
    FORMATS,
    INT4,
    INT8,
    OP,
    Case,
    check_rows,
    make,
    with_bias,
    with_shared,
)
from tests.tolerances import tol

# 高斯权重的相对误差（均方根）：(下限, 上限)；下限说明确实是这么多位，而不是没有量化。
ERRORS = {None: (3e-3, 1e-2), 32: (0.06, 0.09), 64: (0.07, 0.1), 128: (0.08, 0.11)}


# ---- 量化本身 ----


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("columns", [256, 300, 33])
def test_error_of_gaussian_weights(form, columns):
    weight = randn(3, 64, columns)
    packed = quantize_experts(weight, *form)
    error = ((dequantize(packed) - weight).norm() / weight.norm()).item()
    low, high = ERRORS[form[1]]
    assert (low if columns > 255 else 1e-3) < error < high


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 128, 200])
def test_dequantize_agrees_with_the_reference(form, columns):
    """dequantize 与逐个下标的参考写法一致；各张量的形状、类型合约定。"""
    packed = quantize_experts(randn(2, 5, columns), *form)
    want = reference.moe_quantized.dequantize(
        *packed[:3], packed.group_size, columns, torch.float64
    )
    torch.testing.assert_close(dequantize(packed, torch.float64), want, **tol(torch.float32))
    bits, group, symmetric = form
    groups = -(-columns // group) if group else 0
    assert packed.shape == (2, 5, columns) and packed.bits == bits
    assert packed.group_size == (group or 0) and packed.scale.dtype == torch.float32
    assert packed.packed.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert packed.packed.shape[2] == (columns if bits == 8 else groups * group // 2)
    assert packed.scale.shape == ((2, 5, groups) if group else (2, 5))
    assert (packed.zero is None) == symmetric
    assert symmetric or packed.zero.shape == packed.scale.shape


def test_packing_order():
    """第 j 字节：低 4 位是第 j 个，高 4 位是第 j + 16 个。"""
    codes = torch.arange(32) % 16
    weight = (codes - 8.0).view(1, 1, 32)
    packed = quantize_experts(weight, 4, 32)
    assert packed.scale.item() == 1 and torch.equal(dequantize(packed), weight)
    assert torch.equal(packed.packed[0, 0] & 15, codes[:16].to(torch.uint8))
    assert torch.equal(packed.packed[0, 0] >> 4, codes[16:].to(torch.uint8))


@pytest.mark.parametrize("form", FORMATS)
def test_extreme_weights(form):
    """全 0、极小、极大、单个离群值：没有 NaN，误差不超过半个码。"""
    weight = torch.zeros(1, 6, 64)
    weight[0, 1], weight[0, 2] = 1e-42, 1e30
    weight[0, 3, 5], weight[0, 4, 5], weight[0, 5] = 100.0, -100.0, 1.0
    got = dequantize(quantize_experts(weight, *form))
    assert got.isfinite().all() and (got[0, :2] == 0).all()
    peak = weight.abs().amax(-1, keepdim=True)
    assert ((got - weight).abs()[0, 2:] <= 0.07 * peak[0, 2:]).all()


def test_zero_points_help_one_sided_weights():
    weight = torch.rand(2, 16, 128) + 0.0
    errors = [
        (dequantize(quantize_experts(weight, 4, 64, symmetric)) - weight).norm()
        for symmetric in (True, False)
    ]
    assert errors[1] < 0.6 * errors[0]


def test_clipping_beats_plain_rounding():
    """在截断比例里挑误差最小的：不差于不截断的。"""
    weight = randn(2, 32, 256)
    grouped = weight.unflatten(-1, (-1, 128))
    scale = grouped.abs().amax(-1, keepdim=True) / 7
    plain = ((grouped / scale).round() * scale - grouped).norm()
    assert (dequantize(quantize_experts(weight, 4, 128)) - weight).norm() < 0.95 * plain


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_source_dtypes(dtype):
    """按 fp32 量化；源张量不动，不求导。"""
    weight = randn(2, 3, 40).to(dtype).requires_grad_()
    packed = quantize_experts(weight, 4, 32)
    want = quantize_experts(weight.detach().float(), 4, 32)
    assert torch.equal(packed.packed, want.packed) and torch.equal(packed.scale, want.scale)
    assert not packed.scale.requires_grad


def test_state_dict_round_trip():
    module, other, packed = torch.nn.Module(), torch.nn.Module(), make((1, 40, 20, 30)).up
    for target, scale in ((module, 1), (other, 0)):
        for name in ("packed", "scale", "zero"):
            target.register_buffer(name, getattr(packed, name) * scale)
    other.load_state_dict(module.state_dict())
    back = packed._replace(packed=other.packed, scale=other.scale, zero=other.zero)
    assert torch.equal(dequantize(back), dequantize(packed))


@pytest.mark.parametrize(
    "weight, options, message",
    [
        (randn(3, 4), {}, r"weight：应为三维浮点张量.*\[3, 4\]"),
        (torch.ones(1, 2, 3, dtype=torch.int8), {}, "weight：应为三维浮点张量.*int8"),
        (None, {}, "weight：应为三维浮点张量"),
        (randn(1, 2, 3), {"bits": 5}, "bits：应为 8 或 4，实际是5"),
        (randn(1, 2, 3), {"bits": 8, "group_size": 32}, "group_size：应为 None 或 0"),
        (randn(1, 2, 3), {"bits": 8, "symmetric": False}, "symmetric：应为 True"),
        (randn(1, 2, 3), {"bits": 4, "group_size": 48}, "group_size：应为 32、64 或 128"),
        (randn(1, 2, 3), {"bits": 4, "group_size": 0}, "group_size：应为 32、64 或 128"),
    ],
)
def test_bad_quantization(weight, options, message):
    with pytest.raises(InputError, match=message):
        quantize_experts(weight, **options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", [INT8, INT4])
def test_weights_must_be_finite(form, value):
    weight = randn(3, 4, 40)
    weight[1, 2, 3] = value
    with pytest.raises(InputError, match=r"weight\[1\]：应为有限的数"):
        quantize_experts(weight, *form)


# ---- 前向 ----


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_formats(form, dtype):
    """一个专家多行（先解开）、其余少行（边读边解）、一个空专家、几个哨兵；有共享专家。"""
    index = torch.stack((torch.zeros(60, dtype=torch.int64), torch.randint(1, 3, (60,))), -1)
    index[::9, 1] = 4
    for shared in (0, 3, 4):
        make((60, 150, 70, 45), form, dtype=dtype, indices=index, shared=shared).check()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantized_shared(form, dtype):
    """共享专家也量化，少行、多行，有无系数；int8 的可与 int4 的专家同用。"""
    for tokens, count in ((3, 3), (40, 4)):
        case = make((tokens, 150, 70, 45), form, dtype=dtype)
        with_shared(case, form, count).check()
        with_shared(case, INT8, count).check()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("form", [INT8, INT4])
@pytest.mark.parametrize("dtype", FLOATS)
def test_biases(form, dtype):
    """少行、多行；偏置与 x 的类型可以不同，可以只有一个；有、没有门；与共享专家同用。"""
    for tokens, other in itertools.product((3, 40), FLOATS):
        case = with_bias(make((tokens, 150, 70, 45), form, dtype=dtype), other)
        case.check()
        with_shared(case, form, 4).check()
        case.but(up_bias=None).check()
        case.but(down_bias=None, activation="clipped").check()
    plain = make((3, 40, 35, 30), form, dtype=dtype, gated=False)
    with_bias(plain, dtype).check()
    assert not torch.equal(plain.run(), with_bias(plain).run())


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (3, 0, 4, 5), (3, 4, 0, 5), (3, 4, 5, 0)])
def test_empty_dimensions_with_biases(sizes):
    for form in (INT8, INT4):
        with_bias(make(sizes, form)).check()


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (3, 0, 4, 5), (3, 4, 0, 5), (3, 4, 5, 0)])
def test_quantized_shared_with_empty_dimensions(sizes):
    for form in (INT8, INT4, (4, 32, True)):
        with_shared(make(sizes, form), form, 4).check()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("form", [INT8, (4, 32, True), (4, 64, False), (4, 128, False)])
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1),
        (1, 33, 17, 65),
        (1, 300, 160, 131),
        (2, 31, 33, 7),
        (5, 129, 63, 9),
        (30, 530, 140, 150),
        (40, 65, 130, 1),
    ],
)
def test_odd_shapes(sizes, form):
    for dtype in FLOATS[:2]:
        make(sizes, form, dtype=dtype).check()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 15, 16, 17, 96, 97, 529])
@pytest.mark.parametrize("form", [INT8, INT4])
def test_row_boundaries(rows, form):
    check_rows(rows, form)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("form", [INT8, INT4])
@pytest.mark.parametrize("sizes", EMPTY_SIZES)
def test_empty_dimensions(sizes, form):
    make(sizes, form).check()
    make(sizes, form, shared=3).check()
    make(sizes, form, activation="clipped").check()


@pytest.mark.parametrize("form", [INT8, INT4])
@pytest.mark.parametrize("count, top_k", [(0, 2), (3, 0), (1, 1)])
def test_no_experts_or_no_choices(count, top_k, form):
    index = torch.zeros(4, top_k, dtype=torch.int64)
    for shared in (0, 3):
        make((4, 40, 6, 7), form, count=count, indices=index, shared=shared).check()


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("form", [INT8, INT4])
def test_activations(activation, form):
    make((20, 40, 36, 30), form, activation=activation).check()
    if activation not in ops.CLIPPED:
        make((20, 40, 35, 30), form, activation=activation, gated=False).check()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("form", [INT8, INT4])
@pytest.mark.parametrize("tokens", [4, 60])
def test_close_to_the_original_experts(tokens, form):
    """量化前后的输出：int8 差约百分之一，int4 差两成以内。"""
    case = experts((tokens, 256, 128, 96))
    want = case.exact().run(reference.moe_experts)
    up, down = quantize_experts(case.gate_up, *form), quantize_experts(case.down, *form)
    got = Case(case.x, case.indices, case.weights, up, down).run()
    error = ((got - want).norm() / want.norm()).item()
    assert 1e-3 < error < (0.02 if form == INT8 else 0.2)


@pytest.mark.parametrize("tokens", [3, 50])
@pytest.mark.parametrize("form", [INT8, INT4])
def test_non_contiguous(tokens, form):
    plain = make((tokens, 40, 36, 30), form, shared=3)
    want = plain.run()

    def spread(q):
        scale = torch.stack((q.scale, q.scale), 0)[1]
        return q._replace(packed=flipped(q.packed), scale=scale.mT.contiguous().mT)

    other = plain.but(
        x=strided(plain.x), indices=flipped(plain.indices), weights=plain.weights.half().float()
    )
    assert torch.equal(other.run(), plain.but(weights=other.weights).run())
    assert torch.equal(plain.but(up=spread(plain.up), down=spread(plain.down)).run(), want)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", [INT8, INT4])
def test_thread_count_does_not_change_results(threads, dtype, form):
    case, runs = make((70, 300, 140, 130), form, dtype=dtype, shared=4), []
    for count in (1, 2, 5):
        threads(count)
        runs.append(case.run())
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("tokens", [6, 60])
def test_nan_stays_with_its_tokens(tokens):
    for form in (INT8, INT4):
        case = with_shared(make((tokens, 40, 36, 30), form), form)
        case.x[2, 4] = torch.nan
        got, others = case.run(), torch.arange(tokens) != 2
        assert got[2].isnan().all() and got[others].isfinite().all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("form", [INT8, (4, 128, True)])
@pytest.mark.parametrize("dtype", FLOATS[:2])
def test_outliers_in_the_activations(form, dtype):
    """几个激活是其余的千倍（真实模型里常见）：误差仍在同一张表之内。"""
    case = make((4, 400, 256, 70), form, dtype=dtype)
    case.x[:, ::97] *= 1000
    case.check()


# ---- 与 torch 的约定 ----


@pytest.mark.parametrize("form", FORMATS)
def test_opcheck(form):
    torch.library.opcheck(OP, make((5, 40, 6, 7), form, shared=4).packed_args())
    torch.library.opcheck(OP, make((5, 40, 6, 7), form, gated=False).packed_args())
    case = with_shared(make((5, 40, 6, 7), form), form, 4)
    torch.library.opcheck(OP, case.packed_args())
    torch.library.opcheck(OP, with_bias(case, torch.bfloat16).packed_args())


@pytest.mark.parametrize("form", [INT8, INT4])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_fullgraph(form, backend):
    case = make((5, 40, 6, 7), form, shared=3)
    torch._dynamo.reset()
    compiled = torch.compile(ops.moe_experts_quantized, fullgraph=True, backend=backend)
    assert torch.equal(case.run(compiled), case.run())


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_autocast(dtype):
    """x、共享专家按 autocast 的 dtype；混合权重与尺度保持 fp32。"""
    case = make((5, 40, 6, 7), shared=3)
    lower = case.but(x=case.x.to(dtype), shared=tuple(t.to(dtype) for t in case.shared))
    with torch.autocast("cpu", dtype):
        got = case.run()
    assert got.dtype == dtype and torch.equal(got, lower.run())
    case = with_shared(case, INT4, 4)
    with torch.autocast("cpu", dtype):
        got = case.run()
    shared = (*case.shared[:3], case.shared[3].to(dtype))
    assert torch.equal(got, case.but(x=lower.x, shared=shared).run())
    case = with_bias(case.but(x=lower.x, shared=shared))
    with torch.autocast("cpu", dtype):
        got = case.run()
    assert torch.equal(got, case.run())  # 偏置仍是 fp32


def test_backward_is_refused():
    case = make((5, 40, 6, 7))
    y = case.but(x=case.x.requires_grad_()).run()
    with pytest.raises(RuntimeError, match="只做推理，没有导数"):
        y.sum().backward()
    with torch.no_grad():
        assert not case.run().requires_grad


# ---- 坏输入 ----


def without(case, which, **changes):
    return case.but(**{which: getattr(case, which)._replace(**changes)})


@pytest.mark.parametrize("which, name", [("up", "gate_up"), ("down", "down")])
def test_bad_tensors(which, name):
    eight, four = make((5, 40, 6, 7), INT8), make((5, 40, 6, 7), INT4)
    q8, q4 = getattr(eight, which), getattr(four, which)
    bad = [
        (eight, {"packed": q8.packed.float()}, f"{name} 的类型应为 int8.*float32"),
        (eight, {"packed": q8.packed.to(torch.uint8)}, f"{name} 的类型应为 int8.*uint8"),
        (eight, {"packed": q8.packed[..., 1:]}, f"{name} 的形状应为"),
        (eight, {"packed": q8.packed[0]}, f"{name} 的形状应为"),
        (eight, {"scale": q8.scale[:, 1:]}, f"{name}_scale 的形状应为"),
        (eight, {"scale": q8.scale.double()}, f"{name}_scale 的类型应为 float32.*float64"),
        (eight, {"zero": q8.scale.to(torch.uint8)}, f"{name}_zero 应为 None"),
        (four, {"packed": q4.packed.to(torch.int8)}, f"{name} 的类型应为 uint8.*int8"),
        (four, {"packed": q4.packed[..., 1:]}, f"{name} 的形状应为"),
        (four, {"scale": q4.scale[..., 0]}, f"{name}_scale 的形状应为"),
        (four, {"scale": q4.scale.bfloat16()}, f"{name}_scale 的类型应为 float32.*bfloat16"),
        (four, {"zero": q4.zero.float()}, f"{name}_zero 的类型应为 uint8.*float32"),
        (four, {"zero": q4.zero[:1]}, f"{name}_zero 的形状应为"),
    ]
    for case, change, message in bad:
        with pytest.raises(ValueError, match=f"moe_experts_quantized：{message}"):
            without(case, which, **change).run()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": randn(5, 41)}, r"gate_up 的形状应为 \[\*, \*, 41\]，实际是 \[4, 12, 40\]"),
        ({"x": randn(5)}, "x 的形状"),
        ({"x": randn(5, 40).double()}, "x 的类型.*float64"),
        ({"indices": torch.zeros(5, 2)}, "indices 的类型应为 int64"),
        ({"indices": torch.full((5, 2), -1)}, r"indices\[0, 0\] 应不小于 0"),
        ({"weights": torch.ones(5, 3)}, "weights 的形状"),
        ({"activation": "tanh"}, "activation 应为"),
        ({"activation": "clipped", "gated": False}, "clipped 时应有门"),
        ({"shared": (randn(3, 40),)}, "shared 应为空"),
        ({"shared": (randn(3, 40), randn(3, 40), randn(7, 4))}, r"shared\[2\] 的形状"),
        ({"shared": (randn(3, 40),) * 3, "gated": False}, "有 shared 时必须有门"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=f"deepseek_opt：moe_experts_quantized：.*{message}"):
        make((5, 40, 6, 7), INT8).but(**change).run()


def replaced(tensors, index, value):
    return (*tensors[:index], value, *tensors[index + 1 :])


def test_bad_quantized_shared():
    four = with_shared(make((5, 40, 6, 7), INT4), INT4, 4)
    eight = with_shared(make((5, 40, 6, 7), INT8), INT8)
    packed, scale, zero = four.shared, four.shared_scale, four.shared_zero
    bad = [
        (four.but(shared=()), "shared_scale 应为空，或.*实际有 3 个，shared 有 0 个"),
        (four.but(shared_scale=scale[:2]), "shared_scale 应为空，或.*3 个，实际有 2 个"),
        (four.but(shared_scale=()), "shared_scale 应为空，或.*3 个，实际有 0 个"),
        (four.but(shared_zero=zero[:1]), "shared_zero 应为空，或 3 个，实际有 1 个"),
        (four.but(shared=packed[:2]), "shared 应为空，或"),
        (four.but(shared=(*packed, packed[3])), "shared 应为空，或"),
        (four.but(shared=replaced(packed, 0, randn(29, 40))), r"shared\[0\] 的类型应为 uint8"),
        (four.but(shared=replaced(packed, 1, packed[1][1:])), r"shared\[1\] 的形状应为 \[29, "),
        (four.but(shared=replaced(packed, 2, packed[2][1:])), r"shared\[2\] 的形状应为 \[7, "),
        (four.but(shared=replaced(packed, 3, torch.ones(4))), r"shared\[3\] 的形状应为 \[5\]"),
        (four.but(shared_scale=replaced(scale, 1, scale[0][1:])), r"shared_scale\[1\] 的形状"),
        (four.but(shared_zero=replaced(zero, 0, zero[0].int())), r"shared_zero\[0\] 的类型"),
        (four.but(shared_zero=replaced(zero, 2, zero[2][1:])), r"shared_zero\[2\] 的形状"),
        (eight.but(shared_zero=zero), r"shared_zero\[0\] 应为 None"),
        (eight.but(shared=packed[:3]), r"shared\[0\] 的类型应为 int8.*uint8"),
    ]
    for case, message in bad:
        with pytest.raises(ValueError, match=f"moe_experts_quantized：{message}"):
            case.run()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"up_bias": randn(4, 11)}, r"gate_up_bias 的形状应为 \[4, 12\]，实际是 \[4, 11\]"),
        ({"up_bias": randn(12)}, "gate_up_bias 的形状"),
        ({"down_bias": randn(3, 7)}, r"down_bias 的形状应为 \[4, 7\]"),
        ({"up_bias": randn(4, 12).double()}, "gate_up_bias 的类型.*float64"),
        ({"up_bias": torch.ones(4, 12, dtype=torch.int8)}, "gate_up_bias 的类型.*int8"),
        (
            {"up_bias": randn(4, 12), "down_bias": randn(4, 7).half()},
            "down_bias 的类型应为 float32.*float16",
        ),
    ],
)
def test_bad_biases(change, message):
    with pytest.raises(ValueError, match=f"deepseek_opt：moe_experts_quantized：{message}"):
        make((5, 40, 6, 7), INT8).but(**change).run()


@pytest.mark.parametrize("group", [-32, 16, 48, 256])
def test_bad_group_size(group):
    case = make((5, 40, 6, 7), INT4)
    with pytest.raises(ValueError, match=f"group_size 应为 0.*或 32、64、128.*实际是 {group}"):
        case.but(up=case.up._replace(group_size=group)).run()
    with pytest.raises(ValueError, match="gate_up 的类型应为 int8"):
        case.but(up=case.up._replace(group_size=0)).run()


def test_odd_gate_up_and_missing_scale():
    case = make((5, 40, 6, 7), INT8)
    odd = case.up._replace(packed=case.up.packed[:, :11], scale=case.up.scale[:, :11])
    with pytest.raises(ValueError, match="gate_up 应由等宽的 gate 与 up 组成，实际宽 11"):
        case.but(up=odd).run()
    for which, name in (("up", "gate_up"), ("down", "down")):
        with pytest.raises(ValueError, match=f"{name}_scale 应为张量.*实际是 None"):
            without(case, which, scale=None).run()
        with pytest.raises(ValueError, match=f"{name} 应为张量，实际是 None"):
            without(case, which, packed=None).run()
