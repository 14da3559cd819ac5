"""Token records of DPO, the reward model, PPO and GRPO, beside transformers on each sequence alone."""

import importlib
import json
import math

import pytest
import torch
from interrupted import run, run_whole, said
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from configs.config import ROOT, names_with
from models.loader import load_tokenizer
from rlhf.rollouts import Rollout
from rlhf.token_records import chosen_rows

pytestmark = pytest.mark.slow

CONSTANT = {"min_lr_ratio": 1, "lr": 1e-2}  # so a run of one step ends where a longer one begins its second step
CLOSE = {"abs": 2e-4, "rel": 1e-3}
SCRIPTS = [f"train.train_lm{name}" for name in ("", "_ddp", "_amp_ckpt", "_lora", "_wandb")]
SCRIPTS += [f"rlhf.{name}" for name in ("train_reward_model", "dpo_train", "ppo_train", "grpo_train")]


def records(folder):
    return [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]


def plain(folder=None):
    """tiny-llama as transformers loads it, with the adapter of a run."""
    model = AutoModelForCausalLM.from_pretrained(ROOT / "models/tiny-llama", dtype=torch.float32)
    return (PeftModel.from_pretrained(model, str(folder)) if folder else model).eval()


@torch.no_grad()
def alone(model, prompt, completion, temperature=1.0):
    """(log-probs, entropies, states before each token) of a completion, by the plain forward pass of one sequence."""
    out = model(input_ids=torch.tensor([prompt + completion]), output_hidden_states=True)
    log_p = (out.logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
    logprobs = log_p.gather(1, torch.tensor(completion)[:, None])[:, 0]
    states = out.hidden_states[-1][0]
    return logprobs.tolist(), (-(log_p.exp() * log_p).sum(-1)).tolist(), states[len(prompt) - 1 : -1]


def sequences(groups, step, **more):
    """(prompt ids, sequence, its numbers) of a step's records."""
    chosen = [g for g in groups if g["step"] == step and all(g[key] == value for key, value in more.items())]
    return [(g["prompt"]["ids"], s, s["numbers"]) for g in chosen for s in g["sequences"]]


def close(expected):
    return pytest.approx(expected, **CLOSE)


@pytest.mark.statement("token-records")
def test_grpo_keeps_what_transformers_says_of_each_completion_alone(train):
    options = {**CONSTANT, "temperature": 0.7, "kl_coef": 0.02, "inner_epochs": 2, "samples_per_prompt": 3}
    options |= {"clip_low": 0.002, "clip_high": 0.003}  # a step of a tiny model changes little
    options |= {"micro_batch_size": 16, "prompts_per_step": 6}  # a batch has its groups by length, not by place
    one, _ = train("grpo", "one", steps=1, **options)
    out, lines = train("grpo", "two", steps=2, keep_tokens=5, **options)
    groups, policy, reference = records(out), plain(one), plain()
    assert [(g["step"], g["inner_epoch"]) for g in groups] == [(s, e) for s in (1, 2) for e in (1, 2) for _ in range(2)]
    first, last = sequences(groups, 2, inner_epoch=1), sequences(groups, 2, inner_epoch=2)
    assert len(first) == 5 and [s["ids"] for _, s, _ in first] == [s["ids"] for _, s, _ in last]
    moved = 0.0
    for (prompt, sequence, x), (_, again, y) in zip(first, last):
        logprobs, entropies, _ = alone(policy, prompt, sequence["ids"], 0.7)
        ref, _, _ = alone(reference, prompt, sequence["ids"], 0.7)
        assert x["logprob"] == close(logprobs) and x["entropy"] == close(entropies)
        assert x["sampler_logprob"] == close(logprobs) and x["ref_logprob"] == close(ref)
        assert set(x["ratio"]) == {1.0} and not any(x["clipped"]) and x["old_logprob"] == x["logprob"]
        assert x["kl"] == close([math.exp(r - p) - 1 + p - r for p, r in zip(logprobs, ref)])  # k3, at ratio 1
        moved = max(moved, *(abs(p - r) for p, r in zip(logprobs, ref)))
        assert y["old_logprob"] == x["logprob"] and y["logprob"] != x["logprob"]
        ratios = [math.exp(a - b) for a, b in zip(y["logprob"], y["old_logprob"])]
        a = again["scores"]["advantage"]
        assert y["ratio"] == pytest.approx(ratios, abs=1e-5) and y["advantage"] == [a] * len(ratios)
        assert y["clipped"] == [int(r > 1.003 if a > 0 else r < 0.998 and a < 0) for r in ratios]
        expected = [r * (math.exp(q - p) - 1 + p - q) for r, p, q in zip(ratios, y["logprob"], y["ref_logprob"])]
        assert y["kl"] == pytest.approx(expected, abs=1e-5) and x["mask"] == [1] * len(sequence["ids"])
    assert moved > 0.01 and any(any(y["clipped"]) for _, _, y in last)
    rewards = {s["scores"]["reward"] for _, s, _ in first}
    assert len(rewards) > 1 and rewards <= {0.0, 1.0, 2.0}
    same, plain_lines = train("grpo", "without", steps=2, **options)
    assert not (same / "tokens.jsonl").exists() and untimed(lines) == untimed(plain_lines)
    assert_same_weights(out, same)


def untimed(lines):
    return [{key: x for key, x in line.items() if key not in ("seconds", "tok/s")} for line in lines]


def assert_same_weights(a, b):
    a, b = (load_file(x / "adapter_model.safetensors") for x in (a, b))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.statement("token-records")
def test_ppo_keeps_rewards_values_and_returns_of_each_token(train):
    options = {**CONSTANT, "kl_coef": 0.3, "missing_eos_penalty": 0.5}
    one, _ = train("ppo", "one", steps=1, **options)
    out, lines = train("ppo", "two", steps=2, keep_tokens=4, **options)
    policy, reference, head = plain(one), plain(), load_file(one / "value_head.safetensors")
    found = sequences(records(out), 2)
    assert len(found) == 4
    for prompt, sequence, x in found:
        logprobs, _, states = alone(policy, prompt, sequence["ids"])
        ref, _, _ = alone(reference, prompt, sequence["ids"])
        kl = [p - r for p, r in zip(logprobs, ref)]
        score = sequence["scores"]["reward"] - 0.5 * (sequence["finish_reason"] == "length")
        rewards = [-0.3 * k for k in kl[:-1]] + [score - 0.3 * kl[-1]]
        values = (states @ head["weight"][0] + head["bias"][0]).tolist()
        assert x["logprob"] == close(logprobs) and x["ref_logprob"] == close(ref) and set(x["ratio"]) == {1.0}
        assert x["kl"] == close(kl) and x["reward"] == close(rewards) and x["value"] == close(values)
        assert sequence["scores"]["kl"] == close(sum(kl)) and max(map(abs, values)) > 0
        deltas = [r + v - w for r, v, w in zip(rewards, [*values[1:], 0.0], values)]
        n = len(deltas)
        advantages = [sum(0.95 ** (s - t) * deltas[s] for s in range(t, n)) for t in range(n)]  # GAE's double sum
        assert x["return"] == close([a + v for a, v in zip(advantages, values)])
    same, plain_lines = train("ppo", "without", steps=2, **options)
    assert untimed(lines) == untimed(plain_lines)
    assert_same_weights(out, same)


@pytest.mark.parametrize("loss_type, lora_r", [("sigmoid", 4), ("ipo", 4), ("sigmoid", 0)])
@pytest.mark.statement("token-records")
def test_dpo_keeps_the_log_probs_of_both_sides(train, loss_type, lora_r):
    options = {**CONSTANT, "warmup_steps": 0, "loss_type": loss_type, "lora_r": lora_r, "lr": 1e-3}
    one, _ = train("dpo", "one", max_steps=1, **options)
    out, lines = train("dpo", "two", max_steps=2, keep_tokens=3, **options)
    full = lora_r == 0
    policy = AutoModelForCausalLM.from_pretrained(one).eval() if full else plain(one)
    reference, groups = plain(), [g for g in records(out) if g["step"] == 2]
    assert len(groups) == 3 and all([s["name"] for s in g["sequences"]] == ["chosen", "rejected"] for g in groups)
    for group in groups:
        rewards = []
        for sequence in group["sequences"]:
            x, ids = sequence["numbers"], sequence["ids"]
            logprobs, ref = (alone(model, group["prompt"]["ids"], ids)[0] for model in (policy, reference))
            assert x["logprob"] == close(logprobs) and x["ref_logprob"] == close(ref)
            assert max(abs(a - b) for a, b in zip(logprobs, ref)) > 1e-3
            size = len(ids) if loss_type == "ipo" else 1
            rewards.append(0.1 * (sum(logprobs) - sum(ref)) / size)
            assert sequence["scores"] == close({"logps": sum(logprobs) / size, "implicit_reward": rewards[-1]})
        h = (rewards[0] - rewards[1]) / 0.1
        loss = (h - 5) ** 2 if loss_type == "ipo" else math.log(1 + math.exp(-0.1 * h))
        assert group["scores"] == close({"margin": rewards[0] - rewards[1], "loss": loss})
    same, plain_lines = train("dpo", "without", max_steps=2, **options)
    assert untimed(lines) == untimed(plain_lines)


@pytest.mark.statement("token-records")
def test_the_reward_model_keeps_the_score_of_each_beginning(train):
    options = {**CONSTANT, "warmup_steps": 0, "lora_r": 0, "lr": 1e-3}
    one, _ = train("reward", "one", max_steps=1, **options)
    out, lines = train("reward", "two", max_steps=2, keep_tokens=2, **options)
    model = AutoModelForSequenceClassification.from_pretrained(one).eval()
    groups = [g for g in records(out) if g["step"] == 2]
    assert len(groups) == 2
    for group in groups:
        for sequence in group["sequences"]:
            scores = []
            for end in range(1, len(sequence["ids"]) + 1):
                row = torch.tensor([group["prompt"]["ids"] + sequence["ids"][:end]])
                with torch.no_grad():
                    scores.append(model.score(model.model(row).last_hidden_state[:, -1]).item())
            assert sequence["numbers"]["score"] == close(scores) and sequence["scores"]["score"] == close(scores[-1])
            assert len(set(scores)) == len(scores) > 1
        margin = group["sequences"][0]["scores"]["score"] - group["sequences"][1]["scores"]["score"]
        assert group["scores"] == close({"margin": margin, "probability_chosen": 1 / (1 + math.exp(-margin))})
    same, plain_lines = train("reward", "without", max_steps=2, **options)
    assert untimed(lines) == untimed(plain_lines)


def test_a_completion_that_is_not_computed_has_what_the_sampler_knows(train):
    """Without a KL, completions of a group whose rewards are equal have no gradient, and are in no batch."""
    out, lines = train("grpo", kl_coef=0, keep_tokens=64, samples_per_prompt=2, prompts_per_step=6)
    found = sequences(records(out), 1)
    assert len(found) == 12 and 0 < lines[0]["frac_reward_zero_std"] < 1
    for _, sequence, x in found:
        computed = "logprob" in x
        assert x["mask"] == [int(computed)] * len(sequence["ids"]) and "ref_logprob" not in x
        assert computed == bool(sequence["scores"].get("advantage")) and len(x["sampler_logprob"]) == len(x["mask"])


def test_of_a_group_the_best_and_the_worst_are_kept_and_groups_that_differ_come_first():
    lists = [[0], [1], [2], [3], [4], [5], [6]]
    rollout = Rollout(
        lists,
        lists,
        None,
        ["stop"] * 7,
        [""] * 7,
        [""] * 7,
        [2, 0, 5],
        [0, 1, 2],
        rewards=[1.0, 1.0, 0, 2.0, 1, 3.0, 0.5],
    )
    assert chosen_rows(rollout, 3) == [([2, 3, 4, 5, 6], [2, 3, 5])]
    assert chosen_rows(rollout, 6) == [([2, 3, 4, 5, 6], [2, 3, 4, 5, 6]), ([0, 1], [0])]
    assert chosen_rows(rollout, 1) == [([2, 3, 4, 5, 6], [5])]


@pytest.mark.statement("token-records")
def test_killed_and_resumed_it_keeps_each_step_once(tmp_path):
    words = ["--config", "configs/smoke/grpo.yaml", "--steps", 7, "--save_every", 2, "--keep_tokens", 2]
    whole, out = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    run_whole("rlhf.grpo_train", words, whole)
    half = torch.load(f"{whole}.end")["events"] // 2
    assert run("rlhf.grpo_train", words, out, die_at=half) < 0
    before = [group["step"] for group in records(out)]
    run_whole("rlhf.grpo_train", words, out)
    assert "continuing from step" in said(out) and before and before[-1] < 7
    assert records(out) == records(whole) and [g["step"] for g in records(out)] == [1, 3, 4, 5, 7]


def test_the_texts_of_a_run_are_those_of_its_tokenizer(train):
    out, _ = train("grpo", keep_tokens=3)
    tokenizer = load_tokenizer("tiny-llama")
    for prompt, sequence, _ in sequences(records(out), 1):
        raw = b"".join(
            bytes.fromhex(t["bytes"]) if isinstance(t, dict) else t.encode()
            for t, i in zip(sequence["texts"], range(99)) if i not in sequence["special"]
        )  # fmt: skip
        assert raw.decode(errors="replace") == tokenizer.decode(sequence["ids"], skip_special_tokens=True)
        assert len(sequence["texts"]) == len(sequence["ids"]) == sequence["length"] and prompt


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_training_script_has_the_option_and_it_is_no_part_of_what_a_run_is(script):
    found = importlib.import_module(script).Config
    assert "keep_tokens" in names_with(found, identity=False) and found.keep_tokens == 0
