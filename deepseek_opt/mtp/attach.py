"""把 MTP 模块装到模型上、取下；装上之后 state_dict 与 save_pretrained 用 DeepSeek 的检查点布局。"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from deepseek_opt.config import MTPConfig
from deepseek_opt.errors import InputError, UnsupportedError
from deepseek_opt.mtp.adapter import MTPAdapter
from deepseek_opt.mtp.hf import HFAdapter, is_hf_model
from deepseek_opt.mtp.predictor import TokenPredictor
from deepseek_opt.mtp.weights import Source, load_predictor
from deepseek_opt.optimize import check_model, is_optimized, lock_of

NAME = "mtp"
_RECORD = "_deepseek_opt_mtp"
_DECLARED = "num_nextn_predict_layers"
_ABSENT = object()


def attach_mtp(
    model: nn.Module,
    source: Any = None,
    config: MTPConfig | None = None,
    *,
    fresh: bool = False,
    adapter: MTPAdapter | None = None,
) -> TokenPredictor:
    """给 model 装上 MTP 模块（``model.mtp``），返回它；主模型的前向、参数都不变。

    之后 ``model.parameters()``、``.to()``、``train()`` 都包括它；``state_dict()`` 与 ``save_pretrained()``
    把它写成 DeepSeek 的布局（排在主模型各层之后的 ``model.layers.{N}.enorm`` 等），别人用原版 transformers
    照常读入。取下用 :func:`detach_mtp`。

    参数
    ----
    model : transformers 的因果语言模型，或自己的 nn.Module（要给出 adapter）。
    source : 检查点文件夹（safetensors，MTP 层也可以单独在 ``mtp.safetensors`` 里），或“名字 -> 张量”的
        字典；None 时用模型自己的文件夹。
    config : :class:`~deepseek_opt.MTPConfig`，缺省按检查点里的层数。
    fresh : True 时不读权重，随机初始化，用于从头训练。
    adapter : 见 :class:`~deepseek_opt.MTPAdapter`；transformers 模型缺省是 ``HFAdapter(model)``。

    抛出 InputError：权重缺少、形状不对、量化过、编号不对，逐个列出；已经装过，或已经 optimize 过。
    UnsupportedError：不认得这个模型。抛出时模型不变。

    示例
    ----
    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from deepseek_opt import MTPConfig, attach_mtp
    >>> sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64)
    >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
    >>> _ = attach_mtp(model, config=MTPConfig(depth=1), fresh=True)      # 训练之后：
    >>> folder = tempfile.mkdtemp()
    >>> model.save_pretrained(folder)
    >>> again = LlamaForCausalLM.from_pretrained(folder)
    >>> attach_mtp(again, folder).depth
    1
    """
    check_model(model)
    config = MTPConfig() if config is None else config
    if not isinstance(config, MTPConfig):
        raise InputError.expected("config", " MTPConfig", config)
    if fresh and source is not None:
        raise InputError("参数 fresh：给了 source 时应为 False（权重从那里读）")
    with lock_of(model):
        _check_free(model)
        adapter = _adapter_of(model) if adapter is None else adapter
        predictor = _fresh(adapter, config) if fresh else _read(model, adapter, config, source)
        predictor.train(model.training)
        _install(model, predictor)
    return predictor


def detach_mtp(model: nn.Module) -> TokenPredictor:
    """取下 :func:`attach_mtp` 装上的模块并返回它；model（连同配置）回到原样。

    抛出 InputError：没有装过；或正处于 optimize 之中（先 restore）。

    示例
    ----
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from deepseek_opt import attach_mtp, detach_mtp
    >>> sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64)
    >>> model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
    >>> predictor = attach_mtp(model, fresh=True)
    >>> detach_mtp(model) is predictor, hasattr(model, "mtp")
    (True, False)
    """
    check_model(model)
    with lock_of(model):
        if _RECORD not in model.__dict__:
            raise InputError(f"这个 {type(model).__name__} 没有装过 MTP")
        if is_optimized(model):
            raise InputError("请先 restore(model) 再 detach_mtp：这个模型正处于优化状态")
        before = model.__dict__.pop(_RECORD)
        predictor = model._modules.pop(NAME)
        for hooks, mine in (
            (model._state_dict_hooks, _to_checkpoint),
            (model._load_state_dict_pre_hooks, _from_checkpoint),
        ):
            for key in [k for k, hook in hooks.items() if getattr(hook, "hook", hook) is mine]:
                del hooks[key]
        _restore_config(model, before[0])
    return predictor


def predictor_of(model: nn.Module) -> TokenPredictor:
    """model（或被包在里面的）装着的 MTP 模块；没有则抛出 InputError。"""
    check_model(model)
    found = find_predictor(model)
    if found is None:
        raise InputError(f"这个 {type(model).__name__} 没有装 MTP；请先用 attach_mtp(model)")
    return found


def find_predictor(model: nn.Module) -> TokenPredictor | None:
    """同上，没有则为 None。"""
    return next((m for m in model.modules() if isinstance(m, TokenPredictor)), None)


# ---- 内部 ----


def _check_free(model: nn.Module) -> None:
    if _RECORD in model.__dict__:
        raise InputError(f"这个 {type(model).__name__} 已经装过 MTP；要换，请先 detach_mtp(model)")
    if hasattr(model, NAME):
        raise InputError(f"{type(model).__name__} 自己已有名为 {NAME} 的属性，装不上")
    if is_optimized(model):
        raise InputError("请先 attach_mtp 再 optimize：这个模型已经优化过，可以先 restore(model)")


def _adapter_of(model: nn.Module) -> MTPAdapter:
    if is_hf_model(model):
        return HFAdapter(model)
    raise UnsupportedError(
        f"不认得 {type(model).__name__}：它不是 transformers 的模型；"
        "请继承 MTPAdapter 写一个接口，用 attach_mtp(..., adapter=...) 给出"
    )


def _fresh(adapter: MTPAdapter, config: MTPConfig) -> TokenPredictor:
    predictor = TokenPredictor(adapter, config)
    for layer in predictor.layers:
        adapter.reset_layer(layer)
    return predictor


def _read(model: nn.Module, adapter: MTPAdapter, config: MTPConfig, given: Any) -> TokenPredictor:
    given = adapter.default_source() if given is None else given
    if given is None:
        raise InputError(
            "参数 source：应给出检查点文件夹或字典（模型不是从文件夹读来的）；从头训练请用 fresh=True"
        )
    source = Source(given)
    separate = config.depth if config.shared_layers is False and config.depth else 1
    # 配置里声明了几层而文件里少，就是不完整的检查点；V3 的配置类缺省声明 1 层
    declared = getattr(getattr(model, "config", None), _DECLARED, None) or 1
    count = source.layers(adapter, max(separate, declared))
    predictor = TokenPredictor(adapter, config, physical=count)
    load_predictor(predictor, source)
    return predictor


def _install(model: nn.Module, predictor: TokenPredictor) -> None:
    model.add_module(NAME, predictor)
    model.register_state_dict_post_hook(_to_checkpoint)
    model.register_load_state_dict_pre_hook(_from_checkpoint)
    config = getattr(model, "config", None)
    model.__dict__[_RECORD] = (getattr(config, "__dict__", {}).get(_DECLARED, _ABSENT),)
    if is_hf_model(model):
        setattr(config, _DECLARED, len(predictor.layers))


def _restore_config(model: nn.Module, before: Any) -> None:
    if not is_hf_model(model):
        return
    if before is _ABSENT:
        delattr(model.config, _DECLARED)
    else:
        setattr(model.config, _DECLARED, before)


def _to_checkpoint(
    module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, _metadata: Any
) -> None:
    """state_dict：``mtp.layers.0.block.x`` -> ``model.layers.N.x``。"""
    for key, name in _renames(module).items():
        if prefix + key in state_dict:
            state_dict[prefix + name] = state_dict.pop(prefix + key)


def _from_checkpoint(
    module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any
) -> None:
    """load_state_dict：反过来。"""
    for key, name in _renames(module).items():
        if prefix + name in state_dict:
            state_dict[prefix + key] = state_dict.pop(prefix + name)


def _renames(module: nn.Module) -> dict[str, str]:
    return getattr(module, NAME).checkpoint_names(f"{NAME}.")
