"""Documents from embedded corpora, local files and hub datasets, and what is kept from training."""

import json
import random

import pytest

from configs.config import UserError
from data.corpus import HELDOUT_BOOKS, load_corpus, plain_play, split_heldout

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(documents):
    return [document["text"] for document in documents]


def test_shakespeare_keeps_three_whole_plays_from_training():
    corpus = load_corpus("shakespeare")
    assert (corpus.name, corpus.kind, len(corpus.train), len(corpus.heldout)) == ("shakespeare", "text", 35, 3)
    assert [text.splitlines()[0] for text in texts(corpus.heldout)] == ["Macbeth", "Richard II", "Twelfth Night"]
    assert not any("Is this a dagger" in text for text in texts(corpus.train))
    everything = "".join(texts(corpus.train + corpus.heldout))
    assert 4_950_000 < len(everything) < 5_000_000
    assert not set("_*#\\\t\r") & set(everything) and "\n\n\n" not in everything
    assert everything.count("[") == everything.count("]") and "[[" not in everything
    hamlet = next(text for text in texts(corpus.train) if text.startswith("Hamlet\n"))
    beginning = (
        "Hamlet\n\nACT I\n\nSCENE I. Elsinore. A platform before the castle.\n\n"
        "[FRANCISCO at his post. Enter to him BERNARDO]\n\nBERNARDO\nWho's there?\n\nFRANCISCO\nNay, answer me"
    )
    assert hamlet.startswith(beginning)


def test_a_play_in_markdown_becomes_plain_text():
    markdown = (
        "# Title\n\n## ACT I\n\n_Enter A and\nB_\n\n**A**  \n_\\[Aside]_  \nLine one,  \n\\--line two, & c.\n\n\n\n"
        "**B**  \n\\[To A]_  \nNo. *Exit.*\n\n_Burthen _\\[within_\n"
    )
    assert plain_play(markdown) == (
        "Title\n\nACT I\n\n[Enter A and\nB]\n\nA\n[Aside]\nLine one,\n--line two, &c.\n\n"
        "B\n[To A]\nNo. [Exit.]\n\n[Burthen][within]\n"
    )


def test_the_bible_keeps_five_whole_books_from_training():
    corpus = load_corpus("bible-web")
    assert [text.splitlines()[0] for text in texts(corpus.heldout)] == list(HELDOUT_BOOKS)
    assert len(corpus.train) == 61
    beginning = "Genesis\n\nChapter 1\n\nIn the beginning God created the heavens and the earth.\nNow the earth was"
    assert corpus.train[0]["text"].startswith(beginning)
    everything = "".join(texts(corpus.train + corpus.heldout))
    assert not set("{}[]&") & set(everything) and "  " not in everything


def test_openwebtext_takes_each_passage_once_and_unshuffled():
    """The file holds each passage 11 times, 10 of them with shuffled sentences: those would leak into training."""
    corpus = load_corpus("openwebtext-sample")
    assert (len(corpus.train), len(corpus.heldout)) == (950, 50)
    assert corpus.train[1]["text"].startswith("Russian President Vladimir Putin calls the United States a threat")
    paragraphs = [text for text in texts(corpus.train + corpus.heldout) if "\n\n" in text]
    assert len(paragraphs) == 886  # as the passages were written; of the shuffled versions 509 keep one
    longest = [max(text.split(". "), key=len) for text in texts(corpus.heldout)]
    training = "\n".join(texts(corpus.train))
    assert not [sentence for sentence in longest if sentence in training]


def test_one_text_is_cut_near_the_end_of_a_line(tmp_path):
    lines = [f"line {i:04d} of a text\n" for i in range(1010)]
    path = tmp_path / "a.txt"
    path.write_text("".join(lines))
    corpus = load_corpus(path)
    train, heldout = corpus.train[0]["text"], corpus.heldout[0]["text"]
    assert train + heldout == "".join(lines)
    assert train.endswith("\n") and heldout.startswith("line 0959")  # 5 % are 50 and a half of the lines
    assert load_corpus(path, heldout_fraction=0).heldout == []


def test_one_line_is_cut_at_a_space_and_one_word_anywhere(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("head\n" + "word " * 400)
    train, heldout = (part[0]["text"] for part in (load_corpus(path).train, load_corpus(path).heldout))
    assert train.endswith(" ") and 100 <= len(heldout) <= 110
    path.write_text("x" * 1000)
    assert load_corpus(path).heldout == [{"text": "x" * 50}]
    path.write_text("x")
    assert load_corpus(path).train == [{"text": "x"}] and load_corpus(path).heldout == []


def test_a_byte_order_mark_and_windows_lines_leave_no_trace(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo\r\n".encode())
    assert load_corpus(path, heldout_fraction=0).train == [{"text": "one\ntwo\n"}]


def test_a_folder_has_a_document_a_file(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    corpus = load_corpus(tmp_path, heldout_fraction=0)
    assert texts(corpus.train) == ["text of a.txt", "text of b.txt", "text of sub/c.txt"]


def test_the_split_keeps_its_size_and_does_not_hang_on_the_order():
    documents = [{"text": f"document {i}"} for i in range(200)]
    train, heldout = split_heldout(documents, 0.05)
    assert len(heldout) == 10 and len(train) == 190
    shuffled = random.Random(0).sample(documents, 200)
    assert sorted(texts(split_heldout(shuffled, 0.05)[1])) == sorted(texts(heldout))
    assert train == [document for document in documents if document not in heldout]  # the order is kept
    few = split_heldout(documents[:3], 0.05)
    assert [len(part) for part in few] == [2, 1]
    assert split_heldout(documents, 0) == (documents, [])


@pytest.mark.parametrize("form", ["text", "prompt", "messages"])
def test_what_begins_alike_stays_on_one_side(form):
    def document(i, j):
        if form == "text":
            return {"text": f"question {i}"}
        if form == "prompt":
            return {"prompt": f"question {i}", "completion": f"answer {j}"}
        turns = [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": f"answer {j}"}]
        return {"messages": turns + [{"role": "user", "content": f"and {j}?"}, TALK[1]]}

    def question(document):
        return document.get("text") or document.get("prompt") or document["messages"][0]["content"]

    train, heldout = split_heldout([document(i, j) for i in range(20) for j in range(4)], 0.2)
    assert (len(train), len(heldout)) == (64, 16)
    assert not {question(row) for row in train} & {question(row) for row in heldout}


def test_rows_that_all_begin_alike_are_split_one_by_one():
    rows = [{"prompt": "Q", "completion": str(i)} for i in range(5)]
    train, heldout = split_heldout(rows, 0.05)
    assert len(heldout) == 1 and heldout[0] not in train
    assert train == [row for row in rows if row not in heldout]


@pytest.mark.parametrize(
    ("row", "kind", "document"),
    [
        ({"text": "One.", "id": 3}, "text", {"text": "One."}),
        ({"messages": TALK}, "messages", {"messages": TALK}),
        ({"messages": TALK, "prompt": "Hi"}, "messages", {"messages": TALK}),
        ({"prompt": "1 + 1 =", "completion": " 2"}, "prompt", {"prompt": "1 + 1 =", "completion": " 2"}),
        ({"prompt": TALK[:1], "completion": TALK[1:]}, "prompt", {"prompt": TALK[:1], "completion": TALK[1:]}),
        (
            {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": TALK[:1], "chosen_score": 1.0},
            "prompt",
            {"prompt": TALK[:1], "completion": TALK[1:]},
        ),
        ({"prompt": "Q", "chosen": "yes", "rejected": "no"}, "prompt", {"prompt": "Q", "completion": "yes"}),
    ],
)
def test_rows_of_a_jsonl(tmp_path, row, kind, document):
    corpus = load_corpus(write(tmp_path / "a.jsonl", [row]))
    assert corpus.kind == kind
    if kind != "text":  # one single row is for training; one single text is cut
        assert (corpus.train, corpus.heldout) == ([document], [])
    else:
        assert corpus.train[0]["text"] + "".join(texts(corpus.heldout)) == document["text"]


def test_lines_of_a_jsonl_end_at_newlines_only(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b"}\r\n\n{"text": "c"}'.encode())
    assert texts(load_corpus(path, heldout_fraction=0).train) == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (b'{"txt": "a"}', r"line 2 has the keys txt; it takes `text`, `messages`, `prompt` and `completion`, or"),
        (b'{"prompt": "a"}', r"line 2 has the keys prompt"),
        (b'{"prompt": "a", "completion": "b"}', r"line 2 is of the kind prompt \(strings\), .* are text"),
        (b'{"text": 3}', r"line 2: `text` has the type int, it takes a string"),
        (b'{"text": " "}', r"line 2: `text` is empty"),
        (b'{"text": "a"', r"a\.jsonl line 2: not valid JSON \(.* column 13\); it takes one object a line"),
        (b'["a"]', r"a\.jsonl line 2: must be an object with keys, not '\[\"a\"\]'"),
        (b'{"text": "\xff"}', r"a\.jsonl line 2: not UTF-8 text \(byte 10 of the line\)"),
        (b'{"text": "a\\ud83d"}', r"line 2: `text` has half of a surrogate pair at character 1"),
        (b'{"messages": []}', r"line 2: `messages` takes a list of messages"),
        (b'{"messages": [{"role": "user"}]}', r"line 2: `messages`\[0\] takes an object with `role` and `content`"),
        (
            b'{"messages": [{"role": "user", "content": null}]}',
            r"line 2: `messages`\[0\] takes an object with `role` and `content`",
        ),
        (b'{"messages": [{"role": "user", "content": "a"}]}', r"line 2: `messages` has no message of the assistant"),
        (b'{"prompt": "a", "chosen": [], "rejected": []}', r"line 2: `prompt` and `chosen` must both be strings or"),
        (b'{"prompt": "a", "completion": ""}', r"line 2: `completion` is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, second, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + second + b"\n")
    with pytest.raises(UserError, match=message) as error:
        load_corpus(path)
    assert str(path) in str(error.value)


def test_strings_and_messages_are_not_mixed(tmp_path):
    rows = [{"prompt": TALK[:1], "completion": TALK[1:]}, {"prompt": "a", "completion": "b"}]
    with pytest.raises(UserError, match=r"line 2 is of the kind prompt \(strings\), .* are prompt \(messages\)"):
        load_corpus(write(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", b"abc\xe9", r"is not UTF-8 \(byte 3\)"),
        ("a.jsonl", b"\n", "is empty"),
        ("a.md", b"a", r"text comes as \.txt, a folder of \.txt, or rows as \.csv, .*, \.jsonl"),
        ("sub/a.md", b"a", r"is a folder without \.txt files"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_corpus(path.parent if "/" in name else path)
    assert str(path.parent if "/" in name else path) in str(error.value)


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "some/missing.jsonl"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(UserError, match="no such file or folder"):
        load_corpus(name)


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5])
def test_the_share_is_a_share(tmp_path, fraction):
    with pytest.raises(UserError, match="heldout_fraction is"):
        load_corpus(tmp_path, heldout_fraction=fraction)


def test_the_sha256_is_that_of_the_data(tmp_path):
    rows = [{"text": f"text {i}"} for i in range(10)]
    first = load_corpus(write(tmp_path / "a.jsonl", rows))
    same = load_corpus(write(tmp_path / "b.jsonl", [{**row, "id": 1} for row in rows]))
    other = load_corpus(write(tmp_path / "c.jsonl", [*rows[:-1], {"text": "text"}]))
    split = load_corpus(tmp_path / "a.jsonl", heldout_fraction=0.5)
    assert len(first.sha256) == 64 and first.sha256 == same.sha256
    assert len({first.sha256, other.sha256, split.sha256}) == 3


@pytest.fixture
def hub(monkeypatch):
    """Let the hub hold what the test puts into the dict: {split: rows}, or an exception."""
    import datasets

    held = {}

    def load_dataset(name, configuration):
        answer = held[(name, configuration)]
        if isinstance(answer, Exception):
            raise answer
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in answer.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return held


def test_a_hub_dataset_and_its_own_heldout_split(hub):
    rows = [{"text": text} for text in ("one", "", "two", " \n", "three")]
    hub["someone/texts", None] = {"train": rows, "test": [{"text": "t"}], "validation": [{"text": "v"}]}
    corpus = load_corpus("someone/texts")
    assert texts(corpus.train) == ["one", "two", "three"] and texts(corpus.heldout) == ["v"]
    chats = [{"messages": TALK, "prompt": "Hi"}]
    hub["someone/chats", "small"] = {"train_sft": chats * 2, "test_sft": chats}
    corpus = load_corpus("someone/chats:small")
    assert corpus.train == [{"messages": TALK}] * 2 and corpus.heldout == [{"messages": TALK}]
    hub["someone/bare", None] = {"train": [{"text": f"text {i}"} for i in range(40)]}
    assert [len(part) for part in (load_corpus("someone/bare").train, load_corpus("someone/bare").heldout)] == [38, 2]


def test_what_is_wrong_with_a_hub_dataset(hub):
    hub["a/b", None] = ConnectionError("Couldn't reach 'a/b' on the Hub\nmore")
    with pytest.raises(UserError, match=r"a/b is no local .* Couldn't reach 'a/b' on the Hub\n.* shakespeare, bible"):
        load_corpus("a/b")
    hub["a/c", None] = {"eval": [{"text": "a"}]}
    with pytest.raises(UserError, match="a/c has the splits eval, and none called train"):
        load_corpus("a/c")
    hub["a/d", None] = {"train": [{"question": "a", "answer": "b"}]}
    with pytest.raises(UserError, match="a/d, split train, row 0 has the keys question, answer; it takes `text`"):
        load_corpus("a/d")
    hub["a/e", None] = {"train": [{"text": " "}]}
    with pytest.raises(UserError, match="a/e holds no text"):
        load_corpus("a/e")
