"""多词元预测（MTP）：TokenPredictor 模块、读写检查点、训练；生成见 :mod:`deepseek_opt.generation`。"""

from __future__ import annotations

from deepseek_opt.mtp.adapter import LayerInputs, MTPAdapter
from deepseek_opt.mtp.attach import attach_mtp, detach_mtp, predictor_of
from deepseek_opt.mtp.documents import document_runs
from deepseek_opt.mtp.hf import HFAdapter
from deepseek_opt.mtp.loss import MTPLoss, loss_weights, mtp_loss
from deepseek_opt.mtp.predictor import Prediction, TokenPredictor
from deepseek_opt.mtp.training import MTPTraining

__all__ = [
    "HFAdapter",
    "LayerInputs",
    "MTPAdapter",
    "MTPLoss",
    "MTPTraining",
    "Prediction",
    "TokenPredictor",
    "attach_mtp",
    "detach_mtp",
    "document_runs",
    "loss_weights",
    "mtp_loss",
    "predictor_of",
]
