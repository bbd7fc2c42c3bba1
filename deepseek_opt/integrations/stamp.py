"""判断记住的结果是否还有效：同一个张量对象、内容没有被原地改过、推理模式也相同。"""

from __future__ import annotations

import torch
from torch import Tensor


def stamp(tensor: Tensor | None) -> tuple[bool, int]:
    """(是否在 inference_mode 里, 原地改写次数)。

    推理张量不计改写次数，也不能用于求导，所以两种模式下得到的结果不可混用。
    """
    counted = tensor is not None and not tensor.is_inference()
    return torch.is_inference_mode_enabled(), tensor._version if counted else 0
