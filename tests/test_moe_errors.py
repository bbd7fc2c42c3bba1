"""moe_experts 的非法输入：一句中文，写明算子、参数、期望与实际。"""

from __future__ import annotations

import pytest
import torch

from deepseek_opt import ops
from deepseek_opt.errors import UnsupportedError
from tests.moe_cases import Experts, Layout, experts
from tests.op_cases import randn

OPS = torch.ops.deepseek_opt
F64, INT = torch.float64, torch.int64


def make(**options) -> Experts:
    """T = 3，K = 4，I = 5，N = 6，E = 2，每词元 2 个。"""
    return experts((3, 4, 5, 6), 2, bias=True, **options)


def rejected(message: str, case: Experts) -> None:
    for function in (ops.moe_experts, backward):
        with pytest.raises(ValueError, match=message) as caught:
            case.run(function)
        assert "deepseek_opt：moe_experts" in str(caught.value)


def backward(*args, transposed, interleaved, gated):
    """直接调用反向的算子：它的检查与前向相同。"""
    flags = (transposed, interleaved, gated, True, True, True)
    return OPS.moe_experts_backward(randn(3, 6), *args, *flags)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"x": randn(3)}, r"x 的形状应为 \[\*, \*\]，实际是 \[3\]"),
        ({"x": randn(1, 3, 4)}, "x 的形状"),
        ({"x": randn(3, 5)}, r"gate_up 的形状应为 \[\*, \*, 5\]，实际是 \[2, 10, 4\]"),
        ({"x": randn(3, 4, dtype=F64)}, "x 的类型应为 float32、bfloat16 或 float16.*float64"),
        ({"indices": torch.zeros(3, dtype=INT)}, "indices 的形状"),
        ({"indices": torch.zeros(4, 2, dtype=INT)}, r"indices 的形状应为 \[3, \*\]"),
        (
            {"indices": torch.zeros(3, 2, dtype=torch.int32)},
            "indices 的类型应为 int64，实际是 int32",
        ),
        ({"indices": torch.zeros(3, 2)}, "indices 的类型应为 int64，实际是 float32"),
        (
            {"indices": torch.tensor([[0, 1], [1, -1], [0, 0]])},
            r"indices\[1, 1\] 应不小于 0.*专家数 2 的是哨兵.*实际是 -1",
        ),
        ({"weights": randn(3, 3)}, r"weights 的形状应为 \[3, 2\]，实际是 \[3, 3\]"),
        ({"weights": randn(3)}, "weights 的形状"),
        ({"weights": torch.ones(3, 2, dtype=INT)}, "weights 的类型.*int64"),
        ({"weights": randn(3, 2, dtype=F64)}, "weights 的类型.*float64"),
        ({"gate_up": randn(10, 4)}, "gate_up 的形状"),
        ({"gate_up": randn(2, 9, 4)}, "gate_up 应由等宽的 gate 与 up 组成，实际宽 9"),
        ({"gate_up": randn(2, 10, 4, dtype=F64)}, "gate_up 的类型.*float64"),
        ({"gate_up_bias": randn(2, 9)}, r"gate_up_bias 的形状应为 \[2, 10\]"),
        ({"gate_up_bias": randn(2, 10).half()}, "gate_up_bias 的类型应为 float32，实际是 float16"),
        ({"down": randn(3, 6, 5)}, r"down 的形状应为 \[2, \*, 5\]，实际是 \[3, 6, 5\]"),
        ({"down": randn(2, 6, 4)}, "down 的形状"),
        ({"down": randn(2, 6)}, "down 的形状"),
        ({"down": randn(2, 6, 5).bfloat16()}, "down 的类型应为 float32，实际是 bfloat16"),
        ({"down_bias": randn(2, 5)}, r"down_bias 的形状应为 \[2, 6\]"),
        ({"down_bias": randn(2, 6).half()}, "down_bias 的类型应为 float32，实际是 float16"),
    ],
)
def test_tensors(changes, message):
    rejected(message, make().but(**changes))


@pytest.mark.parametrize(
    "layout, message",
    [
        (Layout("swish"), "activation 应为 silu、.*、clipped_silu 之一，实际是 swish"),
        (Layout(""), "activation"),
        (Layout("clipped", limit=0.0), "activation 为 clipped 时应有门，limit 应大于 0，实际是 0"),
        (Layout("clipped", limit=-1.0), "limit 应大于 0，实际是 -1"),
        (Layout("clipped", limit=float("nan")), "limit 应大于 0"),
        (Layout("clipped_silu", limit=0.0), "activation 为 clipped_silu 时应有门，limit 应大于 0"),
    ],
)
def test_layouts(layout, message):
    rejected(message, make().but(layout=layout))


@pytest.mark.parametrize("name", ops.CLIPPED)
def test_clipped_needs_a_gate(name):
    rejected(f"activation 为 {name} 时应有门", make(layout=Layout(name, gated=False)))


def test_transposed_shapes():
    case = make(layout=Layout(transposed=True))
    rejected(r"gate_up 的形状应为 \[\*, 4, \*\]", case.but(gate_up=randn(2, 10, 4)))
    rejected(r"down 的形状应为 \[2, 5, \*\]", case.but(down=randn(2, 6, 5)))
    rejected("gate_up 应由等宽的 gate 与 up 组成，实际宽 7", case.but(gate_up=randn(2, 4, 7)))


@pytest.mark.parametrize("layout", [Layout(transposed=True), Layout(gated=False)])
def test_shared_needs_the_plain_layout(layout):
    rejected("有 shared 时 gate_up 不能转置、必须有门", make(layout=layout, shared=3))


@pytest.mark.parametrize(
    "index, value, message",
    [
        (0, randn(6, 5), r"shared\[0\] 的形状应为 \[\*, 4\]，实际是 \[6, 5\]"),
        (0, randn(6, 4, dtype=F64), r"shared\[0\] 的类型.*float64"),
        (1, randn(5, 4), r"shared\[1\] 的形状应为 \[6, 4\]"),
        (1, randn(6, 4).half(), r"shared\[1\] 的类型应为 float32，实际是 float16"),
        (2, randn(6, 5), r"shared\[2\] 的形状应为 \[6, 6\]"),
        (2, randn(6, 6).half(), r"shared\[2\] 的类型应为 float32，实际是 float16"),
        (3, randn(4), r"shared\[3\] 的形状应为 \[3\]"),
        (3, randn(3, 1), r"shared\[3\] 的形状应为 \[3\]"),
        (3, torch.ones(3, dtype=INT), r"shared\[3\] 的类型.*int64"),
    ],
)
def test_shared(index, value, message):
    case = make(shared=4)
    shared = list(case.shared)
    shared[index] = value
    rejected(message, case.but(shared=tuple(shared)))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shared_count(count):
    case = make(shared=4)
    shared = (*case.shared, case.shared[3])[:count]
    rejected(f"shared 应为空，或.*实际有 {count} 个", case.but(shared=shared))


@pytest.mark.parametrize(
    "grad, message",
    [
        (randn(3, 5), r"grad 的形状应为 \[3, 6\]，实际是 \[3, 5\]"),
        (randn(4, 6), "grad 的形状"),
        (randn(3, 6, dtype=F64), "grad 的类型.*float64"),
    ],
)
def test_backward_gradient(grad, message):
    with pytest.raises(ValueError, match=f"moe_experts_backward：{message}"):
        OPS.moe_experts_backward(grad, *make().args(), True, True, True)


@pytest.mark.parametrize(
    "saved, message",
    [
        (randn(5), r"saved 的形状应为 \[96\]，实际是 \[5\]"),
        (randn(96, dtype=torch.bfloat16), "saved 的类型.*bfloat16"),
        (randn(192)[::2], "saved 应是连续的"),
    ],
)
def test_backward_saved(saved, message):
    """3 个词元各 2 个专家、中间宽 5 补到 8：2 x 3 x 2 x 8 个。"""
    with pytest.raises(ValueError, match=f"moe_experts_backward：{message}"):
        OPS.moe_experts_backward(randn(3, 6), *make().args(), True, True, True, saved)


@pytest.mark.parametrize("name", ["x", "indices", "weights", "gate_up", "gate_up_bias", "down"])
def test_mixed_devices(name):
    """一部分张量在 meta 上。"""
    case = make(shared=3)
    with pytest.raises((ValueError, UnsupportedError), match="全部张量应在同一设备上"):
        case.but(**{name: getattr(case, name).to("meta")}).run()


def test_mixed_devices_in_shared():
    case = make(shared=3)
    moved = (case.shared[0].to("meta"), *case.shared[1:])
    with pytest.raises((ValueError, UnsupportedError), match="全部张量应在同一设备上"):
        case.but(shared=moved).run()


def test_inputs_are_not_changed():
    case = make(shared=4)
    before = {name: t.clone() for name, t in case.tensors().items()}
    rejected("indices", case.but(indices=case.indices - 5))
    case.run()
    case.gradients(randn(3, 6))
    for name, tensor in case.tensors().items():
        assert torch.equal(tensor, before[name]), name
