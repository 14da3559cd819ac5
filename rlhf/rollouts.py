"""Rollouts: the completions from which a step of PPO or GRPO learns, and the batches in which they are computed."""

from __future__ import annotations

import itertools
import math
import shlex
from dataclasses import dataclass, field, fields, replace
from statistics import fmean
from typing import Any, ClassVar

import torch

from configs.config import UserError, option
from data.order import step_indices
from data.pairs import load_groups
from data.prompts import ARITHMETIC, PromptConfig, prompts_and_hash
from data.rewards import RewardConfig, columns_of
from data.rows import text_of
from models.loader import check_length, context_length, load_tokenizer
from models.tokens import completion_text, prompt_ids, stop_ids
from rlhf.packing import Packed, pack
from rlhf.plan import plan_groups, plan_rollouts
from rlhf.sampler import Sampler
from rlhf.scoring import gold_scores
from rlhf.stage import TrainingConfig
from rlhf.steps import RunningCounts, in_words
from runtime.console import clip, say
from runtime.plan import Plan
from runtime.provenance import note_plan
from train.plan import known
from train.updates import check_warmup

SAMPLES = 8  # completions of a logged step that are kept


@dataclass
class RolloutConfig(RewardConfig, PromptConfig, TrainingConfig):
    """The common options of PPO and GRPO."""

    ONE_OF: ClassVar[tuple] = ("reward", "reward_model")
    VALUES: ClassVar[bool] = False  # whether a value head trains, too

    RENAMED: ClassVar[dict] = {"group_size": "samples_per_prompt", "rollout_batch_size": "sampling_batch_size"}
    prompts: str = option(ARITHMETIC, "prompts; their checks give the gold score", reads=True)
    reward_model: str | None = option(None, "folder of a reward model in place of the checks", reads=True)
    steps: int = option(30, "rollouts; each is followed by inner_epochs * minibatches updates", at_least=1)
    prompts_per_step: int = option(8, "prompts per rollout, over all processes", at_least=1)
    samples_per_prompt: int = option(4, "completions per prompt; the prompt is computed once for all", at_least=1)
    max_new_tokens: int = option(48, "longest completion, in tokens", at_least=1)
    temperature: float = option(1.0, "of sampling and of the log-probs", above=0)
    inner_epochs: int = option(1, "passes over each rollout", at_least=1)
    minibatches: int = option(1, "updates per pass", at_least=1)
    micro_batch_size: int = option(16, "completions in one forward and backward pass", at_least=1)
    sampling_batch_size: int = option(64, "completions sampled at once", at_least=1)

    def check(self):
        super().check()
        TrainingConfig.check(self)
        if self.reward and self.reward_model:
            raise UserError("reward and reward_model both score the completions: give one of them")
        if self.minibatches > self.prompts_per_step:
            raise UserError(
                f"minibatches = {self.minibatches}: at most prompts_per_step = {self.prompts_per_step}, or one would "
                "train on nothing"
            )
        check_warmup(self.warmup_steps, self.steps * self.inner_epochs * self.minibatches)

    def plan(self, data: Any = None) -> Plan:
        """The `Plan` of this run. data: the token ids of its prompts; None: read them."""
        notes: list[str] = []
        if data is None:
            bound = "prompts count as long as completions"
            data = known(lambda: training_prompts(self), notes, bound)
        return plan_rollouts(self, data, notes, self.VALUES)


def training_prompts(config):
    """The token ids of the training prompts of a configuration."""
    tokenizer = load_tokenizer(config.model_name, config.chat_template_kwargs)
    rows, _ = prompts_and_hash(config.prompts, "train", False, config.prompt_column)
    return [prompt_ids(tokenizer, row["prompt"]) for row in rows]


def inference_command(config, method):
    """The command that asks the model of a run of `method`, "ppo" or "grpo", what the run asked.

    A run with a reward model is for ppo_inference.py, which shows its scores. Default values are left out.
    """
    method = "ppo" if config.reward_model else method
    defaults = {f.name: f.default for f in fields(config)} | {"out": f"models/{method}"}
    names = {"out": "model_name"} | {key: key for key in ("prompts", "prompt_column", "reward", "reward_weights")}
    words = [
        (f"--{name}", getattr(config, key)) for key, name in names.items() if getattr(config, key) != defaults[key]
    ]
    options = "".join(f" {name} {shlex.quote(value)}" for name, value in words)
    return f"python inference/{method}_inference.py{options}"


@dataclass
class Batch:
    """N completions of one forward pass; L is the number of tokens of the longest one. Per-token tensors are (N, L).

    Completions of one prompt share a row of `packed`, so the prompt is computed once.
    """

    packed: Packed
    rows: list[int]  # (N,) the row of each completion in the rollout
    sampler_logprobs: torch.Tensor | None = None  # (N, L) of the sampler, or of a file of groups
    old_logprobs: torch.Tensor | None = None  # (N, L) of the policy before the updates; None: those of the current one
    ref_logprobs: torch.Tensor | None = None  # (N, L) of the reference
    advantages: torch.Tensor | None = None  # (N,) in GRPO, (N, L) in PPO
    scores: torch.Tensor | None = None  # (N,) of the reward model, in PPO
    rewards: torch.Tensor | None = None  # (N, L), with the KL, in PPO
    values: torch.Tensor | None = None  # (N, L) of the value head before the updates, in PPO
    returns: torch.Tensor | None = None  # (N, L) in PPO

    @property
    def mask(self):
        """(N, L): 1 on the tokens of the completions."""
        return self.packed.mask


@dataclass
class Minibatch:
    """The data of one optimizer step: the batches of this process, whose losses are summed, and counts.

    tokens, sequences: their numbers over all processes; a mean over the step divides by them. Completions with gradient
    0 are in no batch, but they are counted.
    """

    batches: list[Batch]
    tokens: float
    sequences: float


def all_batches(minibatches):
    """The batches of all minibatches, in order."""
    return [batch for minibatch in minibatches for batch in minibatch.batches]


OTHER = ("group_sizes", "places", "by_function", "left_out")  # fields of a rollout without an entry per row


@dataclass
class Rollout:
    """The completions of one step. Entry i of each list belongs to row i; group_sizes and places are per group.

    The rows of a group (the completions of one prompt) are consecutive.
    """

    prompts: list[list[int]]
    completions: list[list[int]]
    logprobs: list[list[float]] | None  # the sampler's, in nats, of each sampled id
    finish_reasons: list[str]  # "stop": the policy sampled a stop token; "length": cut at max_new_tokens
    texts: list[str]
    questions: list[str]
    group_sizes: list[int]  # rows of each prompt
    places: list[int]  # of each group among those of the step, over all processes
    checks: list[list[dict]] | None = None
    asked: list | None = None  # the prompt of each row as the file has it: a text, or messages
    columns: list[dict] | None = None  # the other columns of its row in the file, for a reward function
    rewards: list[float | None] | None = None  # what training maximises; None: to be left out
    gold: list[float] | None = None  # the share of checks passed; None if the prompts have no checks
    by_function: dict = field(default_factory=dict)  # {reward function: its values}, if several; also of rows left out
    left_out: dict = field(default_factory=dict)  # {why: number of rows that have no reward}

    def without_left_out(self):
        """The rollout without the rows whose reward is None. Its groups stay, with fewer rows or none."""
        kept = [i for i, reward in enumerate(self.rewards) if reward is not None]
        if len(kept) == len(self.rewards):
            return self
        sizes = [sum(reward is not None for reward in group) for group in self.grouped(self.rewards)]
        rows = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in OTHER}
        rows = {name: [values[i] for i in kept] for name, values in rows.items() if values is not None}
        return replace(self, **rows, group_sizes=sizes)

    def penalise_cut(self, penalty):
        """Subtract `penalty` from the rewards of the completions that were cut at max_new_tokens."""
        if penalty:
            pairs = zip(self.rewards, self.finish_reasons)
            self.rewards = [reward - penalty * (finish == "length") for reward, finish in pairs]

    @property
    def where(self):
        """A text that names the prompts, for messages."""
        return in_words(self.questions)

    def grouped(self, values):
        """Split a list with one value per row into a list of groups."""
        found, start = [], 0
        for size in self.group_sizes:
            found.append(values[start : start + size])
            start += size
        return found

    def split_groups(self, parts):
        """The rows of all groups in `parts` lists. The place of a group in the step decides its list.

        So the lists of all processes together are the same for any number of processes.
        """
        found = [[] for _ in range(parts)]
        for place, group in zip(self.places, self.grouped(range(len(self.prompts)))):
            found[place % parts] += group
        return found

    def map_groups(self, function, processes):
        """Apply `function` to the groups of the step, over all processes. Returns this process's part as one tensor.

        function: takes a list with the rewards (G,) of each group, and returns a list with one tensor (G,) per group.
        Groups of which fewer than two completions were kept have nothing to be compared with: they get zeros.
        """
        mine = [torch.tensor(group, dtype=torch.float64) for group in self.grouped(self.rewards)]  # 1e8 + 1 is no 1e8
        everywhere = processes.gather(mine)
        found = iter(function([group for groups in everywhere for group in groups if len(group) > 1]))
        results = [
            [next(found) if len(group) > 1 else torch.zeros_like(group) for group in part] for part in everywhere
        ]
        return torch.cat(results[processes.rank]).float()

    def batches(self, rows, size, pad_id, device):
        """These rows as `Batch`es of at most `size` completions. A batch computes each of its prompts once.

        Groups of similar length share a batch, so that it has little padding.
        """
        found = []
        for piece in self.micro_batches(rows, size):
            batch = Batch(self.pack(piece, pad_id, device), piece)
            if self.logprobs:
                batch.sampler_logprobs = batch.packed.align([self.logprobs[i] for i in piece])
            found.append(batch)
        return found

    def micro_batches(self, rows, size):
        """The rows of each batch. A group larger than `size` is cut into pieces, and each piece computes its prompt."""
        chosen = set(rows)
        groups = [[i for i in group if i in chosen] for group in self.grouped(range(len(self.prompts)))]
        groups = [group for group in groups if group]
        groups.sort(key=lambda g: len(self.prompts[g[0]]) + sum(len(self.completions[i]) for i in g))
        pieces = []
        for part in (group[i : i + size] for group in groups for i in range(0, len(group), size)):
            if pieces and len(pieces[-1]) + len(part) <= size:
                pieces[-1] += part
            else:
                pieces.append(part)
        return pieces

    def pack(self, rows, pad_id, device):
        """These rows as one `Packed`; see rlhf/packing.py."""
        return pack([self.prompts[i] for i in rows], [self.completions[i] for i in rows], pad_id, device)

    def count(self, rows, batches, processes, device):
        """(tokens, sequences, computed tokens) over all processes.

        tokens: of the completions of these rows. computed tokens: of `batches`, each prompt once.
        """
        tokens, computed = sum(len(self.completions[i]) for i in rows), sum(batch.packed.tokens for batch in batches)
        mine = torch.tensor([tokens, len(rows), computed], dtype=torch.float32, device=device)
        return processes.sum(mine).tolist()

    def measure(self, meter):
        """Add means over completions to the meter: reward, gold score, length in tokens, share cut at the limit.

        The prompts are the independent samples: their means give the standard errors of reward and gold score.
        """
        for i, completion in enumerate(self.completions):
            cut = self.finish_reasons[i] == "length"
            meter.mean(reward=self.rewards[i], mean_length=len(completion), clipped_ratio=cut)
            if self.gold:
                meter.mean(gold=self.gold[i])
        for name, values in self.by_function.items():
            for value in values:
                if value is not None:
                    meter.mean(**{f"rewards/{name}/mean": value})
        for name, scores in (("reward", self.rewards), ("gold", self.gold)):
            for group in filter(None, self.grouped(scores or [])):
                meter.sample(**{name: fmean(group)})

    def samples(self):
        """The first completions of this process with their rewards, for `Run.log`."""
        keys = ("prompt", "completion", "reward") + (("gold",) if self.gold else ())
        rows = zip(self.questions, self.texts, self.rewards, *([self.gold] if self.gold else []))
        return [dict(zip(keys, row)) for row in itertools.islice(rows, SAMPLES)]

    def show(self):
        """Print the first prompt and completion of this process."""
        if not self.texts:
            return
        reward = f"  (reward {self.rewards[0]:.2f})"
        say(f"        {clip(self.questions[0], 72)}\n        -> {clip(self.texts[0], 69 - len(reward))}{reward}")


class PromptStream:
    """The prompts of the training split. Their order depends on (seed, step) only; each comes once per epoch.

    The prompts of a step are divided among the processes: see `my_places`.
    """

    def __init__(
        self, path, tokenizer, prompts_per_step, seed, processes, need_checks=True, minibatches=1, column="prompt"
    ):
        self.rows, self.sha256 = prompts_and_hash(path, "train", need_checks, column)
        if len(self.rows) < prompts_per_step:
            raise UserError(f"prompts_per_step = {prompts_per_step}: {path} has only {len(self.rows)} training prompts")
        check_prompts_per_step(prompts_per_step, processes)
        self.ids = [prompt_ids(tokenizer, row["prompt"]) for row in self.rows]
        self.count, self.seed, self.processes, self.minibatches = prompts_per_step, seed, processes, minibatches

    def at(self, step):
        """This process's (place in the step, row, ids) for step `step`, counted from 1."""
        chosen = step_indices(len(self.rows), self.count, step, self.seed)
        mine = my_places(self.count, self.minibatches, self.processes)
        return [(place, self.rows[chosen[place]], self.ids[chosen[place]]) for place in mine]


def check_prompts_per_step(count, processes):
    """Raise UserError if a step has fewer prompts than there are processes: some would have nothing to do."""
    n = processes.world_size
    if count < n:
        raise UserError(f"prompts_per_step = {count}: must be at least {n}, one for each process")


def my_places(count, minibatches, processes):
    """The places (prompts) of this process among the `count` places of a step: an equal share of each minibatch.

    They are sorted. Minibatch m has the places m, m + minibatches, ...: see `Rollout.split_groups`.
    """
    by_minibatch = [place for m in range(minibatches) for place in range(m, count, minibatches)]
    return sorted(processes.share(by_minibatch))


def check_room(stream, model, max_new_tokens):
    """Raise UserError if a prompt leaves no room for a completion in the model's context. Call it before training."""
    context = context_length(model)
    if context is None:
        return
    for row, ids in zip(stream.rows, stream.ids):
        if len(ids) + max_new_tokens > context:
            name = row.get("id") or text_of(row["prompt"])[:40]
            raise UserError(
                f"prompt {name!r} has {len(ids)} tokens: with max_new_tokens = {max_new_tokens} it does not fit into "
                f"the model's context of {context}"
            )


class SampledRollouts:
    """Rollouts that the policy samples: `samples` completions of each prompt of a step.

    score: a `Scorer`; None if the rewards are set later. left_out: the numbers of completions that have no reward and
    were left out, since the last line of the log.
    """

    def __init__(self, config, stage, policy, samples, score=None, need_checks=True):
        self.config, self.stage, self.samples, self.score = config, stage, samples, score
        self.tokenizer = policy.tokenizer
        self.stream = PromptStream(
            config.prompts, policy.tokenizer, config.prompts_per_step, config.seed, stage.processes, need_checks,
            config.minibatches, config.prompt_column,
        )  # fmt: skip
        if score:
            score.check_columns(self.stream.rows)
        self.left_out = RunningCounts(stage.processes)
        check_room(self.stream, policy.model, config.max_new_tokens)
        self.sampler = Sampler(policy.model, config, stage.precision)
        self.inputs = {config.prompts: self.stream.sha256}
        note_plan(lambda: config.plan(self.stream.ids))

    def at(self, step):
        """This process's part of the rollout of `step`. It depends on (seed, step) and the policy's weights only."""
        with self.stage.autocast():
            share = self.stream.at(step)
            generation = self.sampler.sample(self.tokenizer, self.stream, step, self.config, self.samples)
            rows = [row for _, row, _ in share for _ in range(self.samples)]
            rollout = Rollout(
                prompts=[ids for _, _, ids in share for _ in range(self.samples)],
                completions=generation.completions,
                logprobs=generation.logprobs,
                finish_reasons=generation.finish_reasons,
                texts=[completion_text(self.tokenizer, ids) for ids in generation.completions],
                questions=[text_of(row["prompt"]) for row in rows],
                asked=[row["prompt"] for row in rows],
                columns=[columns_of(row) for row in rows],
                group_sizes=[self.samples] * len(share),
                places=[place for place, _, _ in share],
                checks=[row["checks"] for row in rows] if all(row.get("checks") for row in rows) else None,
            )
            rollout.gold = gold_scores(rollout)
            if self.score:
                rollout.rewards = self.score(rollout)
                left_out, rollout = rollout.left_out, rollout.without_left_out()
                if not sum(self.stage.processes.gather(len(rollout.texts))):
                    self.stage.run.finite(step, "all completions: no reward function applies", reward=math.nan)
                self.left_out.sum(**left_out)  # not of a step that ends the run: it is made again
        return rollout


def plan_stored(config: Any, groups: list[dict] | None) -> Plan:
    """The `Plan` of a run on stored groups. groups: None: read them."""
    notes: list[str] = []
    if groups is None:
        options = config.chat_template_kwargs
        tokenizer = known(lambda: load_tokenizer(config.model_name, options), notes, "no lengths are known")
        bound = f"groups count as 8 completions that fill max_length = {config.max_length}"
        groups = tokenizer and known(lambda: load_groups(config.groups, tokenizer, config.max_length)[0], notes, bound)
    return plan_groups(config, groups, notes)


class StoredRollouts:
    """Rollouts from a file of groups; each group comes once per epoch.

    `stored`: whether the groups have the log-probs of the policy that sampled them.
    """

    def __init__(self, config, stage, policy):
        check_length(policy.model, config)
        groups, sha256 = load_groups(config.groups, policy.tokenizer, config.max_length)
        check_prompts_per_step(config.prompts_per_step, stage.processes)
        if len(groups) < config.prompts_per_step:
            raise UserError(
                f"prompts_per_step = {config.prompts_per_step}: {config.groups} has only {len(groups)} groups"
            )
        odd = next((g for g in groups if g["temperature"] != config.temperature), None)
        if odd:
            raise UserError(
                f"{odd['where']} was sampled at temperature {odd['temperature']}: set temperature to that, or the "
                "stored log-probs do not compare with the policy's"
            )
        self.config, self.stage, self.groups = config, stage, groups
        self.left_out = RunningCounts(stage.processes)  # nothing: all stored groups have scores
        self.stops = stop_ids(policy.tokenizer)
        self.stored = all(g["logprobs"] for g in groups)
        self.inputs = {config.groups: sha256}
        note_plan(lambda: config.plan(groups))
        what = "ratios to the stored log-probs"
        if not self.stored:
            what = "no stored log-probs: this is advantage-weighted fine-tuning"
        say(f"{len(groups)} groups, {sum(len(g['completions']) for g in groups)} completions; {what}")

    def _finish_reasons(self, group):
        """Those that the file says; else "stop" for a completion whose last id is a stop token."""
        ends = ["stop" if c[-1] in self.stops else "length" for c in group["completions"]]
        return group["finish_reasons"] or ends

    def at(self, step):
        """This process's part of the groups of `step`, with the stored scores as rewards."""
        config = self.config
        chosen = step_indices(len(self.groups), config.prompts_per_step, step, config.seed)
        places = my_places(config.prompts_per_step, config.minibatches, self.stage.processes)
        mine = [self.groups[chosen[place]] for place in places]
        return Rollout(
            prompts=[g["prompt"] for g in mine for _ in g["completions"]],
            completions=[c for g in mine for c in g["completions"]],
            logprobs=[x for g in mine for x in g["logprobs"]] if self.stored else None,
            finish_reasons=[reason for g in mine for reason in self._finish_reasons(g)],
            texts=[t for g in mine for t in g["text"]["completions"]],
            questions=[g["text"]["prompt"] for g in mine for _ in g["completions"]],
            group_sizes=[len(g["completions"]) for g in mine],
            places=places,
            rewards=[s for g in mine for s in g["scores"]],
        )
