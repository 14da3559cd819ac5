"""REPORT.md: its tables, sample completions and text."""

from __future__ import annotations

import os
import re
import shlex
import statistics
import sys
from collections import Counter

from configs.config import ROOT
from data.prompts import TASKS
from data.rows import text_of
from models.fetch import EMBEDDED_MODELS
from report.beside import beside_section
from report.intervals import number_or_dash, plus_minus
from report.plots import checks_figure, curves_figure, gold_is, scores_figure
from report.sentences import (
    checks_sentence,
    cost_sentence,
    curves_sentence,
    fluency_sentence,
    gain,
    greedy_sentence,
    headline,
    kl_sentence,
    proxy_sentence,
    reward_sentence,
    split_base,
)
from report.targets import missed_sentence, targets
from runtime.console import duration, fold
from runtime.files import in_root, read_manifest, write_atomically
from runtime.means import interval
from runtime.provenance import git_commit, machine, versions

COLUMNS = (
    "method", "gold", "greedy", "gain on base", "unseen types", "proxy", "KL, nats/sequence", "KL/token", "ended",
    "tokens", "fluency", "distinct-2", "text, nats/token", "training", "before it", "memory, GB",
)  # fmt: skip
NARROW = ("method", "gold", "proxy", "KL, nats/sequence", "training")  # the columns that fit a terminal


def table(rows):
    """The comparison as lists of cells (texts). The first list is the header."""
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
                plus_minus(row.greedy),
                "" if row is base else plus_minus(gain(row, base)),
                plus_minus(m["unseen"]),
                plus_minus(m["proxy"], 2),
                kl,
                "-" if m["kl_per_token"] is None else f"{m['kl_per_token']:.3f}",
                f"{m['finish_stop']:.0%}",
                f"{m['tokens']:.1f}",
                f"{m['fluency']:.2f}",
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
    """A completion as one line, with all Markdown characters escaped."""
    text = " / ".join(line.strip() for line in text.splitlines() if line.strip())
    text = text[:limit] + (" ..." if len(text) > limit else "")
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", text) or "(nothing)"


def sample_prompts(rows, count=5):
    """[(prompt, [(row, its greedy completion)])] for `count` prompts. Best-of-n has no greedy completions.

    The prompts are the first one of each type, of the types with the most prompts.
    """
    greedy = [(row, {answer["id"]: answer for answer in row.runs[0]["greedy"]}) for row in rows if row.greedy]
    firsts, sizes = {}, Counter()
    for key, answer in greedy[0][1].items():
        name = answer["checks"][0][0] if answer["checks"] else key  # without checks each prompt is a type
        firsts.setdefault(name, key)
        sizes[name] += 1
    chosen = [firsts[name] for name, _ in sizes.most_common(count)]
    return [(greedy[0][1][key]["prompt"], [(row, found[key]) for row, found in greedy]) for key in chosen]


def samples_section(rows):
    """The completions of `sample_prompts` as Markdown tables."""
    parts = []
    for prompt, answers in sample_prompts(rows):
        lines = [["method", "gold", "completion"]]
        for row, answer in answers:
            lines.append([row.label, number_or_dash(answer["gold"]), plain(answer["text"]) + was_cut(answer)])
        parts.append(f"**{plain(text_of(prompt))}**\n\n" + markdown_table(lines).replace("---:", "---"))
    return "\n\n".join(parts)


def samples_text(rows):
    """The completions of `sample_prompts` as text for the console."""
    parts = []
    for prompt, answers in sample_prompts(rows):
        width = max(len(row.label) for row, _ in answers)
        lines = []
        for row, answer in answers:
            said = " / ".join(line.strip() for line in answer["text"].splitlines() if line.strip())
            start = f"  {row.label:<{width}}  {number_or_dash(answer['gold'])}  "
            lines.append(fold(f"{start}{said or '(nothing)'}{was_cut(answer)}", len(start) * " "))
        parts.append("\n".join([fold(" ".join(text_of(prompt).split())), *lines]))
    return "\n\n".join(parts)


def was_cut(answer):
    return "" if answer["finish_reason"] == "stop" else " (cut)"


def spread_section(rows, config):
    """The gold score by seed if there are several seeds, else a sentence."""
    if len(config.seed_list()) < 2:
        return "One training seed: the intervals hold for these checkpoints, not for another run of the same recipe."
    lines = [
        ["method", *[f"seed {seed}" for seed in config.seed_list()], "standard deviation", "mean, 95 % over seeds"]
    ]
    for row in rows:
        values = [run["measured"]["gold"]["mean"] for run in row.runs]
        each = [f"{value:.3f}" for value in values]
        lines.append([row.label, *each, f"{statistics.stdev(values):.3f}", plus_minus(interval(values))])
    note = "Gold score by training seed. Above, the completions of all seeds are pooled and clustered by prompt."
    return note + "\n\n" + markdown_table(lines)


def targets_section(config, rows):
    """What the shipped tasks were to show, and what was missed. Empty for other prompts."""
    if config.prompts not in TASKS or len(rows) < 2:
        return ""
    found = targets(rows, read_manifest(config.reward_model) if config.reward_model else None)
    lines = [["target", "found", "reached"]]
    lines += [[target.what, target.found, "yes" if target.reached else "**no**"] for target in found]
    table_text = markdown_table(lines).replace("---:", "---")
    return f"## Targets\n\n{missed_sentence(found)}\n\n{table_text}\n\n"


def starts_sentence(rows):
    """The methods that did not start from the base itself, and the runs between, as a text; "" if there are none."""
    ways = [f"{row.label} by way of {', '.join(f'`{name}`' for name in row.via)}" for row in rows if row.via]
    return f" Not at once: {'; '.join(ways)}." if ways else ""


def answers_a_prompt(rows):
    """The number of measured completions per prompt, as a text: '2 (base: 4, best of 4: 1)'."""
    counts = {
        row.label: len(row.runs[0]["answers"]) // len({answer["id"] for answer in row.runs[0]["answers"]})
        for row in rows
    }
    usual = statistics.mode(list(counts.values())[::-1])
    others = ", ".join(f"{label}: {count}" for label, count in counts.items() if count != usual)
    return f"{usual} ({others})" if others else f"{usual}"


def doctor_section(rows):
    """What the doctor says of each run, as a Markdown table with a line for each finding."""
    lines = [["run", "worry", "what is seen", "what to try"]]
    for folder, found in {folder: found for row in rows for folder, found in row.checkups.items()}.items():
        said = [[f.level, f.seen, "" if f.level == "normal" else f.advice] for f in found.findings]
        if not found.worries and found.judged:
            said.append(["none", f"logged lines {found.lines}, patterns looked for {len(found.looked_for)}", ""])
        if found.too_short:
            said.append(["-", f"too short to tell of: {', '.join(found.too_short)}", ""])
        lines += [[f"`{folder}`", *cells] for cells in said]
    if len(lines) == 1:
        return "No run left a log."
    return markdown_table(lines).replace("---:", "---")


CHECKS_SECTION = """## Each type of prompt

![Share of completions that pass, by type of prompt](figures/checks.png)

"""


def write_report(config, rows, notes=()):
    """Write REPORT.md and figures/ into config.out. Returns the path of the report."""
    out = in_root(config.out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    scores_figure(rows, out / "figures" / "scores.png")
    curves_figure(rows, out / "figures" / "curves.png")
    checks_section = ""
    if next(row for row in rows if row.key == "base").measured["checks"]:
        checks_figure(rows, out / "figures" / "checks.png")
        checks_section = CHECKS_SECTION + checks_sentence(rows) + "\n\n"
    beside = beside_section(rows, out / "figures", markdown_table)
    base, first = split_base(rows)[0], rows[0].runs[0]
    who, where, used = first["identity"], machine(), versions()
    scored_by = f"checks ({who['hashes']['checks']})"
    if "reward" in who["hashes"]:
        scored_by = f"reward functions `{config.reward}` ({who['hashes']['reward']})"
    command = shlex.join(["python", "report/compare.py", *sys.argv[1:]])
    start = f"`{config.base}`"
    if config.base in EMBEDDED_MODELS:
        start += ", de-quantised from 4-bit (Q4_1): a little worse than the original weights"
    proof = os.path.relpath(ROOT / "proof", out.resolve())
    gpu = ", " + ", ".join(where["gpu"]) if where["gpu"] else ", no GPU"
    hashes = [["method", "run", "weights"]]
    for row in rows:
        hashes += [[row.label, f"`{run['model_name']}`", f"`{run['identity']['hashes']['model']}`"] for run in row.runs]
    setting = who["config"]
    part = {"heldout": "held-out"}.get(setting["split"], setting["split"])
    seconds = sum(run["seconds"]["total"] for row in rows if row.key != "best_of" for run in row.runs)
    text = f"""# Comparison

{headline(rows)} {greedy_sentence(rows)}

{markdown_table(table(rows))}

Gold: {gold_is(rows)}, the mean over completions that were sampled. Greedy: the same of completions in which each token
is the most probable one. Proxy: the reward model's score. Intervals (+-) hold 95 %: Student's, over the means of the
{base.gold["n"]} {part} prompts. Gain on base: the difference prompt by prompt. Unseen types: those that occur in no
training prompt. KL: k1, the mean of log pi(completion) - log base(completion); of best-of-n the upper bound
log n - (n - 1) / n. Ended: completions that stopped by themselves within {setting["max_new_tokens"]} tokens. Fluency:
nats a token of the completions under the base: what it finds more natural costs less. Text: loss on held-out
{setting["text"]}. Training: the run alone; before it: making the preferences, groups and reward model
that it needs. Memory: the training process at its peak. Distinct-2: different word pairs over all, in the first
completions to each prompt, as many of each method.

## Score against KL, and gold against proxy

![Gold score against KL, and against the reward model's score](figures/scores.png)

{kl_sentence(rows)} {proxy_sentence(rows)}

{reward_sentence(rows)}

## Learning curves

![Scores during training](figures/curves.png)

{curves_sentence(rows)}

## What the doctor says of these runs

Patterns that are known to mean something, looked for in the log of each run by
[report/doctor.py](doctor.py): [docs/doctor.md](../docs/doctor.md).

{doctor_section(rows)}

{checks_section}{beside}{targets_section(config, rows)}## What alignment cost

{cost_sentence(rows)} {fluency_sentence(rows)}

## What each method does in expectation

On a policy small enough to enumerate, every expectation is a finite sum; [EXACT.md]({proof}/EXACT.md) has the tables
and more figures: [the gradient of each KL estimator]({proof}/figures/exact_estimators.png), which is that of the whole
completions' KL only with k1 in the reward, and [what an aggregation gives each
completion]({proof}/figures/exact_gradients.png): per-sequence means favour completions of one token, and the standard
deviation prompts that are almost never or almost always solved.

![KL to the optimum against steps, and where each method ends]({proof}/figures/exact_fixed_points.png)

DPO and PPO fall to the optimum of the KL-regularised objective; IPO, GRPO and offline GRPO come to rest at a distance.

## Sample completions

The greedy completion of each method to the first {part} prompt of each of the most frequent types. They were not
chosen by hand. A line break is shown as /.

{samples_section(rows)}

## How it was measured

- Command: `{command}`, commit `{git_commit() or "unknown"}`.
- Machine: {where["cpu"]}, {where["cores"]} cores{gpu}; {where["system"]}.
- Versions: {", ".join(f"{key} {value}" for key, value in used.items() if value)}.
- Start of every run, and reference of every KL: {start}.{starts_sentence(rows)}
- {answers_a_prompt(rows)} completions a prompt, at most {setting["max_new_tokens"]} tokens, temperature
  {setting["temperature"]:g} (and one greedy completion), sampling seed {setting["seed"]}, weights in
  {setting["precision"]}; training seeds {", ".join(map(str, config.seed_list()))}.
- Prompts `{config.prompts}` ({who["hashes"]["prompts"]}), {scored_by}, reward model
  `{config.reward_model}` ({who["hashes"]["reward_model"] or "not there"}).
- Measuring took {duration(seconds)} in all.
{"".join(f"- {note}" + chr(10) for note in notes)}
{spread_section(rows, config)}

{markdown_table(hashes).replace("---:", "---")}
"""
    path = out / "REPORT.md"
    write_atomically(path, text)
    return path
