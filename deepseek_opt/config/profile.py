"""OptimizationProfile：一份完整的优化配置。"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from deepseek_opt.config import io, yaml_safe
from deepseek_opt.config.base import ConfigBase, validate
from deepseek_opt.config.dense import DenseConfig
from deepseek_opt.config.messages import suggest
from deepseek_opt.config.mla import MLAConfig
from deepseek_opt.config.moe import MOEConfig
from deepseek_opt.config.mtp import MTPConfig
from deepseek_opt.config.presets import PRESETS
from deepseek_opt.errors import ConfigError, ConfigProblem

PARTS = ("mla", "mtp", "moe", "dense")


class OptimizationProfile(ConfigBase):
    """一份优化配置；为 None 的部分不动模型。

    可从预设、YAML、JSON、TOML 得到，也可直接构造；出错时抛 ConfigError，一次列出全部错误。

    示例::

        profile = OptimizationProfile(mla=MLAConfig(), dense=DenseConfig())
        profile = OptimizationProfile.preset("long_context")
        profile.to_file("profile.yaml")
        assert OptimizationProfile.from_file("profile.yaml") == profile
        profile.mla.cache_dtype = "int8"     # 校验后生效，profile.revision 随之变大
    """

    live_fields: ClassVar[frozenset[str]] = frozenset({"name", "description", "log_level"})
    frozen_reason: ClassVar[str] = "它决定替换模型的哪些部分；请用 switch(model, profile)"

    name: str | None = Field(None, description="配置的名字")
    description: str | None = Field(None, description="配置的说明")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] | None = Field(
        None, description="日志级别（记录器 deepseek_opt）"
    )
    mla: MLAConfig | None = Field(None, description="MLA 注意力")
    mtp: MTPConfig | None = Field(None, description="多 token 预测")
    moe: MOEConfig | None = Field(None, description="混合专家")
    dense: DenseConfig | None = Field(None, description="稠密部分：门控 FFN、LM head、投影、归一化")

    @property
    def revision(self) -> int:
        """修订号；本对象或任一部分被修改（或整个换掉）后变大。"""
        return max(self._revision, *(part.revision for part in self.parts().values()), 0)

    def parts(self) -> dict[str, ConfigBase]:
        """给出的各部分：名字 → 配置。"""
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}

    @classmethod
    def preset(cls, name: str) -> OptimizationProfile:
        """按名字取预设，每次返回新的对象；名字见 :meth:`presets`。

        抛出：
            ConfigError: 没有这个预设。
        """
        if name not in PRESETS:
            close = suggest(name, PRESETS)
            hint = f"是不是想写 {close}？" if close else ""
            raise ConfigError(f"没有名为 {name!r} 的预设；{hint}可用的预设：{'、'.join(PRESETS)}")
        description, parts = PRESETS[name]
        return cls.model_validate({"name": name, "description": description, **parts})

    @classmethod
    def presets(cls) -> dict[str, str]:
        """所有预设：名字 → 中文说明。"""
        return {name: description for name, (description, _) in PRESETS.items()}

    @classmethod
    def from_file(cls, path: str | Path) -> OptimizationProfile:
        """读取 .yaml、.yml、.json 或 .toml；不执行文件中的任何代码。

        抛出：
            ConfigError: 文件读不了、语法错、重复或未知的字段、类型错、取值矛盾，
                一次列出全部，带文件名、行号、点分路径和值。
        """
        document = io.read(path)
        found = list(document.problems)
        data = document.data
        for name in PARTS:
            if name in data and data[name] is None:
                # 只写 "mla:" 的人多半想启用它；悄悄当作“不动”会让人以为已经优化了。
                message = "空值含义不清：启用请写 {}，不动这一部分请删掉这一行"
                line = document.lines.get((name,))
                found.append(ConfigProblem(name, message, None, line))
        return validate(cls, data, file=str(path), lines=document.lines, found=found)

    def to_yaml(self) -> str:
        """写成 YAML 文本，只含给出的字段。"""
        return yaml_safe.dump(self.to_dict())

    def to_file(self, path: str | Path) -> Path:
        """写成 .yaml、.yml、.json 或 .toml（由后缀决定）；读回来与原来相等。

        先写临时文件再改名，写到一半失败时原文件不变。

        抛出：
            ConfigError: 后缀不认识，或目录不可写。
        """
        return io.write(path, self.to_dict())
