"""The arithmetic prompts: their answers computed again from their texts, and what must not be in two splits."""

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict

import pytest

from configs.config import ROOT, UserError, load_config
from data import make_arithmetic
from data.checks import score
from data.make_arithmetic import FAMILIES, Config, make
from data.prompts import ARITHMETIC, load_prompts

ROWS = load_prompts(ARITHMETIC)
UNSEEN = {"larger sums", "smallest of four"}


def solved(prompt):
    """(the question without the order of what may change places, its answer), from the text alone."""
    numbers = [int(digits) for digits in re.findall(r"\d+", prompt)]
    signs = re.findall(r" ([-+x]) ", prompt)
    if "largest" in prompt or "smallest" in prompt:
        pick = max if "largest" in prompt else min
        return (pick.__name__, *sorted(numbers)), pick(numbers)
    if signs == ["x"]:
        return ("x", *sorted(numbers)), numbers[0] * numbers[1]
    plus = [numbers[0], *(n for sign, n in zip(signs, numbers[1:], strict=True) if sign == "+")]
    minus = [n for sign, n in zip(signs, numbers[1:], strict=True) if sign == "-"]
    return ("+", *sorted(plus), "-", *sorted(minus)), sum(plus) - sum(minus)


def test_answers_are_right():
    for row in ROWS:
        assert row["checks"] == [{"name": "last_number", "value": solved(row["prompt"])[1]}], row
        assert score(f"It is {solved(row['prompt'])[1]}.", row["checks"]) == 1.0
        assert score(f"It is {solved(row['prompt'])[1] + 1}.", row["checks"]) == 0.0
        assert solved(row["prompt"])[1] >= 0


@pytest.mark.statement("splits-apart")
def test_no_question_is_there_twice_in_whatever_order_it_is_asked():
    assert solved("What is 3 + 14?")[0] == solved("What is 14 + 3?")[0]
    assert solved("What is 14 - 3?")[0] != solved("What is 3 - 14?")[0]
    other = make(Config(seed=1))  # smaller: it trains on no question that is held out in ROWS
    for rows, least in ((ROWS, 900), (other, 850)):
        asked = Counter(solved(row["prompt"])[0] for row in rows)
        assert max(asked.values()) == 1 and len(asked) == len(rows) >= least


def test_sizes_and_what_is_only_held_out():
    families = defaultdict(Counter)
    for row in ROWS:
        families[row["split"]][row["family"]] += 1
    trained = {family.name for family in FAMILIES} - UNSEEN
    assert set(families["train"]) == set(families["validation"]) == trained and len(trained) == 5
    assert set(families["heldout"]) == trained | UNSEEN
    assert sum(families["heldout"].values()) >= 300 and sum(families["heldout"][name] for name in UNSEEN) == 80
    assert min(families["heldout"].values()) >= 19 and sum(families["train"].values()) >= 500
    sums = [row for row in ROWS if row["family"] == "sums"]
    larger = [row for row in ROWS if row["family"] == "larger sums"]
    assert max(int(n) for row in sums for n in re.findall(r"\d+", row["prompt"])) == 20
    assert min(int(n) for row in larger for n in re.findall(r"\d+", row["prompt"])) > 20  # a range of its own
    assert not any("smallest" in row["prompt"] for row in ROWS if row["split"] != "heldout")


def test_the_file_is_what_the_script_makes(tmp_path):
    assert make(Config()) == ROWS
    out = tmp_path / "again.json"
    done = subprocess.run(
        [sys.executable, "data/make_arithmetic.py", "--out", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == ""
    assert out.read_bytes() == (ROOT / ARITHMETIC).read_bytes()
    assert done.stdout.splitlines()[-1] == f"next: python data/generate_preferences.py --prompts {out}"


def test_another_seed_and_other_sizes(tmp_path):
    other = make(Config(seed=1, train=30, validation=5, heldout=10, unseen=3))
    sizes = Counter((row["split"], row["family"]) for row in other)
    assert sizes["train", "sums"] == 30 and sizes["validation", "sums"] == 5 and sizes["heldout", "sums"] == 10
    assert sizes["heldout", "larger sums"] == 3
    assert {row["prompt"] for row in other} != {row["prompt"] for row in make(Config(train=30, validation=5))}
    large = make(Config(train=10**6, validation=10**6, heldout=10**6, unseen=10**6))
    products = Counter(row["split"] for row in large if row["family"] == "products")
    own = {solved(row["prompt"])[0] for row in large if row["family"] == "products" and row["split"] == "heldout"}
    measured = {solved(row["prompt"])[0] for row in ROWS if row["family"] == "products" and row["split"] == "heldout"}
    rest = 66 - 19 - 6 - len(measured - own)  # of 66: three tenths, a tenth, and the rest without what is measured
    assert products == {"heldout": 19, "validation": 6, "train": rest} and rest < 41


def test_a_file_with_other_content_stays(tmp_path):
    out = tmp_path / "mine.json"
    out.write_text("[]")
    edits = ["--out", str(out), "--train", "5"]
    with pytest.raises(UserError, match=r"mine.json is there with other content.*--overwrite true"):
        make_arithmetic.main(load_config(Config, edits))
    assert out.read_text() == "[]"
    make_arithmetic.main(load_config(Config, [*edits, "--overwrite", "true"]))
    made = out.read_bytes()
    make_arithmetic.main(load_config(Config, edits))  # the same content: nothing to refuse
    assert out.read_bytes() == made and len(json.loads(made)) > 25
    with pytest.raises(UserError, match="ends in .json"):
        load_config(Config, ["--out", "mine.txt"])


@pytest.mark.parametrize("options", [{"seed": 1}, {"train": 1000, "heldout": 20}])
@pytest.mark.statement("splits-apart")
def test_other_options_train_on_no_question_that_is_measured(options):
    heldout = {solved(row["prompt"])[0] for row in ROWS if row["split"] == "heldout"}
    made = make(Config(**options))
    assert {solved(row["prompt"])[0] for row in made if row["split"] == "heldout"} != heldout
    assert not heldout & {solved(row["prompt"])[0] for row in made if row["split"] != "heldout"}
