"""deepseek_opt：把 DeepSeek 的 MLA、MTP、MoE 技术带进已有的 Transformer。"""

from __future__ import annotations

import importlib
import sys
import types

__version__ = "0.1.0"

_EXPORTS = {
    "MLAConfig": "config",
    "MTPConfig": "config",
    "MOEConfig": "config",
    "DenseConfig": "config",
    "OptimizationProfile": "config",
    "optimize": "optimize",
    "restore": "optimize",
    "switch": "optimize",
    "optimized": "optimize",
    "AttentionOptimizer": "optimize",
    "OptimizationReport": "report",
    "verify": "verify",
    "VerificationReport": "report",
    "LatentCache": "cache",
    "KVCache": "kv_cache",
    "MLAAttention": "layers",
    "ExpertRouter": "layers",
    "RoutingResult": "layers",
    "metrics": "metrics",
    "PerformanceMetrics": "metrics",
    "estimate_memory": "memory",
    "release_buffers": "buffers",
    "accumulate_into_grad": "gradients",
    "MoEFeedForward": "layers",
    "aux_loss": "layers",
    "ExpertStatistics": "metrics",
    "expert_statistics": "metrics",
    "update_expert_bias": "balance",
    "BalanceCallback": "integrations.trainer",
    "MTPAdapter": "mtp",
    "MTPCallback": "integrations.trainer",
    "MTPLoss": "mtp",
    "MTPTraining": "mtp",
    "TokenPredictor": "mtp",
    "GenerationOutput": "generation.generate",
    "generate": "generation.generate",
    "attach_mtp": "mtp",
    "detach_mtp": "mtp",
    "mtp_loss": "mtp",
    "MoeAdapter": "integrations",
    "register_moe": "integrations",
    "upcycle_ffn": "upcycle",
    "upcycle_model": "upcycle",
    "restore_ffn": "upcycle",
    "save_quantized": "quantized_file",
    "load_quantized": "quantized_file",
    "empty_parameters": "quantized_file",
}
__all__ = [*sorted(_EXPORTS), "__version__"]


def __getattr__(name: str):
    """公共名字按需导入：``import deepseek_opt`` 本身不导入 transformers。"""
    if name not in _EXPORTS:
        raise AttributeError(f"模块 deepseek_opt 没有名字 {name!r}")
    module = importlib.import_module(f"deepseek_opt.{_EXPORTS[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


class _Package(types.ModuleType):
    """optimize、verify、metrics 既是子模块又是公共函数：导入子模块时不让它盖住同名的函数。"""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _EXPORTS and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
