"""没有用 MTP 的 transformers 模型：``generate`` 照样逐个词元，只是在 CUDA 上把一步录成 CUDA graph。

一步有几十到几百个小核，由 Python 逐层启动比计算还久。这里与 MTP 同一个循环，从不起草：结果与 transformers 自己的
``_sample`` 逐个词元相同，采样也是（同一种子、同样地取随机数）。录不了的（:func:`~.graphs.obstacle` 的各种，或要返回
几行的缓存）由 transformers 照常生成，日志里记下原因。
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deepseek_opt import log
from deepseek_opt.config import MTPConfig
from deepseek_opt.generation import graphs
from deepseek_opt.generation.adaptive import DraftLength
from deepseek_opt.generation.hf import NAME, GeneratePatch
from deepseek_opt.generation.loop import Plan
from deepseek_opt.generation.plain import PlainPredictor
from deepseek_opt.generation.plan import missing_kernels
from deepseek_opt.integrations.runtime import Runtime
from deepseek_opt.mtp.parts import altered

_SHORTEST = 8  # 生成得更短时，录制的开销比省下的多


class PlainGeneratePatch(GeneratePatch):
    """没有用 MTP 的模型的 generate；主模型的接口第一次用到时才建立、核对。"""

    kind = "mla"

    def __init__(self, module: Any, runtime: Runtime):
        super().__init__(module, runtime, NAME, None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.runtime.refresh()
        if not self.runtime.cuda_graphs:
            if self.predictor is not None:
                graphs.forget(self.predictor)
            return self.call_original(*args, **kwargs)
        if not graphs.can_capture(self.module.device):
            return self.call_original(*args, **kwargs)
        config = kwargs.get("generation_config")
        if kwargs.get("use_mtp") or getattr(config, "use_mtp", False):
            return self.call_original(*args, **kwargs)  # transformers 自己的 MTP
        return super().__call__(*args, **kwargs)

    def decline(self, reason: str) -> None:
        log.LOGGER.info("%s：这一次没有录成 CUDA graph（%s）", NAME, reason)

    def _unready(self) -> str | None:
        """接口第一次用到时建立；模型的某一部分换掉了就重新建立。"""
        reason, predictor = altered(self.module), self.predictor
        if reason is not None:
            return reason
        if predictor is None or not predictor.adapter.is_current():
            try:
                predictor = PlainPredictor(self.module)
            except Exception as error:  # pylint: disable=broad-exception-caught
                # 用几个词元运行的是用户的模型：它自己的错误留给 transformers 的循环去报
                return f"建立不了主模型的接口：{error}"
            self.predictor = predictor
        return missing_kernels(predictor)

    @property
    def config(self) -> MTPConfig:
        return MTPConfig()

    @property
    def length(self) -> DraftLength:
        return self.predictor.length

    def unprepared(self, rows: int, visible: Tensor | None, returns: bool) -> str | None:
        if returns and (rows > 1 or visible is not None):
            return "要返回几行（或有填充）的缓存"
        if visible is None:
            return None
        if not bool(visible[:, -1].all()) or bool((visible[:, :-1] & ~visible[:, 1:]).any()):
            return "填充不在左边"  # transformers 从填充之后接着生成
        return None

    def unfit(self, plan: Plan) -> str | None:
        if plan.rows.max_new < _SHORTEST:
            return f"至多生成 {plan.rows.max_new} 个词元，录制不合算"
        return graphs.obstacle(plan)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "predictor": None}
