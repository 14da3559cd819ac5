"""The statements of "Loss and gradient book-keeping", on literal numbers and a two-layer model in float64."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch

from configs.config import UserError
from data.blocks import make_blocks
from data.order import epoch_order
from models.device import checkpoint_activations
from models.loader import load_model, load_tokenizer
from models.save import save_model
from runtime.processes import Processes
from train.common import LMConfig, count_steps, evaluate_lm, lm_loss, load_blocks, load_data, show_sample, step_rows
from train.train_lm_lora import add_lora, save_adapter
from train.updates import lr_at, make_optimizer

TEXTS = [{"text": "To be, or not to be, that is the question. " * n} for n in (1, 3, 2, 5)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny-llama")


def tiny(name="tiny-llama", dtype=torch.float64):
    return load_model(name, dtype=dtype, device="cpu")


def gradients(model):
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def take_gradients(model, blocks, micro_batches):
    """What the loop of train_lm.py does between two optimizer steps."""
    model.zero_grad()
    count = sum(blocks.counted(rows) for rows in micro_batches)
    loss = 0.0
    for rows in micro_batches:
        nats, _ = lm_loss(model, blocks.batch(rows, "cpu"))
        (nats / count).backward()
        loss += nats.item() / count
    return loss, gradients(model)


@pytest.mark.statement("token-mean")
def test_gradients_do_not_depend_on_accumulation(tokenizer):
    rows = [{"prompt": "Say " * n, "completion": "yes" * (4 * n + 1)} for n in range(10)]
    blocks = make_blocks(rows, "prompt", tokenizer, 128, "test")
    assert len({int(n) for n in blocks.mask.sum(1)}) > 1  # micro-batches with unequal counts, or the test shows nothing
    order = list(range(len(blocks)))
    assert len(order) >= 5
    model = tiny()
    whole = take_gradients(model, blocks, [order])
    for pieces in (2, 5):
        loss, found = take_gradients(model, blocks, [order[i::pieces] for i in range(pieces)])
        assert abs(loss - whole[0]) < 1e-12
        assert (found - whole[1]).abs().max() < 1e-12


@pytest.mark.statement("data-order")
def test_data_order_differs_between_epochs_and_is_the_same_for_equal_seed_and_epoch():
    assert epoch_order(50, 1, 0) == epoch_order(50, 1, 0)
    assert epoch_order(50, 1, 0) != epoch_order(50, 1, 1)
    assert epoch_order(50, 1, 0) != epoch_order(50, 2, 0)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.statement("data-order")
def test_each_epoch_sees_each_row_once_over_all_ranks(processes):
    config = SimpleNamespace(batch_size=6, micro_batch_size=2, epochs=2, max_steps=0, warmup_steps=0, seed=5)
    steps = count_steps(23, config)  # 23 rows: neither the steps nor the ranks divide them
    assert steps == 2 * math.ceil(23 / 6)
    for epoch in (0, 1):
        seen = []
        for rank in range(processes):
            for step in range(1 + epoch * steps // 2, 1 + (epoch + 1) * steps // 2):
                for rows in Processes(rank, processes).share(step_rows(step, 23, config)):
                    assert len(rows) <= 2
                    seen += rows
        assert sorted(seen) == list(range(23))


@pytest.mark.statement("schedule")
def test_learning_rate_warms_up_peaks_and_ends_at_its_minimum():
    values = [lr_at(step, 10, 1.0, 4, 0.1) for step in range(1, 11)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[6] == pytest.approx(0.1 + 0.9 * 0.5)  # step 7: halfway from 4 to 10, cos(pi/2) = 0
    assert values[9] == pytest.approx(0.1)
    assert values[3:] == sorted(values[3:], reverse=True)
    assert lr_at(1, 10, 1.0, 0, 0.1) == 1.0
    assert lr_at(11, 10, 1.0, 4, 0.1) == pytest.approx(0.1)


def test_a_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(UserError, match="warmup_steps = 5 must be below the 3 optimizer steps"):
        count_steps(6, SimpleNamespace(batch_size=2, micro_batch_size=1, epochs=1, max_steps=0, warmup_steps=5))


def test_only_matrices_decay():
    model = tiny("tiny-gpt2")
    groups = make_optimizer(model.parameters(), 1e-3, 0.1).param_groups
    assert {p.dim() for p in groups[0]["params"]} == {2} and groups[0]["weight_decay"] == 0.1
    assert {p.dim() for p in groups[1]["params"]} == {1} and groups[1]["weight_decay"] == 0.0
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in model.parameters())


def test_loss_is_that_of_the_definition(tokenizer):
    model = tiny()
    blocks = make_blocks([{"prompt": "Ask", "completion": "Answer"}], "prompt", tokenizer, 64, "test")
    batch = blocks.batch([0], "cpu")
    nats, count = lm_loss(model, batch)
    length = int(blocks.tokens[0])
    ids = batch["input_ids"][:, :length]
    expected = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    start = length - len("Answer") - 1  # one id a byte, and the stop token
    assert count == 7 and ids[0, -1] == tokenizer.eos_token_id
    assert nats.item() == pytest.approx(-expected[start - 1 :].sum().item(), abs=1e-12)


@pytest.mark.statement("data-order")
def test_evaluation_counts_each_token_once_whatever_the_batch_and_the_number_of_ranks(tokenizer):
    model = tiny()
    blocks = make_blocks(TEXTS, "text", tokenizer, 64, "test")
    # one id a byte: each document has its bytes and the stop token, and all but its first token are predicted
    assert int(blocks.mask.sum()) == sum(len(d["text"]) for d in TEXTS)
    assert int(blocks.bytes.sum()) == sum(len(d["text"]) - 1 for d in TEXTS)
    one = evaluate_lm(model, blocks, 1)
    assert evaluate_lm(model, blocks, 4)["nats_per_token"] == pytest.approx(one["nats_per_token"], abs=1e-12)
    assert len(blocks) % 3  # the set does not divide by the number of ranks
    totals = []

    class Unconnected(Processes):
        def sum(self, x):
            totals.append(x.clone())
            return x

    for rank in range(3):
        evaluate_lm(model, blocks, 2, Unconnected(rank, 3))
    nats, tokens, sizes = sum(totals).tolist()
    assert tokens == int(blocks.mask.sum())
    assert nats / tokens == pytest.approx(one["nats_per_token"], abs=1e-12)
    assert one["bits_per_byte"] == pytest.approx(nats / math.log(2) / sizes, abs=1e-12)


@pytest.mark.statement("evaluation-pure")
def test_evaluation_and_samples_leave_parameters_and_random_state_as_they_were(tokenizer):
    model = tiny().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    blocks = make_blocks(TEXTS, "text", tokenizer, 64, "test")
    config = SimpleNamespace(sample_prompt="The king", sample_tokens=5, seed=0)
    evaluate_lm(model, blocks, 2)
    show_sample(model, tokenizer, "text", config, "before")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.statement("checkpointing")
def test_gradient_checkpointing_recomputes_and_leaves_gradients_as_they_were(tokenizer):
    blocks = make_blocks(TEXTS, "text", tokenizer, 64, "test")
    plain, saving = tiny().train(), tiny().train()
    checkpoint_activations(saving)
    calls = {"plain": 0, "saving": 0}
    for name, model in (("plain", plain), ("saving", saving)):
        lm_loss(model, blocks.batch([0], "cpu"))  # the check of the model's packing runs once, and is not counted
        layer = model.model.layers[0].mlp
        layer.register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    expected = take_gradients(plain, blocks, [[0, 1]])
    found = take_gradients(saving, blocks, [[0, 1]])
    assert calls == {"plain": 1, "saving": 2}
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])


@pytest.mark.statement("tied-merged")
def test_tied_embeddings_survive_saving_and_loading(tokenizer, tmp_path):
    model = tiny(dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.01)
    save_model(model, tokenizer, tmp_path)
    again = load_model(tmp_path, device="cpu")
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert torch.equal(again.get_output_embeddings().weight, model.get_input_embeddings().weight)
    assert not (tmp_path / "saving.tmp").exists()


@pytest.mark.statement("tied-merged")
def test_a_merged_model_is_tied_and_has_the_logits_of_its_adapter(tokenizer, tmp_path):
    model = add_lora(tiny(dtype=torch.float32), "tiny-llama", r=4)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    save_adapter(model, tokenizer, tmp_path, merge=True)
    merged, adapter = load_model(tmp_path / "merged", device="cpu"), load_model(tmp_path, device="cpu")
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    ids = torch.arange(20)[None]
    assert torch.equal(adapter(ids).logits, model.eval()(ids).logits)
    assert (merged(ids).logits - adapter(ids).logits).abs().max() < 1e-5
    assert (merged(ids).logits - tiny(dtype=torch.float32)(ids).logits).abs().max() > 1e-2


def test_a_base_frozen_in_bf16_keeps_the_frequencies_of_its_rotary_positions(tokenizer):
    ids = torch.arange(200, 300)[None] % 259
    adapted = add_lora(tiny(dtype=torch.float32), "tiny-llama", r=4, dtype=torch.bfloat16)
    assert adapted.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapted(ids).logits, tiny(dtype=torch.bfloat16)(ids).logits)


def test_scratch_keys_without_scratch_are_an_error_and_scratch_needs_all_of_them():
    with pytest.raises(UserError, match="scratch_layers would have no effect"):
        LMConfig(scratch_layers=2).check()
    with pytest.raises(UserError, match="scratch needs scratch_architecture, scratch_heads"):
        LMConfig(model_name="scratch", scratch_layers=2, scratch_width=32, scratch_vocab=300).check()


@pytest.mark.statement("held-out")
def test_held_out_documents_that_cannot_be_used_are_replaced(tmp_path, capsys):
    """Half of the rows are too long, and of 24 rows one is held out: which one, chance decides."""
    again = 0
    for number in range(12):
        rows = [{"prompt": f"{number}.{i}", "completion": "c" * (300 if i % 2 else 5)} for i in range(24)]
        path = tmp_path / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = LMConfig(data=str(path), heldout_fraction=0.05, max_length=64)
        train, heldout = load_blocks(config, load_data(config), load_tokenizer("tiny-gpt2"))
        assert len(train) and int(heldout.bytes.sum()) == 5  # one short completion
        again += "none of its 1 held-out documents can be used" in capsys.readouterr().out
    assert 0 < again < 12
    (tmp_path / "equal.jsonl").write_text('{"text": "same"}\n' * 24)
    with pytest.raises(UserError, match="holds 24 equal documents: no document is left for evaluation"):
        load_data(LMConfig(data=str(tmp_path / "equal.jsonl")))
