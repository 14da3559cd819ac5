"""Preference rows as token ids: boundaries, truncation, and rows that would teach nothing."""

import hashlib
import json

import pytest

from configs.config import UserError
from data.blocks import make_blocks
from data.corpus import load_corpus
from data.pairs import load_groups, load_pairs, split_by_prompt
from models.loader import load_tokenizer
from models.tokens import prompt_ids


def write(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["Say the", "Say the ", "Say th"])
@pytest.mark.statement("same-prompt-ids")
def test_prompt_ids_are_the_same_in_chosen_and_rejected_where_the_boundary_could_merge(tmp_path, prompt):
    """With SmolLM2's merges: tokenised in one piece, "Say th" + "ere" would be other tokens than "Say th"."""
    tokenizer = load_tokenizer("smollm2-135m")
    tokenizer.chat_template = None
    path = write(tmp_path, {"prompt": prompt, "chosen": "ere it is", "rejected": " there"})
    [pair], _, _ = load_pairs(path, tokenizer, 64)
    alone = tokenizer(prompt).input_ids
    assert pair["prompt"] == alone == prompt_ids(tokenizer, prompt)
    if prompt == "Say th":
        assert tokenizer(prompt + "ere it is").input_ids[: len(alone)] != alone  # the danger is real
    for key in ("chosen", "rejected"):
        assert tokenizer.decode(pair[key][:-1]) == {"chosen": "ere it is", "rejected": " there"}[key]
        assert pair[key][-1] == tokenizer.eos_token_id


@pytest.mark.statement("same-prompt-ids")
def test_prompt_ids_stay_the_same_when_one_answer_is_longer_and_the_prompt_is_cut(tmp_path):
    tokenizer = load_tokenizer("tiny-gpt2")  # one id a byte, no template
    path = write(tmp_path, {"prompt": "0123456789", "chosen": "abcde", "rejected": "x"})
    [pair], counts, _ = load_pairs(path, tokenizer, 12)
    assert tokenizer.decode(pair["prompt"]) == "456789"  # 12 - 5 letters - the stop token
    assert tokenizer.decode(pair["chosen"][:-1]) == "abcde" and tokenizer.decode(pair["rejected"][:-1]) == "x"
    assert counts == {"dropped": 0, "cut": 1, "equal": 0}


@pytest.mark.statement("truncation")
def test_truncation_never_erases_a_completion(tmp_path):
    tokenizer = load_tokenizer("tiny-gpt2")
    rows = [{"prompt": "p" * 30, "chosen": "abcde", "rejected": "fgh"}, {"prompt": "p", "chosen": "a", "rejected": "b"},
            {"prompt": "p", "chosen": "c" * 20, "rejected": "b"}]  # fmt: skip
    kept, counts, _ = load_pairs(write(tmp_path, *rows), tokenizer, 12, "left")
    assert [tokenizer.decode(p["chosen"]) for p in kept] == ["abcde<|endoftext|>", "a<|endoftext|>"]
    assert [len(p["prompt"]) for p in kept] == [6, 1] and counts == {"dropped": 1, "cut": 1, "equal": 0}
    kept, counts, _ = load_pairs(write(tmp_path, *rows), tokenizer, 12, "drop")
    assert [tokenizer.decode(p["chosen"]) for p in kept] == ["a<|endoftext|>"]
    assert counts == {"dropped": 2, "cut": 0, "equal": 0}


def test_a_pair_whose_completions_are_equal_is_left_out_and_counted(tmp_path):
    tokenizer = load_tokenizer("tiny-llama")
    rows = [{"prompt": "p", "chosen": "a", "rejected": "a"}, {"prompt": "p", "chosen": "a", "rejected": "b"}]
    [pair], counts, _ = load_pairs(write(tmp_path, *rows), tokenizer, 64)
    assert tokenizer.decode(pair["rejected"][:-1]) == "b" and counts == {"dropped": 0, "cut": 0, "equal": 1}
    with pytest.raises(UserError, match="of 1 rows 0 are longer than max_length = 64, and in 1 chosen and rejected"):
        load_pairs(write(tmp_path, rows[0]), tokenizer, 64)


@pytest.mark.statement("empty-completion")
def test_an_empty_completion_is_an_error_that_names_the_row(tmp_path):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match="rows.jsonl line 2: .*completion is empty"):
        load_pairs(write(tmp_path, good, {**good, "rejected": ""}), load_tokenizer("tiny-llama"), 64)


@pytest.mark.statement("sampled-ids")
def test_groups_train_on_the_stored_ids_not_on_their_text(tmp_path):
    tokenizer = load_tokenizer("tiny-llama")
    half = tokenizer("é").input_ids[0]  # half of a character: decoded and encoded again it is another token
    ids = [[half, half, tokenizer.eos_token_id], [half, 10]]
    texts = [tokenizer.decode(x, skip_special_tokens=True) for x in ids]
    assert half not in tokenizer(texts[0]).input_ids
    row = {"prompt": "p", "chosen": texts[0], "rejected": texts[1:], "scores": [1.0, 0.0], "completion_ids": ids,
           "logprobs": [[-1.0, -2.0, -3.0], [-4.0, -5.0]], "temperature": 1.0}  # fmt: skip
    [group], _ = load_groups(write(tmp_path, row), tokenizer, 64)
    assert group["completions"] == ids and group["logprobs"] == row["logprobs"]


def test_a_completion_that_was_cut_has_no_stop_token_in_pairs_and_in_fine_tuning(tmp_path):
    tokenizer = load_tokenizer("tiny-llama")
    stop = tokenizer.eos_token_id
    row = {"prompt": "p", "chosen": "abc", "rejected": "de"}
    finishes = [{}, {"chosen_finish_reason": "stop", "rejected_finish_reason": "length"}]
    finishes += [{"chosen_finish": "length"}]  # the older name of the key
    path = write(tmp_path, *({**row, **finish} for finish in finishes))
    pairs, _, _ = load_pairs(path, tokenizer, 64)
    assert [(p["chosen"][-1] == stop, p["rejected"][-1] == stop) for p in pairs] == [
        (True, True), (True, False), (False, True),
    ]  # fmt: skip
    assert [tokenizer.decode([i for i in p["chosen"] if i != stop]) for p in pairs] == ["abc"] * 3
    corpus = load_corpus(path, 0.01)
    same = {"prompt": "p", "completion": "abc"}
    assert load_corpus(path, 0).train == [same, same, {**same, "finish_reason": "length"}]
    blocks = make_blocks(corpus.train + corpus.heldout, corpus.kind, tokenizer, 96, "rows")
    assert blocks.counted([0]) == 4 + 4 + 3  # a token a letter, and the stop tokens of the first two
    with pytest.raises(UserError, match="line 1: `rejected_finish_reason` is 'cut', it takes stop or length"):
        load_pairs(write(tmp_path, {**row, "rejected_finish_reason": "cut"}), tokenizer, 64)


@pytest.mark.statement("stop-token")
def test_a_group_says_how_its_completions_ended_and_text_that_was_cut_has_no_stop_token(tmp_path):
    tokenizer = load_tokenizer("tiny-llama")
    stop = tokenizer.eos_token_id
    texts = {"prompt": "p", "chosen": "abc", "rejected": ["de", "f"]}
    reasons = ["stop", "length", "stop"]
    plain, said = load_groups(write(tmp_path, texts, {**texts, "finish_reasons": reasons}), tokenizer, 64)[0]
    assert [c[-1] == stop for c in plain["completions"]] == [True] * 3 and plain["finish_reasons"] is None
    assert [c[-1] == stop for c in said["completions"]] == [True, False, True] and said["finish_reasons"] == reasons
    assert said["completions"][1] == plain["completions"][1][:-1]


def pair(prompt, chosen="a", rejected="b"):
    return {"text": {"prompt": prompt, "chosen": chosen, "rejected": rejected}}


@pytest.mark.statement("held-out")
def test_a_held_out_split_exists_whatever_the_hashes_are():
    for seed in range(60):
        for count in (2, 3, 24):
            for fraction in (0.01, 0.1, 0.9, 0.99):
                rows = [pair(f"p{i}") for i in range(count)] + [pair("p0", "c")]
                train, heldout = split_by_prompt(rows, fraction, seed)
                assert train and heldout and len(train) + len(heldout) == len(rows)
                asked = [{row["text"]["prompt"] for row in part} for part in (train, heldout)]
                assert not asked[0] & asked[1]
        train, heldout = split_by_prompt([pair("same", f"c{i}") for i in range(24)], 0.1, seed)
        assert train and 1 <= len(heldout) < 12
    with pytest.raises(UserError, match="all are equal"):
        split_by_prompt([pair("same")] * 24, 0.1)
    assert split_by_prompt([pair("same")], 0) == ([pair("same")], [])


@pytest.mark.statement("held-out")
def test_a_split_that_worked_is_as_it_was():
    """A prompt is held out if sha256 of "seed:prompt", as a share of the largest one, is below the fraction."""
    for seed in range(5):
        rows = [pair(f"p{i}") for i in range(40)]
        shares = [int(hashlib.sha256(f"{seed}:p{i}".encode()).hexdigest()[:16], 16) / 2**64 for i in range(40)]
        assert {x < 0.25 for x in shares} == {True, False}
        assert split_by_prompt(rows, 0.25, seed)[1] == [row for row, x in zip(rows, shares) if x < 0.25]
