"""The router's auxiliary loss against that of transformers, and the steps that it takes part in."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from configs.config import ROOT, UserError, load_config
from models.admission import admitted
from models.fast.lora import add_adapter
from models.generation import OWN, SHARED, generate
from models.loader import load_model, load_tokenizer
from models.router import auxiliary_coefficient, check_router, load_balancing_losses, router_of
from proof.architectures import build
from train import train_lm, train_lm_amp_ckpt
from train.common import lm_loss, load_blocks, load_data, step_rows

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
def test_without_being_asked_for_it_nothing_is_added(tmp_path, changes, capsys):
    build("mixtral", tmp_path, **ASKS | changes)
    model = load_model(tmp_path, device="cpu")
    loss = torch.ones(())
    check_router(model)
    router = router_of(model)
    assert router.coefficient == 0 and router.term == 0 and capsys.readouterr().out == ""
    with router.watching():
        assert not model.model._forward_hooks
    assert router.beside(loss, None) is loss


def test_held_out_losses_do_not_have_it(tmp_path):
    build("mixtral", tmp_path, **ASKS)
    model = load_model(tmp_path, device="cpu")
    nats, count = lm_loss(model, batch_of([0, 1, 2]))
    before = router_of(model).total
    assert before > 0
    with torch.no_grad(), router_of(model).watching():
        assert not model.model._forward_hooks
    with torch.no_grad():
        torch.testing.assert_close(lm_loss(model, batch_of([0, 1, 2]))[0], nats.detach())
    assert router_of(model).total is before  # that of the last pass that trains


def test_what_does_not_give_its_logits_is_refused_by_name(tmp_path):
    build("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | ASKS))
    model = load_model(tmp_path, device="cpu")
    for use in (check_router, lambda model: lm_loss(model, batch_of([0]))):
        with pytest.raises(UserError, match="LlamaForCausalLM.*auxiliary loss.*output_router_logits"):
            use(model)


def test_training_begins_with_a_sentence_that_says_the_coefficient(tmp_path, capsys):
    build("mixtral", tmp_path, **ASKS)
    check_router(load_model(tmp_path, device="cpu"))
    assert capsys.readouterr().out == "the router's auxiliary loss is added to the training loss, times 0.5\n"


def words(folder, out, **more):
    """The command line of two steps on a tiny mixture of experts, which this puts into the folder."""
    if not (folder / "model").is_dir():
        build("mixtral", folder / "model", **ASKS, max_position_embeddings=512)
        texts = [json.dumps({"text": "abcdefgh" * n}) + "\n" for n in range(2, 14)]
        (folder / "text.jsonl").write_text("".join(texts))
    shape = {"model_name": folder / "model", "data": folder / "text.jsonl", "out": folder / out, "sample_prompt": ""}
    shape |= {"max_length": 32, "batch_size": 5, "micro_batch_size": 2, "max_steps": 2, "warmup_steps": 0}
    shape |= {"log_every": 1, "lr": 0.01, "save_minutes": 0, **more}
    return [str(x) for k, v in shape.items() for x in (f"--{k}", v)]


def logged(folder):
    """The logged lines of the steps."""
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("script, more", [
    (train_lm, {}), (train_lm_amp_ckpt, {"precision": "fp32", "measure_steps": 0}),
])  # fmt: skip
def test_a_run_logs_the_mean_over_tokens_of_the_auxiliary_loss_of_their_blocks(script, more, tmp_path):
    config = load_config(script.Config, words(tmp_path, "run", **more))
    script.train(config)
    found = [line["aux_loss"] for line in logged(tmp_path / "run")]
    assert len(found) == 2 and found[0] != found[1]
    model = load_model(tmp_path / "model", device="cpu")
    blocks, _ = load_blocks(config, load_data(config), load_tokenizer(tmp_path / "model"))
    total = count = 0
    for row in (row for rows in step_rows(1, len(blocks), config) for row in rows):
        batch = blocks.batch([row], "cpu")
        tokens = int(blocks.tokens[row])  # the real ones; padding follows them
        positions = {"position_ids": batch["position_ids"][:, :tokens]}
        logits = model.model(batch["input_ids"][:, :tokens], use_cache=False, **positions).router_logits
        counted = batch["mask"].sum().item()
        total += load_balancing_loss_func(logits, logits[0].shape[-1], model.num_experts_per_tok).item() * counted
        count += counted
    assert found[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.slow
@pytest.mark.statement("token-mean-ranks")
def test_two_processes_take_the_steps_of_one_and_log_them(tmp_path):
    train_lm.train(load_config(train_lm.Config, words(tmp_path, "one")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, ROOT / "train/train_lm_ddp.py", *words(tmp_path, "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two/manifest.json").read_text())["processes"] == 2
    for key in ("loss", "aux_loss", "grad_norm"):
        one, two = ([line[key] for line in logged(tmp_path / name)] for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-4) and len(one) == 2


@EVERY
@pytest.mark.statement("left-padding")
def test_decoding_does_not_ask_for_the_logits_and_takes_the_fast_way(kind, tmp_path):
    build(kind, tmp_path, **ASKS)
    asks, plain = (load_model(tmp_path, device="cpu") for _ in range(2))
    plain.config.output_router_logits = False
    prompts = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]
    found, wanted = (generate(m, prompts, 6, samples_per_prompt=2, seed=1) for m in (asks, plain))
    assert found == wanted and asks.config.output_router_logits
    way = OWN if kind == "gpt_oss" else SHARED  # gpt_oss has a window in some layers
    for model in (asks, plain):
        assert [x["way"] for x in admitted(model) if x["kind"] == "decoding"] == [way]
    with pytest.raises((ValueError, RuntimeError, TypeError)):  # what asks for them takes no such mask
        asks(torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 1, 2, 2).tril().bool(), use_cache=False)
