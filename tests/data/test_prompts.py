"""Prompts from files of all forms, with their columns."""

import gzip
import json

import pytest

from configs.config import UserError
from data.prompts import prompts_and_hash, read_prompts
from runtime.files import sha256_file

ROWS = [{"question": "2 + 2?", "answer": "4"}, {"question": "3 + 3?", "answer": "6"}]
READ = [row | {"prompt": row["question"]} for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write_csv(path):
    path.write_text("question,answer\n2 + 2?,'4'\n3 + 3?,'6'\n".replace("'", ""))


def write_parquet(path):
    import datasets

    datasets.Dataset.from_list(ROWS).to_parquet(str(path))


def write_folder(path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))


@pytest.mark.statement("prompt-columns")
@pytest.mark.parametrize(
    "name, write",
    [
        ("qa.jsonl", lambda path: path.write_text(LINES)),
        ("qa.json", lambda path: path.write_text(json.dumps(ROWS))),
        ("lines.json", lambda path: path.write_text(LINES)),
        ("qa.jsonl.gz", lambda path: path.write_bytes(gzip.compress(LINES.encode()))),
        ("qa.csv", write_csv),
        ("qa.parquet", write_parquet),
        ("qa", write_folder),
    ],
)
def test_a_column_of_rows_in_every_form_is_the_prompt_and_the_others_stay(name, write, tmp_path):
    write(tmp_path / name)
    rows, digest = prompts_and_hash(tmp_path / name, column="question")
    assert [row | {"answer": str(row["answer"])} for row in rows] == READ  # a CSV's numbers are numbers
    if (tmp_path / name).is_file():
        assert digest == sha256_file(tmp_path / name)
    with pytest.raises(
        UserError, match=f"{name}.* 1: has no column 'prompt'. Its columns are: question, answer. --prompt"
    ):
        read_prompts(tmp_path / name)


@pytest.mark.statement("prompt-columns")
def test_the_column_wins_over_a_prompt_beside_it(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "no", "ask": "yes", "instruction": "no", "output": "no"}\n')
    assert [row["prompt"] for row in read_prompts(tmp_path / "x.jsonl", column="ask")] == ["yes"]


def test_a_file_with_splits_takes_a_column_too(tmp_path):
    rows = [{"id": str(i), "ask": f"Say {i}.", "split": split} for i, split in enumerate(("train", "heldout"))]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    assert [row["prompt"] for row in read_prompts(tmp_path / "x.json", "train", column="ask")] == ["Say 0."]
    with pytest.raises(UserError, match="lacks prompt"):
        read_prompts(tmp_path / "x.json", "train")


USER, SYSTEM = {"role": "user", "content": "2 + 2?"}, {"role": "system", "content": "Be short."}


@pytest.mark.statement("prompt-columns")
@pytest.mark.parametrize(
    "row, prompt",
    [
        ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"messages": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"messages": [USER, {"role": "assistant", "content": "4"}]}, [USER]),
        ({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}, [USER]),
        ({"prompt": [{"from": "human", "value": "2 + 2?"}]}, [USER]),
        ({"instruction": "Add.", "input": "2 + 2", "output": "4"}, "Add.\n\n2 + 2"),
        ({"prompt": "2 + 2?", "completion": "4"}, "2 + 2?"),
        ({"chosen": [USER, {"role": "assistant", "content": "4"}],
          "rejected": [USER, {"role": "assistant", "content": "5"}]}, [USER]),
        ({"prompt": "2 + 2?", "weight": 2.5}, "2 + 2?"),
    ],
)  # fmt: skip
def test_rows_of_other_forms_give_their_prompt_and_keep_their_columns(row, prompt, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    [found] = read_prompts(tmp_path / "x.jsonl")
    assert found == row | {"prompt": prompt}


@pytest.mark.parametrize("more", [{"tools": [{"name": "add"}]}, {"images": ["a.png"]}])
def test_what_changes_the_meaning_of_a_prompt_is_refused(more, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "2 + 2?"} | more) + "\n")
    with pytest.raises(UserError, match=f"x.jsonl line 1: has {next(iter(more))}, which no stage takes"):
        read_prompts(tmp_path / "x.jsonl")


def test_lines_of_text_have_no_columns(tmp_path):
    (tmp_path / "x.txt").write_text("2 + 2?\n")
    assert read_prompts(tmp_path / "x.txt") == [{"prompt": "2 + 2?"}]
    with pytest.raises(UserError, match="prompt_column = 'ask'.* has lines of text, and no columns"):
        read_prompts(tmp_path / "x.txt", column="ask")
