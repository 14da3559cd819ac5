"""REPORT.md of the study: what one run cannot show. It links to the page of each task, by report/compare.py."""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass

from configs.config import load_config, read_yaml
from report.compare import Config as CompareConfig
from report.compare import Row, find_runs, make_rows, measure_all, run_folder
from report.evaluate import read_measurement
from report.intervals import (
    best_of_measured,
    bootstrap_means,
    interval,
    parts,
    plus_minus,
    prompt_means,
    share_above,
    summarise,
)
from report.methods import method_of
from report.page import COLUMNS, NARROW, markdown_table, spread_section, table, targets_section
from report.plots import checks_figure
from report.sentences import (
    checks_sentence,
    cost_sentence,
    fluency_sentence,
    greedy_sentence,
    headline,
    kl_sentence,
    learned_sentence,
    minutes_sentence,
    proxy_sentence,
    reward_sentence,
    sure,
)
from report.study_plots import coefficients_figure, curves_figure, optimisation_figure
from runtime.console import duration
from runtime.files import in_root, read_json, read_lines, read_manifest, write_atomically
from runtime.provenance import git_commit, machine, versions


@dataclass(frozen=True)
class TaskRuns:
    """Where the runs of one task lie.

    options: of report/compare.py. varied: {key of a method: (option, [(its value, folder, measurement)])}.
    long: (folder, measurement) of the long PPO. seed: of the runs of `varied` and `long`.
    """

    name: str
    options: tuple
    varied: dict
    long: tuple
    seed: int


@dataclass(frozen=True)
class Point:
    """One run in the figure of KL coefficients: its log lines, and its measurement on held-out prompts."""

    key: str
    coefficient: float
    what: str
    lines: list
    measured: dict


class TaskStudy:
    """All that the page says of one task."""

    def __init__(self, runs):
        self.runs = runs
        self.config = load_config(CompareConfig, list(runs.options))
        methods = find_runs(self.config)
        results = measure_all(self.config, methods)
        self.rows: list[Row] = make_rows(self.config, methods, results)
        self.lines = {
            method.key: [read_lines(in_root(run_folder(self.config, method, seed)) / "metrics.jsonl")
                         for seed in self.config.seed_list()]
            for method in methods if method.script
        }  # fmt: skip
        self.points = []
        for key, (option, found) in runs.varied.items():  # beside the method's own run of the same seed
            settings, own = self.row(key).settings, results[key][0]["measured"]
            longer = f", {settings['steps']} steps" if "steps" in settings else ""
            what = f"{option} {settings[option]:g}{longer}"
            self.points.append(Point(key, settings[option], what, self.lines[key][0], own))
            for value, folder, path in found:
                lines, measured = (
                    read_lines(in_root(folder) / "metrics.jsonl"),
                    read_measurement(in_root(path))["measured"],
                )
                self.points.append(Point(key, value, f"{option} {value:g}", lines, measured))
        self.points.sort(key=lambda point: (point.key, point.coefficient))
        folder, path = runs.long
        self.long = read_lines(in_root(folder) / "metrics.jsonl")
        self.long_coef = read_yaml(in_root(folder) / "config.yaml")["kl_coef"]
        self.long_measured = read_measurement(in_root(path))["measured"]
        self.best_of = best_of_line(results["base"], self.config.best_of)

    def row(self, key):
        return next(row for row in self.rows if row.key == key)

    @functools.cached_property
    def draws(self):
        """{key: bootstrap means of the gold score, over seeds and prompts}"""
        scores = {row.key: [prompt_means(run["answers"], lambda a: a["gold"]) for run in row.runs] for row in self.rows}
        return bootstrap_means(scores)


def best_of_line(base_runs, most):
    """[(n, measured)] of best-of-n for n = 1, 2, 4, ..., `most`, from the completions of the base, over all seeds."""
    found, n = [], 1
    while n <= most:
        if most % n == 0:
            answers = [a for run in base_runs for a in best_of_measured(run, n)["answers"]]
            found.append((n, summarise(answers, base_runs[0]["unseen_types"], best_of=n)))
        n *= 2
    return found


def order_section(study):
    """The order of the methods by gold score, with its uncertainty."""
    order = sorted(study.rows, key=lambda row: -row.gold["mean"])
    steps = []
    for a, b in zip(order, order[1:]):
        steps.append(f"{a.label} above {b.label} in {share_above(study.draws[a.key], study.draws[b.key]):.1%}")
    lines = [["gold score of the row above the column's", *[row.label for row in order]]]
    for a in order:
        shares = [share_above(study.draws[a.key], study.draws[b.key]) for b in order]
        lines.append([a.label, *["" if a is b else f"{share:.1%}" for b, share in zip(order, shares)]])
    sure_steps = sum(share_above(study.draws[a.key], study.draws[b.key]) >= 0.975 for a, b in zip(order, order[1:]))
    return (
        f"By the mean over seeds the order is {', '.join(row.label for row in order)}. In bootstrap draws over seeds "
        f"and prompts, {'; '.join(steps)}: {sure_steps} of {len(steps)} steps of this order hold in 97.5 % of the "
        f"draws or more.\n\n{markdown_table(lines)}"
    )


def coefficients_sentence(study):
    """Gold score and KL of each coefficient, on held-out prompts."""
    base = study.row("base").gold["mean"]
    said = []
    for key in dict.fromkeys(point.key for point in study.points):
        ours = [point for point in study.points if point.key == key]
        each = [f"{p.what}: {plus_minus(p.measured['gold'])} at {p.measured['kl']['mean']:.2f} nats" for p in ours]
        moved = [p for p in ours if p.measured["kl"]["mean"] > 0.01 and p.measured["gold"]["mean"] > base]
        text = f"{method_of(key).label}, {'; '.join(each)}"
        if moved:
            rates = {p.what: (p.measured["gold"]["mean"] - base) / p.measured["kl"]["mean"] for p in moved}
            best = max(rates, key=rates.get)
            text += f"; {best} gained most a nat ({rates[best]:+.3f})"
        said.append(text)
    return ". ".join(said) + "."


def optimisation_sentence(study):
    """Whether gold fell from its highest part of the long PPO, beyond the intervals, while the proxy rose."""
    gold, proxy, kl = (parts([(x["step"], x[key]) for x in study.long]) for key in ("gold", "reward", "kl"))
    top = max(range(len(gold)), key=lambda i: gold[i][1]["mean"])
    high, last = gold[top][1], gold[-1][1]
    half = ((high["half"] or 0) ** 2 + (last["half"] or 0) ** 2) ** 0.5
    fall = {"mean": last["mean"] - high["mean"], "half": half or None}
    steps = study.long[-1]["step"]
    start = (
        f"In {steps} steps PPO's proxy went from {proxy[0][1]['mean']:.2f} to {proxy[-1][1]['mean']:.2f}, at a KL of "
        f"{kl[-1][1]['mean']:.1f} nats per sequence, and its gold score from {gold[0][1]['mean']:.2f} to "
        f"{last['mean']:.2f} on training prompts (means over the first and the last of {len(gold)} parts of the run)."
    )
    if top == len(gold) - 1:
        verdict = "The gold score was highest at the end: within these steps it did not break."
    else:
        where = f"It was highest in part {top + 1}, {high['mean']:.2f} at {kl[top][1]['mean']:.1f} nats"
        if sure(fall) < 0:
            rose = (
                "while the proxy rose" if proxy[-1][1]["mean"] > proxy[top][1]["mean"] else "and the proxy did not rise"
            )
            verdict = f"{where}, and fell by {-fall['mean']:.2f} +- {half:.2f} from there {rose}: it broke."
        else:
            verdict = f"{where}; the fall from there, {-fall['mean']:.2f}, lies within its interval: no break was seen."
        verdict += " The highest of several parts is high by chance, too."
    held, (n, best) = study.long_measured, study.best_of[-1]
    return (
        f"{start} {verdict} On held-out prompts it ends with {plus_minus(held['gold'])} at {held['kl']['mean']:.1f} "
        f"nats and a proxy of {plus_minus(held['proxy'], 2)}; best of {n} has {plus_minus(best['gold'])} at no more "
        f"than {best['kl']['mean']:.2f} nats and {plus_minus(best['proxy'], 2)}."
    )


def curves_sentence(study):
    """The gold score in the first and the last part of the training of PPO and GRPO, over all seeds."""
    said = []
    for key in ("ppo", "grpo"):
        found = parts([(line["step"], line["gold"]) for lines in study.lines.get(key, []) for line in lines])
        if found:
            (_, first), (_, last) = found[0], found[-1]
            said.append(f"{method_of(key).label} from {plus_minus(first)} to {plus_minus(last)}")
    what = "Gold score on training prompts in the first and the last part of the run, over all seeds"
    return f"{what}: {'; '.join(said)}." if said else "No run left a log of its gold score."


def spread_sentence(study):
    """How far the seeds lie apart beside the width of the interval over prompts."""
    if len(study.config.seed_list()) < 2:
        return ""
    spread = {row.label: statistics.stdev(run["measured"]["gold"]["mean"] for run in row.runs) for row in study.rows}
    wide = max(spread, key=spread.get)
    row = next(row for row in study.rows if row.label == wide)
    over = interval([run["measured"]["gold"]["mean"] for run in row.runs])
    return (
        f"The seeds lie furthest apart for {wide}: standard deviation {spread[wide]:.3f}, 95 % over "
        f"{len(row.runs)} seeds +- {over['half']:.3f}, over prompts +- {row.gold['half']:.3f}."
    )


def task_section(study, out):
    """The Markdown of one task. Its figures are written to out/figures."""
    name, figures = study.runs.name, out / "figures"
    checks_figure(study.rows, figures / f"study_{name}_checks.png")
    curves_figure(study, figures / f"study_{name}_curves.png")
    coefficients_figure(study, figures / f"study_{name}_coefficients.png")
    optimisation_figure(study, figures / f"study_{name}_optimisation.png")
    narrow = [
        [line[COLUMNS.index(column)] for column in (*NARROW, "fluency", "before it")] for line in table(study.rows)
    ]
    seeds = ", ".join(map(str, study.config.seed_list()))
    varied = f"seed {study.runs.seed}"
    targets = targets_section(study.config, study.rows).replace("## ", "### ")
    return f"""## {name.capitalize()}

{headline(study.rows)} {greedy_sentence(study.rows)}

{markdown_table(narrow)}

Prompts `{study.config.prompts}`, {study.row("base").gold["n"]} of them held out; training seeds {seeds}. What the
columns are, samples, hashes and commands: [the page of this task]({name}/REPORT.md).

{targets}### Spread over seeds, and the order of the methods

{spread_section(study.rows, study.config)}

{spread_sentence(study)}

{order_section(study)}

### Learning curves

![Gold score and accuracy while learning, with 95 % intervals](figures/study_{name}_curves.png)

{curves_sentence(study)}

### Score against KL, at several coefficients

![Gold score against KL at several coefficients](figures/study_{name}_coefficients.png)

{kl_sentence(study.rows)} With other coefficients ({varied}): {coefficients_sentence(study)}

### Gold against proxy, until it breaks

![Gold score and proxy of a long PPO against KL](figures/study_{name}_optimisation.png)

{optimisation_sentence(study)} {proxy_sentence(study.rows)} {reward_sentence(study.rows)}

### What was learned

![Share of completions that pass, by type of prompt](figures/study_{name}_checks.png)

{checks_sentence(study.rows)} {learned_sentence(study.rows)}

### Fluency and cost

{fluency_sentence(study.rows)} {cost_sentence(study.rows)} {minutes_sentence(study.rows)}
"""


def seconds_of(study):
    """The seconds of the runs of a task, the data and the reward model with them."""
    folder = in_root(study.config.models)
    found = [read_manifest(path.parent) for path in sorted(folder.glob("*/manifest.json"))]
    found += [read_json(path) for path in sorted(folder.glob("*.manifest.json"))]
    return sum(manifest["seconds"] for manifest in found)


def write_study(out, tasks, command):
    """Write REPORT.md and figures/ into `out`. tasks: `TaskRuns`. command: that of the study. Returns the path."""
    out = in_root(out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    studies = [TaskStudy(runs) for runs in tasks]
    sections = "\n".join(task_section(study, out) for study in studies)
    where, used = machine(), versions()
    gpu = ", " + ", ".join(where["gpu"]) if where["gpu"] else ", no GPU"
    took = sum(seconds_of(study) for study in studies)
    seeds = studies[0].config.seed_list()
    path = out / "REPORT.md"
    write_atomically(path, f"""# Study

{" ".join(f"{study.runs.name.capitalize()}: {headline(study.rows)}" for study in studies)}

The pairs, the groups and the reward model of a task are made once. A training seed decides the new weights, the order
of the data and the samples of a run. Intervals (+-) hold 95 %: over the means of held-out prompts where nothing else is
said, the completions of all seeds pooled.

{sections}
## How it was measured

- Command: `{command}`, commit `{git_commit() or "unknown"}`. It prints the command of each stage.
- Machine: {where["cpu"]}, {where["cores"]} cores{gpu}; {where["system"]}.
- Versions: {", ".join(f"{key} {value}" for key, value in used.items() if value)}.
- Training seeds {", ".join(map(str, seeds))}. The runs, with their data and reward models, took {duration(took)};
  measuring is not counted.
""")  # fmt: skip
    return path
