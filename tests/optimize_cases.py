"""optimize 的测试共用的配置与输出。"""

from __future__ import annotations

import torch

from deepseek_opt import MLAConfig, OptimizationProfile
from tests.tiny_models import make_inputs


def profile(**fields):
    return OptimizationProfile(mla=MLAConfig(**fields))


@torch.no_grad()
def logits(model, **kwargs):
    ids, mask = make_inputs(left_pad=3)
    return model(ids, attention_mask=mask, **kwargs).logits[mask.bool()]
