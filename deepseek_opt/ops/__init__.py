"""算子的 Python 入口；计算在 ``torch.ops.deepseek_opt.*``（C 或 CUDA 核），此处没有计算。

形状记号：B 行（batch），T 新词元数，S 潜变量槽位数，H 头数，r = kv_lora_rank，
dr = qk_rope_head_dim（可为 0），dn = qk_nope_head_dim，dv = v_head_dim。dtype 为 float32、
bfloat16 或 float16，半精度一律以 fp32 累加。潜变量是 kv_a_layernorm 之后的，旋转键是旋转之后的，
与 transformers 缓存的一致。

每个函数对非法输入抛出 ValueError，消息指明参数、期望与实际，且不改动任何张量。内容（spans、offsets、下标、页号）在 CPU 上时也检查；
在 CUDA 上时不读（读要等设备）：写到缓存之外的位置、负的下标由核断言（此后这个进程里的 CUDA 不能再用），spans 与页号要由
调用者保证在范围之内。
"""

from __future__ import annotations

from deepseek_opt.ops._run import missing  # noqa: F401
from deepseek_opt.ops.dense import (
    add_rms_norm,
    linear,
    rms_norm,
    swiglu_mlp,
)
from deepseek_opt.ops.mla import (
    DECODE_MAX_TOKENS,
    decode_limit,
    mla_attention,
    mla_cache_write,
    mla_decode,
    mla_layer_decode,
    mla_prefill,
    rope,
    rope_,
)
from deepseek_opt.ops.moe import (
    ACTIVATIONS,
    CLIPPED,
    SCORES,
    moe_experts,
    moe_experts_list,
    moe_route,
)
from deepseek_opt.ops.moe_quantized import moe_experts_quantized
from deepseek_opt.ops.mtp import (
    check_drafts,
    check_verified,
    mtp_draft_head,
    mtp_input,
    mtp_verify_greedy,
    mtp_verify_sample,
)
from deepseek_opt.ops.sample import sample_filter, sample_tokens
from deepseek_opt.ops.spans import (
    make_spans,
    slice_spans,
    spans_from_cu_seqlens,
)

__all__ = [
    "ACTIVATIONS",
    "CLIPPED",
    "DECODE_MAX_TOKENS",
    "SCORES",
    "add_rms_norm",
    "check_drafts",
    "check_verified",
    "decode_limit",
    "linear",
    "make_spans",
    "mla_attention",
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
    "rope_",
    "sample_filter",
    "sample_tokens",
    "slice_spans",
    "spans_from_cu_seqlens",
    "swiglu_mlp",
]
