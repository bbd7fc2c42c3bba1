"""每个算子的纯 PyTorch 参考实现：测试的标准答案，写法直白，不求快。

签名与 ``torch.ops.deepseek_opt.*`` 一致；全部可微，可用 fp64 计算，因此也是
梯度检验的对照。形状记号：B 行（batch），T 新词元数，S 潜变量槽位数，H 头数，
r = kv_lora_rank，dr = qk_rope_head_dim，dn = qk_nope_head_dim，dv = v_head_dim。
"""

from __future__ import annotations

from deepseek_opt.reference.dense import (
    add_rms_norm,
    linear,
    rms_norm,
    swiglu_mlp,
)
from deepseek_opt.reference.mla import (
    mla_cache_write,
    mla_decode,
    mla_layer_decode,
    mla_prefill,
    rope,
)
from deepseek_opt.reference.moe import moe_experts, moe_experts_list, moe_route
from deepseek_opt.reference.moe_quantized import moe_experts_quantized
from deepseek_opt.reference.mtp import (
    mtp_draft_head,
    mtp_input,
    mtp_verify_greedy,
    mtp_verify_sample,
)
from deepseek_opt.reference.sample import sample_filter, sample_tokens

__all__ = [
    "add_rms_norm",
    "linear",
    "mla_cache_write",
    "mla_decode",
    "mla_layer_decode",
    "mla_prefill",
    "moe_experts",
    "moe_experts_list",
    "moe_experts_quantized",
    "moe_route",
    "mtp_draft_head",
    "mtp_input",
    "mtp_verify_greedy",
    "mtp_verify_sample",
    "rms_norm",
    "rope",
    "sample_filter",
    "sample_tokens",
    "swiglu_mlp",
]
