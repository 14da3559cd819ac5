"""Prompts that reasoning_gym makes: with the package where it is installed, else with a stand-in of its interface."""

import importlib.util
import json
import random
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest

from configs.config import UserError, load_config
from data.checks import passed, score
from data.procedural import APART, data_set, package, parse_source
from data.prompts import prompts_and_hash, read_prompts
from runtime.provenance import named_inputs

INSTALLED = importlib.util.find_spec("reasoning_gym") is not None
SOURCE = "reasoning_gym:chain_sum?size=40&validation=10&heldout=20"


class ChainSum:
    """As far as the tests use it, the data set `chain_sum` of the package: question i is drawn with seed + i."""

    def __init__(self, size, seed, min_terms=2, max_terms=6, max_digits=4):
        assert 1 <= min_terms <= max_terms, "min_terms must be positive"
        self.size, self.seed, self.terms, self.digits = size, seed, (min_terms, max_terms), max_digits

    def __getitem__(self, i):
        rng = random.Random(self.seed + i)
        numbers = [rng.randrange(10 ** rng.randint(1, self.digits)) for _ in range(rng.randint(*self.terms))]
        asked = " + ".join(map(str, numbers))
        answer = str(sum(numbers))
        question = f"State the final answer to the following arithmetic problem: {asked} ="
        return {"question": question, "answer": answer, "metadata": {"expression": asked}}

    def score_answer(self, answer, entry):
        return 1.0 if answer == entry["answer"] else len(entry["answer"]) / len(answer) * (entry["answer"] in answer)


def stand_in():
    def create_dataset(name, **options):
        if name != "chain_sum":
            raise ValueError(f"Dataset '{name}' not registered")
        return ChainSum(**options)

    def extract_answer(text):
        found = re.findall(r"<answer>\s?(.*?)\s?</answer>", text, re.DOTALL)
        return found[-1].strip() if found else None

    module = ModuleType("reasoning_gym")
    module.create_dataset, module.utils = create_dataset, SimpleNamespace(extract_answer=extract_answer)
    module.factory = ModuleType("reasoning_gym.factory")
    module.factory.DATASETS = {"chain_sum": None}
    return module


@pytest.fixture(autouse=True)
def gym(monkeypatch):
    """The package, or the stand-in under its name."""
    data_set.cache_clear()
    if not INSTALLED:
        module = stand_in()
        monkeypatch.setitem(sys.modules, "reasoning_gym", module)
        monkeypatch.setitem(sys.modules, "reasoning_gym.factory", module.factory)
    yield package()
    data_set.cache_clear()


def questions(rows):
    return [" ".join(row["prompt"].casefold().split()) for row in rows]


@pytest.mark.statement("splits-apart")
def test_no_question_is_in_two_parts_though_near_seeds_share_questions(gym):
    first, second = (gym.create_dataset("chain_sum", size=3, seed=seed) for seed in (0, 1))
    assert first[1]["question"] == second[0]["question"]  # so seeds 0, 1 and 2 for the parts would share them
    parts = {part: read_prompts(SOURCE, part) for part in ("train", "validation", "heldout")}
    assert [len(rows) for rows in parts.values()] == [40, 10, 20]
    every = [text for rows in parts.values() for text in questions(rows)]
    assert len(set(every)) == 70
    drawn = {" ".join(gym.create_dataset("chain_sum", size=200, seed=0)[i]["question"].casefold().split())
             for i in range(200)}  # fmt: skip
    assert set(questions(parts["train"])) <= drawn and not drawn & set(questions(parts["heldout"]))
    assert parts["heldout"][0]["id"] == "heldout-001" and APART > 40


@pytest.mark.statement("splits-apart")
def test_questions_that_come_again_are_left_out():
    """One term of one digit: a hundred questions at most, so that most of those that are drawn were drawn before."""
    source = "reasoning_gym:chain_sum?max_terms=2&max_digits=1&size={}&validation=2&heldout=20"
    rows = read_prompts(source.format(20), None)
    assert len(set(questions(rows))) == len(rows) == 42
    with pytest.raises(UserError, match=r"chain_sum has only \d+ different questions for size = 5000; ask for fewer"):
        read_prompts(source.format(5000), "train")


def test_the_same_source_gives_the_same_prompts_and_another_seed_others():
    rows, digest = prompts_and_hash(SOURCE, None)
    assert (rows, digest) == prompts_and_hash(SOURCE, None)
    others, another = prompts_and_hash(SOURCE + "&seed=1", None)
    assert digest != another and not set(questions(rows)) & set(questions(others))
    more = read_prompts(SOURCE.replace("size=40", "size=60"), "heldout")  # the size of one part leaves the others
    assert questions(more) == questions([row for row in rows if row["split"] == "heldout"])
    assert max(map(len, re.findall(r"\d+", " ".join(questions(read_prompts(SOURCE + "&max_digits=1")))))) == 1


@pytest.mark.statement("verifier")
def test_the_gold_score_is_what_the_tasks_own_verifier_gives(gym):
    row = read_prompts(SOURCE)[0]
    answer, [check] = row["answer"], row["checks"]
    own = gym.create_dataset("chain_sum", size=1, seed=0)
    part, again = f"It is {answer}.", f"No: <answer>-</answer> but <answer> {answer} </answer>."
    partly = own.score_answer(part, check["entry"])
    for said, value in (
        (answer, 1.0), (f"<answer>{answer}</answer>", 1.0), (again, 1.0), (part, partly), ("", 0.0), ("...", 0.0),
        ("<answer></answer>", 0.0),
    ):  # fmt: skip
        assert score(said, row["checks"], row["prompt"]) == value, said
        assert passed(said, row["checks"], row["prompt"]) == [value == 1.0]
    assert 0 < partly < 1  # a verifier may give a part


@pytest.mark.statement("verifier")
def test_a_verifier_judges_what_has_no_word_and_what_repeats(gym, monkeypatch):
    """Answers such as brackets and matrices: the checks of instructions would give 0."""
    row = read_prompts(SOURCE)[0]
    for text in ("([])", "1 1 1 1 1 1 1 1"):
        row["checks"][0]["entry"] = row["checks"][0]["entry"] | {"answer": text}
        assert score(text, row["checks"]) == 1.0
    monkeypatch.setattr("data.procedural.data_set", lambda *_: SimpleNamespace(score_answer=lambda a, e: 1 / 0))
    assert score("5", row["checks"]) == 0.0  # it cannot read the answer


def test_a_missing_package_is_said_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match="reasoning_gym: need a package .* installs it: pip install reasoning-gym"):
        read_prompts(SOURCE)


@pytest.mark.parametrize(
    "source, words",
    [
        ("reasoning_gym:chain_sums", "has no task 'chain_sums'. Its tasks are: .*chain_sum"),
        ("reasoning_gym:", "has no task ''"),
        ("reasoning_gym:chain_sum?min_terms=0", "chain_sum refuses these options: min_terms must be positive"),
        ("reasoning_gym:chain_sum?terms=3", "chain_sum refuses these options: .*'terms'"),
        ("reasoning_gym:chain_sum?size=0", "size must be a whole number from 2 to 250,000"),
        ("reasoning_gym:chain_sum?seed=-1", "seed must be a whole number from 0 to 1,000"),
        ("reasoning_gym:chain_sum?5", "options are written reasoning_gym:TASK.size=500&seed=1"),
    ],
)
def test_wrong_sources_are_refused_by_name(source, words):
    with pytest.raises(UserError, match=words):
        read_prompts(source)


def test_options_are_read_as_json():
    assert parse_source("reasoning_gym:x?a=3&b=true&c=[1,2]&d=word&seed=4") == (
        "x", {"size": 500, "validation": 100, "heldout": 300, "seed": 4}, {"a": 3, "b": True, "c": [1, 2], "d": "word"},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.statement("verifier")
def test_grpo_and_the_measurement_take_a_task_by_its_name(gym, tmp_path, capfd):
    from report import evaluate
    from rlhf import grpo_train

    words = ["--config", "configs/smoke/grpo.yaml", "--prompts", SOURCE, "--out", str(tmp_path / "grpo")]
    config = load_config(grpo_train.Config, words)
    assert named_inputs(config)["prompts"].exists() is False
    grpo_train.main(config)
    lines = [json.loads(line) for line in (tmp_path / "grpo/metrics.jsonl").read_text().splitlines()]
    assert [line["gold"] for line in lines] == [line["reward"] for line in lines] and len(lines) == 2
    assert "--prompts 'reasoning_gym:chain_sum?" in capfd.readouterr().out  # the next command, quoted for a shell
    words = ["--config", "configs/smoke/evaluate.yaml", "--prompts", SOURCE, "--reward_model", "none"]
    more = ["--model_name", str(tmp_path / "grpo"), "--out", str(tmp_path / "measured.json"), "--limit", "6"]
    found = evaluate.evaluate(load_config(evaluate.Config, words + more))
    assert found["unseen_types"] == [] and {a["id"] for a in found["answers"]} == {
        f"heldout-{i:03d}" for i in range(1, 7)
    }
    entries = {row["id"]: row["checks"][0]["entry"] for row in read_prompts(SOURCE)}
    own = gym.create_dataset("chain_sum", size=1, seed=0)
    for answer in found["answers"]:
        assert answer["gold"] == own.score_answer(answer["text"].strip(), entries[answer["id"]])
        assert answer["checks"] == [["chain_sum", answer["gold"] == 1.0]]
