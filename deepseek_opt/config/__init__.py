"""配置：``MLAConfig``、``MTPConfig``、``MOEConfig``、``DenseConfig``、``OptimizationProfile``。

示例::

    from deepseek_opt.config import MLAConfig, OptimizationProfile

    profile = OptimizationProfile(mla=MLAConfig(cache_dtype="int8"))
    profile.mla.memory_budget_bytes = "2GB"
"""

from deepseek_opt.config.base import ConfigBase
from deepseek_opt.config.dense import DenseConfig
from deepseek_opt.config.fields import format_bytes, parse_bytes
from deepseek_opt.config.mla import MLAConfig
from deepseek_opt.config.moe import MOEConfig
from deepseek_opt.config.mtp import MTPConfig
from deepseek_opt.config.profile import OptimizationProfile

__all__ = [
    "ConfigBase",
    "DenseConfig",
    "MLAConfig",
    "MOEConfig",
    "MTPConfig",
    "OptimizationProfile",
    "format_bytes",
    "parse_bytes",
]
