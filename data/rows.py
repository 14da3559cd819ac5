"""Read the rows of users' data files, and convert them to the form that all stages use.

A JSONL file is read line by line, so that an error can name the line. All other forms (JSON, CSV, Parquet, compressed
files, folders of `save_to_disk`, hub datasets) are read by the `datasets` library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from configs.config import UserError, shown
from data.jsonl import parse_jsonl
from runtime.files import in_root, sha256_file

TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}
PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip")  # compressed files, which `datasets` unpacks
# keys that change the meaning of a row and that no stage supports; they raise UserError
BEYOND = (
    "tools",
    "functions",
    "tool_calls",
    "function_call",
    "images",
    "image",
    "videos",
    "audio",
    "weight",
    "weights",
    "chat_template_kwargs",
)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
         "assistant": "assistant", "system": "system"}  # fmt: skip


def kind_of_file(path: str | Path) -> str | None:
    """The `datasets` builder for a file name ("csv" for x.csv.gz). None for another kind of file."""
    suffixes = [s for s in Path(path).suffixes if s not in PACKED]
    return TABLES.get(suffixes[-1]) if suffixes else None


def read_rows(source: str | Path, made_by: str | None = None) -> tuple[Collection[dict], str]:
    """(rows, hash) of a file, a folder of `save_to_disk`, or a hub dataset.

    A hub dataset is NAME, NAME:CONFIGURATION, and for another split than train NAME@SPLIT or NAME:CONFIGURATION@SPLIT.

    Each row is a dict with its place, "pairs.jsonl line 12", under "where". made_by: the command that makes the file.
    Raises UserError, which names the place, for what cannot be read.
    """
    path = in_root(source)
    if path.is_dir():
        return _with_places(_from_disk(path), shown(path)), _folder_hash(path)
    if path.is_file():
        if path.suffix == ".jsonl":
            rows = [{**row, "where": where} for where, row in parse_jsonl(path.read_bytes(), shown(path))]
        elif kind_of_file(path):
            rows = _with_places(_from_file(path), shown(path))
        else:
            raise UserError(f"{shown(path)}: rows come as {', '.join(TABLES)}, also compressed, or as a folder")
        if not rows:
            raise UserError(f"{shown(path)} is empty" + (f". This makes it: {made_by}" if made_by else ""))
        return rows, sha256_file(path)
    if kind_of_file(source) or str(source).startswith((".", "/", "~")):
        raise UserError(f"{shown(path)} is not there" + (f". This makes it: {made_by}" if made_by else ""))
    data = _from_hub(str(source))
    return _with_places(data, str(source)), data._fingerprint


def _with_places(data, name):
    return [{**row, "where": f"{name} row {i}"} for i, row in enumerate(data, 1)]


def _from_file(path):
    import datasets

    options = {"sep": "\t"} if ".tsv" in path.suffixes else {}
    kind = kind_of_file(path)
    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train", keep_in_memory=True, **options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{shown(path)} cannot be read as {kind}: {_reason(error)}") from None


def _from_disk(path):
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, FileNotFoundError) as error:
        raise UserError(f"{shown(path)} is no folder of `save_to_disk`: {_reason(error)}") from None
    if isinstance(data, datasets.DatasetDict):
        if "train" not in data:
            raise UserError(f"{shown(path)} has the splits {', '.join(data)}, and none called train")
        data = data["train"]
    return data


def _from_hub(name):
    import datasets

    place, _, split = name.partition("@")
    hub_id, _, configuration = place.partition(":")
    try:
        return datasets.load_dataset(hub_id, configuration or None, split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data = {name!r} is no local file, and the hub gave no such dataset ({_reason(error)})"
        ) from None


def _folder_hash(path):
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(file.name.encode() + sha256_file(file).encode())
    return digest.hexdigest()


def _reason(error):
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]


def in_one_form(row: dict) -> dict:
    """Convert a row to the form of the stages: `messages`, `prompt` and `completion`, pairs, or `text`.

    Keys with the value null are left out. `conversations` of `from` and `value` (ShareGPT) become `messages`.
    `instruction`, `input` and `output` (Alpaca) become `prompt` and `completion`. If chosen and rejected conversations
    begin with the prompt, it is removed from them. If there is no prompt, their common beginning becomes the prompt.
    Other keys do not change. Raises UserError for keys that change the meaning of a row: tools, images, weights.
    """
    where = row["where"]
    row = {key: value for key, value in row.items() if value is not None}
    refuse_beyond(row, where)
    if "conversations" in row and "messages" not in row:
        row["messages"] = row.pop("conversations")
    for key in ("messages", "prompt", "completion", "chosen", "rejected"):
        if isinstance(row.get(key), list) and row[key] and isinstance(row[key][0], dict):
            row[key] = [_message(message, key, where) for message in row[key]]
    if "instruction" in row and "output" in row and "prompt" not in row:
        given = row.pop("input", "")
        row["prompt"] = row.pop("instruction") + (f"\n\n{given}" if given else "")
        row["completion"] = row.pop("output")
    if "chosen" in row and "rejected" in row:
        _split_pair(row)
    return row


def refuse_beyond(row: dict, where: str, keys: Collection[str] = BEYOND) -> None:
    """Raise UserError if a row has one of `keys`: to ignore it would change what the row means."""
    beyond = [key for key in keys if row.get(key)]
    if beyond:
        hint = "; --chat_template_kwargs sets it for all rows" if "chat_template_kwargs" in beyond else ""
        raise UserError(f"{where}: has {', '.join(beyond)}, which no stage takes: leave the row or the key out{hint}")


def _message(message, key, where):
    if not isinstance(message, dict):
        raise UserError(f"{where}: `{key}` takes objects with `role` and `content`")
    message = {name: value for name, value in message.items() if value is not None}
    beyond = [name for name in BEYOND if message.get(name)]
    if beyond:
        raise UserError(f"{where}: a message of `{key}` has {', '.join(beyond)}, which no stage takes: leave it out")
    if "from" in message and "value" in message:
        role = ROLES.get(str(message["from"]).lower())
        if role is None:
            raise UserError(f"{where}: `{key}` has a message from {message['from']!r}; known are {', '.join(ROLES)}")
        return {"role": role, "content": message["value"]}
    return message


def _split_pair(row):
    """Take the prompt off the conversations (or texts) of a pair that begin with it."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        shared, most = 0, min(len(chosen), len(rejected)) - 1
        while shared < most and chosen[shared] == rejected[shared]:
            shared += 1
        if not shared:
            return
        beginning = chosen[:shared]
        prompt = row.get("prompt", beginning)
        asked = prompt if isinstance(prompt, str) else prompt[-1].get("content") if prompt else None
        if asked == beginning[-1].get("content"):  # the prompt once more, maybe without its system message
            row["prompt"] = beginning
            row["chosen"], row["rejected"] = chosen[shared:], rejected[shared:]
    elif isinstance(chosen, str) and isinstance(rejected, str) and "prompt" not in row:
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
        end = max(chosen.rfind(mark, 0, same) + 1 for mark in " \n")
        if chosen[:end].strip() and chosen[end:].strip() and rejected[end:].strip():
            row["prompt"], row["chosen"], row["rejected"] = chosen[:end], chosen[end:], rejected[end:]


def text_of(value: str | list[dict]) -> str:
    """The plain text of a prompt or a completion (a text, or a list of messages), for reward functions and printing."""
    return value if isinstance(value, str) else "\n".join(m["content"] for m in value)


def plain(prompt: str | list[dict]) -> str:
    """A prompt in lower case with single spaces. Two prompts with the same result count as equal."""
    return " ".join(text_of(prompt).casefold().split())
