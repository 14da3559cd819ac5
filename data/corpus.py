"""Text for language-model training: an embedded corpus, a local file or folder, or a dataset on the hub.

    corpus = load_corpus("shakespeare")
    corpus.train[0]      # {"text": "All's Well That Ends Well\n\nACT I ..."}

A document is a dict of one of three kinds, the same for all documents of a corpus:

    text       {"text": str}                              every token is learnt
    messages   {"messages": [{"role", "content"}, ...]}   what the assistant says is learnt
    prompt     {"prompt": ..., "completion": ...}         the completion is learnt

Prompt and completion are both strings or both lists of messages. Rows with `prompt`, `chosen` and `rejected`, as in
preferences.jsonl, become prompt documents with the chosen completion. If that completion was cut at a length limit,
the document also has `"finish_reason": "length"`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from configs.config import UserError
from data.rows import TABLES, in_one_form, kind_of_file, read_rows
from models.fetch import EMBEDDED_TEXTS, fetch_source

# Whole plays and books are held out, so training sees no line of the works that evaluation reads.
HELDOUT_PLAYS = ("macbeth", "richard-ii", "twelfth-night")
HELDOUT_BOOKS = ("Ruth", "Ecclesiastes", "Jonah", "John", "James")

WITHOUT_A_HUB = (
    f"without a hub there are {', '.join(EMBEDDED_TEXTS)}, any .txt file, any folder of .txt files, and rows with "
    "`text`, `messages`, or `prompt` and `completion` in .jsonl, .json, .csv or .parquet"
)
FINISH_REASONS = ("stop", "length")  # the completion ended with a stop token, or was cut at a length limit
ALLOWED_KEYS = "`text`, `messages`, `prompt` and `completion`, or `prompt`, `chosen` and `rejected`"


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, documents to evaluate on, and the sha256 of both for the run's manifest."""

    name: str
    train: list[dict]
    heldout: list[dict]  # may be empty: one single row, or heldout_fraction 0
    kind: str  # "text", "messages" or "prompt"
    sha256: str


def load_corpus(source: str | Path, heldout_fraction: float = 0.05) -> Corpus:
    """Load a corpus by path, embedded name or hub id, tried in that order. A hub id may end in `:CONFIGURATION`.

    heldout_fraction: share of the documents that is held out if the source has no held-out part of its own. The
        documents are chosen by a hash of their beginning. Of a single text, the last part is held out. The option has
        no effect on the plays and the Bible, which hold out whole works, and on a hub dataset with a validation or
        test split.
    Raises UserError that names the file, the line, the key, and what is allowed.
    """
    name = str(source)
    if not 0 <= heldout_fraction < 1:
        raise UserError(f"heldout_fraction is {heldout_fraction}; it takes a share from 0 to below 1")
    path = Path(source).expanduser()
    heldout = None
    if path.exists():
        documents = _read_path(path)
    elif name in EMBEDDED_TEXTS:
        documents, heldout = READERS[name](fetch_source(name))
    elif path.suffix == ".txt" or kind_of_file(path) or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such file or folder (looked from {Path.cwd()})")
    else:
        documents, heldout = _read_hub(name)

    if not documents:
        raise UserError(f"{name} holds no text to train on")
    if heldout is None:
        documents, heldout = split_heldout(documents, heldout_fraction)
    digest = hashlib.sha256()
    for part in (documents, heldout):
        for document in part:
            digest.update(json.dumps(document, sort_keys=True).encode() + b"\n")
        digest.update(b"\n")
    return Corpus(name, documents, heldout, _kind(documents[0]), digest.hexdigest())


def split_heldout(documents: list[dict], fraction: float) -> tuple[list[dict], list[dict]]:
    """Split documents into (train, heldout). Both keep the given order; the split does not depend on the order.

    Documents with the same beginning (equal texts, or several completions of one prompt) stay on one side. At least one
    document is held out, unless `fraction` is 0 or there is only one document. A single text is cut, if possible at the
    end of a line.
    """
    if fraction == 0:
        return documents, []
    if len(documents) == 1:
        return _cut(documents[0]["text"], fraction) if "text" in documents[0] else (documents, [])

    groups: dict[bytes, list[int]] = {}
    for i, document in enumerate(documents):
        groups.setdefault(hashlib.sha256(_beginning(document).encode()).digest(), []).append(i)
    if len(groups) == 1:  # all begin alike: then those that are equal to the end are a group
        groups = {}
        for i, document in enumerate(documents):
            groups.setdefault(hashlib.sha256(json.dumps(document, sort_keys=True).encode()).digest(), []).append(i)
    held: set[int] = set()
    for key in sorted(groups)[:-1]:  # one group is always left for training
        if len(held) >= max(1, round(len(documents) * fraction)):
            break
        held.update(groups[key])
    return (
        [document for i, document in enumerate(documents) if i not in held],
        [document for i, document in enumerate(documents) if i in held],
    )


def _beginning(document):
    """The part of a document before its first completion: the prompt, or the whole of a text."""
    if "text" in document:
        return document["text"]
    if "prompt" in document:
        return json.dumps(document["prompt"])
    turns = []
    for message in document["messages"]:
        if message["role"] == "assistant":
            break
        turns.append(message)
    return json.dumps(turns)


def _cut(text, fraction):
    cut = len(text) - math.ceil(len(text) * fraction)
    nearest = len(text) - 2 * math.ceil(len(text) * fraction)  # no line ends between here and the cut: cut at a space
    for boundary in ("\n", " "):
        found = text.rfind(boundary, max(nearest, 0), cut)
        if found > 0:
            cut = found + 1
            break
    train, heldout = text[:cut], text[cut:]
    if not train.strip() or not heldout.strip():
        return [{"text": text}], []
    return [{"text": train}], [{"text": heldout}]


def _read_path(path):
    if path.is_dir() and not _holds_rows(path):
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise UserError(f"{path} is a folder without .txt files, and none of `save_to_disk`; {WITHOUT_A_HUB}")
        return [_read_text(file) for file in files]
    if path.suffix == ".txt":
        return [_read_text(path)]
    if path.is_dir() or kind_of_file(path):
        return _documents(read_rows(path)[0], path)
    raise UserError(f"{path}: text comes as .txt, a folder of .txt, or rows as {', '.join(TABLES)}, also compressed")


def _holds_rows(folder):
    """Whether `save_to_disk` of the datasets library wrote this folder."""
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


def _read_text(path):
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it first, e.g. with iconv") from error
    if not text.strip():
        raise UserError(f"{path} is empty")
    return {"text": text}


def _documents(rows, name):
    documents = []
    for row in rows:
        document = as_document(row, row["where"])
        if documents and _form(document) != _form(documents[0]):
            raise UserError(
                f"{row['where']} is of the kind {_form(document)}, the rows before it are {_form(documents[0])}; "
                "a file holds one kind"
            )
        documents.append(document)
    if not documents:
        raise UserError(f"{name} is empty; it takes rows with {ALLOWED_KEYS}")
    return documents


def as_document(row: dict, where: str) -> dict:
    """The document in a row, without other keys. `where` names the row in errors. Raises UserError for a bad row."""
    row = in_one_form({**row, "where": where})
    if "messages" in row:
        messages = _messages(row["messages"], "messages", where)
        if all(message["role"] != "assistant" for message in messages):
            raise UserError(f"{where}: `messages` has no message of the assistant, so there is nothing to learn")
        return {"messages": messages}
    for key in ("completion", "chosen"):
        if "prompt" in row and key in row:
            reason = finish_reason_of(row, key, where)
            finish = {} if reason == "stop" else {"finish_reason": reason}
            kinds = {type(row["prompt"]), type(row[key])}
            if kinds == {str}:
                prompt = _string(row["prompt"], "prompt", where, may_be_empty=True)
                return {"prompt": prompt, "completion": _string(row[key], key, where), **finish}
            if kinds == {list}:
                prompt, completion = (_messages(row[name], name, where) for name in ("prompt", key))
                return {"prompt": prompt, "completion": completion, **finish}
            raise UserError(f"{where}: `prompt` and `{key}` must both be strings or both be lists of messages")
    if "text" in row:
        return {"text": _string(row["text"], "text", where)}
    given = ", ".join(key for key in row if key != "where") or "(none)"
    raise UserError(f"{where} has the keys {given}; it takes {ALLOWED_KEYS}")


def finish_reason_of(row: dict, key: str, where: str) -> str:
    """The finish_reason of the completion under `key`, from the row's `KEY_finish_reason` (`chosen_finish_reason`).

    "stop": the completion ended with a stop token; this is also the default. "length": it was cut at a length limit.
    `KEY_finish` is the older name of the key. Raises UserError for another value.
    """
    name = f"{key}_finish_reason"
    reason = row.get(name, row.get(f"{key}_finish", "stop"))
    if reason not in FINISH_REASONS:
        raise UserError(f"{where}: `{name}` is {reason!r}, it takes stop or length")
    return reason


def _string(value, key, where, may_be_empty=False):
    if not isinstance(value, str):
        raise UserError(f"{where}: `{key}` has the type {type(value).__name__}, it takes a string")
    if not value.strip() and not may_be_empty:
        raise UserError(f"{where}: `{key}` is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: `{key}` has half of a surrogate pair at character {error.start}") from error
    return value


def _messages(value, key, where):
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: `{key}` takes a list of messages, each with `role` and `content`")
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise UserError(f"{where}: `{key}`[{i}] takes an object with `role` and `content`")
        inside = f"{where}: `{key}`[{i}]"
        role = _string(message["role"], "role", inside)
        messages.append({"role": role, "content": _string(message["content"], "content", inside, may_be_empty=True)})
    return messages


def _kind(document):
    return next(kind for kind in ("text", "messages", "prompt") if kind in document)


def _form(document):
    """The kind of a document; for a prompt, also whether it is a string or a list. All rows of a file have one form."""
    kind = _kind(document)
    if kind != "prompt":
        return kind
    return "prompt (strings)" if isinstance(document["prompt"], str) else "prompt (messages)"


def _read_hub(name):
    import datasets
    from huggingface_hub.utils import logging

    print(f"{name}: loading from the hub", flush=True)
    hub_id, _, configuration = name.partition(":")
    bars, verbosity = not datasets.are_progress_bars_disabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    try:
        splits = datasets.load_dataset(hub_id, configuration or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # no network, no such dataset, a configuration that has to be chosen, a file that cannot be read
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name} is no local path and no embedded text, and cannot be had from the hub: {reason}\n{WITHOUT_A_HUB}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()

    train = next((split for split in splits if split.startswith("train")), None)
    if train is None:
        raise UserError(f"{name} has the splits {', '.join(splits)}, and none called train")
    held = next((split for kind in ("valid", "test") for split in splits if split.startswith(kind)), None)
    documents = _rows(splits[train], f"{name}, split {train}")
    return documents, _rows(splits[held], f"{name}, split {held}") if held else None


def _rows(split, where):
    """The documents of a split. Rows with an empty `text` are left out: hub datasets use them as separators."""
    only_text = "text" in split.column_names and "messages" not in split.column_names
    return [
        as_document(row, f"{where}, row {i}")
        for i, row in enumerate(split)
        if not (only_text and row["text"] is not None and not row["text"].strip())
    ]


def _shakespeare(folder):
    """38 plays in Markdown, each one document of plain text."""
    train, heldout = [], []
    for path in sorted(folder.rglob("*.md"), key=lambda path: path.stem):
        text = plain_play(path.read_text(encoding="utf-8"))
        (heldout if path.stem in HELDOUT_PLAYS else train).append({"text": text})
    return train, heldout


def plain_play(markdown: str) -> str:
    """A play as plain text: each speaker on a separate line, stage directions in [brackets], one line per verse."""
    text = re.sub(r"[ \t]+$", "", markdown, flags=re.M)
    text = re.sub(r"^LOVE'S LABOURS LOST\n", "", text, flags=re.M)  # a running head left in that play
    text = re.sub(r"^#+ |\*\*|\\", "", text, flags=re.M)
    # stage directions: _Exit_, *Exit.*, _[Aside]_, and some with a missing mark
    direction = r"[_*]*\[([^\]_*]*)\][_*]*|[_*]+([^_*\[\]]+)[_*]+|\[([^\]_*\n]*)[_*]"
    text = re.sub(direction, lambda found: f"[{''.join(filter(None, found.groups())).strip()}]", text)
    text = text.replace(" []", "").replace("& c.", "&c.")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _bible(folder):
    """66 books, each one document: its name, then the chapters with one verse per line. Footnotes in braces are cut."""
    names = {row[0]: row[1] for row in _csv(folder / "key_english.csv.gz")}
    books = {}
    for _, book, chapter, _, text in _csv(folder / "t_web.csv.gz"):
        verse = re.sub(r"\{[^}]*\}|&gt;|[\[\]]", "", text)  # footnotes, marks of poetry, brackets round supplied words
        verse = re.sub(r" +", " ", verse).strip()
        books.setdefault(names[book], {}).setdefault(chapter, []).append(verse)
    train, heldout = [], []
    for name, chapters in books.items():
        parts = [f"Chapter {chapter}\n\n" + "\n".join(verses) for chapter, verses in chapters.items()]
        (heldout if name in HELDOUT_BOOKS else train).append({"text": "\n\n".join([name, *parts]) + "\n"})
    return train, heldout


def _csv(path):
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        next(rows)  # the header
        return list(rows)


def _openwebtext(folder):
    """1,000 passages. The file has 11 versions of each: "0" is the original, the others have shuffled sentences.

    Only the original is used. The others are no natural text, and would bring held-out passages into training.
    """
    passages = {}
    with (folder / "owt_5.jsonl").open(encoding="utf-8") as file:
        for line in file:
            passages[json.loads(line)["0"]] = None  # a dict keeps the order and drops duplicates
    return [{"text": passage} for passage in passages], None


READERS = {"shakespeare": _shakespeare, "bible-web": _bible, "openwebtext-sample": _openwebtext}
