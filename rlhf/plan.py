"""The plans of the scripts of rlhf/: what `--dry_run true` prints, and what the manifest compares with the peak."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import torch

from data.order import step_indices
from data.pairs import batches_by_length, count_steps, pair_length
from models.admission import MOST_IN_FLOAT32
from models.device import PRECISIONS, frozen_dtype
from models.flops import Part as Work
from models.flops import rows, sampled
from models.generation import common_prefix
from models.loader import model_config
from models.options import quantisation
from models.plan import (
    FLOAT,
    Sizes,
    in_words,
    logits,
    pace,
    passes,
    planned_model,
    planned_precision,
    sampling,
    sizes,
    target,
    training_parts,
)
from runtime.files import in_root, read_json
from runtime.plan import Part, Plan

STEPS = 200  # whose batches are looked at for the largest one


class Roles:
    """The models of a run of rlhf/ on the target: the sizes of the one that trains, and the parts that all hold."""

    def __init__(self, config: Any, score: bool = False):
        processes = int(os.environ.get("WORLD_SIZE", 1))
        self.config, self.target = config, target(config, processes)
        self.processes = self.target.processes
        self.precision = planned_precision(config.precision, self.target)
        self.itemsize = PRECISIONS[self.precision].itemsize
        self.dtype = frozen_dtype(self.precision) if config.lora_r else torch.float32
        how = quantisation(config, self.dtype)
        self.sizes: Sizes = sizes(planned_model(config), self.precision, self.dtype, config.lora_r, score, how)
        name = "reward model" if score else "policy"
        self.held = training_parts(self.sizes, name, self.dtype, self.processes)
        if self.processes > 1:  # all gradients end to end, while they are summed: in place of the buckets of DDP
            assert self.held[-1].name.startswith("gradients in exchange")

    def reference(self) -> Part | None:
        """The weights of the reference. None with LoRA: it is the base with the adapter disabled."""
        if self.config.lora_r:
            return None
        return Part(f"reference: weights, {self.precision}", self.sizes.base * self.itemsize, True)

    def checks(self) -> dict[str, list[Part]]:
        """The float32 copy of the frozen weights, bf16 or fp16, that the checks of a small model make."""
        small = self.sizes.weights <= MOST_IN_FLOAT32 and self.itemsize < FLOAT
        copy = Part("weights in float32", FLOAT * (self.sizes.base - self.sizes.quantised))
        found = {"loading and checks": [copy]} if small else {}
        if self.sizes.quantised:
            found["rounding of the weights"] = [Part("weights before", self.dtype.itemsize * self.sizes.base)]
        return found

    def passes(self, tokens: int, width: int, rows: int, targets: int, score: bool = False) -> list[Part]:
        """The parts of one forward and backward pass. targets: tokens through the head."""
        found = passes(self.sizes, tokens, width, rows, self.config.gradient_checkpointing)
        if score:
            return found
        kind, trained = self.target.kind, not self.config.lora_r
        return found + logits(self.sizes, targets, kind, self.itemsize, trained, entropy=True)

    def plan(
        self,
        steps: str,
        tokens: str,
        work: dict[str, list[Part]],
        notes: list[str],
        flops: float,
        at_most: bool = False,
    ) -> Plan:
        """The `Plan` of the run, of these parts. at_most: whether it may need fewer FLOP."""
        return Plan(
            target=self.target,
            model=f"{in_words(self.sizes, self.config.model_name)}, {self.precision}",
            steps=steps,
            tokens=tokens,
            held=self.held,
            work=work,
            notes=notes,
            flops=flops,
            at_most=at_most,
            seconds_of=pace(self.sizes, self.precision, self.target),
        )


def plan_pairs(config: Any, train: list[dict] | None, notes: list[str], score: bool = False) -> Plan:
    """The `Plan` of DPO, or with `score` of the reward model. train: the pairs; None: rows of max_length."""
    roles = Roles(config, score)
    mine = math.ceil(config.batch_size / roles.processes)
    n = min(config.micro_batch_size, mine)
    if train is None:
        largest, steps = (n * 2 * config.max_length, 2 * config.max_length, n), config.max_steps
        each = Work(2 * config.max_length, config.max_length**2, config.max_length)
        tokens, seen = 2.0 * config.max_length, steps * config.batch_size
    else:
        steps = count_steps(config, len(train))
        chosen = range(1, min(steps, STEPS) + 1)
        batches = [
            batch
            for step in chosen
            for batch in batches_by_length([train[i] for i in _indices(train, config, step)][:: roles.processes], n)
        ]
        largest = max(map(_extent, batches))
        each = _mean(rows([p["prompt"] for p in train], [[len(p["chosen"]), len(p["rejected"])] for p in train]), train)
        tokens, seen = sum(map(pair_length, train)) / len(train), min(len(train), steps * config.batch_size)
    most, width, _ = largest
    work = roles.checks()
    reference = None if score else roles.reference()
    if reference and config.precompute_reference and roles.target.kind == "cuda":
        notes.append("the reference goes before gradients and moments come, which are larger: it does not count")
    elif reference and config.precompute_reference:
        work["log-probs of the reference, before training"] = [reference]
    elif reference:
        roles.held.append(reference)
    work["forward and backward pass"] = roles.passes(most, width, n, most, score)
    trained = steps * config.batch_size
    cost = roles.sizes.cost
    if score:
        flops = trained * cost.training(replace(each, head=0))
    else:  # the reference's log-probs once a pair, or in each step
        flops = trained * cost.training(each)
        flops += (seen if config.precompute_reference else trained) * cost.forward(each)
    said = f"{steps:,} of {config.batch_size} pairs" if steps else "not known"
    return roles.plan(said, f"{int(trained * tokens):,} trained" if steps else "not known", work, notes, flops)


def _mean(work, items):
    """The work of one of these items, whose sum is `work`; what they all begin with counts once a batch."""
    return Work(*(getattr(work, key) // len(items) for key in ("tokens", "pairs", "head")))


def _indices(train, config, step):
    return step_indices(len(train), config.batch_size, step, config.seed)


def _extent(pairs):
    """(tokens, longest row, rows) of a batch of pairs; what all prompts begin with counts once."""
    shared = common_prefix([pair["prompt"] for pair in pairs])
    lengths = [pair_length(pair) for pair in pairs]
    return sum(lengths) - shared * (len(pairs) - 1), max(lengths), len(pairs)


def plan_rollouts(config: Any, prompts: list[list[int]] | None, notes: list[str], value_head: bool = False) -> Plan:
    """The `Plan` of PPO or GRPO online. prompts: their token ids; None: as long as a completion.

    Completions count with max_new_tokens tokens: what is sampled may be shorter.
    """
    roles = Roles(config)
    new, samples = config.max_new_tokens, config.samples_per_prompt
    ids = prompts or [[i, *[0] * (new - 1)] for i in range(config.prompts_per_step)]
    prompt, shared = max(map(len, ids)), common_prefix(ids)
    mine = math.ceil(config.prompts_per_step / roles.processes)
    _other_roles(roles, value_head, notes)
    n = min(config.micro_batch_size, math.ceil(mine / config.minibatches) * samples)
    groups = math.ceil(n / samples)
    tokens = shared + groups * (prompt - shared) + n * new
    together = max(1, min(config.sampling_batch_size, mine * samples))
    copy = bool(config.lora_r) or roles.precision != "fp32"
    s = roles.sizes
    work = roles.checks()
    work["sampling"] = sampling(s, together, prompt, new, roles.itemsize, copy, roles.target.kind)
    width = prompt + min(samples, n) * new
    work["forward and backward pass"] = roles.passes(tokens, width, groups, n * new)
    some = [ids[i % len(ids)] for i in range(config.prompts_per_step)]
    learned = rows(some, [[new] * samples] * len(some))
    drawn = sampled(some, new, samples)
    # forward passes before the updates. PPO: old log-probs, reference, scores; GRPO: what its options need of these
    before = 3 if value_head else (config.inner_epochs * config.minibatches > 1) + bool(config.kl_coef)
    flops = s.cost.forward(drawn) + s.cost.forward(learned) * before + s.cost.training(learned) * config.inner_epochs
    updates = config.inner_epochs * config.minibatches
    said = f"{config.steps:,} rollouts, {updates} update{'s' if updates > 1 else ''} each"
    notes = [*notes, f"completions count with max_new_tokens = {new}; the sampled ones may be shorter"]
    made = config.prompts_per_step * samples * new
    read = (config.prompts_per_step * prompt + made) * config.inner_epochs
    tokens_said = f"{config.steps * made:,} sampled, {config.steps * read:,} trained, at most"
    return roles.plan(said, tokens_said, work, notes, config.steps * flops, at_most=True)


def plan_groups(config: Any, groups: list[dict] | None, notes: list[str]) -> Plan:
    """The `Plan` of GRPO offline. groups: those of the file; None: groups of 8 completions, max_length together."""
    roles = Roles(config)
    _other_roles(roles, False, notes)
    half = config.max_length // 2
    ids = [g["prompt"] for g in groups] if groups else [[i, *[0] * (half - 1)] for i in range(2)]
    lengths = [[len(c) for c in g["completions"]] for g in groups] if groups else [[half] * 8] * 2
    prompt, shared, longest = max(map(len, ids)), common_prefix(ids), max(map(max, lengths))
    samples = max(map(len, lengths))
    n = min(config.micro_batch_size, math.ceil(config.prompts_per_step / roles.processes) * samples)
    together = math.ceil(n / samples)
    work = roles.checks()
    tokens, width = shared + together * (prompt - shared) + n * longest, prompt + min(n, samples) * longest
    work["forward and backward pass"] = roles.passes(tokens, width, together, n * longest)
    read = config.steps * config.inner_epochs * config.prompts_per_step
    flops = read * roles.sizes.cost.training(_mean(rows(ids, lengths), ids))
    mean = sum(len(p) + sum(c) for p, c in zip(ids, lengths, strict=True)) / len(ids)
    said = f"{int(read * mean):,} trained, none sampled"
    return roles.plan(f"{config.steps:,} of {config.prompts_per_step} groups", said, work, notes, flops)


def _other_roles(roles, value_head, notes):
    """Add the parts of reference, reward model and value head to what is held."""
    reference = roles.reference()
    if reference:
        roles.held.append(reference)
    if roles.config.reward_model:
        roles.held.append(_reward_model(roles, value_head, notes))
    if value_head:  # weights, gradients and two moments
        roles.held.append(Part("value head, with gradients and optimizer", 4 * FLOAT * (roles.sizes.width + 1)))


def _reward_model(roles, may_share, notes):
    """The reward model: a second adapter on the policy's backbone, where PPO can share it, or a float32 model."""
    name, s = roles.config.reward_model, roles.sizes
    folder = in_root(name)
    file = folder / "adapter" / "adapter_config.json"
    if may_share and roles.config.lora_r and (file.is_file() or not folder.exists()):
        r = read_json(file).get("r") if file.is_file() else roles.config.lora_r
        if not folder.exists():
            notes.append(f"{name} is not here: an adapter of the policy's rank is assumed")
        return Part("reward model: adapter, float32", FLOAT * s.trained * r / roles.config.lora_r, True)
    if not folder.exists():
        notes.append(f"{name} is not here: a model of the policy's size is assumed")
        return Part("reward model: weights, float32", FLOAT * s.base, True)
    own = sizes(model_config(name), "fp32", torch.float32, 0, score=True)
    return Part("reward model: weights, float32", FLOAT * own.weights, True)
