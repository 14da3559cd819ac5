"""Make the arithmetic prompts, data/arithmetic.json: questions whose only right answer is a number.

    python data/make_arithmetic.py
    python data/make_arithmetic.py --train 1000 --heldout 100 --seed 1 --out data/more.json

A completion is right if its last number is the answer: the check `last_number`. Five families of questions are in all
splits: sums, differences, products, three terms, and the largest of four numbers. Two more are only held out: a range
of numbers (larger sums) and a kind of question (the smallest of four numbers). They show what transfers.

No question is in two splits, and 3 + 14 counts as the same question as 14 + 3. The same options make the same file.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from configs.config import UserError, option, shown
from data.prompts import ARITHMETIC
from runtime.cli import cli
from runtime.console import say
from runtime.files import in_root, write_atomically

ASK = "Answer with the number only."


@dataclass
class Config:
    train: int = option(120, "training questions of each family, at most", at_least=1)
    validation: int = option(20, "validation questions of each family, at most a tenth of its questions", at_least=1)
    heldout: int = option(70, "held-out questions of each family, at most 3 tenths of its questions", at_least=1)
    unseen: int = option(40, "questions of each family that is only held out, at most", at_least=1)
    seed: int = option(0, "of the choice and of the order of the questions", at_least=0)
    out: str = option(ARITHMETIC, "the file to write")
    overwrite: bool = option(False, "replace a file with other content")

    def check(self) -> None:
        if not self.out.endswith(".json"):
            raise UserError(f"out = {self.out!r}: must be a file name that ends in .json")


@dataclass(frozen=True)
class Family:
    """A kind of question. numbers: those of every question that there is, each question once.

    text, answer: the question and its answer, from the numbers in the order in which they are asked.
    commutes: how many of the first numbers may change places without another answer.
    """

    name: str
    numbers: Callable[[], Iterable[tuple[int, ...]]]
    text: Callable[..., str]
    answer: Callable[..., int]
    commutes: int = 1
    only_heldout: bool = False


def pairs(low: int, high: int) -> Iterable[tuple[int, ...]]:
    """All (a, b) with low <= a <= b <= high."""
    return itertools.combinations_with_replacement(range(low, high + 1), 2)


def fours() -> Iterable[tuple[int, ...]]:
    """Sets of four different numbers below 100. Every 97th of them: 3.9 million are more than anybody needs."""
    return itertools.islice(itertools.combinations(range(1, 100), 4), 0, None, 97)


def listed(*numbers: int) -> str:
    return ", ".join(map(str, numbers))


FAMILIES = (
    Family("sums", lambda: pairs(1, 20), "What is {} + {}?".format, lambda a, b: a + b, commutes=2),
    Family(
        "differences", lambda: ((a, b) for b, a in pairs(1, 20) if a > b), "What is {} - {}?".format,
        lambda a, b: a - b,
    ),
    Family(
        "products", lambda: pairs(2, 12), "What is {} x {}?".format,
        lambda a, b: a * b, commutes=2,
    ),
    Family(
        "three terms", lambda: ((a, b, c) for a, b in pairs(1, 9) for c in range(1, 10) if c <= a + b),
        "What is {} + {} - {}?".format, lambda a, b, c: a + b - c, commutes=2,
    ),
    Family(
        "largest of four", fours, lambda *n: f"Which is the largest of these numbers: {listed(*n)}?",
        lambda *n: max(n), commutes=4,
    ),
    Family(
        "larger sums", lambda: pairs(21, 49), "What is {} + {}?".format, lambda a, b: a + b, commutes=2,
        only_heldout=True,
    ),
    Family(
        "smallest of four", fours, lambda *n: f"Which is the smallest of these numbers: {listed(*n)}?",
        lambda *n: min(n), commutes=4, only_heldout=True,
    ),
)  # fmt: skip


def make(config: Config) -> list[dict]:
    """The rows of the prompt file, in the form of data/prompts.py, with the name of the `family` of each question.

    Held-out questions of data/arithmetic.json, on which models are measured, are in no training or validation part.
    """
    measured = {key for key, _ in choose(Config())[0]["heldout"]}
    splits, rng = choose(config, measured)
    found = []
    for split, questions in splits.items():
        rows = [each for _, each in questions]
        rng.shuffle(rows)
        found += [{"id": f"{split}-{i:03d}", **each, "split": split} for i, each in enumerate(rows, start=1)]
    return found


def choose(config: Config, measured: Iterable[tuple] = ()) -> tuple[dict[str, list[tuple]], random.Random]:
    """({split: [(key of a question, its row)]}, the generator that drew them). Equal questions have equal keys.

    measured: keys of questions that must be in no training or validation part.
    """
    rng = random.Random(config.seed)
    splits: dict[str, list[tuple]] = {"train": [], "validation": [], "heldout": []}
    for family in FAMILIES:
        questions = list(family.numbers())
        rng.shuffle(questions)
        for split, count in deal(family, len(questions), config).items():
            if split != "heldout":
                questions = [numbers for numbers in questions if (family.name, numbers) not in measured]
            for numbers in (questions.pop() for _ in range(min(count, len(questions)))):
                splits[split].append(((family.name, numbers), row(family, numbers, rng)))
    return splits, rng


def deal(family: Family, there: int, config: Config) -> dict[str, int]:
    """{split: number of questions} of a family that has `there` questions."""
    if family.only_heldout:
        return {"heldout": min(config.unseen, there)}
    heldout, validation = min(config.heldout, there * 3 // 10), min(config.validation, there // 10)
    return {"heldout": heldout, "validation": validation, "train": min(config.train, there - heldout - validation)}


def row(family: Family, numbers: tuple[int, ...], rng: random.Random) -> dict:
    """One question. Numbers that may change places stand in a random order."""
    first = list(numbers[: family.commutes])
    rng.shuffle(first)
    asked = (*first, *numbers[family.commutes :])
    checks = [{"name": "last_number", "value": family.answer(*asked)}]
    return {"prompt": f"{family.text(*asked)} {ASK}", "checks": checks, "family": family.name}


def main(config: Config) -> None:
    rows = make(config)
    text = "[\n" + ",\n".join(json.dumps(each) for each in rows) + "\n]\n"
    out = in_root(config.out)
    if out.is_file() and out.read_text(encoding="utf-8") != text and not config.overwrite:
        raise UserError(f"{shown(out)} is there with other content. Give another --out, or --overwrite true")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, text)
    names = [family.name for family in FAMILIES]
    say(f"{'questions':<18} {'train':>6} {'validation':>11} {'heldout':>8}")
    for name in names:
        counts = [
            sum(r["family"] == name and r["split"] == s for r in rows) for s in ("train", "validation", "heldout")
        ]
        say(f"{name:<18} {counts[0]:>6} {counts[1]:>11} {counts[2]:>8}")
    say(f"\n{rows[0]['prompt']}  ->  {rows[0]['checks'][0]['value']}")
    say(f"\n{len(rows):,} prompts written to {shown(out)}")
    following = "" if config.out == ARITHMETIC else f" --prompts {config.out}"
    say(f"next: python data/generate_preferences.py{following}")


if __name__ == "__main__":
    cli(main, Config)
