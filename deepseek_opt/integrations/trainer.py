"""transformers Trainer 的回调：每个优化器步之后更新路由偏置。"""

from __future__ import annotations

from typing import Any

from deepseek_opt.balance import update_expert_bias
from deepseek_opt.errors import InputError

try:
    from transformers import TrainerCallback
except ImportError:  # 没有 transformers 时仍可导入；那时也没有 Trainer 可用
    TrainerCallback = object


class BalanceCallback(TrainerCallback):
    """在 transformers Trainer 里做无辅助损失的负载均衡：每个优化器步之后调用 update_expert_bias。

    梯度累积时一个优化器步只更新一次；中途的评估不计入负载。

    参数
    ----
    rate : 步长 γ；None 时用各层配置的，见 :func:`deepseek_opt.update_expert_bias`。

    抛出 InputError：rate 不是正数；训练时模型里没有可更新的偏置。

    示例::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[BalanceCallback(0.001)])
        trainer.train()
    """

    def __init__(self, rate: float | None = None):
        if rate is not None and not (isinstance(rate, (int, float)) and 0 < rate < float("inf")):
            raise InputError.expected("rate", "正数", rate)
        self.rate = rate

    def on_optimizer_step(self, args, state, control, model: Any = None, **kwargs):
        """优化器步之后（清零梯度之前），由 Trainer 调用。"""
        del args, state, control, kwargs
        update_expert_bias(model, self.rate)
