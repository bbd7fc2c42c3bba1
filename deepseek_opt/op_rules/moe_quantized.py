"""量化专家的规则：只做推理，求导时报错。"""

# 规则的参数表必须与算子的模式一致，用不到的也要列出。
# pylint: disable=unused-argument
from __future__ import annotations

from deepseek_opt.op_rules.register import autocast, autograd, fake

# 参数位置：混合权重与尺度在 autocast 里保持 fp32，偏置保持原来的类型。
_WEIGHTS, _GATE_UP_SCALE, _DOWN, _DOWN_SCALE, _SHARED_SCALE = 2, 4, 6, 7, 15
_BIASES = (17, 18)


@fake("moe_experts_quantized")
def _(x, *args):
    return x.new_empty((x.shape[0], args[_DOWN - 1].shape[1]))


def _setup(ctx, inputs, output):
    pass


def _backward(ctx, grad):
    raise RuntimeError(
        "deepseek_opt：moe_experts_quantized 只做推理，没有导数；要训练请用 moe_experts。"
    )


autograd("moe_experts_quantized", _backward, _setup, has_backward_op=False)
autocast(
    "moe_experts_quantized",
    keep=(_WEIGHTS, _GATE_UP_SCALE, _DOWN_SCALE, _SHARED_SCALE, *_BIASES),
)
