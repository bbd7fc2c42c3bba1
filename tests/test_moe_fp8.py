"""fp8（float8_e4m3fn）的专家：量化的误差与形状，前向对照 fp64，NaN 的码，按块的尺度，坏输入，配置，存取。"""

from __future__ import annotations

import pytest
import torch

from deepseek_opt import MOEConfig, ops, reference
from deepseek_opt.errors import ConfigError, InputError
from deepseek_opt.quantize import dequantize, packed_shapes, quantize_experts
from tests.moe_cases import close, experts
from tests.op_cases import FLOATS, flipped, randn
from tests.quantized_cases import (
    EMPTY_SIZES,
    FP8,
    FP8_128,
    FP8_FORMATS,
    INT4,
    INT8,
    OP,
    check_rows,
    make,
    with_bias,
    with_shared,
)
from tests.tolerances import tol

F8 = torch.float8_e4m3fn
forms = pytest.mark.parametrize("form", FP8_FORMATS, ids=["整行", "128 一组"])


# ---- 量化本身 ----


@forms
@pytest.mark.parametrize("columns", [256, 300, 33])
def test_error_of_gaussian_weights(form, columns):
    """3 位尾数：相对误差约百分之二点六，与权重的大小无关。"""
    weight = randn(3, 64, columns)
    packed = quantize_experts(weight, *form)
    error = ((dequantize(packed) - weight).norm() / weight.norm()).item()
    assert 0.02 < error < 0.03 and packed.floating


@forms
@pytest.mark.parametrize("columns", [0, 1, 31, 127, 128, 129, 300])
def test_shapes_and_the_reference(form, columns):
    packed, group = quantize_experts(randn(2, 5, columns), *form), form[1] or 0
    want = reference.moe_quantized.dequantize(*packed[:3], group, columns, torch.float64)
    torch.testing.assert_close(dequantize(packed, torch.float64), want, **tol(torch.float32))
    shapes = packed_shapes((2, 5, columns), 8, group, True, True)
    assert shapes["packed"] == (packed.packed.dtype, tuple(packed.packed.shape))
    assert shapes["scale"] == (packed.scale.dtype, tuple(packed.scale.shape))
    assert set(shapes) == {"packed", "scale"} and packed.zero is None
    assert packed.packed.dtype == F8 and packed.packed.shape == (2, 5, columns)
    assert packed.scale.shape == ((2, 5, -(-columns // 128)) if group else (2, 5))


@forms
def test_extreme_weights(form):
    """全 0、极小、极大、单个离群值：没有 NaN，每组最大的一个精确到一个尺度。"""
    weight = torch.zeros(1, 6, 200)
    weight[0, 1], weight[0, 2] = 1e-42, 1e30
    weight[0, 3, 5], weight[0, 4, 5], weight[0, 5] = 100.0, -100.0, 1.0
    got = dequantize(quantize_experts(weight, *form))
    assert got.isfinite().all() and (got[0, :2] == 0).all()
    torch.testing.assert_close(got[0, 2:], weight[0, 2:], rtol=1e-6, atol=0)


def test_groups_follow_their_own_range():
    """一组的离群值不影响别的组：分组的误差小得多。"""
    weight = randn(1, 4, 256, scale=1e-3)
    weight[..., 0] = 1e3
    whole, grouped = (dequantize(quantize_experts(weight, *form)) for form in FP8_FORMATS)
    errors = [(w - weight)[..., 128:].norm() for w in (whole, grouped)]
    assert errors[1] < 0.1 * errors[0]


def test_rows_can_be_reordered():
    weight, order = randn(2, 6, 40), torch.tensor([0, 2, 4, 1, 3, 5])
    got = quantize_experts(weight, *FP8, order=order)
    want = quantize_experts(weight[:, order], *FP8)
    assert torch.equal(got.packed.float(), want.packed.float())
    assert torch.equal(got.scale, want.scale)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 4}, r"bits：应为 8（fp8），实际是4"),
        ({"group_size": 64}, "group_size：应为 None、0 或 128（fp8），实际是64"),
        ({"symmetric": False}, "symmetric：应为 True（fp8 没有零点）"),
    ],
)
def test_bad_quantization(options, message):
    with pytest.raises(InputError, match=message):
        quantize_experts(randn(1, 2, 3), floating=True, **options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_must_be_finite(value):
    weight = randn(3, 4, 40)
    weight[1, 2, 3] = value
    with pytest.raises(InputError, match=r"weight\[1\]：应为有限的数"):
        quantize_experts(weight, *FP8)


# ---- 前向 ----


@pytest.mark.usefixtures("isa")
@forms
@pytest.mark.parametrize("dtype", FLOATS)
def test_formats(form, dtype):
    """一个专家多行（先解开）、其余少行（边读边解）、一个空专家、几个哨兵；有共享专家。"""
    index = torch.stack((torch.zeros(60, dtype=torch.int64), torch.randint(1, 3, (60,))), -1)
    index[::9, 1] = 4
    for shared in (0, 3, 4):
        make((60, 150, 140, 45), form, dtype=dtype, indices=index, shared=shared).check()


@pytest.mark.usefixtures("isa")
@forms
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantized_shared(form, dtype):
    """共享专家也是 fp8，少行、多行，有无系数；int8 的可与 fp8 的专家同用。"""
    for tokens, count in ((3, 3), (40, 4)):
        case = make((tokens, 150, 70, 45), form, dtype=dtype)
        with_shared(case, form, count).check()
        with_shared(case, INT8, count).check()


def test_fp8_shared_beside_integers():
    """组合规则允许的：fp8 的共享专家与同样 group_size 的整数专家。"""
    with_shared(make((5, 40, 6, 7), INT8), FP8).check()
    with_shared(make((5, 40, 6, 7), (4, 128, True)), FP8_128).check()


@pytest.mark.usefixtures("isa")
@forms
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1),
        (1, 33, 17, 65),
        (1, 300, 160, 131),
        (2, 127, 129, 7),
        (5, 257, 63, 9),
        (30, 530, 140, 150),
        (40, 65, 130, 1),
    ],
)
def test_odd_shapes(sizes, form):
    for dtype in FLOATS[:2]:
        make(sizes, form, dtype=dtype).check()


@pytest.mark.usefixtures("isa")
@forms
@pytest.mark.parametrize("rows", [1, 4, 5, 16, 17, 97])
def test_row_boundaries(rows, form):
    check_rows(rows, form)


@pytest.mark.usefixtures("isa")
@forms
def test_biases_and_plain_experts(form):
    for tokens in (3, 40):
        with_shared(with_bias(make((tokens, 150, 70, 45), form), torch.float16), form, 4).check()
        with_bias(make((tokens, 40, 35, 30), form, gated=False, activation="relu2")).check()


@pytest.mark.usefixtures("isa")
@forms
@pytest.mark.parametrize("sizes", EMPTY_SIZES)
def test_empty_dimensions(sizes, form):
    make(sizes, form).check()
    with_shared(make(sizes, form), form, 4).check()


@pytest.mark.usefixtures("isa")
@forms
@pytest.mark.parametrize("tokens", [4, 60])
def test_close_to_the_original_experts(tokens, form):
    case = experts((tokens, 256, 128, 96))
    want = case.exact().run(reference.moe_experts)
    up, down = quantize_experts(case.gate_up, *form), quantize_experts(case.down, *form)
    got = make((tokens, 256, 128, 96), form).but(
        x=case.x, indices=case.indices, weights=case.weights, up=up, down=down
    )
    error = ((got.run() - want).norm() / want.norm()).item()
    assert 0.01 < error < 0.06


@pytest.mark.usefixtures("isa")
@forms
@pytest.mark.parametrize("tokens", [3, 60])
def test_nan_codes_give_nan_and_stay_with_their_expert(tokens, form):
    """权重里的 NaN 码（0x7f、0xff）：用到它的词元是 NaN，别的词元不受影响。"""
    index = torch.arange(tokens).view(-1, 1) % 2
    case = make((tokens, 40, 36, 30), form, indices=index)
    for code in (0x7F, 0xFF):
        packed = case.down.packed.clone()
        packed.view(torch.uint8)[1, 7, 5] = code
        got = case.but(down=case.down._replace(packed=packed)).run()
        assert got[1::2, 7].isnan().all()
        got[1::2, 7] = 0
        assert got.isfinite().all()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("tokens", [3, 40])
def test_block_scales_of_a_checkpoint(tokens):
    """DeepSeek-V3 的检查点：128 x 128 一块一个尺度，在行上重复就是 group_size = 128 的尺度。"""
    case = make((tokens, 200, 96, 150), FP8_128)

    def blocked(part):
        count, rows, columns = part.shape
        scale = torch.rand(count, -(-rows // 128), -(-columns // 128)) / 4000
        repeated = scale.repeat_interleave(128, 1)[:, :rows].contiguous()
        wide = repeated.repeat_interleave(128, 2)[..., :columns]
        return part._replace(scale=repeated), part.packed.double() * wide.double()

    (up, dense_up), (down, dense_down) = blocked(case.up), blocked(case.down)
    got = case.but(up=up, down=down).run()
    wide = (case.x.double(), case.indices, case.weights, dense_up, None, dense_down, None)
    want = reference.moe_experts(*wide, [], "silu", 1.702, 0.7)
    close(got, want, torch.float32)


@forms
@pytest.mark.parametrize("tokens", [3, 50])
def test_non_contiguous(tokens, form):
    plain = make((tokens, 140, 36, 30), form)

    def spread(q):
        codes = flipped(q.packed.view(torch.uint8)).view(F8)
        assert not codes.is_contiguous()
        return q._replace(packed=codes, scale=flipped(q.scale))

    assert torch.equal(plain.but(up=spread(plain.up), down=spread(plain.down)).run(), plain.run())


@pytest.mark.usefixtures("isa")
@forms
@pytest.mark.parametrize("dtype", FLOATS)
def test_thread_count_does_not_change_results(threads, dtype, form):
    case, runs = make((70, 300, 140, 130), form, dtype=dtype, shared=4), []
    for count in (1, 2, 5):
        threads(count)
        runs.append(case.run())
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


# ---- 与 torch 的约定 ----


@forms
def test_opcheck(form):
    """核对 schema 要比较张量，torch 对 fp8 不会，所以不做那一项。"""
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    case = with_bias(with_shared(make((5, 40, 6, 7), form), form, 4), torch.bfloat16)
    for one in (make((5, 40, 6, 7), form, shared=4), case):
        torch.library.opcheck(OP, one.packed_args(), test_utils=checks)


@forms
def test_compile_fullgraph(form):
    case = make((5, 40, 6, 7), form, shared=3)
    torch._dynamo.reset()
    compiled = torch.compile(ops.moe_experts_quantized, fullgraph=True, backend="aot_eager")
    assert torch.equal(case.run(compiled), case.run())


@forms
def test_autocast_leaves_the_codes_alone(form):
    case = with_shared(make((5, 40, 6, 7), form), form)
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run()
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, case.but(x=case.x.bfloat16()).run())


# ---- 坏输入 ----


def replaced(case, which, **changes):
    return case.but(**{which: getattr(case, which)._replace(**changes)})


@pytest.mark.parametrize("which, name", [("up", "gate_up"), ("down", "down")])
def test_bad_tensors(which, name):
    row, grouped = make((5, 40, 6, 7), FP8), make((5, 40, 6, 7), FP8_128)
    q, g = getattr(row, which), getattr(grouped, which)
    bad = [
        (row, {"packed": q.packed[..., 1:]}, f"{name} 的形状应为"),
        (row, {"scale": g.scale}, f"{name}_scale 的形状应为"),
        (row, {"scale": q.scale.half()}, f"{name}_scale 的类型应为 float32.*float16"),
        (row, {"zero": q.scale.to(torch.uint8)}, f"{name}_zero 应为 None（fp8 没有零点）"),
        (grouped, {"scale": q.scale}, f"{name}_scale 的形状应为"),
        (grouped, {"zero": g.scale.to(torch.uint8)}, f"{name}_zero 应为 None（fp8 没有零点）"),
    ]
    for case, change, message in bad:
        with pytest.raises(ValueError, match=f"moe_experts_quantized：{message}"):
            replaced(case, which, **change).run()


def test_formats_must_agree():
    fp8, int8 = make((5, 40, 6, 7), FP8), make((5, 40, 6, 7), INT8)
    with pytest.raises(ValueError, match="down 的类型应为 float8_e4m3fn.*实际是 int8"):
        fp8.but(down=int8.down).run()
    with pytest.raises(ValueError, match="down 的类型应为 int8.*实际是 float8_e4m3fn"):
        int8.but(down=fp8.down).run()
    other = fp8.up._replace(packed=fp8.up.packed.float().to(torch.float8_e5m2))
    with pytest.raises(ValueError, match="gate_up 的类型应为 int8.*实际是 其他类型"):
        fp8.but(up=other).run()


@pytest.mark.parametrize("group", [32, 64])
def test_bad_group_size(group):
    case = make((5, 40, 6, 7), FP8_128)
    with pytest.raises(ValueError, match=rf"应为 0 或 128（gate_up 是 fp8），实际是 {group}"):
        case.but(up=case.up._replace(group_size=group)).run()
    shared = with_shared(make((5, 40, 6, 7), INT4), FP8)
    with pytest.raises(ValueError, match=r"应为 0 或 128（shared\[0\] 是 fp8），实际是 32"):
        shared.run()


def test_mixed_shared_formats():
    case = with_shared(make((5, 40, 6, 7), FP8), FP8)
    other = with_shared(make((5, 40, 6, 7), FP8), INT8)
    with pytest.raises(ValueError, match=r"shared\[2\] 的类型应为 float8_e4m3fn.*实际是 int8"):
        case.but(shared=(*case.shared[:2], other.shared[2])).run()


# ---- 配置 ----


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"quantization_group_size": 64}, "fp8 分组时只能是 128"),
        ({"quantization_symmetric": False}, "fp8 没有零点，只能是 true"),
        ({"quantization_group_size": 0}, "应为 32、64 或 128"),
    ],
)
def test_bad_configuration(fields, message):
    with pytest.raises(ConfigError, match=message):
        MOEConfig(quantization="fp8", **fields)


def test_good_configuration():
    for fields in ({}, {"quantization_group_size": 128}, {"keep_original_weights": False}):
        assert MOEConfig(quantization="fp8", **fields).quantization == "fp8"
