"""The study: its commands, its budget, its order and sentences on made-up runs, and all of it on a tiny model."""

import importlib
import importlib.util
import math
import random
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from interrupted import said, start_demo

from configs.config import ROOT, UserError, load_config
from report import study
from report.compare import Config as CompareConfig
from report.demo import MEASURED
from report.intervals import bootstrap_means, parts, share_above
from report.study import TASKS, Config, stages, task_runs
from report.study_page import (
    Point,
    TaskStudy,
    best_of_line,
    coefficients_sentence,
    curves_sentence,
    optimisation_sentence,
    order_section,
    spread_sentence,
    task_section,
    write_study,
)

pytestmark = pytest.mark.slow

spec = importlib.util.spec_from_file_location("synthetic", Path(__file__).with_name("synthetic.py"))
synthetic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(synthetic)


def configured(**edits):
    return load_config(Config, [word for key, value in edits.items() for word in (f"--{key}", str(value))])


def loaded(stage):
    """The configuration that a stage's command has."""
    script, *words = stage.command
    return load_config(importlib.import_module(script.removesuffix(".py").replace("/", ".")).Config, words)


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_every_command_is_taken_by_its_script_and_reads_what_an_earlier_one_made(name, smoke):
    todo = stages(configured(smoke=smoke, seeds="0,1,2"), name)
    made = set()
    for stage in todo:
        config = loaded(stage)
        for key in ("data", "groups", "reward_model"):
            path = vars(config).get(key)
            used = key != "groups" or vars(config).get("mode") == "offline"
            assert not (used and path) or path in made, (stage.title, key, path)
        assert stage.name in MEASURED and stage.seconds > 0
        made |= {config.out, stage.made.removesuffix("/manifest.json"), stage.made.replace(".manifest.json", ".jsonl")}
    outs = [loaded(stage).out for stage in todo]
    assert len(set(outs)) == len(todo)
    assert sum("-seed" in out for out in outs) == 2 * 5 and all(f"/{name}" in out for out in outs)


def test_the_runs_of_a_task_have_its_prompts_lengths_and_temperature():
    for stage in stages(configured(), "instructions"):
        config = vars(loaded(stage))
        if "max_new_tokens" in config and config.get("mode") != "offline":
            assert (config["prompts"], config["max_new_tokens"]) == ("data/prompts.json", 48), stage.title
        if "temperature" in config:
            assert config["temperature"] == 0.7, stage.title
    runs = {stage.title: loaded(stage) for stage in stages(configured(), "arithmetic")}
    assert runs["arithmetic: GRPO online, seed 2"].seed == 2 and runs["arithmetic: GRPO online, seed 2"].kl_coef == 0
    assert {run.kl_coef for title, run in runs.items() if "with kl_coef" in title} == {0.01, 0.05, 0.2}
    assert {run.beta for title, run in runs.items() if "with beta" in title} == {0.03, 0.3}
    assert runs["arithmetic: PPO for long, seed 0"].kl_coef < 0.02 < runs["arithmetic: PPO for long, seed 0"].steps


def test_the_study_fits_four_hours_by_the_demos_seconds():
    seconds = {name: sum(stage.seconds for stage in stages(configured(), name)) for name in TASKS}
    assert 1.5 * 3600 < sum(seconds.values()) < 3.75 * 3600, seconds
    one = sum(stage.seconds for stage in stages(configured(seeds="0"), "arithmetic"))
    assert one < 0.7 * seconds["arithmetic"]
    demo = [stage for stage in stages(configured(), "arithmetic") if stage.name == "grpo"]
    assert demo[0].seconds == pytest.approx(MEASURED["grpo"] * 60 / 50)  # steps of the study, steps of the demo


@pytest.mark.parametrize("edits", [{"tasks": "sums"}, {"tasks": "arithmetic,arithmetic"}, {"seeds": "0,0"}])
def test_wrong_tasks_and_seeds_are_refused(edits):
    with pytest.raises(UserError, match=f"{next(iter(edits))} = .*must be different"):
        configured(**edits)


@pytest.mark.statement("order-of-methods")
def test_bootstrap_means_spread_as_seeds_and_prompts_do():
    """Two seeds with means 0 and 1 on equal prompts: a draw is 0, 0.5 or 1, with probabilities 1/4, 1/2, 1/4."""
    seeds = [{f"p{i}": float(k) for i in range(5)} for k in (0, 1)]
    draws = bootstrap_means({"a": seeds}, draws=4000)["a"]
    assert [np.mean(np.isclose(draws, x)) for x in (0, 0.5, 1)] == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    rng = random.Random(0)  # one seed: the spread over prompts is that of their mean
    scores = {f"p{i}": float(rng.random() < 0.3) for i in range(200)}
    draws = bootstrap_means({"a": [scores], "b": [{key: value + 0.01 for key, value in scores.items()}]}, draws=4000)
    assert np.std(draws["a"]) == pytest.approx(np.std(list(scores.values())) / math.sqrt(200), rel=0.05)
    assert share_above(draws["b"], draws["a"]) == 1.0  # the same prompts in each draw: the difference is always 0.01
    assert share_above(draws["a"], draws["a"]) == 0.5


def test_parts_are_equal_and_in_order():
    found = parts([(x, 2.0 * x) for x in reversed(range(24))], 4)
    assert [x for x, _ in found] == [2.5, 8.5, 14.5, 20.5]
    assert [value["mean"] for _, value in found] == [5.0, 17.0, 29.0, 41.0] and found[0][1]["n"] == 6
    assert parts([(1, 1.0)]) == [(1, {"mean": 1.0, "se": None, "half": None, "n": 1})]


def made_up(gold=lambda step: 0.2 + 0.01 * step, proxy=lambda step: 0.1 * step, seeds="0,1,2"):
    """A `TaskStudy` of made-up runs. gold, proxy: of the long PPO, by step."""
    found = TaskStudy.__new__(TaskStudy)
    found.runs = study.task_runs(configured(seeds=seeds), "arithmetic")
    found.config = CompareConfig(seeds=seeds)
    found.rows = synthetic.synthetic_rows()
    for row in found.rows:
        row.runs = [synthetic.measurement(row.key, *synthetic.LEVELS[row.key], seed=seed) for seed in (0, 1, 2)]
    found.lines = {key: [synthetic.curve(key)] * 3 for key in ("dpo", "ppo", "grpo")}
    measured = {row.key: row.runs[0]["measured"] for row in found.rows}
    found.points = [
        Point(key, value, f"{option} {value:g}", synthetic.curve(key), measured[key])
        for key, option, value in (("dpo", "beta", 0.1), ("grpo", "kl_coef", 0.01), ("grpo", "kl_coef", 0.2))
    ]
    rng = random.Random(0)
    found.long = [
        {"step": i, "gold": gold(i) + rng.gauss(0, 0.01), "reward": proxy(i), "kl": 0.3 * i} for i in range(1, 49)
    ]
    found.long_coef, found.long_measured = 0.001, measured["ppo"]
    base = [synthetic.measurement("base", *synthetic.LEVELS["base"], samples=4, seed=seed) for seed in (0, 1, 2)]
    found.best_of = best_of_line(base, 4)
    return found


@pytest.mark.statement("order-of-methods")
def test_the_order_follows_the_scores_and_its_shares_are_those_of_the_draws():
    study = made_up()
    text = order_section(study)
    order = sorted(study.rows, key=lambda row: -row.gold["mean"])
    assert f"the order is {', '.join(row.label for row in order)}." in text
    best, last = order[0].key, order[-1].key
    assert share_above(study.draws[best], study.draws[last]) > 0.99
    assert f"{order[0].label} above {order[1].label} in " in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == len(order) + 2 and lines[2][1] == ""
    assert "The seeds lie furthest apart for" in spread_sentence(study)


@pytest.mark.statement("order-of-methods")
def test_over_optimisation_is_seen_only_where_gold_falls_beyond_its_interval():
    broke = optimisation_sentence(made_up(gold=lambda step: 0.5 - abs(step - 20) * 0.01))
    assert "while the proxy rose: it broke." in broke and re.search("highest in part [56],", broke)
    rising = optimisation_sentence(made_up())
    assert "within these steps it did not break" in rising and "it broke" not in rising
    # part 6, steps 21 to 24, is highest by 0.02, and the scores within a part lie 0.4 apart
    noisy = optimisation_sentence(made_up(gold=lambda step: 0.3 + 0.2 * (-1) ** step + 0.02 * (21 <= step <= 24)))
    assert "highest in part 6," in noisy and "no break was seen" in noisy and "it broke" not in noisy
    fell = optimisation_sentence(made_up(gold=lambda step: 0.6 - 0.01 * step, proxy=lambda step: -step))
    assert "and the proxy did not rise" in fell


def test_best_of_n_is_the_bases_own_completions():
    line = dict(made_up().best_of)
    assert list(line) == [1, 2, 4]
    assert line[1]["answers"] == 3 * 54 * 4 and line[4]["answers"] == 3 * 54
    assert [line[n]["kl"]["mean"] for n in (2, 4)] == pytest.approx([math.log(2) - 1 / 2, math.log(4) - 3 / 4])
    assert line[4]["proxy"]["mean"] > line[2]["proxy"]["mean"] > line[1]["proxy"]["mean"]


def test_the_page_of_a_task_has_its_figures_targets_and_sentences(tmp_path):
    (tmp_path / "figures").mkdir()
    study = made_up(gold=lambda step: 0.5 - abs(step - 20) * 0.01)
    text = task_section(study, tmp_path)
    names = re.findall(r"\(figures/(\w+\.png)\)", text)
    assert len(names) == 4
    for name in names:
        content = (tmp_path / "figures" / name).read_bytes()
        width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
        assert content[:8] == b"\x89PNG\r\n\x1a\n" and 700 < width < 2000 and 300 < height < 1000
    for words in ("### Targets", "targets were reached", "| base | ", "95 % over seeds", "nats per token", "a minute"):
        assert words in text, words
    assert "kl_coef 0.01: " in coefficients_sentence(study) and "GRPO online from 0." in curves_sentence(study)


def test_all_of_it_on_a_tiny_model_killed_in_the_middle(tmp_path, monkeypatch):
    """It goes on where it was killed, runs nothing again that was finished, and writes the page."""
    monkeypatch.setattr(study, "COEFFICIENTS", {"grpo": ("kl_coef", (0.05,)), "dpo": ("beta", (0.3,))})
    config = configured(smoke="true", seeds="0", models=tmp_path / "m", out=tmp_path / "o")
    todo = stages(config, "arithmetic")
    killed = start_demo(todo, tmp_path / "study", "rlhf/ppo_train.py", die_at=4)
    killed.join(240)
    assert killed.exitcode == -signal.SIGKILL
    done = tmp_path / "m/arithmetic/dpo/manifest.json"
    before = done.stat().st_mtime_ns
    assert not (tmp_path / "m/arithmetic/ppo/manifest.json").exists()
    again = start_demo(todo, tmp_path / "study")
    again.join(240)
    words = said(tmp_path / "study")
    assert again.exitcode == 0, words
    assert f"stage {len(todo)} of {len(todo)}" in words and done.stat().st_mtime_ns == before
    assert f"$ python rlhf/ppo_train.py --config configs/smoke/ppo.yaml --reward_model {tmp_path}" in words
    path = write_study(config.out, [task_runs(config, "arithmetic")], "python report/study.py --smoke true")
    text = path.read_text()
    assert "## Arithmetic" in text and "`python report/study.py --smoke true`" in text
    for link in re.findall(r"\]\(([\w./]+)\)", text):
        assert (path.parent / link).is_file(), link
    assert ROOT not in path.parents
