"""稠密部分的配置：门控 FFN、LM head、普通投影、归一化。"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from deepseek_opt.config.base import ConfigBase


class DenseConfig(ConfigBase):
    """稠密部分的配置。

    每个字段三种取值：None 为“能优化就优化，不能就在报告中写明原因”；
    True 同样，但无法优化时算作未满足的要求（``strict=True`` 时报错）；False 为不动。

    示例::

        DenseConfig()                 # 能优化的都优化
        DenseConfig(lm_head=False)    # LM head 留给原模型
    """

    frozen_reason: ClassVar[str] = "它决定替换哪些层；请用 switch(model, profile)"

    ffn: bool | None = Field(None, description="门控 FFN：gate、up、SiLU、down 融合")
    lm_head: bool | None = Field(None, description="LM head（词表投影）")
    projections: bool | None = Field(None, description="注意力等处的普通 nn.Linear 投影")
    norms: bool | None = Field(None, description="RMSNorm（含残差相加）")
