"""Compare the methods: same start, same prompts, same seeds. Writes report/demo/REPORT.md and its figures.

    python report/compare.py
    python report/compare.py --allow_missing true       # only the runs that are there
    python report/compare.py --seeds 0,1,2              # models/dpo, models/dpo-seed1, models/dpo-seed2, ...
    python report/compare.py --suite task,bias,toxicity,refusals,text      # also what changed beside the task

report/evaluate.py measures each method; measurements that already exist are read. The data on training come from the
metrics.jsonl and manifest.json of each run. Every sentence of the report is computed from the numbers in the report.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

import yaml

from configs.config import UserError, option, read_yaml, shown
from data.corpus import load_corpus
from data.rows import text_of
from report.evaluate import Config as EvaluateConfig
from report.evaluate import Measure, evaluate
from report.intervals import best_of_measured, distinct, summarise
from report.methods import METHODS, REWARD_MODEL, method_of
from report.page import COLUMNS, NARROW, samples_text, table, text_table, write_report
from report.sentences import greedy_sentence, headline
from report.suite import TASK, read_suite
from runtime.cli import cli
from runtime.console import duration, fold, say
from runtime.doctor import Diagnosis, examine
from runtime.files import in_root, read_lines, read_manifest, sha256_file
from runtime.run_folder import hold_output
from runtime.tracking import Tracker, Tracking


@dataclass
class Config(Measure, Tracking):
    CONFIG: ClassVar[str] = "configs/compare.yaml"
    models: str = option("models", "the folder of the runs: sft, dpo, ppo, grpo_offline, grpo")
    best_of: int = option(4, "best-of-n: completions of the base of which the reward model keeps one", at_least=2)
    seeds: str | None = option(None, "training seeds, such as 0,1,2: seed 0 in models/dpo, seed 1 in models/dpo-seed1")
    allow_missing: bool = option(False, "compare the runs that are there")
    runs: str = option("report/runs", "the folder of the measurements")
    out: str = option("report/demo", "the folder that receives REPORT.md and figures/")

    def check(self):
        super().check()
        self.seed_list()
        if TASK not in read_suite(self.suite):
            raise UserError(f"suite = {self.suite!r}: the comparison needs {TASK}")

    def seed_list(self):
        words = [word.strip() for word in (self.seeds or "0").split(",")]
        if not all(word.isdigit() for word in words) or len(set(words)) < len(words):
            raise UserError(f"seeds = {self.seeds!r}: must be different whole numbers, such as 0,1,2")
        return [int(word) for word in words]


@dataclass
class Row:
    """One method in the report: its measurements (one per seed), the pooled measurement, and the training cost."""

    key: str
    label: str
    runs: list[dict]
    measured: dict  # see `summarise` in report/intervals.py
    seconds: float | None = None  # of the training of one run
    seconds_before: float | None = None  # to make the data and models that it learns from
    memory: float | None = None  # peak of training, GB
    curves: list[dict] | None = None  # lines of metrics.jsonl
    settings: dict | None = None  # config.yaml
    checkups: dict[str, Diagnosis] = field(default_factory=dict)  # {folder of a run: what the doctor says of it}
    via: tuple = ()  # runs between this one and the base: (models/sft,) for DPO on that SFT

    @property
    def gold(self):
        return self.measured["gold"]

    @property
    def greedy(self):
        """The `interval` of the gold score of greedy completions; None for best-of-n."""
        return self.measured["greedy"]

    def answers(self):
        return [answer for run in self.runs for answer in run["answers"]]

    def text(self):
        return statistics.fmean(run["text"]["nats_per_token"] for run in self.runs)


def run_folder(config, method, seed):
    name = method.key + (f"-seed{seed}" if seed else "")
    return f"{config.models.rstrip('/')}/{name}"


def find_runs(config):
    """The methods that can be compared. For missing runs, raises UserError with the commands that make them."""
    reward = bool(config.reward_model) and in_root(config.reward_model).is_dir()
    missing, methods = {}, []
    for method in METHODS:
        lacks = {}
        if method.key == "best_of" and not reward:
            lacks[config.reward_model or "reward_model"] = REWARD_MODEL
        for seed in config.seed_list() if method.script else ():
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


def way_to_base(folder, base):
    """The runs between the run in a folder and the base: () if it started from the base, (SFT,) for DPO on an SFT.

    Raises UserError if its start, the start of that run, and so on, do not lead to the base.
    """
    way = [folder]
    while not same_model(way[-1], base):
        held = in_root(way[-1]) / "config.yaml"
        if read_manifest(way[-1]) is None or not held.is_file() or way[-1] in way[:-1]:
            said = ", and that from ".join(repr(name) for name in way[1:])
            raise UserError(
                f"{folder} started from {said}, not from base = {base!r}: KLs and gains would not be its own. Give "
                f"--base {way[-1]}, or compare other runs"
            )
        way.append(read_yaml(held)["model_name"])
    return tuple(way[1:-1])


def same_model(a, b):
    """Whether two names mean one model: equal names, or two paths of one folder."""
    return a == b or (in_root(a).is_dir() and in_root(b).is_dir() and in_root(a).samefile(in_root(b)))


def check_starts(config, methods):
    """Raise UserError if a run does not lead back to the base. Call it before anything is measured."""
    for method in methods:
        for seed in config.seed_list() if method.script else ():
            way_to_base(run_folder(config, method, seed), config.base)


def measure_all(config, methods):
    """{method key: its measurements, one per seed}. Prints the progress and the time left.

    Best-of-n is chosen from the completions of the base, so their number per prompt is a multiple of n.
    """
    shared = {f.name: getattr(config, f.name) for f in fields(Measure)}
    jobs = []
    for method in (method for method in methods if method.key != "best_of"):
        for seed in config.seed_list():
            name = run_folder(config, method, seed) if method.script else config.base
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
        say(fold(f"measuring {k + 1} of {len(jobs)}: {method.label} ({job.model_name}) | {duration(elapsed)}{left}"))
        clock = time.time()
        result = evaluate(job)
        if time.time() - clock > 0.5 * result["seconds"]["total"]:
            work += sizes[k]  # measured now, not read from a file
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
        if len(runs) > 1:  # all seeds use the same prompts: their completions are clustered by prompt
            best_of = config.best_of if method.key == "best_of" else 1
            measured = summarise(
                [a for run in runs for a in run["answers"]], runs[0]["unseen_types"], best_of,
                [a for run in runs for a in run.get("greedy", ())],
            )  # fmt: skip
        row = Row(method.key, method.label.format(n=config.best_of), runs, measured)
        if method.script:
            folder = run_folder(config, method, config.seed_list()[0])
            manifests = [read_manifest(run_folder(config, method, seed)) for seed in config.seed_list()]
            row.seconds = statistics.fmean(m["seconds"] for m in manifests)
            row.memory = max(m["peak_memory_gb"] for m in manifests)
            row.checkups = checkups([run_folder(config, method, seed) for seed in config.seed_list()])
            row.curves = read_lines(in_root(folder) / "metrics.jsonl")
            row.settings = yaml.safe_load((in_root(folder) / "config.yaml").read_text(encoding="utf-8"))
            row.via = way_to_base(folder, config.base)
            row.seconds_before = seconds_before(manifests[0]["inputs"] | dict.fromkeys(row.via))
        elif method.key == "best_of":
            row.seconds_before = seconds_before({config.reward_model: ""})
            row.checkups = checkups([config.reward_model])
        rows.append(row)
    equal_variety(rows)
    return rows


def checkups(folders):
    """{folder: what the doctor says of its run} for the runs that left a log."""
    return {folder: examine(folder) for folder in folders if (in_root(folder) / "metrics.jsonl").is_file()}


def equal_variety(rows):
    """Compute each method's distinct-2 from the first n completions per prompt, with one n: it falls with more text."""
    n = min(len(row.answers()) // len({answer["id"] for answer in row.answers()}) for row in rows)
    for row in rows:
        texts = {}
        for answer in row.answers():
            texts.setdefault(answer["id"], []).append(answer["text"])
        first = [text for group in texts.values() for text in group[:n]]
        row.measured = row.measured | {"distinct_2": distinct(first, 2)}


def seconds_before(inputs, seen=None):
    """The seconds to make the inputs of a run, the inputs of these, and so on. Each is counted once.

    inputs: the files and folders in a manifest. Without this time, a method that needs other runs first would look too
    cheap.
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


def stale_inputs(rows, config):
    """Sentences about runs that learned from data that have changed since."""
    found = []
    for row in rows:
        method = method_of(row.key)
        if not method.script:
            continue
        folder = run_folder(config, method, config.seed_list()[0])
        for name, before in read_manifest(folder)["inputs"].items():
            path = in_root(name)
            path = path / "model.safetensors" if path.is_dir() else path
            if len(before) < 64 or not path.is_file():
                continue
            if (
                method.learns_from == "text"
            ):  # the language-model scripts record the hash of the documents, not of the file
                now = load_corpus(path, row.settings["heldout_fraction"]).sha256
            else:
                now = sha256_file(path)
            if now != before:
                found.append(f"{folder} learned from another {name} than the one that lies there now.")
    return found


def send(tracker, rows, path, lines):
    """Send the comparison to W&B: each method's figures, its completions with their scores, and the report's files.

    lines: the table of the report, its header first. path: of the report.
    """
    tracker.open()
    samples, result = [], {}
    for row in rows:
        for a in row.answers():
            scores = {"gold": a["gold"], "reward": a["proxy"]}
            samples.append({"method": row.label, "prompt": text_of(a["prompt"]), "completion": a["text"], **scores})
        figures = {name: row.measured[name] for name in ("gold", "unseen", "proxy", "kl")}
        result |= {f"{row.key}/{name}": figure["mean"] for name, figure in figures.items() if figure}
    tables = {"comparison": [dict(zip(lines[0], line)) for line in lines[1:]], "samples": samples}
    tracker.finish(result, tables, "report", [path, *sorted((path.parent / "figures").iterdir())])


def main(config):
    group = in_root(config.models).absolute().name  # that of the runs which lie there
    tracker = Tracker(config, in_root(config.out), "comparison", group, "compare")
    methods = find_runs(config)
    check_starts(config, methods)
    out = in_root(config.out)
    hold_output(out, lambda: out.mkdir(exist_ok=True))
    results = measure_all(config, methods)
    rows = make_rows(config, methods, results)
    notes = stale_inputs(rows, config)
    path = write_report(config, rows, notes)
    narrow = [[line[COLUMNS.index(name)] for name in NARROW] for line in table(rows)]
    say(f"\n{text_table(narrow)}\n\n" + fold(f"{headline(rows)} {greedy_sentence(rows)}", ""))
    say(f"\ngreedy completions of every method\n\n{samples_text(rows)}")
    for note in notes:
        say(fold(f"note: {note}"))
    say(f"\nwritten to {shown(path)}, figures in {shown(Path(path).parent / 'figures')}/")
    send(tracker, rows, Path(path), table(rows))


if __name__ == "__main__":
    cli(main, Config)
