"""Paths, JSON, and atomic writes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from configs.config import ROOT, UserError, shown


def in_root(path):
    """The path for a name in a configuration.

    A relative path starts at the working directory if it exists there, else at the repository.
    Raises UserError for a text that cannot be a path.
    """
    path = Path(path)
    try:
        return path if path.exists() or path.is_absolute() else ROOT / path
    except OSError as error:  # a text that is too long for a name, for one
        raise UserError(f"{str(path)[:60]!r}... cannot be a file: {error.strerror}") from None


def sha256_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def described(path):
    """{"bytes", "sha256"} of a file, for a manifest."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def synced(*paths):
    """Flush files, and the entries of folders, to the disk (fsync)."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path, text):
    """Write `text` to `path` atomically: the file has either its old content or the complete new content."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def read_manifest(folder):
    """The manifest of a finished run as a dict. None if the folder has no finished run."""
    path = in_root(folder) / "manifest.json"
    return read_json(path) if path.is_file() else None


def json_error(error):
    """The library's message for a line that is not JSON, with the column: 'Expecting value at column 3'."""
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def read_json(path):
    """The object in a JSON file that this repository wrote. Raises UserError if the file is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{shown(path)} is damaged: it takes one JSON object")
    return found


def as_lines(rows):
    """Rows as the text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_lines(path):
    """The rows of a JSONL file that this repository wrote; [] if it is not there. Incomplete lines are left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
