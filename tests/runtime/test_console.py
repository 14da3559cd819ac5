"""What a run prints: log lines of 80 columns, what differs from the defaults, and no control characters."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from configs.config import ROOT, changed, load_config, option
from models import fetch
from rlhf import dpo_train, grpo_train, ppo_train, train_reward_model
from rlhf.rollouts import Rollout
from runtime import run_folder
from runtime.checkpoint import Saving
from runtime.console import LABELS, WIDTH, beside, clip, fold, log_line, say
from runtime.progress import Progress
from runtime.run import Run
from train import train_lm, train_lm_amp_ckpt, train_lm_ddp, train_lm_lora, train_lm_wandb

SCRIPTS = (train_lm, train_lm_ddp, train_lm_amp_ckpt, train_lm_lora, train_lm_wandb)
SCRIPTS += (train_reward_model, dpo_train, ppo_train, grpo_train)
GRPO = {
    "step": 12, "loss": -0.00212, "approx_kl": 0.0, "entropy": 1.2345, "clipfrac": 0.0, "advantage": 0.6, "kl": 0.731,
    "kl_per_token": 0.09, "sampler_kl": 1e-4, "reward": 0.28125, "reward_se": 0.05, "mean_length": 8.25,
    "clipped_ratio": 0.125, "gold": 0.28125, "frac_reward_zero_std": 0.5, "lr": 4.9e-4, "grad_norm": 0.871,
    "tok/s": 1352.4, "seconds": 40.1,
}  # fmt: skip
LM = {"step": 200, "loss": 2.31212, "lr": 2.7e-4, "grad_norm": 0.8712, "tok/s": 1352.4, "seconds": 40.1}
DPO = {"step": 3, "loss": 0.6012, "accuracy": 0.75, "margin": 0.231, "chosen_reward": -0.1, "rejected_reward": -0.331,
       "chosen_logps": -22.1, "rejected_logps": -25.2, "lr": 2e-4, "grad_norm": 1.2, "tok/s": 7630.0}  # fmt: skip


@dataclass
class Config(Saving):
    out: str = option("", identity=False)
    lr: float = option(0.1)
    overwrite: bool = False


@pytest.mark.parametrize(
    "record, total, line",
    [
        (GRPO, 40, "step    12/40 | reward 0.281 | gold 0.281 | kl 0.73 | length 8.2 | eta 3m12s"),
        (LM, 1000, "step   200/1000 | loss 2.3121 | lr 2.7e-04 | grad 0.87 | eta 3m12s"),
        (LM, None, "step   200 | loss 2.3121 | lr 2.7e-04 | grad 0.87 | tok/s 1,352 | eta 3m12s"),
        (DPO, 78, "step     3/78 | loss 0.6012 | accuracy 0.75 | margin 0.231 | eta 3m12s"),
        ({"step": 0, "nats_per_token": 4.08, "bits_per_byte": 1.5}, 30, None),
    ],
)
@pytest.mark.statement("log-line")
def test_a_log_line_has_the_important_numbers_in_80_columns(record, total, line):
    left = 192
    if line is None:
        line, left = "step     0/30 | held-out loss 4.0800 | bits per byte 1.5000", None
    assert log_line(record, total, left) == line
    assert len(log_line(record, total, 359_999)) <= WIDTH  # 99 hours


@pytest.mark.parametrize("record", [GRPO, LM, DPO, {"step": 10**9, **dict.fromkeys(LABELS, 123456)}])
@pytest.mark.statement("log-line")
def test_with_verbose_each_number_is_there_once_and_no_line_is_longer(record):
    rows = log_line(record, 10**9, 359_999, verbose=True).splitlines()
    assert all(len(row) <= WIDTH for row in rows) and rows[0] == log_line(record, 10**9, 359_999)
    words = [word for row in rows for word in row.split(" | ")]
    assert len(words) == len(record.keys() - {"seconds"}) + 1  # and the time left
    assert all(row.startswith("        ") for row in rows[1:]) and len(rows) > 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_says_all_defaults_or_what_differs(script):
    assert changed(load_config(script.Config, [])) == {}
    assert changed(load_config(script.Config, ["--lr", "0.123", "--verbose", "true"])) == {"lr": 0.123, "verbose": True}


def test_what_another_yaml_sets_differs_and_what_the_own_one_sets_does_not(tmp_path):
    (tmp_path / "mine.yaml").write_text("beta: 0.3\nlr: 2e-4\n")
    config = load_config(dpo_train.Config, ["--config", str(tmp_path / "mine.yaml")])
    assert changed(config)["beta"] == 0.3
    assert "lr" not in changed(config)  # configs/dpo.yaml has the same
    assert changed(config)["epochs"] == 1  # that of the script alone: configs/dpo.yaml has 2


def test_a_key_that_another_one_replaces_differs_too():
    config = load_config(ppo_train.Config, ["--reward", "mine:reward"])
    assert changed(config) == {"reward": "mine:reward", "reward_model": None}


def test_a_run_prints_what_differs_and_its_lines(tmp_path, capsys):
    run = Run(Config(out=str(tmp_path / "a"), lr=0.5), str(tmp_path / "a"), total_steps=2)
    run.restart()
    run.log(1, loss=1.0, unknown=2.0)
    out, config = str(tmp_path / "b"), Config(out=str(tmp_path / "b"), verbose=True)
    run = Run(config, out, total_steps=2)
    run.restart()
    run.log(1, loss=1.0, unknown=2.0)
    said = capsys.readouterr().out
    words = " ".join(said.split())
    assert "lr 0.5; the rest are defaults" in words and words.count("the rest are defaults") == 2
    assert said.count("step     1/2 | loss 1.0000\n") == 2
    assert said.count("        unknown 2.0000\n") == 1
    assert not set(said) & {"\r", "\x1b"}
    run_folder.release(tmp_path / "a"), run_folder.release(tmp_path / "b")


def test_verbose_is_no_part_of_what_a_run_is(tmp_path):
    out = str(tmp_path / "run")
    Run(Config(out=out), out).restart()
    run_folder.release(tmp_path / "run")
    assert Run(Config(out=out, verbose=True), out).unfinished
    run_folder.release(tmp_path / "run")


def test_a_text_is_folded_at_words_and_clipped_to_one_line():
    text = "a " * 30 + "x" * 90 + " b-c" * 10
    assert fold(text).split() == text.split() and max(map(len, fold(text).splitlines())) == 2 + 90
    assert [len(line) <= WIDTH for line in fold(text).splitlines()].count(False) == 1
    assert beside("a" * 70, "b" * 7) == "a" * 70 + " | " + "b" * 7 and "\n" in beside("a" * 70, "b" * 8)
    assert clip("a\nb  c", 5) == "a b c" and clip("abcdefgh", 5) == "ab..."


def test_a_sample_is_two_lines_of_80_columns(capsys):
    lists = {key: [[1]] for key in ("prompts", "completions", "logprobs")}
    long = "word " * 100
    rollout = Rollout(**lists, finish_reasons=["stop"], texts=[long], questions=[long], group_sizes=[1], places=[0])
    rollout.rewards = [-12.5]
    rollout.show()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 and max(map(len, rows)) == WIDTH and rows[1].endswith("...  (reward -12.50)")


def test_progress_is_told_now_and_then(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("runtime.progress.time.time", lambda: now[0])
    progress = Progress({"a": 4}, name="parts")
    for seconds in (3, 3, 3, 3):
        now[0] += seconds
        progress.tell("a")
    assert capsys.readouterr().out == "  2/4 parts | 6s | eta 6s\n  4/4 parts | 12s | eta 0s\n"


@pytest.mark.statement("log-line")
def test_control_characters_of_a_completion_are_not_sent_to_the_terminal(capsys):
    say("a\x1b[31mb\rc\x9bd\te\nf")
    assert capsys.readouterr().out == "a\ufffd[31mb\ufffdc\ufffdd\te\nf\n"


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "dumb")
    assert not fetch.Progress("x", 1).terminal
    monkeypatch.setenv("TERM", "xterm")
    assert fetch.Progress("x", 1).terminal


@pytest.mark.slow
def test_under_torchrun_one_voice_without_control_characters(tmp_path):
    words = ["--config", "configs/smoke/train_base.yaml", "--max_steps", "3", "--log_every", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["train/train_lm_ddp.py", *words, "--out", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()
    assert [row.split(" | ")[0] for row in rows if row.startswith("step ")] == [
        "step     0/3", *(f"step     {n}/3" for n in (1, 2, 3)), "step     3/3"
    ]  # fmt: skip
    assert sum(row.startswith("configuration: ") for row in rows) == 1
    assert not set(done.stdout) & {"\r", "\x1b"}
    assert all(len(row) <= WIDTH for row in rows if str(tmp_path) not in row), done.stdout
