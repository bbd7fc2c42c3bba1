"""MTP 的损失：与逐字写出的公式、分开计算的序列、数值梯度对照。"""

import math

import pytest
import torch
import torch.nn.functional as F

from deepseek_opt import MTPConfig, attach_mtp, metrics, mtp_loss
from deepseek_opt.errors import InputError
from deepseek_opt.mtp import loss_weights

from .mtp_models import OwnAdapter, OwnModel, attached, hidden_of, tokens_of
from .tolerances import tol


def test_depth_one_is_the_literal_formula():
    model, predictor = attached("deepseek_v3", loss_weight=0.3)
    tokens = tokens_of(2, 8)
    hidden = hidden_of(model, tokens)
    found = mtp_loss(predictor, tokens, hidden)
    made = predictor(tokens[:, 1:], hidden[:, :-1]).normed
    total, count = 0.0, 0
    for row in range(2):
        for i in range(6):  # 由 h_i 与 t_{i+1} 预测 t_{i+2}
            scores = model.lm_head(made[row, i]).double()
            total += float(torch.logsumexp(scores, 0) - scores[tokens[row, i + 2]])
            count += 1
    assert int(found.tokens[0]) == count
    torch.testing.assert_close(float(found.losses[0]), total / count, **tol(torch.float32))
    torch.testing.assert_close(float(found.loss), 0.3 * total / count, **tol(torch.float32))


def test_roll_out_feeds_each_depth_with_the_one_before():
    model, predictor = attached("llama", depth=3)
    tokens = tokens_of(2, 9)
    hidden = hidden_of(model, tokens)
    found = mtp_loss(predictor, tokens, hidden, logits=model(tokens).logits)
    main = model(tokens).logits.argmax(-1)
    for depth in (1, 2, 3):
        made = predictor(tokens[:, depth:], hidden[:, :-1], depth=depth)
        hidden = made.hidden
        scores = model.lm_head(made.normed[:, :-1])
        target = tokens[:, depth + 1 :]
        wanted = F.cross_entropy(scores.flatten(0, 1), target.flatten())
        torch.testing.assert_close(found.losses[depth - 1], wanted, **tol(torch.float32))
        same = scores.argmax(-1) == main[:, depth:-1]
        torch.testing.assert_close(found.acceptance[depth - 1], same.float().mean())
    torch.testing.assert_close(found.loss, sum(found.losses) * 0.1)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gpt2", "mistral"])
@pytest.mark.parametrize("how", ["position_ids", "document_ids", "attention_mask"])
def test_packed_sequences_equal_separate_ones(name, how):
    model, predictor = attached(name, depth=2)
    first, second = tokens_of(1, 7, seed=2), tokens_of(1, 5, seed=3)
    total, count, hidden = [0.0, 0.0], [0, 0], []
    for tokens in (first, second):
        hidden.append(hidden_of(model, tokens))
        found = mtp_loss(predictor, tokens, hidden[-1])
        for k in range(2):
            total[k] += float(found.losses[k] * found.tokens[k])
            count[k] += int(found.tokens[k])
    positions = torch.tensor([[*range(7), *range(5)]])
    given = {"position_ids": positions}
    tokens, joined = torch.cat([first, second], dim=1), torch.cat(hidden, dim=1)
    if how == "document_ids":
        given["document_ids"] = torch.tensor([[3] * 7 + [9] * 5])
    elif how == "attention_mask":  # 中间与末尾有填充
        pad, wide = torch.zeros(1, 2, dtype=torch.long), torch.randn(1, 2, joined.shape[-1])
        tokens = torch.cat([first, pad, second, pad], dim=1)
        joined = torch.cat([hidden[0], wide, hidden[1], wide], dim=1)
        given["position_ids"] = torch.tensor([[*range(7), 0, 0, *range(5), 0, 0]])
        given["attention_mask"] = torch.tensor([[1] * 7 + [0] * 2 + [1] * 5 + [0] * 2])
    found = mtp_loss(predictor, tokens, joined, **given)
    assert [int(n) for n in found.tokens] == count == [8, 6]
    for k in range(2):
        wanted = torch.tensor(total[k] / count[k])
        torch.testing.assert_close(found.losses[k].detach(), wanted, **tol(torch.float32))


def test_left_padding_equals_no_padding():
    model, predictor = attached("llama", depth=2)
    tokens = tokens_of(1, 6)
    hidden = hidden_of(model, tokens)
    wanted = mtp_loss(predictor, tokens, hidden)
    pad = torch.zeros(1, 3, dtype=torch.long)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    padded = torch.cat([torch.full((1, 3, 32), 9.0), hidden], dim=1)
    found = mtp_loss(predictor, torch.cat([pad, tokens], dim=1), padded, attention_mask=mask)
    assert [int(n) for n in found.tokens] == [int(n) for n in wanted.tokens]
    torch.testing.assert_close(found.loss, wanted.loss, **tol(torch.float32))


def test_ignored_labels_and_given_counts():
    model, predictor = attached("llama")
    tokens = tokens_of(1, 6)
    hidden, labels = hidden_of(model, tokens), tokens.clone()
    labels[:, :4] = -100  # 只有 t4、t5 算
    found = mtp_loss(predictor, tokens, hidden, labels)
    assert int(found.tokens[0]) == 2
    halved = mtp_loss(predictor, tokens, hidden, labels, num_items=4)
    torch.testing.assert_close(halved.loss * 2, found.loss)
    nothing = mtp_loss(predictor, tokens, hidden, torch.full_like(tokens, -100))
    nothing.loss.backward()
    assert float(nothing.loss) == 0.0 and not predictor.layers[0].eh_proj.weight.grad.any()


def test_sequences_shorter_than_the_depth():
    model, predictor = attached("llama", depth=4)
    for length, counts in ((1, [0, 0, 0, 0]), (3, [1, 0, 0, 0])):
        tokens = tokens_of(1, length)
        hidden = hidden_of(model, tokens)
        found = mtp_loss(predictor, tokens, hidden, logits=model(tokens).logits)
        assert [int(n) for n in found.tokens] == counts and found.loss.isfinite()


def test_gradients_against_numerical_ones():
    model = OwnModel(4).double()
    adapter = OwnAdapter(model, hidden_normed=False)
    config = MTPConfig(depth=2, depth_decay=0.5)
    predictor = attach_mtp(model, config=config, fresh=True, adapter=adapter).double()
    tokens = tokens_of(1, 5)
    hidden = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    documents = torch.tensor([[0, 0, 0, 0, 1]])
    weights = [
        predictor.layers[0].eh_proj.weight,
        predictor.layers[0].enorm.weight,
        model.norm.weight,
    ]

    def run(hidden, *_):
        return mtp_loss(predictor, tokens, hidden, document_ids=documents).loss

    assert torch.autograd.gradcheck(run, (hidden, *weights[:2]))


def test_detach_keeps_every_base_parameter_without_gradient():
    model, predictor = attached("llama", depth=2)
    tokens = tokens_of()
    mtp_loss(predictor, tokens, hidden_of(model, tokens)).loss.backward()
    assert (
        model.lm_head.weight.grad.any() and model.model.layers[0].self_attn.q_proj.weight.grad.any()
    )
    wanted = predictor.layers[0].eh_proj.weight.grad.clone()
    model.zero_grad()
    predictor.config.detach_hidden = True
    mtp_loss(predictor, tokens, hidden_of(model, tokens)).loss.backward()
    base = [p for name, p in model.named_parameters() if not name.startswith("mtp.")]
    assert all(p.grad is None for p in base)
    torch.testing.assert_close(
        predictor.layers[0].eh_proj.weight.grad, wanted, **tol(torch.float32)
    )


def test_weights_per_depth_and_schedule():
    assert loss_weights(MTPConfig(), 1) == (0.3,)
    schedule = MTPConfig(loss_weight=0.3, final_loss_weight=0.1, loss_weight_steps=10)
    assert loss_weights(schedule, 2, 9) == (0.15, 0.15) and loss_weights(schedule, 2, 10) == (
        0.05,
        0.05,
    )
    assert loss_weights(MTPConfig(loss_weights=(0.5, 0.25)), 2) == (0.5, 0.25)
    with pytest.raises(InputError, match="loss_weights"):
        loss_weights(MTPConfig(loss_weights=(0.5, 0.25)), 3)
    assert math.isclose(sum(loss_weights(MTPConfig(loss_weight=1.0, depth_decay=0.6), 4)), 1.0)


def test_losses_and_acceptance_are_in_the_metrics():
    model, predictor = attached("llama", depth=2)
    assert metrics(model).mtp_loss_per_depth is None
    tokens = tokens_of()
    hidden, logits = hidden_of(model, tokens), model(tokens).logits
    found = [mtp_loss(predictor, tokens, hidden, logits=logits) for _ in range(2)][1]
    shown = metrics(model)
    assert shown.mtp_loss_per_depth == pytest.approx([float(v) for v in found.losses])
    assert shown.mtp_acceptance_per_depth == pytest.approx([float(v) for v in found.acceptance])
    assert shown.scalars()["mtp_loss_per_depth_2"] == shown.mtp_loss_per_depth[1]
    assert "mtp_acceptance_per_depth" in str(shown)
    predictor.statistics.reset()
    mtp_loss(predictor, tokens, hidden)
    assert all(math.isnan(v) for v in metrics(model).mtp_acceptance_per_depth)


def test_a_perfect_predictor_is_always_accepted():
    model, predictor = attached("llama")
    tokens = tokens_of()
    hidden = hidden_of(model, tokens)
    made = predictor(tokens[:, 1:], hidden[:, :-1]).normed
    logits = torch.zeros(2, 10, 96)
    logits[:, 1:] = predictor.logits(made)  # 位置 i+1 的主模型与深度 1 的位置 i 预测同一个词元
    assert float(mtp_loss(predictor, tokens, hidden, logits=logits).acceptance[0]) == 1.0


def test_bad_input():
    model, predictor = attached("llama")
    tokens = tokens_of()
    hidden = hidden_of(model, tokens)
    with pytest.raises(InputError, match="tokens"):
        mtp_loss(predictor, tokens[0], hidden)
    with pytest.raises(InputError, match="labels"):
        mtp_loss(predictor, tokens, hidden, tokens[:, 1:])
    with pytest.raises(InputError, match="logits"):
        mtp_loss(predictor, tokens, hidden, logits=hidden[:, 1:])
    with pytest.raises(InputError, match="hidden"):
        mtp_loss(predictor, tokens, hidden[:, 1:])
    with pytest.raises(InputError, match="document_ids"):
        mtp_loss(predictor, tokens, hidden, document_ids=tokens[:, 1:])
