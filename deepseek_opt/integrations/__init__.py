"""与 transformers 及用户自己的模型的对接；架构描述见 :mod:`.specs`。"""

from deepseek_opt.integrations.bridge import register_experts
from deepseek_opt.integrations.moe_adapter import MoeAdapter, register_moe
from deepseek_opt.integrations.specs import AttentionSpec, register_spec

__all__ = ["AttentionSpec", "MoeAdapter", "register_experts", "register_moe", "register_spec"]
