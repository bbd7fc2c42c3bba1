"""每种非法输入：一句中文，写明算子、参数、期望与实际；什么都不改动。"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from deepseek_opt import _native, ops
from deepseek_opt.errors import UnsupportedError
from tests.op_cases import QUANTIZED, attention, randn

F64, INT, F8 = torch.float64, torch.int64, torch.float8_e4m3fn


def rejected(message, function, *args, mutated=()):
    before = [t.clone() for t in mutated]
    with pytest.raises(ValueError, match=message) as caught:
        function(*args)
    assert "deepseek_opt：" in str(caught.value)
    for now, then in zip(mutated, before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "args, message",
    [
        ((randn(2, 3), randn(4, 5)), r"linear：weight 的形状应为 \[\*, 3\]，实际是 \[4, 5\]"),
        ((randn(2, 3), randn(3)), "weight 的形状"),
        ((randn(), randn(4, 3)), "x 至少要有 1 维"),
        ((randn(2, 3), randn(4, 3), randn(5)), r"bias 的形状应为 \[4\]，实际是 \[5\]"),
        (
            (randn(2, 3, dtype=F64), randn(4, 3)),
            "x 的类型应为 float32、bfloat16 或 float16.*float64",
        ),
        ((randn(2, 3), randn(4, 3).to(INT)), "weight 的类型.*int64"),
        ((randn(2, 3), randn(4, 3), randn(4).half()), "bias 的类型应为 float32，实际是 float16"),
    ],
)
def test_linear(args, message):
    rejected(message, ops.linear, *args)


@pytest.mark.parametrize(
    "shapes, message",
    [
        (((2, 3), (4, 5), (4, 3), (6, 4)), "gate 的形状"),
        (((2, 3), (4, 3), (5, 3), (6, 4)), r"up 的形状应为 \[4, 3\]，实际是 \[5, 3\]"),
        (((2, 3), (4, 3), (4, 3), (6, 5)), r"down 的形状应为 \[\*, 4\]"),
        (((), (4, 3), (4, 3), (6, 4)), "x 至少要有 1 维"),
    ],
)
def test_swiglu_mlp(shapes, message):
    rejected(message, ops.swiglu_mlp, *(randn(*s) for s in shapes))


def test_swiglu_mlp_dtypes():
    x, gate, up, down = randn(2, 3), randn(4, 3), randn(4, 3), randn(6, 4)
    rejected("up 的类型应为 float32，实际是 float16", ops.swiglu_mlp, x, gate, up.half(), down)
    rejected("x 的类型.*int64", ops.swiglu_mlp, x.to(INT), gate, up, down)


def test_norms():
    x, weight = randn(2, 3), randn(3)
    rejected(r"rms_norm：weight 的形状应为 \[3\]", ops.rms_norm, x, randn(4), 1e-6)
    rejected("x 的类型", ops.rms_norm, x.double(), weight, 1e-6)
    rejected("weight 的类型", ops.rms_norm, x, weight.double(), 1e-6)
    rejected("residual 的形状应与 x", ops.add_rms_norm, x, randn(3, 2), weight, 1e-6)
    rejected("residual 的类型", ops.add_rms_norm, x, x.half(), weight, 1e-6)


@pytest.mark.parametrize(
    "x, cos, sin, message",
    [
        ((1, 2, 4), (1, 2, 2), (1, 2, 2), "x 的形状"),
        ((1, 2, 3, 5), (1, 2, 2), (1, 2, 2), "最后一维应为偶数，实际是 5"),
        ((1, 2, 3, 4), (1, 3, 2), (1, 2, 2), "cos 的形状"),
        ((1, 2, 3, 4), (1, 2, 2), (1, 2, 3), "sin 的形状"),
        ((3, 2, 3, 4), (2, 2, 2), (2, 2, 2), "第 0 维应为 1 或 3，实际是 2"),
    ],
)
def test_rope(x, cos, sin, message):
    rejected(message, ops.rope, randn(*x), randn(*cos), randn(*sin), True)
    value = randn(*x)
    rejected(message, ops.rope_, value, randn(*cos), randn(*sin), True, mutated=[value])


def test_rope_in_place_needs_unit_stride():
    x = randn(1, 2, 4, 3).mT
    rejected("步长应为 1", ops.rope_, x, randn(1, 2, 2), randn(1, 2, 2), True, mutated=[x])


def write_arguments():
    return {
        "latent_cache": randn(2, 8, 4),
        "rope_cache": randn(2, 8, 2),
        "scale_cache": None,
        "latent": randn(2, 3, 4),
        "rope": randn(2, 3, 2),
        "offsets": torch.tensor([0, 5]),
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"offsets": torch.tensor([0, 6])}, r"第 1 行要写槽位 \[6, 9\)，超出缓存的 8 个槽位"),
        ({"offsets": torch.tensor([-1, 0])}, r"第 0 行要写槽位 \[-1, 2\)"),
        ({"offsets": torch.tensor([0])}, "offsets 的形状"),
        (
            {"offsets": torch.tensor([0, 1], dtype=torch.int32)},
            "offsets 的类型应为 int64，实际是 int32",
        ),
        ({"latent": randn(2, 4)}, "latent 的形状"),
        ({"rope": randn(2, 2, 2)}, "rope 的形状"),
        ({"latent_cache": randn(2, 8, 5)}, "latent_cache 的形状"),
        ({"rope_cache": randn(2, 7, 2)}, "rope_cache 的形状"),
        ({"rope_cache": randn(2, 8, 2).double()}, "rope_cache 的类型"),
        ({"latent_cache": randn(2, 8, 4).to(torch.int8)}, "时必须给出 scale_cache"),
        ({"latent_cache": randn(2, 8, 4).to(F8)}, "float8_e4m3fn 时必须给出 scale_cache"),
        ({"latent_cache": randn(2, 8, 4).double()}, "int8 或 float8_e4m3fn，实际是 float64"),
        ({"scale_cache": randn(2, 8)}, "时必须给出 scale_cache，否则不能给"),
        ({"latent_cache": randn(2, 4, 8).mT}, "latent_cache 的最后一维步长应为 1"),
        ({"rope_cache": randn(2, 2, 8).mT}, "rope_cache 的最后一维步长应为 1"),
    ],
)
def test_cache_write(changes, message):
    args = {**write_arguments(), **changes}
    caches = [args[name] for name in ("latent_cache", "rope_cache")]
    rejected(message, ops.mla_cache_write, *args.values(), mutated=caches)


def test_cache_write_scale():
    args = {**write_arguments(), "latent_cache": torch.zeros(2, 8, 4, dtype=torch.int8)}
    for scale, message in (
        (randn(2, 7), "scale_cache 的形状"),
        (randn(2, 8).half(), "scale_cache 的类型应为 float32"),
        (randn(8, 2).mT, "scale_cache 的最后一维步长应为 1"),
    ):
        args["scale_cache"] = scale
        rejected(message, ops.mla_cache_write, *args.values(), mutated=[args["latent_cache"]])


@pytest.mark.parametrize("name", ["mla_decode", "mla_prefill"])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": randn(2, 4, 5)}, "q 的形状"),
        ({"latent": randn(3, 6, 5)}, r"latent 的形状应为 \[2, \*, \*\]，实际是 \[3, 6, 5\]"),
        ({"rope": randn(2, 5, 2)}, r"rope 的形状应为 \[2, 6, \*\]"),
        ({"rope": randn(2, 6, 8)}, "q 的最后一维 5 应不小于 rope 的最后一维 8"),
        ({"kv_b": randn(13, 5)}, r"kv_b_weight 的形状应为 \[14, 5\]，实际是 \[13, 5\]"),
        ({"v_head_dim": 0}, "都应大于 0"),
        ({"v_head_dim": 5}, "kv_b_weight 的形状"),
        ({"q": randn(2, 4, 0, 5)}, "头数"),
        ({"softmax_scale": 0.0}, "softmax_scale 应为正的有限数"),
        ({"softmax_scale": float("nan")}, "softmax_scale"),
        ({"softmax_scale": float("inf")}, "softmax_scale"),
        ({"spans": torch.zeros(2, 3, dtype=INT)}, "spans 的形状"),
        ({"spans": torch.zeros(2, 4, dtype=torch.int32)}, "spans 的类型应为 int64"),
        ({"kv_mask": torch.ones(2, 5, dtype=torch.bool)}, "kv_mask 的形状"),
        ({"kv_mask": torch.ones(2, 6)}, "kv_mask 的类型应为 bool"),
        ({"scale": torch.ones(2, 6)}, "时必须给出 scale，否则不能给"),
        ({"latent": torch.ones(2, 6, 5, dtype=torch.int8)}, "int8.*时必须给出 scale"),
        ({"latent": torch.ones(2, 6, 5).to(F8)}, "float8_e4m3fn 时必须给出 scale"),
        ({"q": randn(2, 4, 2, 5).double()}, "q 的类型"),
        ({"latent": randn(2, 6, 5).double()}, "latent 的类型"),
        ({"rope": torch.ones(2, 6, 2, dtype=torch.int8)}, "rope 的类型"),
        ({"rope": torch.ones(2, 6, 2).to(F8)}, "rope 的类型.*实际是 float8_e4m3fn"),
        ({"kv_b": randn(14, 5).double()}, "kv_b_weight 的类型"),
    ],
)
def test_attention(name, changes, message):
    case = attention(2, 4, 6, 2, (5, 2, 3, 4)).but(**changes)
    rejected(f"{name}：.*{message}", getattr(ops, name), *case.args())


@pytest.mark.parametrize("cache", QUANTIZED)
def test_quantized_has_no_gradient(cache):
    case = attention(2, 4, 6, 2, (5, 2, 3, 4), cache=cache)
    case.q.requires_grad_()
    with pytest.raises(ValueError, match="量化的潜变量.*不能求梯度"):
        ops.mla_prefill(*case.args())


def test_decode_backward_is_not_silent():
    """吸收式只有前向：对它求导，torch 会警告，不会悄悄给出没有梯度的结果。"""
    case = attention(2, 1, 6, 2, (5, 2, 3, 4))
    case.q.requires_grad_()
    with pytest.warns(UserWarning, match="autograd"):
        ops.mla_decode(*case.args()).sum().backward()


def test_library_missing(monkeypatch):
    monkeypatch.setattr(ops._run, "_READY", False)
    monkeypatch.setattr(_native, "load_error", lambda: "没有找到本地库。")
    with pytest.raises(UnsupportedError, match="本地算子库不可用：没有找到本地库"):
        ops.linear(randn(1, 2), randn(3, 2))


def test_mixed_devices_are_refused():
    with pytest.raises(
        ValueError, match="linear：全部张量应在同一设备上，实际是 x 在 cpu，weight 在 meta"
    ):
        ops.linear(torch.ones(2, 3), torch.ones(4, 3, device="meta"))
    q, latent = torch.ones(1, 1, 2, 12), torch.ones(1, 5, 16, device="meta")
    rope, weight = torch.ones(1, 5, 4), torch.ones(2 * 14, 16)
    with pytest.raises(ValueError, match="mla_decode：全部张量应在同一设备上"):
        ops.mla_decode(q, latent, rope, None, weight, ops.make_spans(1, 1, 5), None, 0.3, 6)


def test_missing_kernel_names_the_devices(monkeypatch):
    def refuse(*_args):
        raise NotImplementedError("Could not run")

    packet = SimpleNamespace(default=refuse)
    monkeypatch.setattr(ops._run, "_OPS", SimpleNamespace(linear=packet))
    with pytest.raises(UnsupportedError, match="linear：这些张量在 cpu 上，没有对应的核"):
        ops.linear(torch.ones(2, 3), torch.ones(4, 3))
