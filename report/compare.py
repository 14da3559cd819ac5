"""Set the methods side by side: same start, same prompts, same seeds. Writes report/REPORT.md and its figures.

    python report/compare.py
    python report/compare.py --allow_missing true       # whatever runs are there
    python report/compare.py --seeds 0,1,2              # models/dpo, models/dpo-seed1, models/dpo-seed2, ...

Each method is measured by report/evaluate.py (what was measured already is read), its training by the run's own
metrics.jsonl and manifest.json. Every sentence of the report is computed from the numbers beside it.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import yaml

from configs.config import UserError, cli, option
from configs.run import (
    duration,
    git_commit,
    in_root,
    machine,
    read_manifest,
    say,
    sha256_file,
    shown,
    versions,
    write_atomically,
)
from data.corpus import load_corpus
from models.fetch import EMBEDDED_MODELS
from report.evaluate import Config as EvaluateConfig
from report.evaluate import (
    Measure,
    best_of_measured,
    distinct,
    evaluate,
    interval,
    pair_accuracy,
    plus_minus,
    prompt_means,
    summarise,
)
from report.plots import checks_figure, curves_figure, scores_figure

REWARD = "python rlhf/train_reward_model.py"


@dataclass
class Config(Measure):
    CONFIG: ClassVar[str] = "configs/compare.yaml"
    models: str = option("models", "the folder of the runs: sft, dpo, ppo, grpo_offline, grpo")
    best_of: int = option(4, "best-of-n: answers of the base of which the reward model keeps one", at_least=2)
    seeds: str | None = option(None, "training seeds, such as 0,1,2: seed 0 in models/dpo, seed 1 in models/dpo-seed1")
    allow_missing: bool = option(False, "compare the runs that are there")
    runs: str = option("report/runs", "the folder of the measurements")
    out: str = option("report", "the folder that receives REPORT.md and figures/")

    def check(self):
        self.seed_list()

    def seed_list(self):
        words = [word.strip() for word in (self.seeds or "0").split(",")]
        if not all(word.isdigit() for word in words) or len(set(words)) < len(words):
            raise UserError(f"seeds = {self.seeds!r}: must be different whole numbers, such as 0,1,2")
        return [int(word) for word in words]


@dataclass(frozen=True)
class Method:
    """How a method is called, where its run lies, and what makes it."""

    key: str
    label: str
    folder: str | None = None  # below `models`; None: the base itself
    command: str | None = None


METHODS = (
    Method("base", "base"),
    Method("sft", "SFT on chosen", "sft", "python train/train_lm_lora.py --config configs/sft.yaml"),
    Method("best_of", "best of {n}", None, REWARD),
    Method("dpo", "DPO", "dpo", "python rlhf/dpo_train.py"),
    Method("ppo", "PPO", "ppo", "python rlhf/ppo_train.py"),
    Method(
        "grpo_offline", "GRPO offline", "grpo_offline", "python rlhf/grpo_train.py --config configs/grpo_offline.yaml"
    ),
    Method("grpo", "GRPO online", "grpo", "python rlhf/grpo_train.py"),
)


@dataclass
class Row:
    """One method in the report: its measurements (one a seed), the same pooled, and what its training took."""

    key: str
    label: str
    runs: list[dict]
    measured: dict  # see report/evaluate.py, summarise
    seconds: float | None = None  # training, of one run
    seconds_before: float | None = None  # making what it learns from
    memory: float | None = None  # GB
    curves: list[dict] | None = None  # lines of metrics.jsonl
    settings: dict | None = None  # config.yaml

    @property
    def gold(self):
        return self.measured["gold"]

    def answers(self):
        return [answer for run in self.runs for answer in run["answers"]]

    def text(self):
        return statistics.fmean(run["text"]["nats_per_token"] for run in self.runs)


def run_folder(config, method, seed):
    name = method.folder + (f"-seed{seed}" if seed else "")
    return f"{config.models.rstrip('/')}/{name}"


def find_runs(config):
    """The methods that can be compared. Raises UserError, with the commands that make them, for missing runs."""
    reward = bool(config.reward_model) and in_root(config.reward_model).is_dir()
    missing, methods = {}, []
    for method in METHODS:
        lacks = {}
        if method.key == "best_of" and not reward:
            lacks[config.reward_model] = REWARD
        for seed in config.seed_list() if method.folder else ():
            folder = run_folder(config, method, seed)
            if read_manifest(folder) is None:
                edits = f" --seed {seed} --out {folder}" if seed else ""
                lacks[folder] = method.command + edits
        missing |= lacks
        methods += [] if lacks else [method]
    if missing and not config.allow_missing:
        raise UserError(
            "these runs are missing; each is made by the command beside it:\n"
            + "\n".join(f"  {folder}: {command}" for folder, command in missing.items())
            + "\n--allow_missing true compares the others"
        )
    if missing:
        say("left out, for they are not there: " + ", ".join(missing))
    return methods


def measure_all(config, methods):
    """{method key: its measurements, one a seed}; says how far it is and how long the rest will take.

    Best-of-n is chosen from the base's own answers, of which there are therefore a multiple of n.
    """
    shared = {f.name: getattr(config, f.name) for f in fields(Measure)}
    jobs = []
    for method in (method for method in methods if method.key != "best_of"):
        for seed in config.seed_list():
            name = run_folder(config, method, seed) if method.folder else config.base
            suffix = f"-seed{seed}" if seed else ""
            out = f"{config.runs}/{method.key}{suffix}.json"
            edits = {"seed": config.seed + seed, "model_name": name, "out": out}
            if method.key == "base":
                edits["samples_per_prompt"] = config.best_of * math.ceil(config.samples_per_prompt / config.best_of)
            jobs.append((method, EvaluateConfig(**(shared | edits))))
    found, started, work = {}, time.time(), 0.0
    sizes = [job.samples_per_prompt for _, job in jobs]
    for k, (method, job) in enumerate(jobs):
        elapsed = time.time() - started
        left = f" | about {duration(elapsed / work * sum(sizes[k:]))} left" if work else ""
        say(f"measuring {k + 1} of {len(jobs)}: {method.label} ({job.model_name}) | {duration(elapsed)}{left}")
        clock = time.time()
        result = evaluate(job)
        if time.time() - clock > 0.5 * result["seconds"]["total"]:
            work += sizes[k]  # measured now, not read back
        else:
            started += time.time() - clock
        found.setdefault(method.key, []).append(result)
    if any(method.key == "best_of" for method in methods):
        found["best_of"] = [best_of_measured(result, config.best_of) for result in found["base"]]
    return found


def make_rows(config, methods, results):
    """A `Row` for each method, from its measurements and the records of its runs."""
    rows = []
    for method in methods:
        runs = results[method.key]
        measured = runs[0]["measured"]
        if len(runs) > 1:  # the same prompts again: answers of all seeds are clustered by prompt
            best_of = config.best_of if method.key == "best_of" else 1
            measured = summarise([a for run in runs for a in run["answers"]], runs[0]["unseen_types"], best_of)
        row = Row(method.key, method.label.format(n=config.best_of), runs, measured)
        if method.folder:
            folder = run_folder(config, method, config.seed_list()[0])
            manifests = [read_manifest(run_folder(config, method, seed)) for seed in config.seed_list()]
            row.seconds = statistics.fmean(m["seconds"] for m in manifests)
            row.memory = max(m["peak_memory_gb"] for m in manifests)
            row.curves = read_lines(in_root(folder) / "metrics.jsonl")
            row.settings = yaml.safe_load((in_root(folder) / "config.yaml").read_text(encoding="utf-8"))
            start = row.settings.get("model_name")
            if start != config.base:
                raise UserError(f"{folder} started from {start!r}, not from base = {config.base!r}")
            row.seconds_before = seconds_before(manifests[0]["inputs"])
        elif method.key == "best_of":
            row.seconds_before = seconds_before({config.reward_model: ""})
        rows.append(row)
    equal_variety(rows)
    return rows


def equal_variety(rows):
    """Take each method's distinct-2 from as many answers, the first n to each prompt: it falls as texts get more."""
    n = min(len(row.answers()) // row.gold["n"] for row in rows)
    for row in rows:
        texts = {}
        for answer in row.answers():
            texts.setdefault(answer["id"], []).append(answer["text"])
        first = [text for group in texts.values() for text in group[:n]]
        row.measured = row.measured | {"distinct_2": distinct(first, 2)}


def seconds_before(inputs, seen=None):
    """Seconds that it took to make what a run learned from, and what that was made from: each run counted once.

    inputs: the files and folders in a manifest. A method's own time alone would flatter one that needs others first.
    """
    seen = set() if seen is None else seen
    total = 0.0
    for name in inputs:
        path = in_root(name)
        manifest = path / "manifest.json" if path.is_dir() else path.with_suffix(".manifest.json")
        if manifest.is_file() and manifest not in seen:
            seen.add(manifest)
            found = json.loads(manifest.read_text(encoding="utf-8"))
            total += found["seconds"] + seconds_before(found["inputs"], seen)
    return total


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def gain(row, base, value=lambda a: a["gold"]):
    """`interval` of the difference to the base, prompt by prompt: sharper than two intervals, as prompts differ."""
    theirs, mine = prompt_means(base.answers(), value), prompt_means(row.answers(), value)
    return interval([mine[key] - theirs[key] for key in mine if key in theirs])


def sure(difference):
    """1 or -1 where the interval of a difference lies above or below 0, else 0."""
    if difference["half"] is None or abs(difference["mean"]) <= difference["half"]:
        return 0
    return 1 if difference["mean"] > 0 else -1


def overlap(a, b):
    """Whether two 95 % intervals overlap."""
    return abs(a["mean"] - b["mean"]) <= (a["half"] or 0.0) + (b["half"] or 0.0)


def listed(names):
    names = list(names)
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1] if names else "none"


def split_base(rows):
    base = next(row for row in rows if row.key == "base")
    return base, [row for row in rows if row is not base]


def headline(rows):
    """Who is best, and whose interval does and does not overlap with the base's."""
    base, others = split_base(rows)
    if not others:
        return f"Only the base was measured: gold score {plus_minus(base.gold)}."
    best = max(others, key=lambda row: row.gold["mean"])
    times = f", {best.gold['mean'] / base.gold['mean']:.1f} times the base's" if base.gold["mean"] else ""
    if best.gold["mean"] > base.gold["mean"]:
        first = f"{best.label} has the highest gold score, {plus_minus(best.gold)}{times} {plus_minus(base.gold)}."
    else:
        first = f"No method scores above the base, whose gold score is {plus_minus(base.gold)}."
    above = [r.label for r in others if r.gold["mean"] > base.gold["mean"] and not overlap(r.gold, base.gold)]
    below = [r.label for r in others if r.gold["mean"] < base.gold["mean"] and not overlap(r.gold, base.gold)]
    rest = [r.label for r in others if overlap(r.gold, base.gold)]
    parts = [f"95 % intervals above the base's, without overlap: {listed(above)}"]
    parts.append(f"overlapping with it: {listed(rest)}")
    if below:
        parts.append(f"below it, without overlap: {listed(below)}")
    return f"{first} {'; '.join(parts)}."


def kl_sentence(rows):
    """How far from the base the gold score was bought."""
    base, others = split_base(rows)
    far = [r for r in others if r.measured["kl"] and r.measured["kl"]["mean"] > 0.01]
    better = [r for r in far if r.gold["mean"] > base.gold["mean"]]
    if not better:
        return "None of the methods that moved away from the base scores above it."
    best = max(better, key=lambda r: r.gold["mean"])
    thrifty = max(better, key=lambda r: (r.gold["mean"] - base.gold["mean"]) / r.measured["kl"]["mean"])
    rate = (thrifty.gold["mean"] - base.gold["mean"]) / thrifty.measured["kl"]["mean"]
    furthest = max(far, key=lambda r: r.measured["kl"]["mean"])
    return (
        f"{best.label} reaches the highest gold score of those that moved, {best.gold['mean']:.3f}, at "
        f"{best.measured['kl']['mean']:.1f} nats an answer; {thrifty.label} gains most a nat ({rate:+.3f}), and "
        f"{furthest.label} went furthest from the base ({furthest.measured['kl']['mean']:.1f} nats)."
    )


def proxy_sentence(rows):
    """Which methods gained the thing itself, and which only the proxy, by the intervals of the paired differences."""
    base, others = split_base(rows)
    if any(row.measured["proxy"] is None for row in rows):
        return "There was no reward model: the proxy was not measured."
    kinds = {"both": [], "proxy": [], "gold": [], "neither": []}
    for row in others:
        gold, proxy = sure(gain(row, base)) > 0, sure(gain(row, base, lambda a: a["proxy"])) > 0
        kinds["both" if gold and proxy else "gold" if gold else "proxy" if proxy else "neither"].append(row.label)
    words = {
        "both": "gold and proxy both rose: {}",
        "proxy": "only the proxy rose: {}",
        "gold": "only the gold score rose: {}",
        "neither": "neither rose: {}",
    }
    parts = [words[kind].format(listed(names)) for kind, names in kinds.items() if names]
    text = "; ".join(parts) or "no method to compare"
    return f"Beyond the 95 % interval of the difference to the base, prompt by prompt, {text}."


def reward_sentence(rows):
    """How often the reward model is right where none of its training pairs come from: on the held-out prompts."""
    base, _ = split_base(rows)
    if any(answer["proxy"] is None for answer in base.answers()):
        return ""
    unseen = base.runs[0]["unseen_types"]
    seen = [a for a in base.answers() if not any(name in unseen for name, _ in a["checks"])]
    everywhere, familiar = pair_accuracy(base.answers()), pair_accuracy(seen)
    if not everywhere:
        return "No two answers of the base to one held-out prompt differ in gold: the reward model was not tested."
    half, count = everywhere["half"] or 0, f"{everywhere['pairs']} pairs of {everywhere['n']} prompts"
    text = (
        "Of two answers of the base to one held-out prompt that differ in gold, the reward model prefers the better in "
        f"{everywhere['mean']:.0%} +- {half:.0%} ({count})"
    )
    if not familiar or familiar["pairs"] == everywhere["pairs"]:
        return f"{text}."
    half = familiar["half"] or 0
    return f"{text}; on prompts with check types that it was trained on, in {familiar['mean']:.0%} +- {half:.0%}."


def curves_sentence(rows):
    """First against last fifth of each run's log lines."""
    found = []
    for row in rows:
        for key, name in (("gold", "gold score"), ("reward", "reward-model score"), ("accuracy", "accuracy on pairs")):
            values = [line[key] for line in row.curves or () if key in line]
            if len(values) < 2 or (key == "reward" and row.key != "ppo"):
                continue
            fifth = max(1, len(values) // 5)
            first, last = statistics.fmean(values[:fifth]), statistics.fmean(values[-fifth:])
            found.append(f"{row.label}'s {name} {'rose' if last > first else 'fell'} from {first:.2f} to {last:.2f}")
    if not found:
        return "No run left a log of its scores."
    return "From the first to the last fifth of its training, on training prompts, " + "; ".join(found) + "."


def checks_sentence(rows):
    """Where the best method gained and lost most, and what reached the check types that nobody trained on."""
    base, others = split_base(rows)
    if not others:
        return "Only the base was measured."
    best = max(others, key=lambda row: row.gold["mean"])
    before, after = base.measured["checks"], best.measured["checks"]
    unseen = base.runs[0]["unseen_types"]
    change = {name: after[name]["mean"] - before[name]["mean"] for name in before if name not in unseen}
    most, least = max(change, key=change.get), min(change, key=change.get)
    verb = "gains" if change[most] > 0 else "changes"
    text = f"{best.label} {verb} most on {most} ({change[most]:+.2f}) and least on {least} ({change[least]:+.2f})."
    if not base.measured["unseen"]:
        return text + " No check type occurs only held-out."
    transfers = [r.label for r in others if sure(unseen_gain(r, base)) > 0]
    start = base.measured["unseen"]["mean"]
    reached = max(others, key=lambda r: r.measured["unseen"]["mean"])
    return (
        f"{text} On the types that occur only held-out ({', '.join(unseen)}) the base passes {start:.2f} and "
        f"{reached.label}, the best there, {reached.measured['unseen']['mean']:.2f}; risen beyond the interval: "
        f"{listed(transfers)}."
    )


def unseen_gain(row, base):
    """`gain` on the checks of the types that no training prompt has."""
    types = base.runs[0]["unseen_types"]

    def asked(answers):
        return [{"id": a["id"], "good": good} for a in answers for name, good in a["checks"] if name in types]

    theirs, mine = (prompt_means(asked(r.answers()), lambda c: c["good"]) for r in (base, row))
    return interval([mine[key] - theirs[key] for key in mine if key in theirs])


def cost_sentence(rows):
    """What alignment cost in language modelling and in variety."""
    base, others = split_base(rows)
    moved = [row for row in others if row.key != "best_of"]
    if not moved:
        return "No trained method was measured."
    worst = max(moved, key=lambda row: row.text())
    difference = worst.text() - base.text()
    share = math.exp(difference) - 1
    narrow = min(moved, key=lambda row: row.measured["distinct_2"])
    return (
        f"Held-out text costs the base {base.text():.3f} nats a token and {worst.label}, the highest, "
        f"{worst.text():.3f} ({difference:+.3f}; perplexity {share:+.1%}). The fewest different word pairs are "
        f"{narrow.label}'s: distinct-2 {narrow.measured['distinct_2']:.3f}, the base's "
        f"{base.measured['distinct_2']:.3f}."
    )


COLUMNS = (
    "method", "gold", "gain on base", "unseen checks", "proxy", "KL, nats/answer", "KL/token", "ended", "tokens",
    "distinct-2", "text, nats/token", "training", "before it", "memory, GB",
)  # fmt: skip


def table(rows):
    """The comparison as lists of words, the header first."""
    base, _ = split_base(rows)
    found = [list(COLUMNS)]
    for row in rows:
        m = row.measured
        bound = m["kl"] is not None and m["kl"]["n"] == 0
        kl = f"at most {m['kl']['mean']:.2f}" if bound else plus_minus(m["kl"], 2)
        found.append(
            [
                row.label,
                plus_minus(row.gold),
                "" if row is base else plus_minus(gain(row, base)),
                plus_minus(m["unseen"]),
                plus_minus(m["proxy"], 2),
                kl,
                "-" if m["kl_per_token"] is None else f"{m['kl_per_token']:.3f}",
                f"{m['ended']:.0%}",
                f"{m['tokens']:.1f}",
                f"{m['distinct_2']:.3f}",
                f"{row.text():.3f}",
                "-" if row.seconds is None else duration(row.seconds),
                "-" if row.seconds_before is None else duration(row.seconds_before),
                "-" if row.memory is None else f"{row.memory:.2f}",
            ]
        )
    return found


def markdown_table(lines):
    head, *body = lines
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


def text_table(lines):
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(w.ljust(n) if i == 0 else w.rjust(n) for i, (w, n) in enumerate(zip(line, widths)))
                     for line in lines)  # fmt: skip


def plain(text, limit=300):
    """An answer as one line in which Markdown sees nothing to format."""
    text = " / ".join(line.strip() for line in text.splitlines() if line.strip())
    text = text[:limit] + (" ..." if len(text) > limit else "")
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", text) or "(nothing)"


def samples_section(rows, count=5):
    """The first answer of each method to `count` held-out prompts, evenly spaced in the file: not chosen by hand."""
    first = {row.key: {} for row in rows}
    for row in rows:
        for answer in row.runs[0]["answers"]:
            first[row.key].setdefault(answer["id"], answer)
    ids = list(first["base"])
    parts = []
    for k in range(min(count, len(ids))):
        chosen = ids[(2 * k + 1) * len(ids) // (2 * count)] if len(ids) >= count else ids[k]
        lines = [["method", "gold", "answer"]]
        for row in rows:
            answer = first[row.key][chosen]
            cut = "" if answer["stopped"] else " (cut)"
            lines.append([row.label, f"{answer['gold']:.2f}", plain(answer["text"]) + cut])
        parts.append(f"**{plain(first['base'][chosen]['prompt'])}**\n\n" + markdown_table(lines).replace("---:", "---"))
    return "\n\n".join(parts)


def stale_inputs(rows, config):
    """Sentences on runs that learned from data that is not the data that lies there now."""
    found = []
    for row in rows:
        method = next(method for method in METHODS if method.key == row.key)
        if not method.folder:
            continue
        folder = run_folder(config, method, config.seed_list()[0])
        for name, before in read_manifest(folder)["inputs"].items():
            path = in_root(name)
            path = path / "model.safetensors" if path.is_dir() else path
            if len(before) < 64 or not path.is_file():
                continue
            if row.key == "sft":  # the language-model scripts record the hash of the documents, not of the file
                now = load_corpus(path, row.settings["heldout_fraction"]).sha256
            else:
                now = sha256_file(path)
            if now != before:
                found.append(f"{folder} learned from another {name} than the one that lies there now.")
    return found


def spread_section(rows, config):
    """The gold score of each seed, where there are several."""
    if len(config.seed_list()) < 2:
        return "One training seed: the intervals hold for these checkpoints, not for another run of the same recipe."
    lines = [["method", *[f"seed {seed}" for seed in config.seed_list()], "mean", "standard deviation"]]
    for row in rows:
        values = [run["measured"]["gold"]["mean"] for run in row.runs]
        each = [f"{value:.3f}" for value in values]
        lines.append([row.label, *each, f"{statistics.fmean(values):.3f}", f"{statistics.stdev(values):.3f}"])
    note = "Gold score by training seed. Above, the answers of all seeds are pooled and clustered by prompt."
    return note + "\n\n" + markdown_table(lines)


def answers_a_prompt(rows):
    """How many answers to a prompt were measured, in words: '2 (base: 4, best of 4: 1)'."""
    counts = {row.label: len(row.runs[0]["answers"]) // row.gold["n"] for row in rows}
    usual = statistics.mode(list(counts.values())[::-1])
    others = ", ".join(f"{label}: {count}" for label, count in counts.items() if count != usual)
    return f"{usual} ({others})" if others else f"{usual}"


def write_report(config, rows, notes=()):
    """Write REPORT.md and figures/ into config.out; returns the report's path."""
    out = in_root(config.out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    scores_figure(rows, out / "figures" / "scores.png")
    curves_figure(rows, out / "figures" / "curves.png")
    checks_figure(rows, out / "figures" / "checks.png")
    base, first = split_base(rows)[0], rows[0].runs[0]
    who, where, used = first["identity"], machine(), versions()
    command = shlex.join(["python", "report/compare.py", *sys.argv[1:]])
    start = f"`{config.base}`"
    if config.base in EMBEDDED_MODELS:
        start += ", de-quantised from 4-bit (Q4_1): a little worse than the original weights"
    gpu = ", " + ", ".join(where["gpu"]) if where["gpu"] else ", no GPU"
    hashes = [["method", "run", "weights"]]
    for row in rows:
        hashes += [[row.label, f"`{run['model_name']}`", f"`{run['identity']['hashes']['model']}`"] for run in row.runs]
    setting = who["config"]
    seconds = sum(run["seconds"]["total"] for row in rows if row.key != "best_of" for run in row.runs)
    text = f"""# Comparison

{headline(rows)}

{markdown_table(table(rows))}

Gold: share of a prompt's checks that an answer passes. Proxy: the reward model's score. Intervals (+-) hold 95 %:
Student's, over the means of the {base.gold["n"]} held-out prompts. Gain on base: the difference prompt by prompt.
Unseen checks: types that occur in no training prompt. KL: k1, the mean of log pi(answer) - log base(answer); of
best-of-n the upper bound log n - (n - 1) / n. Ended: answers that stopped by themselves within
{setting["max_new_tokens"]} tokens. Text: loss on held-out {setting["text"]}. Training: the run alone; before it: making
the preferences, groups and reward model that it needs. Memory: the training process at its peak. Distinct-2:
different word pairs over all, in the first answers to each prompt, as many of each method.

## Score against KL, and gold against proxy

![Gold score against KL, and against the reward model's score](figures/scores.png)

{kl_sentence(rows)} {proxy_sentence(rows)}

{reward_sentence(rows)}

## Learning curves

![Scores during training](figures/curves.png)

{curves_sentence(rows)}

## Each check type

![Share of answers that pass, by check type](figures/checks.png)

{checks_sentence(rows)}

## What alignment cost

{cost_sentence(rows)}

## What each method does in expectation

On a policy small enough to enumerate, every expectation is a finite sum; [EXACT.md](EXACT.md) has the tables and more
figures: [the gradient of each KL estimator](figures/exact_estimators.png), which is that of the whole answers' KL only
with k1 in the reward, and [what an aggregation gives each answer](figures/exact_gradients.png): per-sequence means
favour answers of one token, and the standard deviation prompts that are almost never or almost always solved.

![KL to the optimum against steps, and where each method ends](figures/exact_fixed_points.png)

DPO and PPO fall to the optimum of the KL-regularised objective; IPO, GRPO and offline GRPO come to rest at a distance.

## Sample answers

The first sample of each method to prompts evenly spaced in the held-out set. A line break is shown as /.

{samples_section(rows)}

## How it was measured

- Command: `{command}`, commit `{git_commit() or "unknown"}`.
- Machine: {where["cpu"]}, {where["cores"]} cores{gpu}; {where["system"]}.
- Versions: {", ".join(f"{key} {value}" for key, value in used.items() if value)}.
- Start of every run, and reference of every KL: {start}.
- {answers_a_prompt(rows)} answers a prompt, at most {setting["max_new_tokens"]} tokens, temperature
  {setting["temperature"]:g}, sampling seed {setting["seed"]}, weights in {setting["precision"]}; training seeds
  {", ".join(map(str, config.seed_list()))}.
- Prompts `{config.prompts}` ({who["hashes"]["prompts"]}), checks ({who["hashes"]["checks"]}), reward model
  `{config.reward_model}` ({who["hashes"]["reward_model"] or "not there"}).
- Measuring took {duration(seconds)} in all.
{"".join(f"- {note}" + chr(10) for note in notes)}
{spread_section(rows, config)}

{markdown_table(hashes).replace("---:", "---")}
"""
    path = out / "REPORT.md"
    write_atomically(path, text)
    return path


def main(config):
    methods = find_runs(config)
    results = measure_all(config, methods)
    rows = make_rows(config, methods, results)
    notes = stale_inputs(rows, config)
    path = write_report(config, rows, notes)
    narrow = [[line[i] for i in (0, 1, 3, 4, 5, 7, 8, 9, 10, 11, 13)] for line in table(rows)]
    say(f"\n{text_table(narrow)}\n\n{headline(rows)}")
    for note in notes:
        say(f"note: {note}")
    say(f"\nwritten to {shown(path)}, figures in {shown(Path(path).parent / 'figures')}/")


if __name__ == "__main__":
    cli(main, Config)
