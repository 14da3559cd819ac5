"""Prompts from a file, a folder, the hub, standard input, or a program that makes them (data/procedural.py).

`.json` in the form of data/prompts.json, lines of text, or rows with columns (JSONL, CSV, Parquet, ...): data/rows.py.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from configs.config import UserError, option
from data.checks import CHECKS, GATES, words
from data.jsonl import BYTE_ORDER_MARK, parse_jsonl
from data.procedural import is_procedural, procedural_rows
from data.rows import in_one_form, kind_of_file, plain, read_rows, refuse_beyond
from runtime.console import quiet_libraries
from runtime.files import in_root, sha256_file

HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?(@[\w.-]+)?")  # the id of a dataset, maybe a configuration, a split


@dataclass
class PromptConfig:
    """The option of all scripts that read prompts."""

    prompt_column: str = option("prompt", "column of the prompts, in a file that has columns")


def read_prompts(
    source: str | Path, split: str | None = "heldout", need_checks: bool = False, column: str = "prompt"
) -> list[dict]:
    """Prompts as dicts with at least "prompt" (a text, or a list of messages), in file order.

    source: a task of data/procedural.py or a `.json` file in the form of data/prompts.json (the rows with this split),
    rows that `read_rows` takes, any other file with one prompt a line, or `-`: standard input, lines or JSONL. Blank
    lines are skipped.
    column: the column that holds the prompt, in place of "prompt". The other columns stay in the dicts.
    Raises UserError that names the file and the line: for a bad row, for a column that is not there, for no prompts,
    and for missing checks if `need_checks`.
    """
    return prompts_and_hash(source, split, need_checks, column)[0]


def prompts_and_hash(
    source: str | Path, split: str | None = "heldout", need_checks: bool = False, column: str = "prompt"
) -> tuple[list[dict], str]:
    """(the prompts of `read_prompts`, the hash of the data). Standard input has the hash ""."""
    name, path = str(source), in_root(source)
    if name == "-":
        return parse_prompts(sys.stdin.buffer.read(), "standard input", need_checks, column=column), ""
    if is_procedural(name):
        if column != "prompt":
            raise UserError(f"prompt_column = {column!r}: {name} makes its prompts, and has no columns")
        made, digest = procedural_rows(name)
        return [row for row in made if split in (None, row["split"])], digest
    if path.is_file() and (path.suffix in (".json", ".jsonl") or not kind_of_file(path)):
        return _from_bytes(path, name, split, need_checks, column), sha256_file(path)
    if not path.exists() and (kind_of_file(path) or path.suffix == ".txt" or not HUB.fullmatch(name)):
        raise UserError(f"prompts = {name!r}: no such file")
    quiet_libraries()
    rows, digest = read_rows(source)
    return prompt_rows(((row["where"], row) for row in rows), need_checks, column), digest


def _from_bytes(path, name, split, need_checks, column):
    """The prompts of a file of JSON, JSONL or lines of text."""
    content = path.read_bytes()
    if path.suffix != ".json" or _in_lines(content):
        return parse_prompts(content, name, need_checks, path.suffix in (".json", ".jsonl"), column)
    rows = _without_splits(content)
    if rows is None:
        return load_prompts(path, split, need_checks, column)
    return prompt_rows([(f"{name} row {i}", row) for i, row in enumerate(rows, 1)], need_checks, column)


def _in_lines(content):
    """Whether a `.json` file holds JSONL: several lines, and the first one is an object."""
    first, *others = content.removeprefix(BYTE_ORDER_MARK).strip().split(b"\n")
    try:
        return bool(others) and isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _without_splits(content):
    """The rows of a JSON file that is a list of objects, none of which has a `split`. None for any other file."""
    try:
        rows = json.loads(content)
    except ValueError:
        return None
    plain = isinstance(rows, list) and rows and all(isinstance(row, dict) and "split" not in row for row in rows)
    return rows if plain else None


def parse_prompts(
    content: bytes, where: str, need_checks: bool = False, jsonl: bool = False, column: str = "prompt"
) -> list[dict]:
    """The prompts in the bytes `content`: JSONL if `jsonl` or if it begins with a brace, else one prompt per line."""
    if not content.strip():
        raise UserError(f"{where}: there is no prompt in it")
    if jsonl or content.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"{"):
        return prompt_rows(parse_jsonl(content, where), need_checks, column)
    if need_checks:
        raise UserError(f"{where}: lines of text have no checks to be scored by; give a --reward module:function")
    if column != "prompt":
        raise UserError(f"prompt_column = {column!r}: {where} has lines of text, and no columns")
    return [{"prompt": line.strip()} for line in _decoded(content, where).split("\n") if line.strip()]


def prompt_rows(rows: Iterable[tuple[str, dict]], need_checks: bool = False, column: str = "prompt") -> list[dict]:
    """Rows with their prompt under "prompt". rows: (place, row); a UserError names the place of a bad row."""
    found = []
    for place, row in rows:
        row = {key: value for key, value in row.items() if key != "where"} | {"prompt": _prompt_of(row, column, place)}
        if not _is_prompt(row["prompt"]):
            raise UserError(
                f'{place}: must be an object whose "{column}" is a text or a list of messages, '
                f"each with role and content, not {str(row)[:60]!r}"
            )
        refuse_beyond(row, place, ["chat_template_kwargs"])
        if need_checks and not row.get("checks"):
            raise UserError(f"{place}: has no checks to be scored by; give a --reward module:function")
        if row.get("checks"):
            validate_checks(row["checks"], place)
        found.append(row)
    return found


def _prompt_of(row, column, place):
    """The prompt of a row: its column, else what the other forms of data/rows.py have in its place."""
    others = {key: value for key, value in row.items() if key not in ("prompt", "weight", "weights")}
    other = in_one_form(others | {"prompt": row.get(column), "where": place})
    if column in row:
        return other.get("prompt", row[column])
    turns = other.get("messages")
    if column == "prompt" and "prompt" in other:
        return other["prompt"]
    if column == "prompt" and isinstance(turns, list) and turns:  # a conversation without its last answer
        return turns[:-1] if isinstance(turns[-1], dict) and turns[-1].get("role") == "assistant" else turns
    there = ", ".join(key for key in row if key != "where")
    raise UserError(f"{place}: has no column {column!r}. Its columns are: {there}. --prompt_column names another")


def _is_prompt(value):
    if isinstance(value, list):
        return bool(value) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value)
    return isinstance(value, str) and bool(value.strip())


def _decoded(content, where):
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None


ARITHMETIC = "data/arithmetic.json"  # made by data/make_arithmetic.py
PROMPTS = "data/prompts.json"  # the instructions
TASKS = (ARITHMETIC, PROMPTS)

SPLITS = ("train", "validation", "heldout")


ARGUMENTS = {  # argument: (whether a value is allowed, what is allowed)
    "n": (lambda v: type(v) is int and v >= 1, "a whole number of at least 1"),
    "word": (lambda v: isinstance(v, str) and len(words(v)) == 1, "one word"),
    "phrase": (lambda v: isinstance(v, str) and len(words(v)) >= 1, "a text of at least one word"),
    "value": (lambda v: type(v) in (int, float) and math.isfinite(v), "a number"),
    "stems": (
        lambda v: isinstance(v, list) and bool(v) and all(isinstance(x, str) and x and x == x.casefold() for x in v),
        "a list of beginnings of words, in lower case",
    ),
    "letter": (lambda v: isinstance(v, str) and len(v) == 1 and v.isalpha(), "one letter"),
}


def validate_checks(checks: list[dict], where: str) -> None:
    """Raise UserError unless every check can be called. It names `where` (a prompt's id) and what is allowed."""
    if not isinstance(checks, list) or not checks:
        raise UserError(f'{where}: checks must be a list of at least one {{"name": ..., arguments}}, got {checks!r}')
    for check in checks:
        if not isinstance(check, dict) or not isinstance(check.get("name"), str):
            raise UserError(f'{where}: a check must be an object with a "name", got {check!r}')
        name = check["name"]
        known = CHECKS | GATES
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise UserError(f"{where}: unknown check {name!r}{hint}; known checks: {', '.join(sorted(known))}")
        allowed = [key for key in inspect.signature(known[name]).parameters if key in ARGUMENTS]
        takes = f"{name} takes " + (", ".join(f"{a} ({ARGUMENTS[a][1]})" for a in allowed) or "no arguments")
        given = [key for key in check if key != "name"]
        for key in given:
            if key not in allowed:
                raise UserError(f"{where}: check {name!r} has an unknown argument {key!r}; {takes}")
        for key in allowed:
            if key not in given:
                raise UserError(f"{where}: check {name!r} lacks the argument {key!r}; {takes}")
            if not ARGUMENTS[key][0](check[key]):
                raise UserError(f"{where}: check {name!r} got {key}={check[key]!r}; {takes}")


def load_prompts(
    path: str | Path = PROMPTS, split: str | None = None, need_checks: bool = True, column: str = "prompt"
) -> list[dict]:
    """Read and validate a prompt file; return its prompts, or those of one split.

    A relative path starts at the working directory if it is there, else at the root. With `need_checks=False` (a
    reward function or a reward model scores) "checks" may be absent or empty.
    Raises UserError, naming the file and the prompt's id, for whatever is wrong.
    """
    if split is not None and split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    file = in_root(path)
    if not file.is_file():
        raise UserError(f"no prompt file at {file.absolute()}")
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file}: must be a list of at least one prompt, not {str(rows)[:40]}")

    seen: dict[str, str] = {}  # prompt text without case and spacing -> its split
    ids = set()
    for i, row in enumerate(rows):
        where = f"{file}: prompt {row['id']!r}" if isinstance(row, dict) and "id" in row else f"{file}: entry {i + 1}"
        needed = ("id", column, "split", "checks") if need_checks else ("id", column, "split")
        missing = [key for key in needed if not isinstance(row, dict) or key not in row]
        if missing:
            raise UserError(f"{where}: lacks {', '.join(missing)}; every prompt is an object with {', '.join(needed)}")
        row["prompt"] = row[column]
        if not isinstance(row["id"], str) or not row["id"].strip():
            raise UserError(f"{where}: id must be a text that is not empty, got {row['id']!r}")
        if not _is_prompt(row["prompt"]):
            raise UserError(f"{where}: prompt must be a text that is not empty, or messages, got {row['prompt']!r}")
        refuse_beyond(row, where, ["chat_template_kwargs"])
        if row["id"] in ids:
            raise UserError(f"{where}: this id stands twice")
        ids.add(row["id"])
        if row["split"] not in SPLITS:
            raise UserError(f"{where}: split must be one of {', '.join(SPLITS)}, got {row['split']!r}")
        if need_checks or row.get("checks"):
            validate_checks(row["checks"], where)
        text = plain(row["prompt"])
        if text in seen and seen[text] != row["split"]:
            raise UserError(f"{where}: the same prompt stands in two splits")
        if text in seen and row["split"] == "heldout":
            raise UserError(f"{where}: the same prompt is held out twice, and would count twice; take one out")
        seen[text] = row["split"]

    rows = [row for row in rows if split in (None, row["split"])]
    if not rows:
        raise UserError(f"{file}: no prompt has split {split!r}")
    return rows
