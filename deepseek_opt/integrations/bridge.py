"""没有安装（或没有导入）transformers 时也能用的薄接口；有则转给 hf_* 模块。"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from deepseek_opt.cache import LatentCache
from deepseek_opt.cache_layer import LatentLayer
from deepseek_opt.errors import UnsupportedError
from deepseek_opt.integrations.specs import MIN_TRANSFORMERS


def loaded() -> bool:
    """本进程是否导入过 transformers；没有的话，模型和缓存都不可能来自它。"""
    return "transformers.modeling_utils" in sys.modules


def wants_attentions() -> bool:
    """这次前向是否要收集注意力权重。"""
    module = sys.modules.get("transformers.utils.output_capturing")
    if module is None:
        return False
    collected = module._active_collector.get()
    return collected is not None and "attentions" in collected


def resolve_layer(cache: Any, index: int, runtime: Any, tracked: bool) -> LatentLayer | None:
    """cache 第 index 层的潜变量存储；不是（也不能变成）潜变量缓存时为 None。"""
    if isinstance(cache, LatentCache):
        return cache.layer(index)
    layers = getattr(cache, "layers", ())
    if index < len(layers) and isinstance(layers[index], LatentLayer):
        return layers[index]
    if not loaded():
        return None
    from deepseek_opt.integrations import hf_cache

    return hf_cache.resolve_layer(cache, index, runtime, tracked)


def original_mask(
    module: Any, hidden: Tensor, kwargs: dict[str, Any], index: int
) -> dict[str, Any]:
    """回退时把 2 维掩码换成原实现要的形式。"""
    from deepseek_opt.integrations import hf_config

    return hf_config.original_mask(module, hidden, kwargs, index)


def register_experts() -> None:
    """导入过 transformers 时，登记名为 deepseek_opt 的 experts 实现。"""
    if loaded():
        from deepseek_opt.integrations import experts_interface

        experts_interface.register()


def check_version() -> None:
    """transformers 太旧时给出明确的错误。"""
    import transformers
    from packaging.version import Version

    if Version(transformers.__version__).release < Version(MIN_TRANSFORMERS).release:
        raise UnsupportedError(
            f"transformers {transformers.__version__} 太旧：请升级到 {MIN_TRANSFORMERS} 或更新"
            "（更早的版本没有测试过，5.14 及以前缓存的是展开后的 K、V）"
        )
