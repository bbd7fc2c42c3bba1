"""transformers Trainer 的回调：更新路由偏置；训练 MTP。"""

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


class MTPCallback(TrainerCallback):
    """在 transformers Trainer 里训练 MTP：装上 :class:`~deepseek_opt.MTPTraining`，随训练步切换 λ，写日志。

    模型要先用 :func:`deepseek_opt.attach_mtp` 装上 MTP。每次写日志时加上 mtp_loss_per_depth_1、
    mtp_acceptance_per_depth_1 等，是上次写日志以来的平均。评估时的损失仍是主模型的。

    示例::

        attach_mtp(model, config=MTPConfig(depth=1, loss_weight=0.3), fresh=True)
        Trainer(model, args, train_dataset=data, callbacks=[MTPCallback()]).train()
        model.save_pretrained("out")                 # MTP 层在里面
    """

    def __init__(self) -> None:
        self.training: Any = None

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        """开始训练，由 Trainer 调用。"""
        del args, control, kwargs
        from deepseek_opt.mtp import MTPTraining

        self._leave()
        self.training = MTPTraining(model, state.global_step).start()
        self.training.predictor.statistics.reset()

    def on_step_end(self, args, state, control, **kwargs):
        """一个优化器步之后，由 Trainer 调用。"""
        del args, control, kwargs
        self.training.step = state.global_step

    def on_log(self, args, state, control, logs: Any = None, **kwargs):
        """写日志时，由 Trainer 调用。"""
        del args, control, kwargs
        if self.training is None or "loss" not in logs:
            return
        statistics = self.training.predictor.statistics
        for name, values in (
            ("mtp_loss_per_depth", statistics.losses),
            ("mtp_acceptance_per_depth", statistics.acceptance),
        ):
            found = {f"{name}_{i}": value for i, value in enumerate(values, 1)}
            logs.update(found)
            state.log_history[-1].update(found)
        statistics.reset()

    def on_train_end(self, args, state, control, **kwargs):
        """训练结束，由 Trainer 调用。"""
        del args, state, control, kwargs
        self._leave()

    def _leave(self) -> None:
        if self.training is not None:
            self.training.stop()
        self.training = None
