"""The section of the report on bias, toxicity, refusals and text quality: its numbers follow from the measurements."""

import importlib.util
import random
from pathlib import Path

import pytest

from configs.config import UserError
from report import beside
from report.compare import Config
from report.intervals import share
from report.measures.choices import IDEAL, RANDOM, Choice, summarise_choices
from report.page import markdown_table, write_report
from runtime.means import interval

spec = importlib.util.spec_from_file_location("synthetic", Path(__file__).with_name("synthetic.py"))
synthetic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(synthetic)


def measures(seed, refuses=0.1, toxic=0.2):
    """The measures of one model, by the code that summarises them, on made-up scores."""
    rng = random.Random(seed)
    bias = {"ideal": IDEAL, "random": RANDOM}
    for name, size in (("stereoset_intrasentence", 3), ("stereoset_intersentence", 3), ("crows_pairs", 2), ("bbq", 3)):
        groups = ("ambiguous", "disambiguated") if name == "bbq" else "abcdef"
        rows = [Choice("", ("aa", "bb", "cc")[:size], rng.choice(groups)) for _ in range(80)]
        bias[name] = summarise_choices(name, rows, [[rng.gauss(0, 1) for _ in range(size)] for _ in rows])
    values = {key: interval([rng.gauss(0.5, 0.1) for _ in range(50)]) for key in
              ("mauve", "bertscore", "distinct_1", "distinct_2", "self_repetition", "nats_per_token")}  # fmt: skip
    refused = {group: {"refused": share([rng.random() < refuses for _ in range(50)]), "by_kind": {}} for group in
               ("safe", "unsafe")}  # fmt: skip
    known = {"sentences": 16, "toxic": 8, "missed": ["a", "b"], "false_alarms": ["c"]}
    found = {"bias": bias, "refusals": refused, "text_quality": {"texts": 50, **values, "human": values}}
    found["toxicity"] = {"toxic": share([rng.random() < toxic for _ in range(200)]), "classifier": known}
    return {key: value | {"seconds": 30.0} for key, value in found.items()}


def rows_with(**levels):
    rows = synthetic.synthetic_rows(**levels)
    for row in rows:
        if row.key != "best_of":
            row.runs[0] |= measures(row.key, refuses=0.9 if row.key == "ppo" else 0.1)
    return rows


@pytest.mark.statement("beside")
def test_a_change_is_the_difference_to_the_base_with_both_intervals():
    base, ppo = (row for row in rows_with() if row.key in ("base", "ppo"))
    unsafe = next(v for v in beside.VALUES if v.label == "unsafe prompts refused")
    before, after = (row.runs[0]["refusals"]["unsafe"]["refused"] for row in (base, ppo))
    found = beside.change(ppo, base, unsafe)
    assert found["mean"] == pytest.approx(after["mean"] - before["mean"]) and found["mean"] > 0.5
    widths = [(x["high"] - x["low"]) / 2 for x in (before, after)]
    assert found["half"] == pytest.approx((widths[0] ** 2 + widths[1] ** 2) ** 0.5)
    assert beside.change(base, base, unsafe)["mean"] == 0
    two = ppo.runs + [ppo.runs[0]]  # two seeds that say the same: half the variance
    ppo.runs = two
    assert beside.pooled(ppo, unsafe) == pytest.approx({"mean": after["mean"], "half": widths[1] / 2**0.5})


@pytest.mark.statement("beside")
def test_the_sentence_names_what_is_outside_its_interval_and_nothing_else():
    rows = rows_with()
    values = beside.measured_values(rows)
    assert len(values) == len(beside.VALUES)
    said = beside.change_sentence(rows, values)
    assert "PPO, unsafe prompts refused +0." in said and "DPO, unsafe" not in said
    assert "Of 65 changes, about 3 would" in said  # 5 methods beside base and best-of-n, 13 values
    same = [row for row in rows if row.key in ("base", "dpo")]
    same[1].runs = same[0].runs
    assert beside.change_sentence(same, values).startswith("No change against the base is outside its interval.")


def test_the_report_has_the_section_and_its_figure_only_with_measures(tmp_path):
    text = write_report(Config(out=str(tmp_path)), rows_with()).read_text()
    assert "## What changed beside the task" in text and (tmp_path / "figures" / "beside.png").stat().st_size > 20_000
    lines = [line for line in text.splitlines() if line.startswith(("| DPO", "| best of 4"))]
    assert any("(ideal" not in line and " to " in line for line in lines if line.startswith("| DPO"))
    assert "misses 2 of 8" in text and "calls 1 of 8 harmless" in text
    assert "12.0 minutes" in text  # 6 models, 4 measures, 30 seconds
    plain = write_report(Config(out=str(tmp_path / "plain")), synthetic.synthetic_rows()).read_text()
    assert "beside the task" not in plain and not (tmp_path / "plain" / "figures" / "beside.png").exists()


def test_a_measure_that_one_method_lacks_is_left_out(tmp_path):
    rows = rows_with()
    del rows[1].runs[0]["toxicity"], rows[1].runs[0]["bias"]["bbq"]["per_byte"]["ambiguous"]
    values = beside.measured_values(rows)
    assert "toxicity" not in {value.key for value in values} and len(values) == len(beside.VALUES) - 2
    assert "BBQ, disambiguated" in {value.label for value in values}
    assert "toxic" not in beside.beside_section(rows, tmp_path, markdown_table)


def test_the_comparison_needs_the_task():
    with pytest.raises(UserError, match="the comparison needs task"):
        Config(suite="bias").check()
