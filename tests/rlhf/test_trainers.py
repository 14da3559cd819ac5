"""Statements about the loops of the RLHF trainers: each runs its own `main` on a tiny model, watched from outside."""

import copy
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from data.order import step_indices
from data.pairs import load_pairs
from models.fast.layers import GatedMLP
from models.loader import load_model, load_tokenizer
from models.tiny import byte_tokenizer, tiny_config
from rlhf import pairs as pairs_module
from rlhf import policy as policy_module
from rlhf import rollouts, sampler
from rlhf.dpo_train import pair_logps
from rlhf.rollouts import PromptStream
from runtime.processes import Processes
from train.updates import Updates, lr_at

pytestmark = pytest.mark.slow

TRAINERS = {
    "reward": "rlhf.train_reward_model", "dpo": "rlhf.dpo_train", "ppo": "rlhf.ppo_train", "grpo": "rlhf.grpo_train"
}  # fmt: skip
DRIVER = str(Path(__file__).with_name("watched_driver.py"))
CLIPPED = {"lr": 1.0, "warmup_steps": 0, "max_grad_norm": 1e-3, "micro_batch_size": 1}
UNEVEN = {  # two steps of three pairs, or three prompts: rank 0 has two of them
    "reward": {**CLIPPED, "batch_size": 3, "max_steps": 2},
    "dpo": {**CLIPPED, "batch_size": 3, "max_steps": 2},
    "ppo": {**CLIPPED, "prompts_per_step": 3, "steps": 2},
    "grpo": {**CLIPPED, "prompts_per_step": 3, "steps": 2},
}
FOUR = pytest.mark.parametrize("name", ["reward", "dpo", "ppo", "grpo"])
close = torch.testing.assert_close


def weights(folder):
    adapter = folder / "adapter" if (folder / "adapter").is_dir() else folder
    return load_file(adapter / "adapter_model.safetensors")


def watch(monkeypatch, script, name, seen):
    """Replace script.name by itself, and append (arguments, what it returned) of each call to `seen`."""
    original = getattr(script, name)

    def watched(*given, **more):
        found = original(*given, **more)
        seen.append((given, found))
        return found

    monkeypatch.setattr(script, name, watched)


def flat(parameters):
    return torch.cat([p.detach().reshape(-1) for p in parameters]).double()


# book-keeping, in each trainer


@FOUR
@pytest.mark.statement("clipping")
def test_with_sgd_at_lr_1_and_a_limit_of_1e_6_weights_move_by_at_most_1e_6(train, sgd, monkeypatch, name):
    before, original = [], Updates.step

    def step(*given, **more):
        before.append(flat(sgd))
        return original(*given, **more)

    monkeypatch.setattr(Updates, "step", step)
    shape = {"steps": 1} if name in ("ppo", "grpo") else {"max_steps": 1}
    _, [line] = train(name, lr=1.0, warmup_steps=0, max_grad_norm=1e-6, **shape)
    moved = (flat(sgd) - before[0]).norm()
    assert 1e-7 < moved <= 1e-6 * 1.01  # 1 % for the rounding of float32 weights
    assert line["grad_norm"] > 1e-3  # the norm logged is the one before clipping


@FOUR
@pytest.mark.statement("token-mean")
def test_steps_do_not_depend_on_the_split_into_micro_batches(train, sgd, name):
    shape = {"steps": 2} if name in ("ppo", "grpo") else {"max_steps": 2}
    found = []
    for size in (16, 4, 3):  # completions, or pairs, in a micro-batch
        sgd.clear()
        train(name, out=str(size), lr=0.1, warmup_steps=0, max_grad_norm=1e9, micro_batch_size=size, **shape)
        found.append(flat(sgd))  # nothing was clipped, which would hide a wrong scale
    assert (found[0] - found[1]).abs().max() < 1e-6 and (found[0] - found[2]).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["ppo", "grpo", "offline"])
@pytest.mark.statement("cost-follows-work")
def test_a_pass_holds_at_most_micro_batch_size_completions(train, monkeypatch, name):
    seen, options = [], {} if name == "offline" else {"samples_per_prompt": 5}
    watch(monkeypatch, policy_module, "packed_logprobs", seen)
    train(name, steps=1, prompts_per_step=2, micro_batch_size=2, kl_coef=0.1, **options)
    groups = 3 if name == "offline" else 5  # completions of one prompt: more than a pass holds
    found = [len(packed.mask) for (_, packed, *_), _ in seen]
    assert max(found) == 2 and sum(found) >= 2 * groups


@FOUR
@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.statement("checkpointing")
def test_gradient_checkpointing_recomputes_and_changes_nothing(train, sgd, monkeypatch, name, lora_r):
    calls, forward = [], GatedMLP.forward

    def counted(self, x):
        calls.append(torch.is_grad_enabled())
        return forward(self, x)

    monkeypatch.setattr(GatedMLP, "forward", counted)
    monkeypatch.setattr(policy_module, "check_training", lambda model: None)  # it runs the layers, too
    for module in (pairs_module, rollouts):
        monkeypatch.setattr(module, "note_plan", lambda plan: None)  # and so does the plan
    shape = {"steps": 1} if name in ("ppo", "grpo") else {"max_steps": 1}
    shape |= {"kl_coef": 0} if name == "grpo" else {}  # without a pass of the reference
    passes, found = {}, {}
    for on in ("false", "true"):
        calls.clear()
        sgd.clear()
        folder, _ = train(name, out=on, lr=0.5, warmup_steps=0, gradient_checkpointing=on, lora_r=lora_r, **shape)
        passes[on], found[on] = sum(calls), flat(sgd)
        b = [value for key, value in weights(folder).items() if "lora_B" in key] if lora_r else []
        assert len(b) == (14 if lora_r else 0) and all(value.abs().max() > 0 for value in b)
    assert passes["true"] == 2 * passes["false"] > 0
    close(found["true"], found["false"], atol=1e-7, rtol=0)


@FOUR
@pytest.mark.statement("schedule")
def test_the_schedule_ends_at_its_minimum(train, name):
    shape = {"steps": 3} if name in ("ppo", "grpo") else {"epochs": 1}
    more = {"inner_epochs": 2, "minibatches": 2} if name == "ppo" else {"inner_epochs": 2} if name == "grpo" else {}
    _, lines = train(name, lr=1e-3, warmup_steps=1, min_lr_ratio=0.25, **shape, **more)
    assert len(lines) > 2 and lines[-1]["lr"] == pytest.approx(2.5e-4)
    assert [x["lr"] for x in lines[1:]] == sorted((x["lr"] for x in lines[1:]), reverse=True)


@pytest.mark.statement("schedule")
def test_the_schedule_counts_optimizer_steps_and_stands_still_on_skipped_ones(train, monkeypatch):
    _, plain = train("dpo", out="plain", lr=1e-3, warmup_steps=2, micro_batch_size=1, max_steps=4)
    steps = len(plain)
    assert [x["lr"] for x in plain] == [lr_at(i, steps, 1e-3, 2, 0.1) for i in range(1, steps + 1)]
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**40, backoff_factor=2.0**-15)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    _, lines = train("dpo", out="skipping", lr=1e-3, warmup_steps=2, precision="fp16", max_steps=4)
    skipped = ["grad_norm" not in x for x in lines]  # it was not finite
    assert any(skipped) and not all(skipped)
    taken = 0
    for line, lost in zip(lines, skipped):
        assert line["lr"] == lr_at(taken + 1, steps, 1e-3, 2, 0.1)
        taken += not lost


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.statement("data-order")
def test_prompts_come_in_another_order_each_epoch_and_the_ranks_together_see_each_once(minibatches):
    rows = 23
    steps = [step_indices(rows, 4, step, seed=7) for step in range(1, 24)]  # 92 places: four epochs
    epochs = [[i for step in steps for i in step][e * rows : (e + 1) * rows] for e in range(4)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert steps[3] == step_indices(rows, 4, 4, seed=7) != step_indices(rows, 4, 4, seed=8)
    tokenizer = load_tokenizer("tiny-llama")
    seen = []
    for rank in range(3):
        stream = PromptStream("data/prompts.json", tokenizer, 5, 0, Processes(rank, 3), minibatches=minibatches)
        seen += [(k, row["id"]) for k, row, _ in stream.at(2)]
    expected = [stream.rows[i]["id"] for i in step_indices(len(stream.rows), 5, 2, 0)]
    assert sorted(seen) == list(enumerate(expected))


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.statement("data-order")
def test_held_out_pairs_are_counted_once_over_the_ranks(module, monkeypatch, pairs, processes):
    script = module("dpo")
    held_out = load_pairs(pairs, load_tokenizer("tiny-llama"), 512)[0][:8]  # which 3 does not divide
    seen = []

    def logps(batch):
        return torch.zeros(len(batch)), torch.zeros(len(batch))

    def policy_logps(policy, batch, config, stage):
        seen.extend(pair["where"] for pair in batch)
        return logps(batch)

    monkeypatch.setattr(script, "policy_logps", policy_logps)
    monkeypatch.setattr(script.Meter, "collect", lambda meter, _: meter.totals["loss"][1])  # the weight of the mean
    stages = [SimpleNamespace(processes=Processes(rank, processes)) for rank in range(processes)]
    given = None, SimpleNamespace(logps=logps), held_out, script.Config(micro_batch_size=2)
    counts = [script.evaluate(*given, stage) for stage in stages]
    assert sorted(seen) == sorted(pair["where"] for pair in held_out) and sum(counts) == 8


@pytest.mark.statement("evaluation-pure")
def test_evaluation_leaves_parameters_and_random_state_as_they_were(train, module, monkeypatch):
    script, calls = module("dpo"), []
    original = script.evaluate

    def evaluate(policy, *given):
        model = policy.model
        state, parameters = torch.get_rng_state(), copy.deepcopy(model.state_dict())
        found = original(policy, *given)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(v, parameters[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        calls.append(found)
        return found

    monkeypatch.setattr(script, "evaluate", evaluate)
    train("dpo", max_steps=1)
    assert len(calls) == 2 and calls[0]["loss"] != calls[1]["loss"]


# two processes


@pytest.fixture(scope="module")
def two_processes(words, home, tmp_path_factory):
    """A folder with what each rank saw of each trainer: see watched_driver.py."""
    folder = tmp_path_factory.mktemp("two")
    plan = {name: [TRAINERS[name], words(name, folder / name, **UNEVEN[name])] for name in UNEVEN}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", DRIVER, str(folder)]
    where = {"cwd": home, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    done = subprocess.run([*command, json.dumps(plan)], capture_output=True, text=True, timeout=240, **where)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(json.loads((folder / name / "manifest.json").read_text())["processes"] == 2 for name in UNEVEN)
    return folder


@FOUR
@pytest.mark.statement("ranks-equal")
def test_parameters_are_equal_on_all_ranks_after_each_step(two_processes, name):
    one, other = (torch.load(two_processes / f"{name}.{rank}.pt") for rank in (0, 1))
    assert len(one["after_step"]) == len(other["after_step"]) == 2
    assert all(torch.equal(a, b) for a, b in zip(one["after_step"], other["after_step"]))
    assert not torch.equal(*one["after_step"])


@FOUR
@pytest.mark.statement("one-all-reduce")
def test_gradients_are_reduced_once_a_step(two_processes, name):
    assert torch.load(two_processes / f"{name}.0.pt")["reduced"] == 2  # steps, each of several micro-batches


@FOUR
@pytest.mark.statement("token-mean-ranks", "whitening")
def test_two_uneven_processes_take_the_steps_of_one_with_clipping_on(two_processes, train, sgd, name):
    _, lines = train(name, **UNEVEN[name])
    assert all(line["grad_norm"] > 2 * UNEVEN[name]["max_grad_norm"] for line in lines)
    of_two = [json.loads(line) for line in (two_processes / name / "metrics.jsonl").read_text().splitlines()]
    assert [x["grad_norm"] for x in of_two] == pytest.approx([x["grad_norm"] for x in lines], rel=1e-3)
    found = torch.load(two_processes / f"{name}.0.pt")["after_step"][-1]
    close(found, flat(sgd), atol=2e-6, rtol=0)


# DPO


@pytest.fixture
def droopy(tmp_path):
    """A folder with a GPT-2 whose configuration has dropout everywhere."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    tokenizer = byte_tokenizer()
    config = tiny_config("tiny-gpt2", len(tokenizer), tokenizer.eos_token_id)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.5
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "droopy")
    tokenizer.save_pretrained(tmp_path / "droopy")
    return tmp_path / "droopy"


@pytest.mark.parametrize("cached", ["true", "false"])
@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.statement("dpo-ln-2")
def test_the_first_dpo_loss_is_ln_2_exactly_with_dropout_in_the_config(train, droopy, lora_r, cached):
    _, [line] = train("dpo", model_name=droopy, lora_r=lora_r, precompute_reference=cached, max_steps=1,
                      batch_size=4, micro_batch_size=4, gradient_checkpointing="true")  # fmt: skip  # in train mode
    assert line["loss"] == torch.tensor(math.log(2)).item()
    assert line["margin"] == line["chosen_reward"] == line["rejected_reward"] == 0


@pytest.mark.statement("cached-reference")
def test_what_one_run_cached_is_of_no_use_to_another(train, droopy):
    for model in ("tiny-llama", droopy):  # the same data, another reference
        options = {"model_name": model, "precompute_reference": "true", "max_steps": 1}
        _, [line] = train("dpo", out=f"of-{Path(model).name}", **options)
        assert line["loss"] == torch.tensor(math.log(2)).item()


@pytest.mark.parametrize("name", ["dpo", "ppo", "grpo"])
@pytest.mark.statement("dpo-ln-2")
def test_the_reference_is_frozen_and_never_changes(train, module, monkeypatch, name):
    loaded, used = [], []
    watch(monkeypatch, policy_module, "load_policy", loaded)
    place = module(name) if name == "dpo" else policy_module  # where the reference's passes are
    original = place.as_reference

    def entered(model, reference):
        used.append((reference.training, any(p.requires_grad for p in reference.parameters())))
        return original(model, reference)

    monkeypatch.setattr(place, "as_reference", entered)
    train(name, lora_r=0, kl_coef=0.1) if name != "dpo" else train(name, lora_r=0)
    [(_, (policy, reference, _, _))] = loaded
    start = load_model("tiny-llama", device="cpu").state_dict()
    assert used and not any(flag for pair in used for flag in pair)
    assert all(torch.equal(v.cpu(), start[k]) for k, v in reference.state_dict().items())
    assert not torch.equal(flat(policy.parameters()), flat(reference.parameters()))


@pytest.mark.statement("dpo-sums", "logged-apart")
def test_dpo_uses_the_means_for_ipo_alone_and_logs_both_log_probs(train, pairs):
    tokenizer, model = load_tokenizer("tiny-llama"), load_model("tiny-llama", device="cpu")
    rows, _, _ = load_pairs(pairs, tokenizer, 512)
    for loss_type in ("sigmoid", "hinge", "ipo"):
        _, [line] = train("dpo", out=loss_type, loss_type=loss_type, heldout_fraction=0, batch_size=6, max_steps=1)
        batch = [rows[i] for i in step_indices(len(rows), 6, 1, 0)]
        chosen, rejected = pair_logps(model, batch, tokenizer, "cpu", per_token=loss_type == "ipo")
        assert line["chosen_logps"] == pytest.approx(chosen.mean().item(), abs=1e-5)
        assert line["rejected_logps"] == pytest.approx(rejected.mean().item(), abs=1e-5)


# reward model


@pytest.mark.statement("score-format")
def test_an_answer_is_scored_in_the_form_in_which_the_model_was_trained(train, monkeypatch, pairs, tmp_path):
    trained, scored = [], []
    watch(monkeypatch, pairs_module, "pack", trained)
    watch(monkeypatch, rollouts, "pack", scored)
    train("reward", out="reward", epochs=2)
    rows = [{"id": f"p{i}", "prompt": f"letter {i}", "split": "train"} for i in range(24)]  # the prompts of `pairs`
    (tmp_path / "prompts.json").write_text(json.dumps(rows))
    train("ppo", out="ppo", prompts=tmp_path / "prompts.json")
    known = {tuple(prompt) for (prompts, *_), _ in trained for prompt in prompts}
    asked = {tuple(prompt) for (prompts, *_), _ in scored for prompt in prompts}
    assert len(known) == 24 and asked and asked <= known
    eos = load_tokenizer("tiny-llama").eos_token_id  # which the sampler keeps at the end of what it stopped at
    assert all(c[-1] == eos and eos not in c[:-1] for (_, completions, *_), _ in trained for c in completions)


# PPO


@pytest.mark.statement("values-fixed", "ppo-first-step")
def test_old_values_and_old_log_probs_do_not_change_over_the_inner_epochs(train, module, monkeypatch):
    surrogates, values = [], []
    watch(monkeypatch, module("ppo"), "policy_loss", surrogates)
    watch(monkeypatch, module("ppo"), "value_loss", values)
    _, lines = train("ppo", steps=1, inner_epochs=3, minibatches=1, lr=1e-2, micro_batch_size=8)
    assert len(surrogates) == len(values) == 3
    for (logprobs, old, advantages, *_), _ in surrogates[1:]:
        assert torch.equal(old, surrogates[0][0][1]) and torch.equal(advantages, surrogates[0][0][2])
        assert not torch.equal(logprobs, old) and not old.requires_grad
    for (now, old, returns, *_), _ in values[1:]:
        assert torch.equal(old, values[0][0][1]) and torch.equal(returns, values[0][0][2])
        assert not torch.equal(now, old) and not old.requires_grad
    assert torch.equal(surrogates[0][0][0], surrogates[0][0][1])  # and the first ratio is 1
    assert lines[0]["approx_kl"] > 0


@pytest.mark.parametrize("bootstrap", ["false", "true"])
@pytest.mark.statement("bootstrap")
def test_only_what_the_length_cut_goes_on_at_its_last_value(train, module, monkeypatch, bootstrap):
    samples, estimates, read = [], [], []
    original = rollouts.SampledRollouts.at

    def at(*given):
        rollout = original(*given)
        rollout.finish_reasons = [("stop", "length")[i % 2] for i in range(len(rollout.prompts))]
        samples.append(rollout)
        return rollout

    monkeypatch.setattr(rollouts.SampledRollouts, "at", at)
    watch(monkeypatch, module("ppo"), "gae", estimates)
    watch(monkeypatch, policy_module, "packed_logprobs", read)
    train("ppo", steps=2, bootstrap_cut=bootstrap, lr=1e-2, micro_batch_size=64, missing_eos_penalty=0.5)
    (_, _, _, _, _, last_values), _ = estimates[1]  # after one step the value head is no longer 0
    if bootstrap == "false":
        assert last_values is None
        return
    _, after_the_end = (x[2] for _, x in read if isinstance(x, tuple) and len(x) == 3)  # of the passes before updates
    order = samples[1].micro_batches(range(8), 64)[0]
    cut = torch.tensor([samples[1].finish_reasons[i] == "length" for i in order], device=after_the_end.device)
    assert (after_the_end != 0).all()
    assert torch.equal(last_values, after_the_end * cut)


@pytest.mark.statement("bootstrap")
def test_an_answer_is_cut_where_its_finish_reason_says_so(train, monkeypatch):
    reasons, samples = [], []
    watch(monkeypatch, sampler, "generate", reasons)
    watch(monkeypatch, rollouts.SampledRollouts, "at", samples)
    _, lines = train("ppo", steps=1, prompts_per_step=16, max_new_tokens=30, samples_per_prompt=4)
    said = reasons[0][1].finish_reasons
    assert set(said) == {"stop", "length"}
    assert samples[0][1].finish_reasons == said
    assert lines[0]["clipped_ratio"] == pytest.approx(said.count("length") / len(said))


# GRPO


@pytest.mark.statement("sampled-ids")
def test_rollouts_train_on_the_sampled_ids(train, monkeypatch):
    """Random bytes are no UTF-8: what they decode to has other ids."""
    drawn, packed = [], []
    watch(monkeypatch, sampler, "generate", drawn)
    watch(monkeypatch, policy_module, "packed_logprobs", packed)
    train("grpo", steps=1, micro_batch_size=64)
    (given, _) = packed[-1]
    trained = [row[mask.bool()].tolist() for row, mask in zip(given[1].targets, given[1].mask)]
    completions = drawn[0][1].completions
    assert sorted(trained) == sorted(completions)
    tokenizer = load_tokenizer("tiny-llama")
    assert any(tokenizer(tokenizer.decode(ids)).input_ids != ids for ids in completions)


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_samplers_copy_has_weights_only_while_it_samples(train, monkeypatch, name):
    sizes, after = [], []
    original = sampler.generate

    def generate(model, *given, **more):
        sizes.append((model, sum(p.numel() for p in model.parameters())))
        return original(model, *given, **more)

    watch(monkeypatch, sampler.Sampler, "sample", after)
    monkeypatch.setattr(sampler, "generate", generate)
    train(name, steps=2)
    (copied, first), (same, second) = sizes
    assert copied is same and first == second == sum(p.numel() for p in load_model("tiny-llama").parameters())
    used = after[0][0][0]
    assert used.copy is copied and sum(p.numel() for p in copied.parameters()) == 0
    assert all(p.numel() for p in used.policy.parameters())  # whose weights the copy may share while it samples


@pytest.mark.parametrize("name", ["ppo", "grpo"])
@pytest.mark.statement("sampler-logprobs")
def test_rollouts_are_drawn_from_the_whole_distribution_at_the_training_temperature(train, monkeypatch, name):
    """Nothing is cut off by top-k or top-p, and log-probs are taken at the temperature of the sampling."""
    drawn, read = [], []
    original = sampler.generate

    def generate(*given, **more):
        drawn.append((more, original(*given, **more)))
        return drawn[-1][1]

    monkeypatch.setattr(sampler, "generate", generate)
    watch(monkeypatch, policy_module.Policy, "logprobs", read)
    train(name, steps=1, temperature=0.7, micro_batch_size=64)
    options, generation = drawn[0]
    assert options["temperature"] == 0.7 and options.keys().isdisjoint({"top_k", "top_p"})
    (_, batch), (again, *_) = read[0]  # of the weights that sampled
    packed = batch.packed
    stored = {tuple(c): p for c, p in zip(generation.completions, generation.logprobs)}
    for ids, mask, logprobs in zip(packed.targets, packed.mask.bool(), again.detach()):
        assert logprobs[mask].tolist() == pytest.approx(stored[tuple(ids[mask].tolist())], abs=1e-4)


@pytest.mark.statement("no-signal")
def test_the_share_of_groups_without_any_difference_is_logged(train, module, monkeypatch):
    rewards = [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5]  # three groups of four
    monkeypatch.setattr(module("grpo").Scorer, "__call__", lambda self, rollout: rewards)
    _, [line] = train("grpo", steps=1)
    assert line["frac_reward_zero_std"] == pytest.approx(2 / 3)


@pytest.mark.statement("missing-eos")
def test_grpo_takes_the_penalty_from_the_rewards_of_completions_that_were_cut(train, module, monkeypatch):
    seen, drawn = [], []
    monkeypatch.setattr(module("grpo").Scorer, "__call__", lambda self, rollout: [0.25] * len(rollout.texts))
    watch(monkeypatch, module("grpo"), "advantages_of_step", seen)
    watch(monkeypatch, rollouts.SampledRollouts, "at", drawn)
    sizes = {"steps": 1, "prompts_per_step": 16, "max_new_tokens": 30, "samples_per_prompt": 4}
    _, [line] = train("grpo", missing_eos_penalty=0.5, **sizes)
    finish_reasons = drawn[0][1].finish_reasons
    assert set(finish_reasons) == {"stop", "length"}
    rewards = [0.25 if reason == "stop" else -0.25 for reason in finish_reasons]
    assert torch.cat(seen[0][0][0]).tolist() == rewards
    assert line["reward"] == pytest.approx(sum(rewards) / len(rewards))


@pytest.mark.statement("offline-online")
def test_the_offline_gradient_is_that_of_the_online_step_on_the_same_data(train, module, monkeypatch, sgd, tmp_path):
    sampled, original = [], module("grpo").Scorer.__call__

    def score(self, rollout):
        sampled.append((rollout, original(self, rollout)))
        return sampled[-1][1]

    monkeypatch.setattr(module("grpo").Scorer, "__call__", score)
    shape = {"steps": 1, "lr": 1.0, "max_grad_norm": 1e9, "temperature": 0.7, "kl_coef": 0.1, "prompts_per_step": 3}
    _, [line] = train("grpo", out="online", **shape)
    online = flat(sgd)
    assert line["grad_norm"] > 0.01  # and the weights moved by that
    rollout, rewards = sampled[0]
    rows = []
    for rows_of_group in rollout.grouped(range(len(rollout.prompts))):
        ranked = sorted(rows_of_group, key=lambda i: -rewards[i])  # as the generator writes them: the best first
        texts = [[{"role": "assistant", "content": rollout.texts[i]}] for i in ranked]
        rows.append({"prompt": [{"role": "user", "content": rollout.questions[ranked[0]]}], "chosen": texts[0],
                     "rejected": texts[1:], "scores": [rewards[i] for i in ranked], "temperature": 0.7,
                     "completion_ids": [rollout.completions[i] for i in ranked],
                     "logprobs": [rollout.logprobs[i] for i in ranked]})  # fmt: skip
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sgd.clear()
    train("offline", out="offline", groups=tmp_path / "same.jsonl", **shape)
    close(flat(sgd), online, atol=1e-5, rtol=0)


def test_offline_the_file_says_which_completions_were_cut(train, groups, tmp_path):
    rows = [json.loads(line) for line in groups.read_text().splitlines()]
    ends = [sum(ids[-1] != 2 for ids in row["completion_ids"]) for row in rows]
    for name, reasons, cut in (("ids", None, sum(ends) / 12), ("file", ["length", "stop", "length"], 2 / 3)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({**row, "finish_reasons": reasons}) + "\n" for row in rows))
        _, [line] = train("offline", out=name, groups=path, steps=1, prompts_per_step=4)
        assert line["clipped_ratio"] == pytest.approx(cut)
