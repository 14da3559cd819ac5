"""The router's auxiliary loss against that of transformers, and the steps that it takes part in."""

import json
from types import SimpleNamespace

import pytest
import torch

from configs.config import UserError
from models.fast.lora import add_adapter
from models.loader import load_model
from models.router import auxiliary_coefficient, load_balancing_losses, router_loss
from proof.architectures import build
from rlhf.policy import prepare_training
from train.common import lm_loss

ROWS = torch.tensor([[(7 * i + 11 * row) % 57 + 3 for i in range(16)] for row in range(3)])
PADDING = (0, 5, 9)  # tokens at the end of each row
ASKS = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
EVERY = pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "olmoe"])


def batch_of(rows):
    """These rows as a batch of `lm_loss`: one sample each, of which the second half counts, and padding."""
    mask, positions = torch.zeros(len(rows), 15, dtype=torch.bool), torch.arange(16).repeat(len(rows), 1)
    for i, row in enumerate(rows):
        end = 16 - PADDING[row]
        mask[i, end // 2 : end - 1] = True
        positions[i, end:] = torch.arange(PADDING[row])
    return {"input_ids": ROWS[rows], "position_ids": positions, "mask": mask}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def transformers_loss(model, row):
    """(mean of -log p over the counted tokens, auxiliary loss) of a row without its padding, by transformers."""
    end = 16 - PADDING[row]
    ids = ROWS[row : row + 1, :end]
    labels = ids.clone()
    labels[0, : end // 2 + 1] = -100
    found = model(input_ids=ids, labels=labels, output_router_logits=True, use_cache=False)
    aux = model.config.router_aux_loss_coef * found.aux_loss
    return found.loss - aux, aux


@EVERY
@pytest.mark.statement("token-mean")
def test_values_and_gradients_are_those_of_transformers_row_by_row(kind, tmp_path):
    build(kind, tmp_path, **ASKS)
    model = load_model(tmp_path, device="cpu")
    assert auxiliary_coefficient(model) == 0.5
    batch = batch_of([0, 1, 2])
    nats, count = lm_loss(model, batch)
    tokens = batch["mask"].sum(-1)
    parts = [transformers_loss(model, row) for row in range(3)]
    assert min(aux.item() for _, aux in parts) > 0.4  # it is part of transformers' loss, and not small
    expected = sum((loss + aux) * n for (loss, aux), n in zip(parts, tokens)) / count
    plain = sum(loss * n for (loss, _), n in zip(parts, tokens))
    torch.testing.assert_close(nats, plain, rtol=1e-5, atol=0)  # the value is that of the tokens alone
    found, wanted = gradients(model, nats / count), gradients(model, expected)
    without = gradients(
        model, sum(loss * n for loss, n in zip((transformers_loss(model, r)[0] for r in range(3)), tokens)) / count
    )
    assert (wanted - without).norm() > 0.01 * wanted.norm()  # the auxiliary loss is seen in the gradients
    assert (found - wanted).norm() < 1e-4 * (wanted - without).norm()


@pytest.mark.statement("token-mean")
def test_any_split_into_micro_batches_gives_the_same_step(tmp_path):
    build("mixtral", tmp_path, **ASKS)
    model, found = load_model(tmp_path, device="cpu"), []
    count = int(batch_of([0, 1, 2])["mask"].sum())
    for split in ([[0, 1, 2]], [[0], [1, 2]], [[2], [0], [1]]):
        found.append(gradients(model, sum(lm_loss(model, batch_of(rows))[0] / count for rows in split)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora_r", [0, 4])
def test_gradient_checkpointing_changes_nothing(lora_r, tmp_path):
    build("mixtral", tmp_path, **ASKS)
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        model = load_model(tmp_path, device="cpu")
        if lora_r:
            model = add_adapter(model, lora_r, 8, task_type="CAUSAL_LM")
            torch.manual_seed(0)
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(p, std=0.1)
        if on:
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        nats, count = lm_loss(model, batch_of([0, 1]))
        found.append(gradients(model, nats / count))
    assert found[0].norm() > 0
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
    model.config.get_text_config().output_router_logits = False
    nats, count = lm_loss(model, batch_of([0, 1]))
    assert (gradients(model, nats / count) - found[0]).norm() > 0.01 * found[0].norm()


@pytest.mark.statement("token-mean")
def test_two_experts_and_three_tokens_by_hand():
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 9.0]])  # the last token is padding
    p = 1 / (1 + torch.tensor(-2.0).exp())
    # f = (2, 0) / 2: the first of two equal experts is taken; P = ((0.5 + p) / 2, ...); 2 * (f * P).sum() = 0.5 + p
    found = load_balancing_losses([logits, logits], 1, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(found, (0.5 + p)[None])


@pytest.mark.parametrize("changes", [{"output_router_logits": False}, {"router_aux_loss_coef": 0.0}])
def test_without_being_asked_for_it_nothing_is_added(tmp_path, changes):
    build("mixtral", tmp_path, **ASKS | changes)
    model = load_model(tmp_path, device="cpu")
    loss = torch.ones(())
    with router_loss(model) as add:
        assert auxiliary_coefficient(model) == 0 and add(loss, None) is loss
    assert not model.model._forward_hooks


def test_held_out_losses_do_not_have_it(tmp_path):
    build("mixtral", tmp_path, **ASKS)
    model = load_model(tmp_path, device="cpu")
    with torch.no_grad(), router_loss(model) as add:
        assert not model.model._forward_hooks
        assert add(model.lm_head.weight, None) is model.lm_head.weight


def test_what_does_not_give_its_logits_is_refused_by_name(tmp_path):
    build("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | ASKS))
    with pytest.raises(UserError, match="LlamaForCausalLM.*auxiliary loss.*output_router_logits"):
        lm_loss(load_model(tmp_path, device="cpu"), batch_of([0]))


def test_rlhf_says_that_it_does_not_add_it(tmp_path, capsys):
    build("mixtral", tmp_path, **ASKS)
    prepare_training(load_model(tmp_path, device="cpu"), SimpleNamespace(lora_r=0, gradient_checkpointing=False), "")
    assert "asks for the router's auxiliary loss. This script trains without it" in capsys.readouterr().out
