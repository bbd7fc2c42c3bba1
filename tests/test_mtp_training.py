"""model(...).loss 里的 MTP 损失；Trainer 的回调。"""

import pytest
import torch
from torch import nn

from deepseek_opt import MTPConfig, MTPTraining, attach_mtp, mtp_loss
from deepseek_opt.errors import InputError
from deepseek_opt.integrations.trainer import MTPCallback
from deepseek_opt.mtp import HFAdapter

from .mtp_models import NAMES, attached, hidden_of, make, tokens_of, transformers
from .processes import one_process
from .tolerances import tol


@pytest.mark.parametrize("name", [n for n in NAMES if n != "gpt2"])  # GPT-2 训练时有 dropout
def test_the_loss_of_the_model_gets_the_mtp_part(name):
    model, predictor = attached(name, depth=2)
    tokens = tokens_of()
    before = model(tokens, labels=tokens).loss
    wanted = mtp_loss(predictor, tokens, hidden_of(model, tokens), logits=model(tokens).logits)
    model.train()
    with MTPTraining(model) as training:
        loss = model(tokens, labels=tokens).loss
        pair = model(tokens, labels=tokens, return_dict=False)
    torch.testing.assert_close(loss, before + wanted.loss, **tol(torch.float32))
    torch.testing.assert_close(pair[0], loss)
    assert torch.equal(torch.stack(training.last.acceptance), torch.stack(wanted.acceptance))
    torch.testing.assert_close(model(tokens, labels=tokens).loss, before)  # 块外照旧


def test_evaluation_and_forwards_without_labels_are_untouched(caplog):
    model, _ = attached("llama")
    tokens = tokens_of()
    want = model(tokens, labels=tokens).loss
    with MTPTraining(model) as training:
        assert torch.equal(model(tokens, labels=tokens).loss, want)
        model.train()
        with caplog.at_level("WARNING", "deepseek_opt"):
            assert model(tokens).loss is None and model(tokens).loss is None
    assert training.last is None and len(caplog.records) == 1


def test_pre_norm_hidden_states_are_captured():
    model = make("llama").train()
    adapter = HFAdapter(model, hidden_normed=False)
    predictor = attach_mtp(model, fresh=True, adapter=adapter)
    tokens, seen = tokens_of(), []
    handle = model.model.layers[-1].register_forward_hook(lambda *a: seen.append(a[2]))
    with MTPTraining(model) as training:
        model(tokens, labels=tokens)
    handle.remove()
    torch.testing.assert_close(training.last.loss, mtp_loss(predictor, tokens, seen[0]).loss)


def test_padding_positions_and_given_counts_are_passed_on():
    model, predictor = attached("llama")
    model.train()
    tokens = tokens_of(1, 8)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])
    with MTPTraining(model) as training:
        model(input_ids=tokens, labels=tokens, position_ids=positions)
        assert int(training.last.tokens[0]) == 4
        model(input_ids=tokens, labels=tokens, attention_mask=mask)
        assert int(training.last.tokens[0]) == 5
        model(input_ids=tokens, labels=tokens, num_items_in_batch=torch.tensor(12))
    wanted = mtp_loss(predictor, tokens, hidden_of(model, tokens), num_items=12)
    torch.testing.assert_close(training.last.loss, wanted.loss, **tol(torch.float32))


def test_gradient_checkpointing_gives_the_same_gradients():
    model, predictor = attached("llama", depth=2)
    model.train()
    tokens, grads = tokens_of(), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        with MTPTraining(model):
            model(tokens, labels=tokens).loss.backward()
        grads.append({n: p.grad.clone() for n, p in predictor.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_mistakes():
    with pytest.raises(InputError, match="attach_mtp"):
        MTPTraining(make("llama"))
    model, _ = attached("llama")
    model.train()
    tokens = tokens_of()
    training = MTPTraining(model)
    with training:
        with pytest.raises(InputError, match="已经在用"):
            training.start()
        with pytest.raises(InputError, match="input_ids"):
            model(inputs_embeds=torch.randn(2, 10, 32), labels=tokens)
        with pytest.raises(InputError, match="logits_to_keep"):
            model(tokens, labels=tokens[:, -3:], logits_to_keep=3)
    assert not model._forward_hooks and not model._forward_pre_hooks


def train(tmp_path, model, steps=4, **options):
    data = [{"input_ids": t, "labels": t} for t in tokens_of(16, 10)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=4,
        logging_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-2,
        **options,
    )
    callback = MTPCallback()
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    return trainer


def test_trainer_trains_and_logs_and_saves(tmp_path):
    model, predictor = attached("llama", depth=2)
    config = predictor.config
    config.loss_weight, config.final_loss_weight, config.loss_weight_steps = None, None, None
    before = {n: p.clone() for n, p in predictor.named_parameters()}
    trainer = train(tmp_path, model, gradient_accumulation_steps=2)
    assert all(not torch.equal(before[n], p) for n, p in predictor.named_parameters())
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4]
    assert logs[1]["mtp_loss_per_depth_2"] < logs[0]["mtp_loss_per_depth_2"]
    assert 0 <= logs[0]["mtp_acceptance_per_depth_1"] <= 1
    assert not model._forward_hooks
    trainer.save_model(tmp_path / "out")
    found = attach_mtp(make("llama"), tmp_path / "out").state_dict()
    assert all(torch.equal(found[n], p) for n, p in predictor.named_parameters())


def test_frozen_base_only_trains_the_predictor(tmp_path):
    model, predictor = attached("llama")
    model.requires_grad_(False)
    predictor.requires_grad_(True)
    base = {n: p.clone() for n, p in model.named_parameters() if not n.startswith("mtp.")}
    before = predictor.layers[0].eh_proj.weight.clone()
    train(tmp_path, model, steps=2)
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in base.items())
    assert not torch.equal(predictor.layers[0].eh_proj.weight, before)


def test_schedule_follows_the_steps_of_the_trainer(tmp_path):
    model = make("llama")
    config = MTPConfig(loss_weight=0.3, final_loss_weight=0.1, loss_weight_steps=2)
    attach_mtp(model, config=config, fresh=True)
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            seen.append(callback.training.last.weights)

    callback, data = MTPCallback(), [{"input_ids": t, "labels": t} for t in tokens_of(4, 8)]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.add_callback(callback)
    trainer.add_callback(Watch())
    trainer.train()
    assert seen == [(0.3,), (0.3,), (0.1,), (0.1,)]


def test_ddp_gives_the_same_gradients(tmp_path):
    model, predictor = attached("llama", depth=2)
    model.train()
    tokens, grads = tokens_of(), []
    with one_process(tmp_path):
        for module in (model, nn.parallel.DistributedDataParallel(model)):
            model.zero_grad()
            with MTPTraining(module):
                module(input_ids=tokens, labels=tokens).loss.backward()
            grads.append({n: p.grad.clone() for n, p in predictor.named_parameters()})
        del module
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)
