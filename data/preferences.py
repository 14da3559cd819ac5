"""Shared code of the two generators of preference data: prompts, completions with scores, the summary, the file.

The main function of each is:

    claim(config)                                       # check that config.out may be written
    sampled = sample_and_score(config, load_task(config))
    summary = summarise(config, sampled, matches)       # printed, and kept in the manifest
    save(config, rows, sampled, summary, started, ...)  # config.out, and config.out's .manifest.json
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from configs.config import UserError, config_to_dict, names_with, option, shown
from data.checks import is_degenerate, passed, score
from data.prompts import ARITHMETIC, TASKS, PromptConfig, load_prompts, prompts_and_hash
from data.rewards import RewardConfig, RewardFunctions, columns_of, in_numbers, reward_functions
from data.rows import plain, text_of
from models.completions import Completion, as_completions, mean, progress_line, rate
from models.device import cast_weights, frozen_dtype, pick_device, pick_precision
from models.loader import load_model, load_tokenizer, weights_hash
from models.options import ModelOptions
from models.resumable import acquire_output, discard, generate_resumable, partial_path
from models.tokens import never_sampled, prompt_ids, stop_ids
from runtime.console import duration, fold, quiet_libraries, say
from runtime.files import as_lines, in_root, read_json, sha256_file, write_atomically
from runtime.provenance import files_read, provenance
from runtime.run_folder import check_place


@dataclass
class SamplingConfig(RewardConfig, PromptConfig, ModelOptions):
    RENAMED: ClassVar[dict] = {"batch_size": "sampling_batch_size"}
    model_name: str = option(
        "smollm2-135m", "the model that samples: an embedded name, a folder, or a hub id", reads=True
    )
    prompts: str = option(
        ARITHMETIC, "prompts (.json, .jsonl, .csv, .txt, ...); of a .json those of training", reads=True
    )
    limit: int | None = option(None, "take only the first so many training prompts", at_least=1)
    samples_per_prompt: int = option(4, "completions sampled for each prompt", at_least=2)
    max_new_tokens: int = option(48, "longest completion, in tokens", at_least=1)
    temperature: float = option(1.0, "of the sampling; training on the samples wants 1", above=0)
    sampling_batch_size: int = option(128, "completions sampled at once", at_least=1, identity=False)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "of the weights while sampling")
    seed: int = option(0, "of the sampling", at_least=0)
    out: str = option("data/preferences.jsonl", "the file to write, one JSON object per line", identity=False)
    overwrite: bool = option(False, "replace a file that another configuration made", identity=False)

    def check(self) -> None:
        super().check()
        if not self.out.endswith(".jsonl"):
            raise UserError(f"out = {self.out!r}: must be a file name that ends in .jsonl")
        if in_root(self.out).resolve() == in_root(self.prompts).resolve():
            raise UserError(f"out = {self.out!r} is the file of the prompts: give another one")
        if self.sampling_batch_size < self.samples_per_prompt:
            raise UserError(
                f"sampling_batch_size = {self.sampling_batch_size}: must be at least samples_per_prompt = "
                f"{self.samples_per_prompt}, because the samples of a prompt run together"
            )


@dataclass
class Task:
    prompts: list[dict]  # with "prompt", and with "checks" where there is no reward function
    reward: RewardFunctions | None  # None: the checks decide
    sha256: str  # of the prompts


@dataclass
class Sampled:
    task: Task
    answers: list[list[Completion]]  # one list for each prompt, without those that have no score
    policy: str  # hash of the float32 weights of the sampling model
    seconds_before: float = 0.0  # seconds of sampling before an interruption
    left_out: dict[str, int] = field(default_factory=dict)  # {why: completions without a score}

    def __iter__(self):
        """(prompt, its completions), in file order."""
        return iter(zip(self.task.prompts, self.answers))


def manifest_path(out: str | Path) -> Path:
    """data/preferences.jsonl -> data/preferences.manifest.json"""
    return in_root(out).with_suffix(".manifest.json")


def claim(config: SamplingConfig) -> None:
    """Check that config.out may be written. If it already holds the result of this run, exit with status 0.

    Raises UserError if something else made the file, or if its folder cannot be written to.
    """
    out, manifest = in_root(config.out), manifest_path(config.out)
    check_place(out)
    acquire_output(out)
    if out.is_file() and not config.overwrite:
        advice = "Give another --out, or --overwrite true to replace it"
        torn = partial_path(out).stat().st_size  # an earlier run was killed between the file and its manifest
        if not manifest.is_file():
            if torn:
                return
            raise UserError(f"{shown(out)} is there, and no {manifest.name} beside it says what made it. {advice}")
        before = read_json(manifest)
        if before.get("sha256") != sha256_file(out):
            if torn:
                return
            raise UserError(f"{shown(out)} was changed since {manifest.name} was written. {advice}")
        differences = _differences(before, config)
        if differences:
            raise UserError(
                f"{shown(out)} was made with another configuration:\n  " + "\n  ".join(differences) + f"\n{advice}"
            )
        say(f"{shown(out)} is there already, made by this very configuration. --overwrite true makes it again.")
        discard(partial_path(out))
        sys.exit(0)


def _differences(before, config):
    then, now, free = before["config"], config_to_dict(config), names_with(config, identity=False)
    found = [
        f"{key}: {then.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and key not in free
    ]
    files, old = files_read(config), before.get("files", {})
    changed = [key for key in sorted(files) if files[key] != old.get(key, files[key])]
    return found or [f"{vars(config).get(key, 'data/checks.py')}: its content has changed since" for key in changed]


def load_task(config: SamplingConfig) -> Task:
    """The `Task`: the training prompts and the reward functions.

    Raises UserError, naming the prompt, if a training prompt is also held out: models are measured on held-out prompts.
    """
    reward = reward_functions(config)
    prompts, digest = prompts_and_hash(config.prompts, "train", reward is None, config.prompt_column)
    if reward:
        reward.check_columns(prompts)
    if config.limit is not None and config.limit > len(prompts):
        raise UserError(f"limit = {config.limit}: {config.prompts} has only {len(prompts)} training prompts")
    prompts = prompts[: config.limit]
    heldout = {plain(row["prompt"]): (row["id"], file) for file in TASKS for row in load_prompts(file, "heldout")}
    for row in prompts:
        if plain(row["prompt"]) in heldout:
            name, file = heldout[plain(row["prompt"])]
            raise UserError(
                f"{config.prompts}: the prompt {text_of(row['prompt'])!r} is the held-out prompt {name!r} of {file}, "
                "on which models are measured; take it out"
            )
    return Task(prompts, reward, digest)


def sample_and_score(config: SamplingConfig, task: Task) -> Sampled:
    """Sample config.samples_per_prompt completions per prompt and score them. Prints progress. Returns a `Sampled`."""
    quiet_libraries()
    prompts, reward = task.prompts, task.reward
    device = pick_device()
    precision = pick_precision(config.precision, device)
    tokenizer = load_tokenizer(config.model_name, config.chat_template_kwargs)
    model = load_model(config.model_name, dtype=torch.float32, device=device)
    policy = weights_hash(model)  # before the cast: a trainer that loads float32 weights computes the same hash
    model = cast_weights(model, frozen_dtype(precision))
    many = len(prompts) * config.samples_per_prompt
    words = (
        f"{config.model_name} ({precision}, {device}): {config.samples_per_prompt} completions to each of "
        f"{len(prompts)} prompts, {many:,} in all, of at most {config.max_new_tokens} tokens, temperature "
        f"{config.temperature:g}"
    )
    say(fold(words))
    started = time.time()
    generation, before = generate_resumable(
        partial_path(in_root(config.out)),
        {"policy": policy, "precision": precision, "device": device.type},
        model,
        [prompt_ids(tokenizer, row["prompt"]) for row in prompts],
        config.max_new_tokens,
        config.temperature,
        config.samples_per_prompt,
        list(stop_ids(tokenizer)),
        config.seed,
        config.sampling_batch_size,
        progress_line(),
        never_sampled(tokenizer),
    )
    answers = as_completions(tokenizer, generation, config.samples_per_prompt)
    say(f"sampled {rate(answers, before + time.time() - started)}")
    answers, left_out = score_answers(prompts, answers, reward)
    return Sampled(task, answers, policy, before, left_out)


def score_answers(
    prompts: list[dict], groups: list[list[Completion]], reward: RewardFunctions | None = None
) -> tuple[list[list[Completion]], dict[str, int]]:
    """(the completions of each prompt that have a score, {why a completion has none: how many}).

    The reward functions give the score, else the checks of the prompt's row. groups: the completions of each prompt.
    """
    if reward is None:
        for row, group in zip(prompts, groups):
            for answer in group:
                answer.score = score(answer.text, row["checks"], row["prompt"])
        return groups, {}
    pairs = [(row, answer) for row, group in zip(prompts, groups) for answer in group]
    asked, columns = [row["prompt"] for row, _ in pairs], [columns_of(row) for row, _ in pairs]
    scores = reward.in_parts(asked, [a.text for _, a in pairs], columns, [a.ids for _, a in pairs], len(groups[0]))
    values = iter(scores.values)
    found: list[list[Completion]] = []
    for group in groups:
        found.append([])
        for answer, value in zip(group, values):
            if value is not None:
                answer.score = value
                found[-1].append(answer)
    return found, scores.left_out


def messages(role: str, content: str | list[dict]) -> list[dict]:
    """A text as a list of one message, the form that TRL and others read. A list of messages is returned unchanged."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def summarise(config: SamplingConfig, sampled: Sampled, matches: list[tuple[Completion, Completion]]) -> dict:
    """Print numbers by which a person can judge the data. Returns them as a dict for the manifest.

    matches: (chosen, rejected) completions; the chosen one has the higher score.
    """
    answers = [a for group in sampled.answers for a in group]
    scores = [a.score for a in answers]
    longer = [len(c.ids) - len(r.ids) for c, r in matches]
    longer_wins = sum(d > 0 for d in longer) + 0.5 * sum(d == 0 for d in longer)  # equal lengths count half
    longer_right = longer_wins / len(matches)
    summary: dict[str, Any] = {
        "answers": len(answers),
        "mean_score": mean(scores),
        "ended_by_themselves": mean(a.finish_reason == "stop" for a in answers),
        "degenerate": mean(is_degenerate(a.text) for a in answers),
        "mean_tokens": mean(len(a.ids) for a in answers),
        "chosen_mean_tokens": mean(len(c.ids) for c, _ in matches),
        "rejected_mean_tokens": mean(len(r.ids) for _, r in matches),
        "chosen_ended": mean(c.finish_reason == "stop" for c, _ in matches),
        "rejected_ended": mean(r.finish_reason == "stop" for _, r in matches),
        "longer_wins": longer_right,
        "duplicate_answers": sum(len(group) - len({a.text for a in group}) for group in sampled.answers),
        "duplicate_prompts": len(sampled.answers) - len({plain(row["prompt"]) for row, _ in sampled}),
        **sampled.left_out,
        "heldout_overlap": 0,  # load_task raises UserError for any overlap
        "pass_rate": pass_rates(sampled),
    }
    if any(sampled.left_out.values()):
        say(f"left out, without a score: {in_numbers(sampled.left_out)}")
    say(f"\nscores of all {len(answers):,} completions (mean {summary['mean_score']:.3f}):")
    say(histogram(scores))
    if summary["pass_rate"]:
        say("share of completions that pass each check:")
        rates = [f"{name} {rate:.2f}" for name, rate in summary["pass_rate"].items()]
        for i in range(0, len(rates), 3):
            say("  " + "".join(rate.ljust(26) for rate in rates[i : i + 3]).rstrip())
    difference = summary["chosen_mean_tokens"] - summary["rejected_mean_tokens"]
    rule, right = ("longer", longer_right) if longer_right >= 0.5 else ("shorter", 1 - longer_right)
    lengths = (
        f"length: chosen {summary['chosen_mean_tokens']:.1f} tokens, rejected {summary['rejected_mean_tokens']:.1f} "
        f"({difference:+.1f}). The rule '{rule} wins' alone is right on {right:.0%} of pairs (a coin: 50%)"
    )
    ends = (
        f"ended by themselves within {config.max_new_tokens} tokens: {summary['ended_by_themselves']:.0%} of "
        f"completions, {summary['chosen_ended']:.0%} of chosen, {summary['rejected_ended']:.0%} of rejected; "
        f"looping: {summary['degenerate']:.1%}"
    )
    duplicates = (
        f"duplicates: {summary['duplicate_answers']} completions repeat another to the same prompt, "
        f"{summary['duplicate_prompts']} prompts repeat another; no prompt is a held-out one"
    )
    say("\n".join(map(fold, (lengths, ends, duplicates))))
    return summary


def pass_rates(sampled: Sampled) -> dict[str, float]:
    """{name of a check: share of completions that pass it}. Empty if the prompts have no checks."""
    tried: Counter[str]
    right: Counter[str]
    tried, right = Counter(), Counter()
    for row, group in sampled:
        checks = row.get("checks") or []
        for answer in group:
            for check, good in zip(checks, passed(answer.text, checks, row["prompt"])):
                tried[check["name"]] += 1
                right[check["name"]] += good
    return {name: right[name] / tried[name] for name in sorted(tried)}


def histogram(values: list[float], bins: int = 8, width: int = 40) -> str:
    """A histogram as text: one bar per value if there are at most `bins` values, else `bins` equal intervals."""
    distinct = sorted(set(values))
    if len(distinct) <= bins:
        bars = [(f"{value:g}", values.count(value)) for value in distinct]
    else:
        low, step = distinct[0], (distinct[-1] - distinct[0]) / bins
        place = Counter(min(int((value - low) / step), bins - 1) for value in values)
        bars = [(f"{low + k * step:.3g} to {low + (k + 1) * step:.3g}", place[k]) for k in range(bins)]
    label, most = max(len(name) for name, _ in bars), max(count for _, count in bars)
    return "\n".join(f"  {name:>{label}} | {'#' * round(width * n / most):<{width}} {n:,}" for name, n in bars)


def show_match(prompt: dict, chosen: Completion, rejected: Completion) -> None:
    """Print one prompt with its chosen and its rejected completion."""
    say("\na sample\n" + fold(f"  prompt:   {text_of(prompt['prompt'])!r}", 12 * " "))
    for name, answer in (("chosen:", chosen), ("rejected:", rejected)):
        what = f"(score {answer.score:g}, {len(answer.ids)} tokens, {answer.finish_reason})"
        say(fold(f"  {name:<9} {answer.text!r} {what}", 12 * " "))


def save(
    config: SamplingConfig, rows: list[dict], sampled: Sampled, summary: dict, started: float, next_command: str
) -> None:
    """Write the rows, then the manifest, each atomically. Print where they are and the next command."""
    out = in_root(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, as_lines(rows))
    manifest = {
        "script": Path(sys.argv[0]).name,
        "config": config_to_dict(config),
        "rows": len(rows),
        "sha256": sha256_file(out),
        "summary": summary,
        "inputs": {"prompts": sampled.task.sha256, "policy": sampled.policy},
        "files": files_read(config),
        **provenance(sampled.seconds_before + time.time() - started),
    }
    write_atomically(manifest_path(out), json.dumps(manifest, indent=2) + "\n")
    discard(partial_path(out))
    say(f"\nwritten to {shown(out)} (and {manifest_path(out).name}) in {duration(manifest['seconds'])}")
    say(f"next: {next_command}")


def data_option(config: SamplingConfig, key: str, default: str) -> str:
    """` --KEY FILE` for the next command, or "" if config.out is the default file of the next stage."""
    return "" if config.out == default else f" --{key} {config.out}"
