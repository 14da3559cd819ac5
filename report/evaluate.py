"""Measure one checkpoint on the held-out prompts: its scores, its distance from the base, and their intervals.

    python report/evaluate.py --model_name models/dpo
    python report/evaluate.py --model_name smollm2-135m --best_of 4     # the best of 4 completions by the reward model
    python report/evaluate.py --prompts my.jsonl --reward my_reward:reward    # reward functions in place of the checks
    python report/evaluate.py --suite task,bias,toxicity,refusals,text      # beside the task: report/suite.py

It samples completions and scores them with the checks, or with reward functions (gold), and with the reward model
(proxy). It estimates the KL to the base from the sampler's log-probs and one forward pass of the base over the same
tokens. It also reads held-out text. It writes report/runs/NAME.json with all completions. If an equal measurement is
already there, it is read instead.

Intervals are 95 % Student intervals over the mean scores of the prompts: prompts are independent, completions of one
prompt are not. Left out: the spread over training seeds; report/compare.py adds it if there are several runs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from configs.config import ROOT, UserError, config_to_dict, names_with, option, options, shown
from data.blocks import make_blocks
from data.checks import asked_checks, passed, score
from data.corpus import load_corpus
from data.order import epoch_order
from data.prompts import ARITHMETIC, PromptConfig, prompts_and_hash
from data.rewards import RewardConfig, columns_of, in_numbers, reward_functions
from data.rows import text_of
from models.admission import known_as
from models.completions import progress_line
from models.device import cast_weights, frozen_dtype, pick_device, pick_precision
from models.fast.head import check_head
from models.generation import generate
from models.loader import (
    QUANTISATION,
    adapter_base,
    context_length,
    load_model,
    load_tokenizer,
    resolve_model,
    same_tokens,
    weights_hash,
)
from models.options import ModelOptions, QuantisationOptions, check_quantisation, quantisation
from models.resumable import acquire_output, discard, generate_resumable, partial_path
from models.tokens import completion_text, never_sampled, prompt_ids, stop_ids
from report.intervals import keep_best, number_or_dash, plus_minus, summarise
from report.suite import KEYS, TASK, measure_suite, read_suite, show_suite
from rlhf.reward_model import RewardModel
from rlhf.utils import completion_logprobs, kl_estimate, score_completions
from runtime.cli import cli
from runtime.console import fold, quiet_libraries, say
from runtime.files import in_root, read_json, sha256_file, write_atomically
from runtime.provenance import JUDGES, code_read, provenance, sha256_files
from runtime.run_folder import check_place
from train.common import evaluate_lm

BLOCKS_AT_ONCE = 8
FORM = 2  # of a measurement: one of an earlier form is measured again


@dataclass
class Measure(RewardConfig, PromptConfig, ModelOptions):
    """The options of a measurement. They are the same for all models that are compared."""

    RENAMED: ClassVar[dict] = {"batch_size": "sampling_batch_size"}
    base: str = option("smollm2-135m", "the model that the KL is taken to: where training started", reads=True)
    reward_model: str | None = option(
        "models/reward", "folder of the reward model, the proxy; left out if not there", reads=True
    )
    prompts: str = option(ARITHMETIC, "prompts; completions of one part of them are measured", reads=True)
    split: Literal["heldout", "validation"] = option("heldout", "which part: choose settings by validation")
    limit: int | None = option(None, "take only the first so many of these prompts", at_least=2)
    samples_per_prompt: int = option(2, "completions measured for each prompt", at_least=1)
    max_new_tokens: int = option(48, "longest completion, in tokens", at_least=1)
    temperature: float = option(
        1.0, "of the sampling and of the log-probs; a greedy completion is measured apart", above=0
    )
    sampling_batch_size: int = option(240, "completions sampled at once", at_least=1, identity=False)
    text: str = option("shakespeare", "corpus whose held-out part is read for the perplexity", reads=True)
    text_tokens: int = option(4096, "tokens of it that are read, about", at_least=16)
    text_length: int = option(256, "tokens that are read in one piece", at_least=8)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "of the weights of all models")
    seed: int = option(0, "of the sampling", at_least=0)
    suite: str = option("task", "what is measured: task, bias, toxicity, refusals, text, with commas", identity=False)
    suite_limit: int | None = option(
        None, "take only the first so many rows of each set beside the task", at_least=2, identity=False
    )
    overwrite: bool = option(False, "measure again what was measured already", identity=False)

    def check(self):
        super().check()
        read_suite(self.suite)


@dataclass
class Config(Measure, QuantisationOptions):
    CONFIG: ClassVar[str] = "configs/evaluate.yaml"
    model_name: str = option(
        "smollm2-135m",
        "what is measured: an embedded name, a folder with a model or an adapter",
        reads=True,
        identity=False,  # it counts by its weights
    )
    best_of: int = option(1, "keep of so many completions the one that the reward model scores highest", at_least=1)
    out: str | None = option(None, "the file to write; default report/runs/NAME.json", identity=False)

    def check(self):
        super().check()
        check_quantisation(self)
        if self.best_of > 1 and self.suite != TASK:
            raise UserError(f"suite = {self.suite!r}: best_of = {self.best_of} is measured on the task alone")


def files_hash(name):
    """A hash of the weight files of a model; for an adapter also of its base; for a hub model, of its weights."""
    path = resolve_model(name)
    if not isinstance(path, Path):
        return weights_hash(load_model(name, dtype=torch.float32))
    digest = hashlib.sha256()
    if (path / "adapter_config.json").is_file():
        digest.update(files_hash(adapter_base(path)).encode())
        files = [path / "adapter_model.safetensors"]
        files += [path / QUANTISATION] if (path / QUANTISATION).is_file() else []
    else:
        files = sorted(path.glob("*.safetensors"))
    for file in files:
        if not file.is_file():
            raise UserError(f"{shown(path)} has no weights: {file.name} is missing")
        digest.update(sha256_file(file).encode())
    return digest.hexdigest()[:16]


def measurement_path(config):
    """The path of the measurement: `out`, or report/runs/NAME.json; NAME of models/smoke/dpo is smoke-dpo."""
    if config.out:
        return in_root(config.out)
    name = shown(in_root(config.model_name)) if in_root(config.model_name).is_dir() else config.model_name
    name = name.strip("/").removeprefix("models/").replace("/", "-")
    return ROOT / "report" / "runs" / f"{name}{f'-best{config.best_of}' if config.best_of > 1 else ''}.json"


def read_measurement(path):
    """The measurement in a file. Raises UserError if the file is something else, so that it is not replaced."""
    found = read_json(path)
    if not {"identity", "measured", "answers"} <= found.keys() and not found.keys() & set(KEYS):
        raise UserError(f"{shown(path)} is there and no measurement: give another --out, or --overwrite true")
    return found


def identity(config):
    """Everything that decides the measured numbers: settings, and hashes of weights, prompts and the checks' code.

    Raises UserError if the prompts, or a reward model that best_of needs, are not there.
    """
    free = names_with(config, identity=False)
    settings = {k: v for k, v in config_to_dict(config).items() if k not in free}
    settings["precision"] = pick_precision(config.precision, pick_device())
    how = quantisation(config, frozen_dtype(settings["precision"]))
    if how is None:
        settings = {k: v for k, v in settings.items() if k not in options(QuantisationOptions)}
    reward = config.reward_model and in_root(config.reward_model)
    there = bool(reward) and reward.is_dir()
    _, prompts = prompts_and_hash(config.prompts, None, column=config.prompt_column)
    if config.best_of > 1 and not there:
        raise UserError(
            f"best_of = {config.best_of} needs a reward model, and reward_model = {config.reward_model!r} is not "
            "there. This makes it: python rlhf/train_reward_model.py"
        )
    hashes = {
        "model": files_hash(config.model_name) + (f" in {how.words}" if how else ""),
        "base": files_hash(config.base),
        "reward_model": files_hash(config.reward_model) if there else None,
        "prompts": prompts[:16],
        "checks": sha256_files([ROOT / "data" / name for name in JUDGES], ROOT)[:16],
        **code_read(config),
    }
    return {"config": settings, "hashes": hashes, "form": FORM}


def evaluate(config):
    """Measure config.model_name by the measures of config.suite. Returns a dict, and writes it to `measurement_path`.

    It has the keys of `measure_task` and KEYS of report/suite.py. A measure that is already there is read instead.
    Raises UserError as `measure_task` and the measures do.
    """
    path = measurement_path(config)
    check_place(path)
    acquire_output(path)
    who = identity(config)
    found = read_measurement(path) if path.is_file() and not config.overwrite else {}
    task = {key: x for key, x in found.items() if key not in KEYS}
    others = {key: found[key] for key in KEYS if key in found and of_model(found[key], who)}
    if task and not of_model(task, who):
        task = {}
    if TASK in read_suite(config.suite):
        if task.get("identity") == who:
            say(f"{shown(path)} holds this very measurement. --overwrite true measures again.")
        else:
            task = measure_task(config, who, path)
            write_atomically(path, json.dumps(task | others, indent=1, ensure_ascii=False) + "\n")
    result = measure_suite(config, who, task | others, path)
    discard(partial_path(path))
    return result


def of_model(found, who):
    """Whether a measurement is one of the weights that are measured now."""
    return found["identity"]["hashes"]["model"] == who["hashes"]["model"]


def measure_task(config, who, path):
    """Measure config.model_name on the prompts. who: its `identity`. path: of the measurement. Returns a dict.

    Keys: model_name, identity, measured (see `summarise`), text (nats_per_token, bits_per_byte), unseen_types, answers
    (the sampled completions), greedy (one greedy completion per prompt), left_out (numbers of sampled completions
    without a gold score), seconds (of sampling, kl, reward_model, rewards, text, total), git_commit, versions, machine.
    Raises UserError for models with different tokenizers, and for everything that the loaders refuse.
    """
    started = time.time()
    quiet_libraries()
    device = pick_device()
    dtype = frozen_dtype(who["config"]["precision"])
    tokenizer = load_tokenizer(config.model_name, config.chat_template_kwargs)
    same_tokens(tokenizer, config.base)
    prompts, unseen = measured_prompts(config)
    reward = reward_functions(config)
    if reward:
        reward.check_columns(prompts)
    template = json.dumps(config.chat_template_kwargs)  # text, because the blocks are cached by it
    blocks = heldout_blocks(config.text, config.text_tokens, config.text_length, config.base, template)
    reward_model = None
    if who["hashes"]["reward_model"]:  # before sampling, so that an error in it is reported at once
        same_tokens(tokenizer, config.reward_model)
        reward_model = RewardModel.load(config.reward_model, dtype=dtype, device=device)
    seconds = {}

    # 1. completions. An adapter is merged in float32 and the sum is cast, as for a model in use
    clock = time.time()
    how = quantisation(config, dtype)
    model = load_model(config.model_name, torch.float32, device, merge_adapter=True, quantisation=how)
    check_head(model, config.model_name)
    model = cast_weights(model, dtype)
    context = context_length(model)
    if context and config.text_length > context:
        raise UserError(f"text_length = {config.text_length}: {config.model_name} reads at most {context} tokens")
    per_prompt = config.samples_per_prompt * config.best_of
    ids = [prompt_ids(tokenizer, row["prompt"]) for row in prompts]
    stops, never = list(stop_ids(tokenizer)), never_sampled(tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    generation, before = generate_resumable(
        partial_path(path),
        who,
        model,
        ids,
        config.max_new_tokens,
        config.temperature,
        per_prompt,
        stops,
        config.seed,
        config.sampling_batch_size,
        progress_line(),
        never,
    )
    questions = [question for question in ids for _ in range(per_prompt)]
    completions = generation.completions
    greedy = None
    if config.best_of == 1:
        settings = {"stop_ids": stops, "batch_size": config.sampling_batch_size, "never": never}
        greedy = generate(model, ids, config.max_new_tokens, temperature=0, progress=progress_line(), **settings)
    seconds["sampling"] = before + time.time() - clock

    # 2. the reward model's scores
    clock = time.time()
    scores = [None] * len(completions)
    if reward_model:
        scores = score_completions(reward_model, questions, completions, tokenizer.pad_token_id)
        del reward_model
    else:
        say(f"reward_model = {config.reward_model!r} is not there: its score is left out")
    seconds["reward_model"] = time.time() - clock

    # 3. held-out text, then the KL: k1 of each completion
    clock = time.time()
    heldout_text = evaluate_lm(model, blocks, BLOCKS_AT_ONCE)
    del model
    seconds["text"] = time.time() - clock
    clock = time.time()
    base_logprobs = generation.logprobs
    if who["hashes"]["model"] != who["hashes"]["base"]:
        rows = (questions, completions, tokenizer.pad_token_id, config.temperature)
        base_logprobs = logprobs_of(config.base, dtype, *rows)
    kls = [None] * len(completions) if config.best_of > 1 else completion_kls(generation.logprobs, base_logprobs)
    seconds["kl"] = time.time() - clock

    # 4. the gold score (None: the reward functions give none), the checks, and the summary
    clock = time.time()
    rows = [row for row in prompts for _ in range(per_prompt)]
    answers, left_out = judged(tokenizer, rows, generation, reward, per_prompt)
    nats = [-math.fsum(logprobs) for logprobs in base_logprobs]
    answers = [{**a, "proxy": x, "kl": kl, "base_nats": y} for a, x, kl, y in zip(answers, scores, kls, nats)]
    firsts = judged(tokenizer, prompts, greedy, reward, 1)[0] if greedy else []
    seconds["rewards"] = time.time() - clock
    if config.best_of > 1:
        answers = keep_best(answers, config.best_of)
    measured = summarise(answers, unseen, config.best_of, firsts)
    seconds["total"] = before + time.time() - started
    where = provenance(seconds["total"])
    return {
        **{key: where[key] for key in ("git_commit", "versions", "machine", "admission")},
        "model_name": config.model_name,
        "identity": who,
        "measured": measured,
        "text": heldout_text,
        "unseen_types": unseen,
        "left_out": left_out,
        "seconds": {key: round(value, 2) for key, value in seconds.items()},
        "answers": answers,
        "greedy": firsts,
    }


def measured_prompts(config):
    """(prompts of config.split, types that no training prompt has). Raises UserError if no prompt has this split.

    All prompts of a file without splits are held out.
    """
    rows, _ = prompts_and_hash(config.prompts, None, config.reward is None, config.prompt_column)
    trained = {name for row in rows if row.get("split") == "train" for name in types_of(row)}
    chosen = [row for row in rows if row.get("split", "heldout") == config.split]
    if not chosen:
        raise UserError(f"{config.prompts} has no prompt with split {config.split!r}")
    unseen = sorted({name for row in chosen for name in types_of(row)} - trained)
    names = [str(row.get("id")) for row in chosen]
    if (
        len(set(names)) < len(names) or "None" in names
    ):  # rows without ids: completions are grouped by the place of their prompt
        chosen = [row | {"id": f"row {i}"} for i, row in enumerate(chosen, 1)]
    return chosen[: config.limit], unseen


def types_of(row):
    """The types by which the report breaks down the scores: the prompt's `family`, else the names of its checks."""
    if not row.get("checks"):
        return []
    return [row["family"]] if "family" in row else [check["name"] for check in asked_checks(row["checks"])]


def judged(tokenizer, rows, generation, reward, per_prompt):
    """(the completions as dicts with their gold scores, numbers of completions without one).

    Entry i of the `Generation` belongs to the prompt rows[i]; per_prompt of them follow each other. "checks" has a list
    [type, passed] for each of `types_of`: with a family, whether all checks are passed.
    """
    texts = [completion_text(tokenizer, ids) for ids in generation.completions]
    by_checks = [
        score(text, row["checks"], row["prompt"]) if row.get("checks") else 0.0 for row, text in zip(rows, texts)
    ]
    golds, left_out = by_checks, {}
    if reward:
        asked, columns = [row["prompt"] for row in rows], [columns_of(row) for row in rows]
        found = reward.in_parts(asked, texts, columns, generation.completions, per_prompt)
        golds, left_out = found.values, found.left_out
        if all(gold is None for gold in golds):
            raise UserError(f"{in_numbers(left_out)} have no reward: there is nothing to measure")
    answers = []
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        good = [by_checks[i] == 1.0]
        if "family" not in row:
            asked = asked_checks(row.get("checks") or [])
            good = [x and by_checks[i] > 0 for x in passed(text, asked, row["prompt"])]
        answers.append(
            {
                "id": row["id"],
                "prompt": text_of(row["prompt"]),
                "text": text,
                "gold": golds[i],
                "tokens": len(generation.completions[i]),
                "finish_reason": generation.finish_reasons[i],
                "checks": [[name, x] for name, x in zip(types_of(row), good)],
            }
        )
    return answers, left_out


def logprobs_of(base, dtype, questions, completions, pad_id, temperature):
    """The log-probs of each token of the completions under the base, in nats: one list per completion."""
    reference = known_as(load_model(base, dtype=dtype, device=pick_device(), merge_adapter=True), "reference")
    return completion_logprobs(reference, questions, completions, pad_id, temperature)


def completion_kls(logprobs, base_logprobs):
    """k1 of each completion, log pi(completion) - log base(completion), in nats: an unbiased estimate of the KL.

    logprobs: the sampler's log-probs, one list per completion; base_logprobs: those of the base.
    """
    pairs = zip(logprobs, base_logprobs)
    return [kl_estimate(torch.tensor(p), torch.tensor(q), "k1").double().sum().item() for p, q in pairs]


@functools.lru_cache(maxsize=2)
def heldout_blocks(text, tokens, length, tokenizer_name, template_options):
    """About `tokens` tokens of the held-out part of a corpus, in blocks of `length`. All models get the same blocks.

    template_options: `chat_template_kwargs` as JSON, for a corpus of messages or prompts.
    """
    path = in_root(text)
    corpus = load_corpus(str(path) if path.exists() else text)
    if not corpus.heldout:
        raise UserError(f"text = {text!r}: no document of it is held out")
    tokenizer = load_tokenizer(tokenizer_name, None if corpus.kind == "text" else json.loads(template_options))
    blocks = make_blocks(corpus.heldout, corpus.kind, tokenizer, length, f"{corpus.name}, held out")
    return blocks.pick(sorted(epoch_order(len(blocks), 0, 0)[: max(1, tokens // length)]))


def show(config, result):
    """Print the measurement of the task."""
    m = result["measured"]
    if any(result["left_out"].values()):
        say(f"\nwithout a gold score: {in_numbers(result['left_out'])}")
    part = {"heldout": "held-out"}.get(config.split, config.split)
    how_many = f"{m['answers']} completions to {m['gold']['n']} {part} prompts"
    say("\n" + fold(f"{config.model_name}: {how_many}; intervals hold 95 %"))
    say(f"  gold score           {plus_minus(m['gold'])}")
    say(f"  greedy               {plus_minus(m['greedy'])}")
    say(f"  unseen types         {plus_minus(m['unseen'])}  ({', '.join(result['unseen_types']) or 'none'})")
    say(f"  reward model         {plus_minus(m['proxy'])}")
    bound = "  (at most: log n - (n - 1) / n)" if config.best_of > 1 else ""
    se = f"  (standard error {m['kl']['se']:.3f})" if m["kl"]["se"] is not None else ""
    per_token = f", {m['kl_per_token']:.4f} a token" if m["kl_per_token"] is not None else ""
    say(f"  KL to the base       {plus_minus(m['kl'])} nats per sequence{per_token}{se}{bound}")
    say(f"  fluency              {m['fluency']:.3f} nats per token of the completions under the base")
    say(
        f"  ended by itself      {m['finish_stop']:.0%} of completions; {m['tokens']:.1f} tokens long; "
        f"{m['looping']:.1%} loop"
    )
    say(f"  distinct-1, -2       {m['distinct_1']:.3f}, {m['distinct_2']:.3f}")
    text = result["text"]
    perplexity = math.exp(text["nats_per_token"])
    say(f"  held-out text        {text['nats_per_token']:.4f} nats per token, perplexity {perplexity:.1f}")
    if m["checks"]:
        say("  share passed, by type (* in no training prompt):")
    rates = [f"{name}{'*' * (name in result['unseen_types'])} {x['mean']:.2f}" for name, x in m["checks"].items()]
    for i in range(0, len(rates), 3):
        say("    " + "".join(rate.ljust(25) for rate in rates[i : i + 3]).rstrip())
    for answer in result["answers"][:: max(1, len(result["answers"]) // 3)][:3]:
        text = " ".join(answer["text"].split())[:300]
        gold = f"(gold {number_or_dash(answer['gold'])})"
        say("\n" + fold(f"  {answer['prompt']}") + "\n" + fold(f"  -> {text}  {gold}", 5 * " "))


def main(config):
    result = evaluate(config)
    if TASK in read_suite(config.suite):
        show(config, result)
        parts = ", ".join(f"{key} {value:.1f} s" for key, value in result["seconds"].items())
        say(f"\n{parts}")
    show_suite(result)
    say(f"\nwritten to {shown(measurement_path(config))}")
    say("next: python report/compare.py")


if __name__ == "__main__":
    cli(main, Config)
