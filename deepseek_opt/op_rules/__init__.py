"""各算子的 fake（形状推导）、autograd、autocast 规则；导入即登记一次。

前向与反向的计算都在本地库里；这里只有 torch.library 的登记。反向本身也是算子，
没有二阶导数（对它再求导时 torch 会报错，而不是给出错误的结果）。
"""

from deepseek_opt.op_rules import dense, mla, moe, moe_quantized, mtp  # noqa: F401
