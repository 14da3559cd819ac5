"""Prompts that a program makes, with its own verifier as gold: the tasks of the package reasoning_gym.

    python rlhf/grpo_train.py --prompts reasoning_gym:chain_sum
    python report/evaluate.py --prompts "reasoning_gym:chain_sum?size=500&seed=1&max_terms=3"

`size`, `validation` and `heldout` are the numbers of prompts of the three parts, and `seed` makes others. All further
options are those of the task itself. The package is an optional extra.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

from configs.config import UserError
from data.rows import plain

PREFIX = "reasoning_gym:"
INSTALL = "pip install reasoning-gym"
SIZES = {"train": "size", "validation": "validation", "heldout": "heldout"}  # {part: the option with its size}
DEFAULTS = {"size": 500, "validation": 100, "heldout": 300, "seed": 0}
APART = 1_000_000  # question i of a data set is drawn with seed + i: parts whose seeds are closer share questions
SEEDS = 1000  # the highest seed: those of some tasks must stay below 2**32
TRIES = 4  # times as many questions are drawn as wanted, at most, because equal ones are left out


def is_procedural(source: str) -> bool:
    """Whether `--prompts` names a task of the package."""
    return source.startswith(PREFIX)


def procedural_rows(source: str) -> tuple[list[dict], str]:
    """(the prompts of all three parts in the form of data/prompts.json, their hash).

    No question is in two parts, and none is held out twice. Raises UserError, which names what is allowed, for a
    package that is not installed, a task or an option that is not there, and a task with too few questions.
    """
    task, sizes, options = parse_source(source)
    rows: list[dict] = []
    seen: set[str] = set()
    for part in ("heldout", "validation", "train"):  # what is held out is the same for any size of the others
        wanted = sizes[SIZES[part]]
        mine: list[dict] = []
        seed = (len(SIZES) * sizes["seed"] + list(SIZES).index(part)) * APART
        for entry in drawn(task, options, wanted * TRIES, seed, source):
            if len(mine) == wanted:
                break
            text = plain(entry["question"])
            if text not in seen:
                seen.add(text)
                check = {"name": "verified", "task": task, "options": options, "entry": entry}
                mine.append({"id": f"{part}-{len(mine) + 1:03d}", "prompt": entry["question"], "split": part,
                             "family": task, "answer": entry["answer"], "checks": [check]})  # fmt: skip
        if len(mine) < wanted:
            raise UserError(
                f"prompts = {source!r}: {task} has only {len(mine)} different questions for {SIZES[part]} = {wanted}; "
                f"ask for fewer, such as {PREFIX}{task}?{SIZES[part]}={max(len(mine), 1)}"
            )
        rows = mine + rows
    content = json.dumps([[row["prompt"], row["answer"], row["split"]] for row in rows], default=str)
    return rows, hashlib.sha256(content.encode()).hexdigest()


def parse_source(source: str) -> tuple[str, dict[str, int], dict[str, Any]]:
    """`reasoning_gym:TASK?size=9&max_terms=3` -> (task, sizes and seed with their defaults, options of the task)."""
    task, _, query = source.removeprefix(PREFIX).partition("?")
    sizes: dict[str, int] = dict(DEFAULTS)
    options: dict[str, Any] = {}
    for key, text in parse_qsl(query, keep_blank_values=True):
        if key not in sizes:
            try:
                options[key] = json.loads(text)
            except json.JSONDecodeError:
                options[key] = text
            continue
        least, largest = (0, SEEDS) if key == "seed" else (2, APART // TRIES)
        if not text.isdecimal() or not least <= int(text) <= largest:
            raise UserError(f"prompts = {source!r}: {key} must be a whole number from {least} to {largest:,}")
        sizes[key] = int(text)
    if "?" in source and not parse_qsl(query):
        raise UserError(f"prompts = {source!r}: options are written {PREFIX}TASK?size=500&seed=1")
    return task, sizes, options


def drawn(task: str, options: dict, size: int, seed: int, source: str) -> Iterator[dict]:
    """The entries of one data set of the package: dicts with `question`, `answer` and `metadata`."""
    try:
        data = data_set(task, json.dumps(options), size, seed)
    except ValueError as error:
        if "not registered" not in str(error):
            raise UserError(f"prompts = {source!r}: {error}") from None
        names = ", ".join(sorted(package().factory.DATASETS))
        raise UserError(f"prompts = {source!r}: reasoning_gym has no task {task!r}. Its tasks are: {names}") from None
    except (AssertionError, TypeError) as error:
        raise UserError(f"prompts = {source!r}: {task} refuses these options: {error}") from None
    return (data[i] for i in range(size))


@functools.lru_cache(maxsize=32)
def data_set(task: str, options: str, size: int = 1, seed: int = 0) -> Any:
    """A data set of the package. options: JSON."""
    return package().create_dataset(task, size=size, seed=seed, **json.loads(options))


def package() -> Any:
    """The module reasoning_gym. Raises UserError with the command that installs it."""
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "reasoning_gym":
            raise
        raise UserError(
            f"prompts that begin with {PREFIX} need a package that is not installed. This installs it: {INSTALL}"
        ) from None
    return reasoning_gym


def verified(text: str, task: str, options: dict, entry: dict) -> float:
    """The score of a completion by the task's own verifier, in [0, 1].

    What the last `<answer>` tags enclose is the answer; without them, the whole completion.
    """
    answer = package().utils.extract_answer(text)
    try:
        value = data_set(task, json.dumps(options)).score_answer(text.strip() if answer is None else answer, entry)
    except Exception:  # some verifiers raise what their parser raises on text that is no answer
        return 0.0
    return min(1.0, max(0.0, float(value)))
