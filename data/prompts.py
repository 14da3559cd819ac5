"""Prompts from a file or from standard input, in one of three forms: .json, .jsonl, or lines of text."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import sys
from pathlib import Path

from configs.config import UserError
from data.checks import CHECKS, GATES, words
from data.jsonl import BYTE_ORDER_MARK, parse_jsonl
from runtime.files import in_root


def read_prompts(source: str | Path, split: str = "heldout", need_checks: bool = False) -> list[dict]:
    """Prompts as dicts with at least "prompt" (a text, or a list of messages), in file order.

    source: a `.json` file in the form of data/prompts.json (its rows with this split), a `.jsonl` file whose rows have
    "prompt", any other file with one prompt a line, or `-`: standard input, lines or JSONL. Blank lines are skipped.
    Raises UserError that names the file and the line: for a bad row, for no prompts, and for missing checks if
    `need_checks`.
    """
    if source != "-" and str(source).endswith(".json"):
        return load_prompts(in_root(source), split, need_checks=need_checks)
    where, content = ("standard input", sys.stdin.buffer.read()) if source == "-" else (str(source), _file(source))
    return parse_prompts(content, where, need_checks, jsonl=str(source).endswith(".jsonl"))


def parse_prompts(content: bytes, where: str, need_checks: bool = False, jsonl: bool = False) -> list[dict]:
    """The prompts in the bytes `content`: JSONL if `jsonl` or if it begins with a brace, else one prompt per line."""
    if not content.strip():
        raise UserError(f"{where}: there is no prompt in it")
    if not (jsonl or content.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"{")):
        if need_checks:
            raise UserError(f"{where}: lines of text have no checks to be scored by; give a --reward module:function")
        return [{"prompt": line.strip()} for line in _decoded(content, where).split("\n") if line.strip()]
    rows = []
    for place, row in parse_jsonl(content, where):
        if not _is_prompt(row.get("prompt")):
            raise UserError(
                f'{place}: must be an object whose "prompt" is a text or a list of messages, '
                f"each with role and content, not {str(row)[:60]!r}"
            )
        if need_checks and not row.get("checks"):
            raise UserError(f"{place}: has no checks to be scored by; give a --reward module:function")
        if row.get("checks"):
            validate_checks(row["checks"], place)
        rows.append(row)
    return rows


def _is_prompt(value):
    if isinstance(value, list):
        return bool(value) and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value)
    return isinstance(value, str) and bool(value.strip())


def _file(source):
    path = in_root(source)
    if not path.is_file():
        raise UserError(f"prompts = {str(source)!r}: no such file")
    return path.read_bytes()


def _decoded(content, where):
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def text_of(value: str | list[dict]) -> str:
    """The plain text of a prompt or a completion (a text, or a list of messages), for reward functions and printing."""
    return value if isinstance(value, str) else "\n".join(m["content"] for m in value)


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


def load_prompts(path: str | Path = PROMPTS, split: str | None = None, need_checks: bool = True) -> list[dict]:
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
        needed = ("id", "prompt", "split", "checks") if need_checks else ("id", "prompt", "split")
        missing = [key for key in needed if not isinstance(row, dict) or key not in row]
        if missing:
            raise UserError(f"{where}: lacks {', '.join(missing)}; every prompt is an object with {', '.join(needed)}")
        if not isinstance(row["id"], str) or not row["id"].strip():
            raise UserError(f"{where}: id must be a text that is not empty, got {row['id']!r}")
        if not _is_prompt(row["prompt"]):
            raise UserError(f"{where}: prompt must be a text that is not empty, or messages, got {row['prompt']!r}")
        if row["id"] in ids:
            raise UserError(f"{where}: this id stands twice")
        ids.add(row["id"])
        if row["split"] not in SPLITS:
            raise UserError(f"{where}: split must be one of {', '.join(SPLITS)}, got {row['split']!r}")
        if need_checks or row.get("checks"):
            validate_checks(row["checks"], where)
        text = " ".join(text_of(row["prompt"]).casefold().split())
        if text in seen and seen[text] != row["split"]:
            raise UserError(f"{where}: the same prompt stands in two splits")
        if text in seen and row["split"] == "heldout":
            raise UserError(f"{where}: the same prompt is held out twice, and would count twice; take one out")
        seen[text] = row["split"]

    rows = [row for row in rows if split in (None, row["split"])]
    if not rows:
        raise UserError(f"{file}: no prompt has split {split!r}")
    return rows
