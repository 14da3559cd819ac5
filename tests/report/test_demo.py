"""The order of the demo, what it does with work that is done, and with a stage that fails; on stages of a few lines."""

import re
import signal
import sys
from itertools import chain, repeat
from pathlib import Path

import pytest
from interrupted import said, start_demo, tree_differences

from configs.config import ROOT, UserError
from report import demo
from report.demo import MEASURED, Stage, run_all, seconds_left, stages
from runtime.memory import AT_START

pytestmark = pytest.mark.slow


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A function that makes a stage of the given Python lines; each stage costs 100 s in the table."""
    monkeypatch.setattr(demo, "MEASURED", dict.fromkeys("abcdef", 100))

    def make(name, lines, made=""):
        path = tmp_path / f"{name}.py"
        path.write_text(lines)
        return Stage(name, f"stage {name}", (str(path),), made)

    return make


def test_every_stage_comes_after_what_it_reads():
    order = ["fetch", "preferences", "groups", "lm", "sft", "reward", "dpo", "ppo", "grpo_offline", "grpo", "compare"]
    assert MEASURED.keys() == set(order)  # each of them was timed
    for smoke in (False, True):
        names = [stage.name for stage in stages(smoke)]
        assert names == order[smoke:]  # a tiny model need not be fetched
        for later, earlier in (("sft", "preferences"), ("reward", "preferences"), ("dpo", "preferences"),
                               ("ppo", "reward"), ("grpo_offline", "groups")):  # fmt: skip
            assert names.index(earlier) < names.index(later)


def test_the_demo_fits_twenty_minutes():
    assert sum(MEASURED.values()) <= 20 * 60


def test_commands_are_scripts_and_configurations_that_exist():
    for smoke in (False, True):
        for stage in stages(smoke):
            script, *edits = stage.command
            assert (ROOT / script).is_file()
            for path in (word for word in edits if word.endswith(".yaml")):
                assert (ROOT / path).is_file(), path
    commands = {stage.name: " ".join(stage.command) for stage in stages()}
    assert commands["dpo"] == "rlhf/dpo_train.py"  # README's commands, as written
    assert commands["sft"] == "train/train_lm_lora.py --config configs/sft.yaml"


def test_runs_in_order_and_counts_down(fake, capfd):
    run_all([fake("a", "print('first')"), fake("b", "import sys; print('second', file=sys.stderr)")], "again")
    said = capfd.readouterr().out
    assert re.search(r"stage 1 of 2: stage a \| 0s \| about 3 min left", said)  # 200 s
    assert said.index("stage 1 of 2") < said.index("first") < said.index("stage 2 of 2") < said.index("second")
    assert "about 1 min left" in said[said.index("stage 2 of 2") :]  # far quicker than the table: rescaled
    assert "all 2 stages in" in said


def test_a_failed_stage_stops_the_rest_and_says_how_to_go_on(fake, capfd, tmp_path):
    mark = tmp_path / "ran"
    todo = [fake("a", "import sys; print('no pairs'); sys.exit(2)"), fake("b", f"open({str(mark)!r}, 'w')")]
    with pytest.raises(UserError, match=r"stage 1 of 2 \(stage a\) ended with status 2.*make demo"):
        run_all(todo, "make demo")
    assert "no pairs" in capfd.readouterr().out
    assert not mark.exists()


def test_work_that_is_done_does_not_count_as_pace(fake, capfd):
    done = fake("a", "print('models/dpo holds this very run, finished.')")
    run_all([done, fake("b", "print('work')")], "again")
    said = capfd.readouterr().out
    assert "about 2 min left" in said[said.index("stage 2 of 2") :]  # still 100 s at the table's pace


def test_one_stage_does_not_decide_the_estimate(fake, capfd, monkeypatch):
    ticks = chain([0.0] * 3, repeat(50.0))  # the first stage takes ten times as long as the pace foresees
    monkeypatch.setattr(demo.time, "time", lambda: next(ticks))
    run_all([fake(name, "") for name in "abcdef"], "again", pace=0.05)
    said = capfd.readouterr().out
    assert "about 1 min left" in said[said.index("stage 2 of 6") :]  # 500 s at (15 + 50) / 400; not at 0.5: 4 min


def test_the_estimate_leaves_out_what_is_there(fake, tmp_path):
    made = tmp_path / "manifest.json"
    todo = [fake("a", "", str(made)), fake("b", "")]
    assert seconds_left(todo, 1.0) == 200
    assert seconds_left(todo, 0.5) == 100
    made.write_text("{}")
    assert seconds_left(todo, 1.0) == 100 + demo.DONE_SECONDS


def test_a_faster_machine_is_expected_to_take_less(monkeypatch):
    paces = []
    for speed in (demo.THERE, demo.THERE / 390 * 86):
        ticks = iter([k * 2 * 1024**3 / speed for k in range(8)])  # each product takes as long as it would there
        monkeypatch.setattr(demo.time, "perf_counter", lambda ticks=ticks: next(ticks))
        paces.append(demo.first_pace())
    assert paces == pytest.approx([1.0, 1 / 0.43])


def test_an_interruption_says_how_to_go_on(fake, capfd, monkeypatch):
    def interrupted(stage):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_all([fake("a", "")], "make demo")
    assert "stopped in stage 1 of 1 (stage a). To go on from there: make demo" in capfd.readouterr().out


def test_stages_use_this_python(fake, capfd):
    run_all([fake("a", "import sys; print('python is', sys.executable)")], "again")
    assert f"python is {sys.executable}" in capfd.readouterr().out
    assert Path(sys.executable).exists()


def test_stages_start_as_memory_py_says_unless_the_user_says_otherwise(fake, capfd, monkeypatch):
    stage = fake("a", "import os; print('found', os.environ['GLIBC_TUNABLES'])")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    run_all([stage], "again")
    monkeypatch.setenv("GLIBC_TUNABLES", "mine")
    run_all([stage], "again")
    said = capfd.readouterr().out
    assert f"found {AT_START['GLIBC_TUNABLES']}" in said and "found mine" in said


def test_killed_in_the_middle_of_a_stage_it_goes_on_there_and_ends_with_the_same_files(tmp_path):
    def todo(folder):
        pairs, lm = tmp_path / folder / "pairs.jsonl", tmp_path / folder / "lm"
        sampling = ("--config", "configs/smoke/preferences.yaml", "--limit", "12", "--out", str(pairs))
        steps = ("--config", "configs/smoke/train_base.yaml", "--save_every", "1", "--out", str(lm))
        return [
            Stage("preferences", "pairs", ("data/generate_preferences.py", *sampling), str(pairs)),
            Stage("lm", "training", ("train/train_lm.py", *steps), str(lm / "manifest.json")),
        ]

    whole = start_demo(todo("whole"), tmp_path / "demo1")
    killed = start_demo(todo("killed"), tmp_path / "demo2", "train/train_lm.py", die_at=40)
    whole.join(120), killed.join(120)
    assert (whole.exitcode, killed.exitcode) == (0, -signal.SIGKILL)
    again = start_demo(todo("killed"), tmp_path / "demo2")
    again.join(120)
    words = said(tmp_path / "demo2")
    assert again.exitcode == 0, words
    assert tree_differences(tmp_path / "whole", tmp_path / "killed") == []
    assert words.count("is there already, made by this very configuration") == 1
    assert words.count("continuing from step") == 1
