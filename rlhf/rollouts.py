"""Answers sampled from the policy and their scores: what PPO and GRPO have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from configs.config import UserError
from data.checks import score
from data.order import step_indices
from data.prompts import load_prompts
from data.rewards import call_judge, load_judge
from models.device import frozen_dtype
from models.fast.head import unwrapped
from models.generation import generate
from models.loader import load_model, same_tokens
from models.tokens import answer_text, prompt_ids
from rlhf.packing import pack, score_answers
from rlhf.reward_model import RewardModel, find_reward_model
from runtime.console import say
from runtime.files import in_root, sha256_file


@dataclass
class Rollout:
    """Answers to prompts: entry i of each list is one row; the answers of one prompt are consecutive rows."""

    prompts: list[list[int]]
    completions: list[list[int]]
    logprobs: list[list[float]] | None  # the sampler's, of each sampled id
    stopped: list[bool]  # ended by itself, not by the length limit
    texts: list[str]
    questions: list[str]
    group_sizes: list[int]  # rows of each prompt
    checks: list[list[dict]] | None = None

    def grouped(self, values):
        """A list with one value a row as a list of groups."""
        found, start = [], 0
        for size in self.group_sizes:
            found.append(values[start : start + size])
            start += size
        return found

    def split_groups(self, parts):
        """Rows of all groups, dealt out to `parts` lists group by group."""
        groups = self.grouped(range(len(self.prompts)))
        return [[i for group in groups[part::parts] for i in group] for part in range(parts)]

    def micro_batches(self, rows, size):
        """These rows in pieces of about `size` answers, groups kept together: a prompt is computed once a piece.

        Groups of like length share a piece, so that little of it is padding.
        """
        chosen = set(rows)
        groups = [[i for i in group if i in chosen] for group in self.grouped(range(len(self.prompts)))]
        groups = [group for group in groups if group]
        groups.sort(key=lambda g: len(self.prompts[g[0]]) + sum(len(self.completions[i]) for i in g))
        pieces = []
        for group in groups:
            if pieces and len(pieces[-1]) + len(group) <= size:
                pieces[-1] += group
            else:
                pieces.append(list(group))
        return pieces

    def pack(self, rows, pad_id, device):
        """These rows as one batch; see `rlhf/packing.py`."""
        return pack([self.prompts[i] for i in rows], [self.completions[i] for i in rows], pad_id, device)

    def measure(self, meter, rewards, gold):
        """Means over answers: reward, gold score, length in tokens, share that ended by itself."""
        for i, completion in enumerate(self.completions):
            meter.mean(reward=rewards[i], length=len(completion), stopped=self.stopped[i])
            if gold:
                meter.mean(gold=gold[i])

    def show(self, rewards):
        """Print the first prompt and answer of this rank."""
        text = " ".join(self.texts[0].split())
        say(f"        {self.questions[0]}\n        -> {text[:200]}  (reward {rewards[0]:.2f})")


class PromptStream:
    """Prompts of the training split in an order that is a pure function of (seed, step), each once an epoch.

    A step's prompts are dealt out to the ranks: rank r gets every world-th of them.
    """

    def __init__(self, path, tokenizer, prompts_per_step, seed, accelerator, need_checks=True):
        self.rows = load_prompts(path, split="train", need_checks=need_checks)
        if len(self.rows) < prompts_per_step:
            raise UserError(f"prompts_per_step = {prompts_per_step}: {path} has only {len(self.rows)} training prompts")
        if prompts_per_step < accelerator.num_processes:
            n = accelerator.num_processes
            raise UserError(f"prompts_per_step = {prompts_per_step}: must be at least {n}, one for each process")
        self.ids = [prompt_ids(tokenizer, row["prompt"]) for row in self.rows]
        self.sha256 = sha256_file(in_root(path))
        self.count, self.seed, self.accelerator = prompts_per_step, seed, accelerator

    def at(self, step):
        """This rank's (position in the step, row, ids) for step `step`, counted from 1."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        chosen = step_indices(len(self.rows), self.count, step, self.seed)
        return [(k, self.rows[i], self.ids[i]) for k, i in enumerate(chosen) if k % world == rank]


def check_room(stream, model, max_new_tokens):
    """Raise UserError for a prompt after which the model has no room for an answer: now, not when it is its turn."""
    context = model.config.max_position_embeddings
    for row, ids in zip(stream.rows, stream.ids):
        if len(ids) + max_new_tokens > context:
            raise UserError(
                f"prompt {row['id']!r} has {len(ids)} tokens: with max_new_tokens = {max_new_tokens} it does not fit "
                f"into the model's context of {context}"
            )


class Sampler:
    """The model that answers: a copy of the policy in the dtype of the passes, brought up to date before each rollout.

    With LoRA the copy is the base with the adapter merged in: an adapter beside each layer doubles the time of a token.
    With all weights training in float32 it saves the cast of every weight for every token; where the passes are in
    float32, too, the policy itself answers. What rounding the merged weights to bf16 changes is measured in the tests
    (1e-4 nats a token and less). The copy has weights only while it samples: they make room for the passes.
    """

    def __init__(self, policy, config, precision):
        self.policy = self.copy = policy
        weight = policy.get_input_embeddings().weight
        self.dtype = frozen_dtype(precision)
        if isinstance(policy, PeftModel) or weight.dtype != self.dtype:
            self.copy = load_model(config.model_name, dtype=self.dtype, device=weight.device, merge_adapter=True)
            self.copy.requires_grad_(False)
            self.rest()

    @torch.no_grad()
    def model(self):
        """The policy as it is now, ready to sample."""
        if self.copy is self.policy:
            return self.copy
        policy = unwrapped(self.policy)
        for name, mine in self.copy.named_parameters():
            layer, _, kind = name.rpartition(".")
            layer = policy.get_submodule(layer)
            if isinstance(layer, LoraLayer):
                theirs = getattr(layer.get_base_layer(), kind)
                if kind == "weight":
                    theirs = theirs.float() + layer.get_delta_weight("default").float()
            else:
                theirs = getattr(layer, kind)
            mine.data = theirs.to(self.dtype)
        return self.copy

    def rest(self):
        """Let go of the copy's weights until the next rollout."""
        if self.copy is not self.policy:
            for weight in self.copy.parameters():
                weight.data = weight.new_empty(0)

    def sample(self, tokenizer, stream, step, config, samples):
        """`samples` answers to each of this rank's prompts of the step, as a Rollout.

        The random numbers belong to the place in the step, so that one process and several draw the same answers.
        """
        share = stream.at(step)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        uniforms = torch.rand(stream.count, samples, config.max_new_tokens, generator=generator, dtype=torch.float64)
        generation = generate(
            self.model(),
            [ids for _, _, ids in share],
            config.max_new_tokens,
            temperature=config.temperature,
            samples_per_prompt=samples,
            stop_ids=[tokenizer.eos_token_id],
            uniforms=uniforms[[k for k, _, _ in share]].flatten(0, 1),
            batch_size=config.rollout_batch_size,
        )
        self.rest()
        rows = [row for _, row, _ in share for _ in range(samples)]
        return Rollout(
            prompts=[ids for _, _, ids in share for _ in range(samples)],
            completions=generation.completions,
            logprobs=generation.logprobs,
            stopped=[reason == "stop" for reason in generation.finish_reasons],
            texts=[answer_text(tokenizer, ids) for ids in generation.completions],
            questions=[row["prompt"] for row in rows],
            group_sizes=[samples] * len(share),
            checks=[row["checks"] for row in rows] if all(row.get("checks") for row in rows) else None,
        )


def gold_scores(rollout):
    """The share of checks that each answer passes; None where the prompts have no checks."""
    if rollout.checks is None:
        return None
    return [score(text, checks) for text, checks in zip(rollout.texts, rollout.checks)]


class Scorer:
    """What answers are worth: by the checks (the gold score), by a reward model's folder, or by the user's judge."""

    def __init__(self, judge, reward_model, tokenizer, device):
        self.judge = load_judge(judge) if judge else None
        self.reward_model = None
        if reward_model:
            self.reward_model = RewardModel.load(find_reward_model(reward_model), device=device)
            same_tokens(tokenizer, reward_model)
        self.pad_id = tokenizer.pad_token_id

    def __call__(self, rollout):
        """(rewards, gold): a float for each row; gold is None where the prompts have no checks."""
        gold = gold_scores(rollout)
        if self.judge:
            rewards = [call_judge(self.judge, q, text) for q, text in zip(rollout.questions, rollout.texts)]
        elif self.reward_model:
            rewards = score_answers(self.reward_model, rollout.prompts, rollout.completions, self.pad_id)
        else:
            rewards = gold
        return rewards, gold
