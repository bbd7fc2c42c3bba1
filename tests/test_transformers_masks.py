"""掩码：凡是“因果 + 键填充 + 打包”的都换成 spans 且精确；别的由原实现计算，绝不悄悄算错。"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_opt.integrations.masks import PlanMemo, _plan_on_device, build_plan

from deepseek_opt import MLAConfig, OptimizationProfile, optimize, restore
from tests.tiny_models import make_inputs, make_model
from tests.tolerances import tol

PROFILE = OptimizationProfile(mla=MLAConfig())


def visible(plan, batch, q_len, slots):
    """把 spans 与 kv_mask 还原成 [B, T, slots] 的可见性。"""
    seen = torch.zeros(batch * q_len, batch * slots, dtype=torch.bool)
    for q0, q1, k0, k1 in plan.spans.tolist():
        for q in range(q0, q1):
            seen[q, k0 : k1 - (q1 - 1 - q)] = True
    if plan.kv_mask is not None:
        seen &= plan.kv_mask.reshape(1, -1)
    seen = seen.view(batch, q_len, batch, slots)
    return torch.stack([seen[b, :, b] for b in range(batch)])


def causal(keys, q_len):
    """键掩码 [B, S] -> [B, T, S]。"""
    total = keys.shape[1]
    order = torch.arange(total) <= torch.arange(total - q_len, total)[:, None]
    return order & keys[:, None]


@settings(max_examples=80)
@given(st.data())
def test_padding_masks_are_exact(data):
    batch, total = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    q_len = data.draw(st.integers(1, total))
    slots = total + data.draw(st.integers(0, 3))
    bits = data.draw(st.lists(st.booleans(), min_size=batch * total, max_size=batch * total))
    keys = torch.tensor(bits).view(batch, total)
    want = torch.nn.functional.pad(causal(keys, q_len), (0, slots - total))
    for mask in (keys, keys.long(), want[:, None], _float(want[:, None])):
        if mask.dim() == 4 and mask.shape[-1] > total:
            mask = mask[..., : data.draw(st.integers(total, slots))]
        plan = build_plan(mask, batch, q_len, total, slots)
        assert plan.reason is None
        assert torch.equal(visible(plan, batch, q_len, slots), want)


@settings(max_examples=80)
@given(st.data())
def test_padding_masks_on_a_device(data):
    """在设备上算的（不读掩码的内容）与 CPU 上的看见同样的键；长度可以是张量，缺的部分当作遮住。"""
    batch, total = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    q_len = data.draw(st.integers(1, total))
    slots = total + data.draw(st.integers(0, 3))
    width = data.draw(st.integers(1, slots + 2))
    bits = data.draw(st.lists(st.booleans(), min_size=batch * width, max_size=batch * width))
    mask = torch.tensor(bits).view(batch, width)
    keys = torch.nn.functional.pad(mask, (0, slots + 2 - width))[:, :total]
    want = torch.nn.functional.pad(causal(keys, q_len), (0, slots - total))
    for length in (total, torch.tensor(total)):
        plan = _plan_on_device(mask.long(), q_len, length, slots)
        begin, end, first, last = plan.spans.T
        assert bool((begin <= end).all()) and bool((first <= last).all())
        assert bool((last - first >= end - begin).all())
        assert torch.equal(visible(plan, batch, q_len, slots), want)
    assert build_plan(mask, batch, q_len, torch.tensor(total), slots).spans.equal(plan.spans)
    full = mask[:, None, None].expand(batch, 1, q_len, width)
    assert "StaticCache" in build_plan(full, batch, q_len, torch.tensor(total), slots).reason


def _float(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@settings(max_examples=80)
@given(st.data())
def test_any_4d_mask_is_exact_or_refused(data):
    q_len, past = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 3))
    total = q_len + past
    bits = data.draw(st.lists(st.booleans(), min_size=q_len * total, max_size=q_len * total))
    mask = torch.tensor(bits).view(1, 1, q_len, total)
    plan = build_plan(mask, 1, q_len, total, total)
    if plan.reason is None:
        assert torch.equal(visible(plan, 1, q_len, total), mask[0])


def test_packed_and_refused_masks():
    blocks = torch.block_diag(*(torch.ones(n, n).tril() for n in (3, 1, 4))).bool()
    plan = build_plan(blocks[None, None], 1, 8, 8, 8)
    assert (
        plan.spans.tolist() == [[0, 3, 0, 3], [3, 4, 3, 4], [4, 8, 4, 8]] and plan.kv_mask is None
    )
    full = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    wide = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    assert "滑动窗口" in build_plan(wide.tril() & wide.triu(-4), 1, 40, 40, 40).reason
    for bad, word in (
        (full, "因果"),
        (_float(full.tril()) + 0.5 * torch.eye(6), "偏置"),
        (torch.cat([full.tril(), full], 1), "每个头"),
        (full.tril()[..., :4], "少于"),
        (full.tril().long(), "类型"),
        (full[0], "3 维"),
        (full.tril()[:, :, :5], "不符"),
        ("mask", "掩码类型"),
    ):
        assert word in build_plan(bad, 1, 6, 6, 6).reason


def test_memo_follows_identity_and_version():
    memo, mask = PlanMemo(), torch.ones(1, 4, dtype=torch.bool)
    first = memo.plan(mask, 1, 4, 4, 4)
    assert memo.plan(mask, 1, 4, 4, 4) is first
    mask[0, 0] = False
    second = memo.plan(mask, 1, 4, 4, 4)
    assert second.spans.tolist() == [[1, 4, 1, 4]]
    assert memo.plan(None, 1, 4, 4, 4).spans.tolist() == [[0, 4, 0, 4]]
    assert memo.plan(torch.ones(1, 4, dtype=torch.bool), 1, 4, 4, 4).spans.tolist() == [
        [0, 4, 0, 4]
    ]


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request):
    return make_model(attn_implementation=request.param)


def custom_masks():
    ones = torch.ones(2, 1, 12, 12, dtype=torch.bool)
    window = ones.tril() & ones.triu(-3)
    return {"bidirectional": ones, "window": window, "prefix": ones.tril() | (torch.arange(12) < 4)}


@pytest.mark.parametrize("kind", ["bidirectional", "window", "prefix"])
def test_custom_4d_masks_use_the_original(model, kind):
    ids, _ = make_inputs()
    mask = custom_masks()[kind]
    if model.config._attn_implementation == "eager":
        mask = _float(mask)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        report = optimize(model, PROFILE)
        actual = model(ids, attention_mask=mask).logits
    restore(model)
    assert torch.equal(actual, expected)
    assert sum(report.fallbacks.values()) == 2
    assert {"bidirectional": "因果", "window": "滑动窗口", "prefix": "因果"}[kind] in str(report)


def test_packed_position_ids(model):
    """不带掩码、position_ids 重新开始：各段互不可见。"""
    ids, _ = make_inputs(batch=1, length=10)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        report = optimize(model, PROFILE)
        actual = model(ids, position_ids=positions, use_cache=False).logits
    restore(model)
    torch.testing.assert_close(actual, expected, **tol(torch.float32))
    assert not report.fallbacks


def test_bidirectional_config_uses_the_original(model):
    ids, _ = make_inputs()
    model.config.is_causal = False
    try:
        with torch.no_grad():
            expected = model(ids).logits
            report = optimize(model, PROFILE)
            actual = model(ids).logits
    finally:
        restore(model)
        del model.config.is_causal
    assert torch.equal(actual, expected)
    assert "双向" in next(iter(report.fallbacks))[1]


def test_output_attentions_is_honoured():
    model = make_model(attn_implementation="eager")
    ids, mask = make_inputs(left_pad=3)
    options = {"attention_mask": mask, "output_attentions": True}
    with torch.no_grad():
        expected = model(ids, **options)
        report = optimize(model, PROFILE)
        actual = model(ids, **options)
        fast = model(ids, attention_mask=mask)
        assert fast.attentions is None
    assert len(actual.attentions) == 2
    for old, new in zip(expected.attentions, actual.attentions, strict=True):
        assert torch.equal(new, old)
    assert torch.equal(actual.logits, expected.logits)
    assert all("output_attentions" in reason for _, reason in report.fallbacks)
    generated = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=3,
        output_attentions=True,
        return_dict_in_generate=True,
        do_sample=False,
    )
    assert generated.attentions[-1][0].shape[-2:] == (1, 14)
    restore(model)


def test_hidden_states_and_hooks(model):
    ids, mask = make_inputs(left_pad=3)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        optimize(model, PROFILE)
        seen = []
        hook = model.model.layers[0].self_attn.o_proj.register_forward_hook(
            lambda m, a, out: seen.append(out)
        )
        actual = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        hook.remove()
    restore(model)
    assert len(seen) == 1  # 有钩子的投影走它自己的 forward
    for old, new in zip(expected, actual, strict=True):
        torch.testing.assert_close(new[mask.bool()], old[mask.bool()], **tol(torch.float32))


def test_no_square_mask_is_built(monkeypatch):
    """全部层替换之后，带填充的长输入不再生成 T×S 的掩码。"""
    from transformers import masking_utils

    model = make_model(attn_implementation="eager")
    ids, mask = make_inputs(left_pad=5)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        optimize(model, PROFILE)

        def refuse(*args, **kwargs):
            raise AssertionError("生成了 T×S 掩码")

        for name in ("eager", "sdpa"):
            monkeypatch.setitem(masking_utils.AttentionMaskInterface._global_mapping, name, refuse)
        actual = model(ids, attention_mask=mask).logits
    monkeypatch.undo()
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], **tol(torch.float32))
    restore(model)


def test_set_attn_implementation_on_a_live_model():
    model = make_model(attn_implementation="sdpa")
    ids, mask = make_inputs(left_pad=3)
    optimize(model, PROFILE)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(ids, attention_mask=mask, output_attentions=True)
    assert len(out.attentions) == 2
    restore(model)
    assert model.config._attn_implementation == model.model.config._attn_implementation == "eager"
    with torch.no_grad():
        again = model(ids, attention_mask=mask, output_attentions=True)
    assert torch.equal(again.logits, out.logits)
