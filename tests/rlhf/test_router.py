"""The router's auxiliary loss in rlhf/: of packed sequences against transformers, and in the steps of each trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.pairs import load_pairs, split_by_prompt
from models.loader import load_model, load_tokenizer
from models.router import router_of
from proof.architectures import build
from rlhf import packing
from rlhf.packing import APART, PADDED, RAGGED, pack, token_states
from rlhf.pairs import pack_pairs
from rlhf.reward_model import RewardModel
from rlhf.utils import packed_logprobs, packed_scores

ASKS = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "max_position_embeddings": 512}
# two groups, whose prompts have three tokens in common, and a completion of a third prompt
PROMPTS = [[5, 6, 7, 8, 9]] * 3 + [[5, 6, 7, 11]] * 2 + [[5, 6, 7, 9, 9, 9, 9]]
COMPLETIONS = [[20, 21], [22, 23, 24, 25, 26], [27], [28, 29, 30], [31], [32, 33, 34, 35]]
TRAINERS = {
    "reward": "rlhf.train_reward_model", "dpo": "rlhf.dpo_train", "ppo": "rlhf.ppo_train", "grpo": "rlhf.grpo_train"
}  # fmt: skip
FOUR = pytest.mark.parametrize("name", TRAINERS)
DRIVER = str(Path(__file__).with_name("watched_driver.py"))


def transformers_losses(model, prompts, completions):
    """The auxiliary loss of each sequence alone, by transformers' model for language modelling."""
    rows = [torch.tensor([p + c]) for p, c in zip(prompts, completions)]
    return [model(input_ids=row, output_router_logits=True, use_cache=False).aux_loss for row in rows]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind, way", [
    ("mixtral", RAGGED), ("mixtral", PADDED), ("mixtral", APART), ("qwen3_moe", RAGGED), ("gpt_oss", APART),
    ("olmoe", PADDED),
])  # fmt: skip
@pytest.mark.statement("packed-apart")
def test_each_sequence_has_the_loss_and_gradients_that_transformers_gives_it_alone(kind, way, tmp_path, monkeypatch):
    build(kind, tmp_path, **ASKS)
    model = load_model(tmp_path, device="cpu")
    packed = pack(PROMPTS, COMPLETIONS, 2, "cpu")
    assert packed.rows.shared == 3 and packed.input_ids.shape[1] < sum(map(len, PROMPTS + COMPLETIONS))
    monkeypatch.setattr(packing, "admit", lambda *_: way)
    token_states(model, packed)
    expected = transformers_losses(model, PROMPTS, COMPLETIONS)
    assert max(expected) > 1.01 * min(expected)  # they differ, so that a wrong token shows
    router = router_of(model)
    torch.testing.assert_close(router.total, sum(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(router.term, 0.5 * router.total)
    found, wanted = gradients(model, router.total), gradients(model, sum(expected))
    assert (found - wanted).norm() < 1e-4 * wanted.norm() > 0


@pytest.mark.statement("packed-apart")
def test_any_split_into_passes_gives_the_same_sum(tmp_path):
    build("mixtral", tmp_path, **ASKS)
    model, found = load_model(tmp_path, device="cpu"), []
    for split in ([slice(0, 6)], [slice(0, 2), slice(2, 6)], [slice(i, i + 1) for i in range(6)]):
        terms = []
        for part in split:
            packed_logprobs(model, pack(PROMPTS[part], COMPLETIONS[part], 2, "cpu"))
            terms.append(router_of(model).term)
        found.append(gradients(model, sum(terms)))
    assert all((other - found[0]).norm() < 1e-4 * found[0].norm() for other in found[1:])


def test_a_reward_model_has_the_loss_of_its_body(tmp_path):
    build("mixtral", tmp_path, **ASKS)
    torch.manual_seed(0)
    scorer = RewardModel.load(tmp_path, device="cpu", new_head=True)
    packed_scores(scorer.model, pack(PROMPTS, COMPLETIONS, 2, "cpu"), scorer.head)
    expected = sum(transformers_losses(load_model(tmp_path, device="cpu"), PROMPTS, COMPLETIONS))
    torch.testing.assert_close(router_of(scorer.model).total.detach(), expected.detach(), rtol=1e-5, atol=0)


# the trainers


def options(name, model, **changes):
    """Two steps of three pairs, or prompts: of two processes, the first has two of them. All weights train, or LoRA."""
    found = {"model_name": model, "lr": 0.05, "warmup_steps": 0, "lora_r": 4 if name in ("dpo", "ppo") else 0}
    if name in ("reward", "dpo"):
        found |= {"batch_size": 3, "max_steps": 2}
    else:
        found |= {"prompts_per_step": 3, "steps": 2, "reward": "thirds:reward", "max_new_tokens": 4}
        found |= {"samples_per_prompt": 4, "kl_coef": 0.0}  # without it, GRPO computes what has an advantage
    return found | ({"reward_model": "none"} if name == "ppo" else {}) | changes


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    for coefficient in (0.5, 0.0):
        build("mixtral", folder / str(coefficient), **ASKS | {"router_aux_loss_coef": coefficient})
    return folder


@pytest.fixture(scope="module")
def two_processes(words, home, mixtral, tmp_path_factory):
    """A folder with the runs of two processes, whose passes hold one completion or pair; see watched_driver.py."""
    folder = tmp_path_factory.mktemp("two")
    given = {name: options(name, mixtral / "0.5", micro_batch_size=1) for name in TRAINERS}
    plan = {name: [TRAINERS[name], words(name, folder / name, **given[name])] for name in TRAINERS}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", DRIVER, str(folder)]
    where = {"cwd": home, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    done = subprocess.run([*command, json.dumps(plan)], capture_output=True, text=True, timeout=240, **where)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(json.loads((folder / name / "manifest.json").read_text())["processes"] == 2 for name in TRAINERS)
    return folder


@FOUR
@pytest.mark.slow
@pytest.mark.statement("token-mean-ranks")
def test_two_processes_in_small_passes_take_the_steps_of_one_in_large_passes(two_processes, mixtral, train, sgd, name):
    found = {}
    for coefficient in ("0.5", "0.0"):
        sgd.clear()
        _, lines = train(name, out=coefficient, **options(name, mixtral / coefficient, micro_batch_size=16))
        found[coefficient] = torch.cat([p.detach().reshape(-1) for p in sgd]).double(), lines
    (weights, lines), (plain, its_lines) = found["0.5"], found["0.0"]
    of_two = torch.load(two_processes / f"{name}.0.pt")["after_step"][-1]
    logged = [json.loads(line) for line in (two_processes / name / "metrics.jsonl").read_text().splitlines()]
    assert (weights - plain).norm() > 100 * (weights - of_two).norm()  # the loss moves the weights
    for key in ("loss", "aux_loss", "grad_norm"):
        assert [x[key] for x in logged] == pytest.approx([x[key] for x in lines], rel=1e-3, abs=1e-6)
    assert lines[0]["aux_loss"] > 1 and "aux_loss" not in its_lines[0]
    assert lines[0]["loss"] == pytest.approx(its_lines[0]["loss"], rel=1e-5, abs=1e-7)  # it is not in the loss


@pytest.mark.slow
@pytest.mark.statement("token-mean")
def test_completions_without_an_advantage_train_the_router(train, sgd, mixtral, monkeypatch, module):
    monkeypatch.setattr(module("grpo"), "advantages_of_step", lambda groups, _: [torch.zeros_like(g) for g in groups])
    _, lines = train("grpo", **options("grpo", mixtral / "0.5"))
    assert [line["loss"] for line in lines] == [0, 0] and min(line["grad_norm"] for line in lines) > 0
    assert all("aux_loss" in line for line in lines)


@pytest.mark.slow
def test_the_logged_loss_is_the_mean_over_the_sequences_of_the_step(train, mixtral, pairs):
    model, tokenizer = load_model(mixtral / "0.5", device="cpu"), load_tokenizer(mixtral / "0.5")
    mine, _ = split_by_prompt(load_pairs(pairs, tokenizer, 512)[0], 0.25, 0)
    prompts, completions = zip(*pack_pairs(mine, 2, "cpu").sequences)
    with torch.no_grad():
        expected = torch.stack(transformers_losses(model, prompts, completions)).mean()
    shape = {"batch_size": len(mine), "micro_batch_size": 4, "max_steps": 1, "heldout_fraction": 0.25}
    _, [line] = train("dpo", **options("dpo", mixtral / "0.5", **shape))
    assert line["aux_loss"] == pytest.approx(expected.item(), rel=1e-5)
