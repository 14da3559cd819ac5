"""Chaos finds nothing where nothing is wrong, finds what is wrong, and says which stages there are."""

import queue
import subprocess
import sys

import chaos
import pytest
import torture

pytestmark = pytest.mark.slow


def short(tmp_path, monkeypatch, spoil=()):
    """Two kills of the plain loop. spoil: options of the runs that are killed."""
    monkeypatch.setattr(torture, "_reports", [queue.Queue()])
    begin = torture.Script.begin

    def spoilt(self):
        begin(self)
        if self.runs == 2:
            self.words = [*self.words, *spoil]

    monkeypatch.setattr(torture.Script, "begin", spoilt)
    return torture.torture("lm", tmp_path, kills=2, seed=0)


def test_a_stage_is_killed_as_often_as_asked_and_nothing_differs(tmp_path, monkeypatch):
    found = short(tmp_path, monkeypatch)
    assert found["kills"] == sum(found[moment] for moment in chaos.PHASES) == 2
    assert found["differences"] == []
    assert chaos.verdict([found], 61) == (
        f"1 stages, {found['runs']} runs, 2 kills, 1m01s: all ended as if they never had been killed"
    )


def test_what_differs_is_found(tmp_path, monkeypatch):
    found = short(tmp_path, monkeypatch, spoil=["--lr", "0.0031"])
    assert {"run 2: metrics.jsonl", "run 2: updates", "run 2: model.safetensors: model.norm.weight"} <= {
        *found["differences"]
    }
    assert "DIFFERENT after kills: lm" in chaos.verdict([found], 61)


def test_an_unknown_stage_is_one_message():
    command = [sys.executable, chaos.__file__, "lm", "pppo"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("error: no stage is called 'pppo'. The stages are: demo, lm, ddp,")
    assert process.stderr.count("\n") == 1


def test_the_time_left_counts_what_is_not_begun(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(chaos.time, "time", lambda: now[0])
    progress = chaos.Progress(["lm", "ppo"], kills=4, jobs=1)
    progress.say("lm", "begins", 0)
    now[0] = 10.0
    progress.say("lm", "saving", 2)  # 5 s a kill: 2 are left here, 4 there
    assert capsys.readouterr().out.endswith("lm           | kill 2 of 4, in saving      , about 0m30s left\n")
