"""What both sides of a benchmark read: passages of Shakespeare's plays, as texts, pairs and token ids."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from data.corpus import load_corpus
from data.prompts import load_prompts
from models.loader import load_tokenizer

LETTER = "benchmarks.texts:letter_e"  # as a reward function for our scripts


@functools.cache
def all_plays():
    """The plays as one text."""
    return "\n".join(document["text"] for document in load_corpus("shakespeare").train)


def plays(characters):
    """The first so many characters of the plays."""
    return all_plays()[:characters]


def passages(tokenizer, lengths):
    """Token ids of consecutive passages of these lengths."""
    wanted = sum(lengths)
    ids = tokenizer(plays(8 * wanted), add_special_tokens=False).input_ids
    assert len(ids) >= wanted, (len(ids), wanted)
    found, start = [], 0
    for length in lengths:
        found.append(ids[start : start + length])
        start += length
    return found


def write_pairs(path, model_name, count, prompt, completion):
    """Write `count` pairs as JSONL: a prompt has about `prompt` tokens, each completion about `completion`.

    The completions differ in length by up to a fifth, because real pairs do not all have the same length.
    """
    tokenizer = load_tokenizer(model_name)
    lengths = [n for i in range(count) for n in (prompt, around(completion, 2 * i), around(completion, 2 * i + 1))]
    texts = [tokenizer.decode(ids).strip() for ids in passages(tokenizer, lengths)]
    roles = (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant"))
    rows = [
        {key: [{"role": role, "content": text}] for (key, role), text in zip(roles, texts[i : i + 3])}
        for i in range(0, len(texts), 3)
    ]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def around(length, i):
    """A length that varies with i within a fifth of `length`."""
    reach = max(1, length // 5)
    return length - reach + (i * 7) % (2 * reach + 1)


def prompts_of_checks():
    """The training prompts of the project's task, as rows of data/prompts.json."""
    return load_prompts(split="train")


def letter_e(prompt, completion):
    """A reward that both sides compute in the same way: the share of e among the characters of the completion."""
    return completion.count("e") / max(len(completion), 1)
