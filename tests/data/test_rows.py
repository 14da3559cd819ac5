"""Rows in the forms in which users of this field have them: taken whole, or refused, or counted as left out."""

import gzip
import json

import datasets
import pytest

from configs.config import UserError
from data.corpus import load_corpus
from data.pairs import load_pairs, split_by_prompt, split_prompt
from data.rows import in_one_form, read_rows
from models.loader import load_tokenizer

ROWS = [{"prompt": f"Say {i}", "completion": f"It is {i}."} for i in range(12)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(kind, folder):
    if kind == "jsonl":
        return jsonl(folder / "a.jsonl", ROWS)
    if kind == "json":
        (folder / "a.json").write_text(json.dumps(ROWS))
        return folder / "a.json"
    if kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in ROWS).encode()))
        return folder / "a.jsonl.gz"
    data = datasets.Dataset.from_list(ROWS)
    if kind == "csv":
        data.to_csv(folder / "a.csv")
        return folder / "a.csv"
    if kind == "parquet":
        data.to_parquet(folder / "a.parquet")
        return folder / "a.parquet"
    if kind == "splits":
        data = datasets.DatasetDict({"train": data})
    data.save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "csv", "parquet", "folder", "splits"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    path = write(kind, tmp_path)
    rows, digest = read_rows(path)
    assert [{k: row[k] for k in ("prompt", "completion")} for row in rows] == ROWS and digest
    assert all(row["where"].endswith((f"line {i}", f"row {i}")) for i, row in enumerate(rows, 1))
    corpus = load_corpus(path, 0.2)
    assert corpus.kind == "prompt" and len(corpus.train) + len(corpus.heldout) == 12 and corpus.heldout


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
         {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}),
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, {"prompt": "Add.\n\n1 2", "completion": "3"}),
        ({"instruction": "Sing.", "input": "", "output": "La"}, {"prompt": "Sing.", "completion": "La"}),
        ({"text": "T", "messages": None}, {"text": "T"}),
        ({"messages": [{"role": "user", "content": "Q", "tool_calls": None}]},
         {"messages": [{"role": "user", "content": "Q"}]}),
        ({"question": "Q", "answer": 4}, {"question": "Q", "answer": 4}),
    ],
)  # fmt: skip
def test_other_forms_become_the_one_form(row, expected):
    found = in_one_form({**row, "where": "a.jsonl line 1"})
    assert found.pop("where") == "a.jsonl line 1" and found == expected


def message(role, content):
    return {"role": role, "content": content}


USER, GOOD, BAD = message("user", "Q"), message("assistant", "good"), message("assistant", "bad")


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, ([USER], [GOOD], [BAD])),  # UltraFeedback
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, ([USER], [GOOD], [BAD])),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, ([USER], [GOOD], [BAD])),
        ({"chosen": "Human: Q\n\nAssistant: good one", "rejected": "Human: Q\n\nAssistant: bad"},
         ("Human: Q\n\nAssistant: ", "good one", "bad")),
    ],
)  # fmt: skip
def test_the_prompt_of_a_pair_is_what_both_sides_begin_with(row, expected):
    assert split_prompt({**row, "where": "a line 1"}) == expected


@pytest.mark.parametrize(
    "row, named",
    [
        ({"messages": [USER, GOOD], "tools": [{"name": "f"}]}, "has tools"),
        ({"messages": [USER, {**GOOD, "tool_calls": [1]}]}, "a message of `messages` has tool_calls"),
        ({"prompt": "Q", "completion": "A", "images": ["x.png"]}, "has images"),
        ({"messages": [USER, {**GOOD, "weight": 1}]}, "has weight"),
        ({"conversations": [{"from": "observer", "value": "Q"}]}, "message from 'observer'"),
    ],
)
def test_what_changes_the_meaning_of_a_row_is_refused(row, named):
    with pytest.raises(UserError, match=f"x line 3.*{named}"):
        in_one_form({**row, "where": "x line 3"})


def test_pairs_whose_sides_are_equal_are_counted_and_left_out(tmp_path):
    tokenizer = load_tokenizer("tiny-llama")
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "a" if i < 4 else "b"} for i in range(6)]
    pairs, counts, _ = load_pairs(jsonl(tmp_path / "a.jsonl", rows), tokenizer, 64)
    assert len(pairs) == 2 and counts["equal"] == 4
    with pytest.raises(UserError, match="in 4 chosen and rejected are equal"):
        load_pairs(jsonl(tmp_path / "b.jsonl", rows[:4]), tokenizer, 64)


@pytest.mark.parametrize("seed", range(12))
def test_a_held_out_split_is_never_empty_by_chance(seed):
    rows = [{"text": {"prompt": f"p{i}"}} for i in range(3)]
    train, heldout = split_by_prompt(rows, 0.1, seed)  # of three prompts, mostly none falls below a tenth
    assert train and heldout and len(train) + len(heldout) == 3
