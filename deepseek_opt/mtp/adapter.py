"""TokenPredictor 与模型之间的协议：嵌入、输出头、解码层、缓存。"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_opt.errors import InputError, UnsupportedError


@dataclass(frozen=True)
class LayerInputs:
    """一次运行解码层所需的、隐藏状态以外的输入。

    属性：
        position_ids: [B, T]，输入词元在各自序列里的位置。
        documents: [B, T]，各位置属于哪个文档，只能看见同一文档里在前的；None 表示每行是一整个文档。
        attention_mask: [B, 缓存 + T]，0 为填充；只与 cache 一起用。
        cache: 由 ``make_cache`` 得到的缓存；None 表示没有。
        index: 第几个物理层，即在缓存里的层号。
    """

    position_ids: Tensor
    documents: Tensor | None = None
    attention_mask: Tensor | None = None
    cache: Any = None
    index: int = 0


class MTPAdapter:
    """说明一个模型怎样与 MTP 相接；自己的模型继承它，至少写 ``make_layer``。

    transformers 的模型不需要：:func:`deepseek_opt.attach_mtp` 自己认得。

    参数
    ----
    model : 主模型。
    embedding : 词嵌入模块：[B, T] -> [B, T, H]。
    head : 输出头：归一化之后的 [..., H] -> [..., V]。
    hidden_size : H。
    final_norm : 输出头之前的归一化；``hidden_normed=False`` 时必须给出（隐藏状态取自它的输入）。
    hidden_normed : 主模型给出的隐藏状态是最后的归一化之后的（True，transformers 与 vLLM 的约定）还是之前的。
    chain_normed : 传给下一深度的隐藏状态是 shared_head.norm 之后的（True）还是之前的。
    layer_path : 主模型各层所在的路径，例如 ``model.layers``：MTP 层在检查点里排在它们之后。
        None 时名字就是 ``mtp.layers.0...``。
    num_layers : 主模型的层数。

    示例
    ----
    >>> import torch
    >>> from torch import nn
    >>> from deepseek_opt import MTPAdapter, MTPConfig, attach_mtp
    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)
    >>> class Adapter(MTPAdapter):
    ...     def make_layer(self):
    ...         return nn.Sequential(nn.Linear(8, 8), nn.SiLU())
    >>> model = Model()
    >>> adapter = Adapter(model, embedding=model.embed, head=model.head, hidden_size=8)
    >>> predictor = attach_mtp(model, config=MTPConfig(depth=2), fresh=True, adapter=adapter)
    >>> predictor(torch.tensor([[3, 4]]), torch.randn(1, 2, 8)).normed.shape
    torch.Size([1, 2, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        embedding: nn.Module,
        head: nn.Module,
        hidden_size: int,
        final_norm: nn.Module | None = None,
        hidden_normed: bool = True,
        chain_normed: bool = True,
        layer_path: str | None = None,
        num_layers: int = 0,
    ):
        for name, value in (("model", model), ("embedding", embedding), ("head", head)):
            if not isinstance(value, nn.Module):
                raise InputError.expected(name, " nn.Module", value)
        if isinstance(hidden_size, bool) or not isinstance(hidden_size, int) or hidden_size < 1:
            raise InputError.expected("hidden_size", "正整数", hidden_size)
        if not hidden_normed and final_norm is None:
            raise InputError("参数 final_norm：hidden_normed=False 时应给出，隐藏状态取自它的输入")
        self.model = model
        self.embedding = embedding
        self.head = head
        self.hidden_size = hidden_size
        self.final_norm = final_norm
        self.hidden_normed = hidden_normed
        self.chain_normed = chain_normed
        self.layer_path = layer_path
        self.num_layers = num_layers

    # ---- 自己的模型要写或可以改写的 ----

    def make_layer(self) -> nn.Module:
        """新建一个与主模型同类的解码层，随机初始化。"""
        raise NotImplementedError(f"{type(self).__name__} 没有实现 make_layer()")

    def make_norm(self) -> nn.Module:
        """新建一个归一化（enorm、hnorm、shared_head.norm 用），权重为 1。"""
        return nn.RMSNorm(self.hidden_size)

    def run_layer(self, layer: nn.Module, x: Tensor, inputs: LayerInputs) -> Tensor:
        """运行解码层：x [B, T, H] -> [B, T, H]，因果。缺省为 ``layer(x)``，不认打包与缓存。"""
        if inputs.documents is not None or inputs.cache is not None:
            raise UnsupportedError(
                f"{type(self).__name__}.run_layer 没有改写：不能用打包的序列、填充与缓存；"
                "请按 inputs.documents、inputs.cache 计算"
            )
        return layer(x)

    def embed(self, tokens: Tensor, position_ids: Tensor) -> Tensor:
        """词元的嵌入；位置是加上去的模型（GPT-2）在这里加。"""
        del position_ids
        return self.embedding(tokens)

    def make_cache(self) -> Any:
        """MTP 层用的空缓存。"""
        raise UnsupportedError(f"{type(self).__name__} 没有实现 make_cache()")

    def reset_layer(self, layer: nn.Module) -> None:
        """为从头训练初始化一个 MTP 层；缺省用各模块建立时的初值。"""

    # ---- 生成 ----

    max_positions: int | None = None
    """位置的上限（学得的位置嵌入有几个）；None 为不限。"""

    def run_model(self, tokens: Tensor, position_ids: Tensor, cache: Any) -> Tensor:
        """主模型带缓存的前向：tokens [B, T] 接在缓存里各行之后，返回隐藏状态 [B, T, H]（``hidden_normed`` 的约定）。

        各行已有的长度可以不同（``cache.lengths``），position_ids [B, T] 是各自的位置。用 MTP 生成时才需要。
        """
        raise UnsupportedError(
            f"{type(self).__name__} 没有实现 run_model()，不能用 MTP 生成；"
            "请按 tokens、position_ids、cache 计算隐藏状态"
        )

    def make_model_cache(self) -> Any:
        """主模型用的空缓存：要有 ``crop_rows(lengths)`` 与 ``select(index)``，见 LatentCache、KVCache。"""
        raise UnsupportedError(
            f"{type(self).__name__} 没有实现 make_model_cache()，不能用 MTP 生成"
        )

    def generating(self) -> AbstractContextManager[None]:
        """一次生成在这个块内进行：其间参数与钩子不变，可以把检查只做一次。"""
        return nullcontext()

    def capturable(self, rows: int, steps: int) -> bool:
        """rows 行、每行 steps 个词元的一步（主模型与 MTP 层）能不能录进 CUDA graph：不等设备，地址不变。缺省不能。"""
        del rows, steps
        return False

    def is_current(self) -> bool:
        """主模型的各部分（嵌入、输出头、各层）是不是还是建立时的那些。缺省不看。"""
        return True

    def reserve_positions(self, count: int) -> Any:
        """要用到前 count 个位置；返回与位置有关的表（没有则 None），够长就总是同一个对象。能录的才需要。"""
        del count

    def logits(self, hidden: Tensor) -> Tensor:
        """``run_model`` 的隐藏状态 -> logits。"""
        return self.head(hidden if self.hidden_normed else self.final_norm(hidden))

    # ---- 检查点 ----

    def layer_prefix(self, index: int) -> str:
        """第 index 个物理层在检查点里的前缀。"""
        if self.layer_path is None:
            return f"mtp.layers.{index}."
        return f"{self.layer_path}.{self.num_layers + index}."

    def to_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """内存里的名字与布局 -> 检查点的；可以在 meta 张量上运行，只求名字与形状。"""
        return tensors

    def from_checkpoint(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """``to_checkpoint`` 的逆。"""
        return tensors

    def default_source(self) -> Any:
        """没有给出 source 时从哪里读。"""
        return None

    # ---- 供本库使用 ----

    @property
    def captured(self) -> nn.Module:
        """它的输入就是要用的隐藏状态的那个模块。"""
        return self.head if self.hidden_normed else self.final_norm

    @property
    def dtype(self) -> torch.dtype:
        """新建的层用的类型。"""
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """新建的层所在的设备。"""
        return self.embedding.weight.device
