"""optimize、restore、switch、optimized：只改实例、能还原、能回滚、随模型复制与保存。"""

from __future__ import annotations

import copy
import io
import logging
import threading

import pytest
import torch
from torch import nn

from deepseek_opt import (
    AttentionOptimizer,
    DenseConfig,
    LatentCache,
    MLAConfig,
    OptimizationProfile,
    optimize,
    optimized,
    restore,
    switch,
    verify,
)
from deepseek_opt.errors import ConfigError, UnsupportedError
from deepseek_opt.integrations import AttentionSpec, register_spec, specs
from deepseek_opt.metrics import is_collecting, metrics, start_metrics
from deepseek_opt.optimize import is_optimized
from tests.tiny_models import make_inputs, make_model
from tests.tolerances import tol


def profile(**fields):
    return OptimizationProfile(mla=MLAConfig(**fields))


@pytest.fixture
def model():
    return make_model(attn_implementation="eager")


def snapshot(model):
    """实例上除参数外的一切：各模块 __dict__ 的键与对象身份。"""
    return [
        {k: id(v) for k, v in m.__dict__.items() if not k.startswith("_")} for m in model.modules()
    ]


@torch.no_grad()
def logits(model, **kwargs):
    ids, mask = make_inputs(left_pad=3)
    return model(ids, attention_mask=mask, **kwargs).logits[mask.bool()]


def test_restore_is_bit_for_bit(model):
    before, state = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    config, expected = model.config, logits(model)
    optimize(model, OptimizationProfile(mla=MLAConfig(), dense=DenseConfig()))
    assert is_optimized(model) and type(model.model.layers[0].self_attn).forward is not None
    restore(model)
    assert snapshot(model) == before and model.model.config is config
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), expected) and not is_optimized(model)
    assert not any(k.startswith("_deepseek_opt") for m in model.modules() for k in m.__dict__)


def test_only_this_instance_changes(model):
    other = make_model(attn_implementation="eager")
    shared = type(model)(model.config).eval()  # 同一个配置对象
    optimize(model, profile())
    for untouched in (other, shared):
        assert not any("forward" in m.__dict__ for m in untouched.modules())
        assert untouched.model.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "eager"


def test_state_dict_and_save_pretrained_unchanged(model, tmp_path):
    model.save_pretrained(tmp_path / "before")
    keys = list(model.state_dict())
    optimize(model, OptimizationProfile(mla=MLAConfig(), dense=DenseConfig()))
    assert list(model.state_dict()) == keys
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    model.save_pretrained(tmp_path / "after")
    model.model.save_pretrained(tmp_path / "base_after")
    restore(model)
    model.model.save_pretrained(tmp_path / "base_before")
    for old, new in (("before", "after"), ("base_before", "base_after")):
        files = sorted(p.name for p in (tmp_path / old).iterdir())
        assert files == sorted(p.name for p in (tmp_path / new).iterdir())
        for name in files:
            assert (tmp_path / old / name).read_bytes() == (tmp_path / new / name).read_bytes(), (
                name
            )


def test_base_model_as_root(tmp_path):
    base = make_model(attn_implementation="eager").model
    ids, mask = make_inputs(left_pad=3)
    with torch.no_grad():
        expected = base(ids, attention_mask=mask).last_hidden_state
        base.save_pretrained(tmp_path / "before")
        optimize(base, profile())
        actual = base(ids, attention_mask=mask).last_hidden_state
    base.save_pretrained(tmp_path / "after")
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **tol(torch.float32))
    one, two = (tmp_path / n / "config.json" for n in ("before", "after"))
    assert one.read_bytes() == two.read_bytes()
    restore(base)


def test_deepcopy_is_independent(model):
    optimize(model, profile())
    twin = copy.deepcopy(model)
    attention = twin.model.layers[0].self_attn
    assert attention.forward.module is attention
    with torch.no_grad():
        attention.o_proj.weight.zero_()
    expected = logits(model)
    restore(model)
    assert is_optimized(twin)
    torch.testing.assert_close(logits(model), expected, **tol(torch.float32))
    assert not torch.allclose(logits(twin), expected)
    twin_profile = switch(twin, profile(cache_dtype="bfloat16"))
    assert twin_profile.replaced
    restore(twin)
    layer = copy.deepcopy(optimize_and_take(model))
    assert layer.self_attn.forward.module is layer.self_attn


def optimize_and_take(model):
    optimize(model, profile())
    return model.model.layers[1]


def test_whole_model_can_be_pickled(model):
    optimize(model, profile())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert is_optimized(loaded)
    torch.testing.assert_close(logits(loaded), logits(model), **tol(torch.float32))
    restore(loaded)


def test_switch_replaces_the_profile(model):
    expected = logits(model)
    first = optimize(model, profile())
    second = switch(model, OptimizationProfile(dense=DenseConfig()))
    assert {e.part for e in first.replaced} == {"mla"}
    assert {e.part for e in second.replaced} == {"dense"}
    assert "forward" not in model.model.layers[0].self_attn.__dict__
    torch.testing.assert_close(logits(model), expected, **tol(torch.float32))
    restore(model)


def test_failed_switch_keeps_the_old_optimization(model):
    report = optimize(model, profile())
    with pytest.raises(ConfigError, match="kv_lora_rank"):
        switch(model, profile(kv_lora_rank=999))
    assert is_optimized(model)
    logits(model)
    assert not report.fallbacks
    restore(model)
    assert not is_optimized(model)


def test_optimized_restores_even_on_error(model):
    expected = logits(model)
    with optimized(model, profile()) as report:
        assert report.replaced
    with pytest.raises(ZeroDivisionError), optimized(model, profile()):
        raise ZeroDivisionError
    assert not is_optimized(model) and torch.equal(logits(model), expected)


def test_error_in_the_middle_rolls_back(model):
    before, seen = snapshot(model), []

    def explode(name, _module):
        seen.append(name)
        if len(seen) == 4:
            raise RuntimeError("中途出错")
        return True

    with pytest.raises(RuntimeError, match="中途出错"):
        optimize(
            model, OptimizationProfile(mla=MLAConfig(), dense=DenseConfig()), filter_fn=explode
        )
    assert snapshot(model) == before and not is_optimized(model)


def test_filter_fn_chooses_layers(model):
    report = optimize(model, profile(), filter_fn=lambda name, _: "layers.1" in name)
    assert [e.name for e in report.replaced] == ["model.layers.1.self_attn"]
    assert "filter_fn" in report.skipped[0].reason
    expected = logits(model)
    assert model.model.config._attn_implementation == "eager"  # 还有没替换的层，掩码照旧
    restore(model)
    torch.testing.assert_close(logits(model), expected, **tol(torch.float32))


def test_strict_and_missing_parts(caplog):
    plain = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(UnsupportedError, match="没有 MLA 注意力层"):
        optimize(plain, profile(), strict=True)
    assert not is_optimized(plain)
    with caplog.at_level(logging.WARNING, logger="deepseek_opt"):
        report = optimize(plain, profile())
    assert not report.replaced and "什么都没有替换" in caplog.text
    restore(plain)


def test_missing_mtp_is_reported(model):
    from deepseek_opt import MTPConfig

    wanted = OptimizationProfile(mla=MLAConfig(), mtp=MTPConfig())
    report = optimize(model, wanted)
    assert report.replaced and report.unmet[0].part == "mtp"
    assert "MTP" in report.unmet[0].reason and "attach_mtp" in report.unmet[0].reason
    restore(model)
    with pytest.raises(UnsupportedError, match="mtp"):
        optimize(model, wanted, strict=True)
    assert not is_optimized(model)


def test_live_config_takes_effect_or_explains(model):
    settings = profile()
    optimize(model, settings)
    ids, _ = make_inputs()
    with torch.no_grad():
        first = model(ids, use_cache=True).past_key_values
        settings.mla.cache_dtype = "bfloat16"
        second = model(ids, use_cache=True).past_key_values
        assert first.layers[0].latent.dtype == torch.float32
        assert second.layers[0].latent.dtype == torch.bfloat16
        settings.mla.kv_lora_rank = 8
        with pytest.raises(ConfigError, match="kv_lora_rank"):
            model(ids)
        settings.mla.kv_lora_rank = None
        model(ids)
    restore(model)


def test_attention_optimizer_class(model):
    optimizer = AttentionOptimizer(MLAConfig())
    attention = model.model.layers[0].self_attn
    assert optimizer.can_optimize(attention) and not optimizer.can_optimize(model.model.norm)
    report = optimizer.apply(model)
    assert len(report.replaced) == 2
    optimizer.config.cache_dtype = "float16"
    logits(model)
    optimizer.restore(model)
    assert not is_optimized(model)


def test_dense_parts_match(model):
    expected = logits(model)
    report = optimize(model, OptimizationProfile(dense=DenseConfig()))
    kinds = {e.kind for e in report.replaced}
    assert {"门控 FFN", "LM head", "投影", "RMSNorm"} <= kinds
    torch.testing.assert_close(logits(model), expected, **tol(torch.float32))
    assert not report.fallbacks
    restore(model)
    report = optimize(model, OptimizationProfile(mla=MLAConfig(), dense=DenseConfig(norms=False)))
    assert "RMSNorm" not in {e.kind for e in report.replaced}
    torch.testing.assert_close(logits(model), expected, **tol(torch.float32))
    restore(model)


def test_dense_refuses_what_it_does_not_know():
    class Odd(nn.Module):
        def __init__(self, act=None, bias=False, scale=1.0):
            super().__init__()
            self.gate_proj = nn.Linear(8, 12, bias=bias)
            self.up_proj = nn.Linear(8, 12, bias=bias)
            self.down_proj = nn.Linear(12, 8, bias=bias)
            self.act_fn = act or nn.SiLU()
            self.scale = scale

        def forward(self, x):
            hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
            return self.down_proj(hidden) * self.scale

    class Scaled(Odd):
        def forward(self, x):
            return super().forward(x) * 2

    modules = nn.ModuleDict(
        {"gelu": Odd(nn.GELU()), "bias": Odd(bias=True), "scaled": Scaled(), "ok": Odd()}
    )
    report = optimize(modules, OptimizationProfile(dense=DenseConfig(projections=False)))
    reasons = {e.name: e.reason for e in report.skipped}
    assert set(reasons) == {"gelu", "bias", "scaled"}
    assert "SiLU" in reasons["gelu"] and "偏置" in reasons["bias"] and "不是" in reasons["scaled"]
    assert [e.name for e in report.replaced] == ["ok"]
    modules["ok"].up_proj.register_forward_hook(lambda *_: None)
    modules["ok"](torch.randn(2, 8))
    assert sum(report.fallbacks.values()) == 1  # 后来加的钩子要被看见
    restore(modules)


def test_training_modes_and_gradient_checkpointing(model):
    ids, _ = make_inputs()

    def gradient():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return model.model.layers[0].self_attn.kv_b_proj.weight.grad.clone()

    model.train()
    expected = gradient()
    report = optimize(model, profile())
    torch.testing.assert_close(gradient(), expected, rtol=1e-3, atol=1e-6)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.testing.assert_close(gradient(), expected, rtol=1e-3, atol=1e-6)
    assert not report.fallbacks
    model.eval()
    logits(model)
    restore(model)


def test_dropout_falls_back_with_reason():
    model = make_model(attn_implementation="eager", attention_dropout=0.2)
    ids, _ = make_inputs()
    expected_eval = logits(model)
    report = optimize(model, profile())
    torch.testing.assert_close(logits(model), expected_eval, **tol(torch.float32))
    assert not report.fallbacks
    model.train()
    torch.manual_seed(0)
    actual = model(ids).logits
    assert {r for _, r in report.fallbacks} and all("dropout" in r for _, r in report.fallbacks)
    restore(model)
    torch.manual_seed(0)
    assert torch.equal(model(ids).logits, actual)


def test_two_models_in_two_threads():
    models = [make_model(seed=i) for i in range(2)]
    expected = [logits(m) for m in models]
    errors = []

    def work(model, want):
        try:
            for _ in range(5):
                optimize(model, profile())
                torch.testing.assert_close(logits(model), want, **tol(torch.float32))
                restore(model)
        except BaseException as error:  # 线程里的错误要带回主线程
            errors.append(error)
            raise

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(models, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_two_threads_generate_with_one_model(model):
    prompts = [make_inputs(seed=i, left_pad=i) for i in range(4)]
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = [model.generate(ids, attention_mask=mask, **options) for ids, mask in prompts]
    optimize(model, profile())
    results = [None] * len(prompts)

    def work(index):
        ids, mask = prompts[index]
        results[index] = model.generate(ids, attention_mask=mask, **options)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    restore(model)


class OwnAttention(nn.Module):
    """用户自己的 MLA 注意力：名字、旋转约定、返回值都与 DeepSeek 不同。"""

    def __init__(self):
        super().__init__()
        self.rank, self.nope, self.rot, self.vd, self.idx = 16, 8, 8, 8, 0
        self.query = nn.Linear(32, 2 * 16, bias=False)
        self.down = nn.Linear(32, 24, bias=False)
        self.norm = nn.RMSNorm(16, eps=1e-6)
        self.up = nn.Linear(16, 2 * 16, bias=False)
        self.out = nn.Linear(16, 32, bias=False)
        self.temperature = 0.25

    def forward(
        self, hidden_states, position_embeddings=None, attention_mask=None, past_key_values=None
    ):
        assert attention_mask is None and past_key_values is None
        batch, steps, _ = hidden_states.shape
        cos, sin = (t[..., :4].unsqueeze(2) for t in position_embeddings)

        def turn(x):
            a, b = x.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        q = self.query(hidden_states).view(batch, steps, 2, 16)
        q = torch.cat((q[..., :8], turn(q[..., 8:])), -1)
        latent, rope = self.down(hidden_states).split((16, 8), -1)
        kv = self.up(self.norm(latent)).view(batch, steps, 2, 16)
        k = torch.cat((kv[..., :8], turn(rope.unsqueeze(2)).expand(-1, -1, 2, -1)), -1)
        score = torch.einsum("bthd,bshd->bhts", q, k) * self.temperature
        score = score.masked_fill(torch.ones(steps, steps).triu(1).bool(), -torch.inf)
        out = torch.einsum("bhts,bshd->bthd", score.softmax(-1), kv[..., 8:])
        return self.out(out.flatten(2))


def test_register_spec_for_own_module():
    layer = OwnAttention()
    hidden, angle = torch.randn(2, 5, 32), torch.rand(1, 5, 8)
    rotation = (angle.cos(), angle.sin())
    expected = layer(hidden, rotation)
    holder = nn.ModuleDict({"attention": layer})
    spec = AttentionSpec(
        cls=OwnAttention,
        q_proj="query",
        q_a_proj=None,
        q_a_layernorm=None,
        q_b_proj=None,
        kv_a_proj="down",
        kv_a_layernorm="norm",
        kv_b_proj="up",
        o_proj="out",
        kv_lora_rank="rank",
        qk_nope_head_dim="nope",
        qk_rope_head_dim="rot",
        v_head_dim="vd",
        layer_idx="idx",
        scaling="temperature",
        rope="half",
        returns_tuple=False,
    )
    register_spec(spec)
    try:
        assert len(optimize(holder, profile(), strict=True).replaced) == 1
        torch.testing.assert_close(layer(hidden, rotation), expected, **tol(torch.float32))
        cache = LatentCache(1)
        with torch.no_grad():
            parts = [
                layer(hidden[:, a:b], tuple(t[:, a:b] for t in rotation), past_key_values=cache)
                for a, b in ((0, 3), (3, 5))
            ]
        torch.testing.assert_close(torch.cat(parts, 1), expected, **tol(torch.float32))
        restore(holder)
    finally:
        del specs.SPECS[spec.key]


def test_subclass_with_its_own_forward_is_left_alone(model):
    cls = type(model.model.layers[0].self_attn)

    class Custom(cls):
        def forward(self, hidden_states, **kwargs):
            out, weights = super().forward(hidden_states, **kwargs)
            return out * 2, weights

    model.model.layers[0].self_attn.__class__ = Custom
    report = optimize(model, profile())
    assert "改写" in report.skipped[0].reason and len(report.replaced) == 1
    restore(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_error_is_not_worse(dtype):
    """以 fp32 为准：16 位时我们的误差不比 transformers 的 eager 大。"""
    reference = make_model(attn_implementation="eager", num_hidden_layers=1)
    low = copy.deepcopy(reference).to(dtype)
    reference.load_state_dict({k: v.float() for k, v in low.state_dict().items()})
    ids, mask = make_inputs(batch=4, length=48, left_pad=7)

    def run(model):
        with torch.no_grad():
            return model(ids, attention_mask=mask).logits[mask.bool()].float()

    exact = run(reference)
    theirs = (run(low) - exact).pow(2).mean().sqrt()
    optimize(low, profile())
    ours = (run(low) - exact).pow(2).mean().sqrt()
    assert ours <= 1.05 * theirs


def test_autocast_is_not_worse():
    model = make_model(attn_implementation="eager", num_hidden_layers=1)
    exact = logits(model)

    def error():
        with torch.autocast("cpu", torch.bfloat16):
            return (logits(model).float() - exact).pow(2).mean().sqrt()

    theirs = error()
    report = optimize(model, profile())
    assert error() <= 1.1 * theirs
    assert not report.fallbacks


def test_own_layers_need_no_replacement():
    from deepseek_opt import MLAAttention

    config = MLAConfig(
        num_attention_heads=2,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
    )
    model = torch.nn.Sequential(MLAAttention(config, 16))
    report = optimize(model, OptimizationProfile(mla=MLAConfig()), strict=True)
    assert "已经是本库的层" in str(report)


def test_metrics_are_collected_from_optimize_to_restore(model):
    optimize(model, profile())
    logits(model)
    switch(model, profile(cache_dtype="int8"))
    verify(model, make_inputs()[0])  # 对照用的前向不计入
    logits(model)
    assert metrics(model).calls == 2
    restore(model)
    assert not is_collecting(model) and not model._forward_hooks and not model._forward_pre_hooks


def test_metrics_started_by_the_user_outlive_restore(model):
    start_metrics(model)
    with optimized(model, profile()):
        logits(model)
    assert is_collecting(model) and metrics(model).calls == 1


def test_clamped_ffn_is_not_mistaken_for_a_plain_one():
    """DeepSeek-V4、GLM-5 的写法：平常的输入碰不到截断，核对时要放大才看得出。"""

    class Clamped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj = torch.nn.Linear(8, 12, bias=False)
            self.up_proj = torch.nn.Linear(8, 12, bias=False)
            self.down_proj = torch.nn.Linear(12, 8, bias=False)
            self.act_fn = torch.nn.SiLU()

        def forward(self, x):
            up = self.up_proj(x).clamp(-10, 10)
            return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=10)) * up)

    model = torch.nn.Sequential(Clamped())
    report = optimize(model, OptimizationProfile(dense=DenseConfig(ffn=True, projections=False)))
    assert "forward 不是 down(silu(gate x) * up x)" in report.skipped[0].reason
