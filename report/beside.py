"""The section of REPORT.md on what each method changed beside the task: bias, toxicity, refusals, text quality."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from report.intervals import plus_minus, share_text
from report.plots import beside_figure
from report.sentences import gain, split_base


@dataclass(frozen=True)
class Value:
    """One number of a measure. key: of the measure in a measurement. find: takes it out of the measure. ideal: a text.

    digits: after the point. figure: whether it has a panel in the figure.
    """

    key: str
    label: str
    find: Callable[[dict], dict]
    ideal: str
    digits: int = 3
    figure: bool = True


VALUES = (
    Value("bias", "StereoSet icat", lambda m: m["stereoset_intrasentence"]["per_byte"]["macro"]["icat"], "100", 1),
    Value("bias", "StereoSet ss", lambda m: m["stereoset_intrasentence"]["per_byte"]["macro"]["ss"], "50", 1, False),
    Value("bias", "CrowS-Pairs share", lambda m: m["crows_pairs"]["sums"]["share"], "0.5"),
    Value("bias", "BBQ, ambiguous", lambda m: m["bbq"]["per_byte"]["ambiguous"]["accuracy"], "1", 3, False),
    Value("bias", "BBQ, disambiguated", lambda m: m["bbq"]["per_byte"]["disambiguated"]["accuracy"], "1"),
    Value("toxicity", "toxic continuations", lambda m: m["toxic"], "0"),
    Value("refusals", "safe prompts refused", lambda m: m["safe"]["refused"], "0"),
    Value("refusals", "unsafe prompts refused", lambda m: m["unsafe"]["refused"], "1"),
    Value("text_quality", "MAUVE", lambda m: m["mauve"], "human ceiling"),
    Value("text_quality", "BERTScore F1", lambda m: m["bertscore"], "-", 3, False),
    Value("text_quality", "distinct-2", lambda m: m["distinct_2"], "as human", 3, False),
    Value("text_quality", "repeated 4-grams", lambda m: m["self_repetition"], "as human", 3, False),
    Value("text_quality", "base's loss, nats/token", lambda m: m["nats_per_token"], "as human", 3, False),
)


def measured_values(rows):
    """The `Value`s that every measured row has, in order. Best-of-n is not a model: it has none of them."""
    measured = [run for row in rows if row.key != "best_of" for run in row.runs]
    return [value for value in VALUES if all(has(value, run) for run in measured)]


def has(value, run):
    """Whether a measurement has a value: few rows of BBQ may lack one of its contexts."""
    try:
        return value.key in run and value.find(run[value.key]) is not None
    except KeyError:
        return False


def half(x):
    """Half of the 95 % interval of an `interval` or of a `share`; 0 where one unit has none."""
    return (x["high"] - x["low"]) / 2 if "high" in x else x["half"] or 0.0


def pooled(row, value):
    """{"mean", "half"} of one value of a row, over its training seeds."""
    found = [value.find(run[value.key]) for run in row.runs]
    spread = math.sqrt(sum(half(x) ** 2 for x in found)) / len(found)
    return {"mean": statistics.fmean(x["mean"] for x in found), "half": spread}


def change(row, base, value):
    """{"mean", "half"} of the change of a value against the base.

    The interval is that of two independent measurements: too wide, because both answer the same rows.
    """
    a, b = pooled(row, value), pooled(base, value)
    return {"mean": a["mean"] - b["mean"], "half": math.hypot(a["half"], b["half"])}


def beside_table(rows, values):
    """The values of every method as lists of cells; the first list is the header."""
    head = ["method", *(f"{value.label} (ideal {value.ideal})" for value in values)]
    found = [head]
    for row in (row for row in rows if row.key != "best_of"):
        cells = []
        for value in values:
            first = value.find(row.runs[0][value.key])
            single = len(row.runs) == 1 and "high" in first
            cells.append(share_text(first, value.digits) if single else plus_minus(pooled(row, value), value.digits))
        found.append([row.label, *cells])
    return found


def change_sentence(rows, values):
    """The changes whose intervals leave out 0, and how many would by chance."""
    base, others = split_base(rows)
    others = [row for row in others if row.key != "best_of"]
    found = []
    for row in others:
        for value in values:
            x = change(row, base, value)
            if abs(x["mean"]) > x["half"]:
                found.append(
                    f"{row.label}, {value.label} {x['mean']:+.{value.digits}f} +- {x['half']:.{value.digits}f}"
                )
    pairs = len(others) * len(values)
    chance = f"Of {pairs} changes, about {0.05 * pairs:.0f} would be outside their interval by chance at most."
    if not found:
        return f"No change against the base is outside its interval. {chance}"
    return f"Changes against the base that are outside their interval: {'; '.join(found)}. {chance}"


def beside_section(rows, figures, markdown_table):
    """The section as Markdown, "" if no measure beside the task was taken.

    figures: the folder for its figure. markdown_table: turns lists of cells into Markdown.
    """
    values = measured_values(rows)
    if not values:
        return ""
    base, others = split_base(rows)
    others = [row for row in others if row.key != "best_of"]
    panels = [("gain on the task", [gain(row, base) for row in others])]
    panels += [(v.label, [change(row, base, v) for row in others]) for v in values if v.figure]
    beside_figure(others, panels, figures / "beside.png")
    notes = []
    if any(value.key == "toxicity" for value in values):
        known = base.runs[0]["toxicity"]["classifier"]
        notes.append(
            f"The classifier of toxicity misses {len(known['missed'])} of {known['toxic']} toxic sentences of a list, "
            f"and calls {len(known['false_alarms'])} of {known['sentences'] - known['toxic']} harmless ones toxic."
        )
    if any(value.key == "text_quality" for value in values):
        human = base.runs[0]["text_quality"]["human"]
        notes.append(
            f"Human text: MAUVE against other human text {plus_minus(human['mauve'])}, distinct-2 "
            f"{plus_minus(human['distinct_2'])}, the base's loss {plus_minus(human['nats_per_token'])}."
        )
    seconds = sum(run[key]["seconds"] for row in rows if row.key != "best_of" for run in row.runs
                  for key in dict.fromkeys(value.key for value in values))  # fmt: skip
    return f"""## What changed beside the task

![Gain on the task, and the change of each other measure, by method](figures/beside.png)

{change_sentence(rows, values)} {" ".join(notes)}

{markdown_table(beside_table(rows, values))}

What each measure means, and what it does not: [docs/measures.md](../docs/measures.md). StereoSet and BBQ per byte,
CrowS-Pairs by sums; StereoSet over targets. Intervals hold 95 %; in the figure they are those of independent
measurements, which is too wide. Best-of-n is no model of its own and is left out. These measures took
{seconds / 60:.1f} minutes.

"""
