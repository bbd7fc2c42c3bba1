"""TokenPredictor：DeepSeek-V3 的多词元预测（MTP）模块（arXiv 2412.19437，2.2 节）。"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepseek_opt import ops
from deepseek_opt.config import MTPConfig
from deepseek_opt.errors import InputError
from deepseek_opt.integrations.patch import is_taken
from deepseek_opt.integrations.projections import is_rms_norm, norm_eps
from deepseek_opt.metrics.prediction import DraftStatistics, PredictionStatistics
from deepseek_opt.mtp.adapter import LayerInputs, MTPAdapter

BLOCK = "block."
_FUSED = (torch.float32, torch.bfloat16, torch.float16)


class Prediction(NamedTuple):
    """一个深度的结果，都是 [B, T, H]。

    hidden : 传给下一深度的。normed : shared_head.norm 之后的，输出头用它。
    """

    hidden: Tensor
    normed: Tensor


class SharedHead(nn.Module):
    """输出头一侧：归一化；输出头不与主模型共用时另有 head。"""

    def __init__(self, norm: nn.Module, head: nn.Module | None):
        super().__init__()
        self.norm = norm
        if head is not None:
            self.head = head


class PredictionLayer(nn.Module):
    """一个物理的 MTP 层；参数名去掉 ``block.`` 就是 DeepSeek 检查点里的。"""

    def __init__(self, adapter: MTPAdapter, own_head: bool, own_embedding: bool):
        super().__init__()
        hidden, place = adapter.hidden_size, {"device": adapter.device, "dtype": adapter.dtype}
        self.enorm = adapter.make_norm()
        self.hnorm = adapter.make_norm()
        self._known_norms: bool | None = None  # 两个归一化是不是一样的 RMSNorm
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False, **place)
        self.block = adapter.make_layer()
        rows = adapter.embedding.weight.shape[0]
        bias = getattr(adapter.head, "bias", None) is not None
        head = nn.Linear(hidden, rows, bias=bias, **place) if own_head else None
        self.shared_head = SharedHead(adapter.make_norm(), head)
        if own_embedding:
            self.embed_tokens = nn.Embedding(rows, hidden, **place)

    def fused_input(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """M_k [RMSNorm(Emb(t)); RMSNorm(h)]：检查点里 eh_proj 的前一半列属于嵌入。"""
        if self._fusable(embedded, hidden):
            norms = self.enorm.weight, self.hnorm.weight
            return ops.mtp_input(
                embedded, hidden, *norms, self.eh_proj.weight, norm_eps(self.enorm)
            )
        return self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))

    def _fusable(self, embedded: Tensor, hidden: Tensor) -> bool:
        """能否由 mtp_input 一次算完：普通的 RMSNorm 与 nn.Linear，没有别人的钩子。"""
        if embedded.dtype != hidden.dtype or not _takes(embedded, "mtp_input"):
            return False
        if type(self.eh_proj) is not nn.Linear:
            return False
        norms = (self.enorm, self.hnorm)
        if self._known_norms is None:
            same = norm_eps(norms[0]) == norm_eps(norms[1])
            self._known_norms = same and all(is_rms_norm(norm) for norm in norms)
        return self._known_norms and not any(is_taken(m) for m in (*norms, self.eh_proj))


class TokenPredictor(nn.Module):
    """多词元预测模块：由位置 i 的隐藏状态与第 i+k 个词元，预测第 i+k+1 个。

    h' = Block(M [RMSNorm(Emb(t)); RMSNorm(h)])，logits = head(shared_head.norm(h'))。h 在第一个深度是主模型的
    隐藏状态，之后是上一深度的 h'。嵌入与输出头缺省与主模型共用。深度大于物理层数时，最后一层反复使用。

    通常用 :func:`deepseek_opt.attach_mtp` 建立。

    参数
    ----
    adapter : 主模型的 :class:`~deepseek_opt.MTPAdapter`。
    config : :class:`~deepseek_opt.MTPConfig`；``shared_layers=False`` 时每个深度一个物理层，否则共用一个。
    physical : 物理层的个数，None 时由 config 决定。

    抛出 InputError：物理层的个数与 config 不符。

    示例
    ----
    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from deepseek_opt import MTPConfig, attach_mtp
    >>> sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64)
    >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
    >>> predictor = attach_mtp(model, config=MTPConfig(depth=4), fresh=True)
    >>> tokens = torch.tensor([[5, 6, 7]])
    >>> hidden = model.model(tokens).last_hidden_state
    >>> step = predictor(tokens[:, 1:], hidden[:, :-1])          # 深度 1：预测 t2、t3
    >>> predictor.logits(step.normed).shape
    torch.Size([1, 2, 64])
    """

    def __init__(
        self, adapter: MTPAdapter, config: MTPConfig | None = None, *, physical: int | None = None
    ):
        super().__init__()
        config = MTPConfig() if config is None else config
        if not isinstance(config, MTPConfig):
            raise InputError.expected("config", " MTPConfig", config)
        if not isinstance(adapter, MTPAdapter):
            raise InputError.expected("adapter", " MTPAdapter", adapter)
        self.adapter = adapter
        self.config = config
        count = _physical(config, physical)
        own = (config.shared_head is False, config.shared_embedding is False)
        self.layers = nn.ModuleList([PredictionLayer(adapter, *own) for _ in range(count)])
        for index, layer in enumerate(self.layers):
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = index
        self.draft_vocabulary: Tensor | None = None
        self.statistics = PredictionStatistics()
        self.draft_statistics = DraftStatistics()

    @property
    def depth(self) -> int:
        """预测深度：config.depth，没有给出时为物理层的个数。"""
        return self.config.depth or len(self.layers)

    def layer_index(self, depth: int) -> int:
        """深度 depth（从 1 起）用第几个物理层（从 0 起）。"""
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise InputError.expected("depth", "正整数", depth)
        return min(depth, len(self.layers)) - 1

    def forward(
        self,
        tokens: Tensor,
        hidden: Tensor,
        *,
        depth: int = 1,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
    ) -> Prediction:
        """运行一个深度。

        参数
        ----
        tokens : [B, T]，第 depth 个词元：与 hidden 的位置 i 对应的是 t[i + depth]。
        hidden : [B, T, H]，主模型（depth = 1）或上一深度的隐藏状态。
        position_ids : [B, T]，tokens 的位置；None 时从 depth（有缓存时再加已有的长度）起连续编号。
        document_ids : [B, T]，hidden 各位置所属的文档，只看同一文档。
        attention_mask, cache : 带缓存时的填充与 ``adapter.make_cache()`` 得到的缓存。

        返回 :class:`Prediction`。抛出 InputError：形状不符。
        """
        self._check(tokens, hidden)
        index = self.layer_index(depth)
        layer = self.layers[index]
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length(index)
            position_ids = torch.arange(tokens.shape[1], device=tokens.device)[None] + past + depth
        embedded = self._embed(layer, tokens, position_ids)
        inputs = LayerInputs(position_ids, document_ids, attention_mask, cache, index)
        fused = layer.fused_input(embedded.to(hidden.dtype), hidden)
        out = self.adapter.run_layer(layer.block, fused, inputs)
        normed = layer.shared_head.norm(out)
        return Prediction(normed if self.adapter.chain_normed else out, normed)

    def logits(self, normed: Tensor, depth: int = 1) -> Tensor:
        """输出头：[..., H] -> [..., V]。``detach_hidden`` 时主模型的输出头不得梯度。"""
        own = getattr(self.layers[self.layer_index(depth)].shared_head, "head", None)
        if own is not None:
            return own(normed)
        head = self.adapter.head
        if not self.config.detach_hidden:
            return head(normed)
        frozen = {name: p.detach() for name, p in head.named_parameters()}
        return torch.func.functional_call(head, frozen, (normed,))

    def set_draft_vocabulary(self, tokens: Tensor | None) -> None:
        """生成时只在 tokens（[N] int64，不重复）里起草，例如语料里最常见的几千个；None 为整个词表。

        核对仍看整个词表，所以不影响结果；输出头读的权重少，起草就快，选不到的词元总是不被接受。

        抛出 InputError：不是一维的整数张量、为空、重复、不在词表之内。

        示例::

            counts = torch.bincount(corpus_tokens, minlength=vocab_size)
            model.mtp.set_draft_vocabulary(counts.topk(2048).indices)
        """
        if tokens is None:
            self.draft_vocabulary = None
            return
        size = self.adapter.head.weight.shape[0]
        good = isinstance(tokens, Tensor) and tokens.dtype == torch.int64 and tokens.dim() == 1
        if not good or not tokens.numel():
            raise InputError.expected("tokens", "非空的一维 int64 张量", tokens)
        kept = tokens.unique()
        if kept.numel() != tokens.numel():
            raise InputError("参数 tokens：不应有重复的词元")
        if int(kept[0]) < 0 or int(kept[-1]) >= size:
            raise InputError(
                f"参数 tokens：应在 [0, {size}) 内，实际是 {int(kept[0])} 到 {int(kept[-1])}"
            )
        self.draft_vocabulary = kept.to(self.adapter.device)

    def draft_tokens(self, normed: Tensor, depth: int = 1) -> Tensor:
        """起草：normed [R, H] -> 分数最大的词元 [R]；普通的输出头由 mtp_draft_head 一次算完。"""
        head = getattr(self.layers[self.layer_index(depth)].shared_head, "head", self.adapter.head)
        if type(head) is nn.Linear and not is_taken(head) and _takes(normed, "mtp_draft_head"):
            return ops.mtp_draft_head(normed, head.weight, head.bias, self.draft_vocabulary)
        return self.draft_logits(normed, depth).argmax(-1)

    def draft_logits(self, normed: Tensor, depth: int = 1) -> Tensor:
        """起草用的 logits [R, V]：不在 draft_vocabulary 里的为 -inf。"""
        found = self.logits(normed, depth)
        if self.draft_vocabulary is None:
            return found
        out = torch.full_like(found, -torch.inf)
        out[:, self.draft_vocabulary] = found[:, self.draft_vocabulary]
        return out

    def checkpoint_names(self, prefix: str = "") -> dict[str, str]:
        """本模块 state_dict 的名字 -> 检查点里（拆开专家之前）的名字。"""
        names = {}
        for key in self.state_dict():
            index, _, rest = key.removeprefix("layers.").partition(".")
            rest = rest.removeprefix(BLOCK)
            names[prefix + key] = self.adapter.layer_prefix(int(index)) + rest
        return names

    def _embed(self, layer: PredictionLayer, tokens: Tensor, position_ids: Tensor) -> Tensor:
        own = getattr(layer, "embed_tokens", None)
        if own is not None:
            return own(tokens)
        found = self.adapter.embed(tokens, position_ids)
        return found.detach() if self.config.detach_hidden else found

    def _check(self, tokens: Tensor, hidden: Tensor) -> None:
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
            raise InputError.expected("tokens", "整数张量 [B, T]", tokens)
        wanted = (*tokens.shape, self.adapter.hidden_size)
        if not isinstance(hidden, Tensor) or tuple(hidden.shape) != wanted:
            raise InputError.expected("hidden", f"形状 {list(wanted)} 的张量", hidden)


def _takes(x: Tensor, op: str) -> bool:
    """本库的核 op 能否直接算 x。"""
    if x.dtype not in _FUSED or torch.is_autocast_enabled(x.device.type):
        return False
    return ops.missing(x, op) is None


def _physical(config: MTPConfig, physical: int | None) -> int:
    """物理层的个数；与 config 矛盾则报错。"""
    if physical is None:
        return (config.depth or 1) if config.shared_layers is False else 1
    if config.shared_layers and physical != 1:
        raise InputError(f"config.shared_layers = True 时应只有 1 个物理层，实际有 {physical} 个")
    if config.depth and physical > config.depth:
        raise InputError(f"有 {physical} 个物理层，多于 config.depth = {config.depth}")
    if config.shared_layers is False and physical != (config.depth or physical):
        raise InputError(
            f"config.shared_layers = False、depth = {config.depth} 时应有 {config.depth} 个物理层，"
            f"实际有 {physical} 个"
        )
    return physical
