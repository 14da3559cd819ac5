"""Prompts from a file or from standard input, in whichever of three forms a user has them."""

from __future__ import annotations

import json
import sys

from configs.config import UserError
from configs.run import in_root, json_error
from data.checks import load_prompts, validate_checks


def read_prompts(source, split="heldout", need_checks=False):
    """Prompts as dicts with at least "prompt" (a text, or a list of messages), in file order.

    source: a `.json` file in the form of data/prompts.json (its rows with this split), a `.jsonl` file whose rows have
    "prompt", any other file with one prompt a line, or `-`: standard input, lines or JSONL. Blank lines are skipped.
    Raises UserError naming file and line, also when no prompt is there, or without checks where they are needed.
    """
    if source != "-" and str(source).endswith(".json"):
        return load_prompts(in_root(source), split, need_checks=need_checks)
    where, content = ("standard input", _stdin()) if source == "-" else (str(source), _file(source))
    return parse_prompts(content, where, need_checks, jsonl=str(source).endswith(".jsonl"))


def parse_prompts(content, where, need_checks=False, jsonl=False):
    """The prompts in the text `content`: JSONL if told so or if it begins with a brace, else one a line."""
    lines = [(number, line.strip()) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{where}: there is no prompt in it")
    if not (jsonl or lines[0][1].startswith("{")):
        if need_checks:
            raise UserError(f"{where}: lines of text have no checks to be scored by; give a --judge module:function")
        return [{"prompt": line} for _, line in lines]
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} line {number}: not valid JSON ({json_error(error)})") from None
        if not isinstance(row, dict) or not _is_prompt(row.get("prompt")):
            raise UserError(
                f'{where} line {number}: must be an object whose "prompt" is a text or a list of messages, '
                f"each with role and content, not {line[:60]!r}"
            )
        if need_checks and not row.get("checks"):
            raise UserError(f"{where} line {number}: has no checks to be scored by; give a --judge module:function")
        if row.get("checks"):
            validate_checks(row["checks"], f"{where} line {number}")
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
    return _decoded(path.read_bytes(), str(source))


def _stdin():
    return _decoded(sys.stdin.buffer.read(), "standard input")


def _decoded(content, where):
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def text_of(prompt):
    """The plain text of a prompt (a text, or a list of messages), for judges and for the terminal."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
