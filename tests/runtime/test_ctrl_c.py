"""A real SIGINT to a real process of each training script: before the first log line, the folder is as it was."""

import json
import signal
import time

import pytest
from interrupted import SCRIPTS, run, said

from configs.config import ROOT
from runtime import run_folder
from runtime.signals import undisturbed

TRAINERS = [script for script in SCRIPTS if script.startswith(("train.", "rlhf."))]
OLD = {"config.yaml": "seed: 1\n", "metrics.jsonl": '{"step": 1}\n', "model.safetensors": "weights", "notes/a": "b"}
MOVED = 4  # events until the old run is moved aside: a rename each
WRITTEN = MOVED + 2 + 2  # and until config.yaml and metrics.jsonl are written: fsync and rename, each


@pytest.fixture
def words(tmp_path, monkeypatch):
    """script -> its command line at smoke size; what it reads lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    pairs = [{"prompt": f"say {i}", "chosen": f"it is {i}", "rejected": "no"} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "own.py").write_text("def reward(prompt, completion):\n    return float(len(completion) % 3)\n")
    names = {"train_reward_model": "reward", "dpo_train": "dpo", "ppo_train": "ppo", "grpo_train": "grpo"}
    more = {
        "reward": ["--data", "pairs.jsonl"],
        "dpo": ["--data", "pairs.jsonl"],
        "ppo": ["--reward", "own:reward"],
        "grpo": ["--reward", "own:reward"],
        "train_base": ["--sample_tokens", 2, "--wandb", "off", "--data", ROOT / "tests/train/text.jsonl"],
    }

    def of(script):
        name = names.get(script.partition(".")[2], "train_base")
        measured = ["--measure_steps", 0] if script.endswith("amp_ckpt") else []
        return ["--config", ROOT / f"configs/smoke/{name}.yaml", "--overwrite", "true", *more[name], *measured]

    return of


def old_run(folder):
    for name, text in OLD.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def interrupt(script, words, out, event):
    """Run the script until this event, at which it gets a SIGINT; what it has printed."""
    assert run(script, words, out, die_at=event, die_by=signal.SIGINT) == 130, said(out)
    assert "Traceback" not in said(out) and said(out).endswith("\ninterrupted\n")
    return said(out)


@pytest.mark.parametrize("script", TRAINERS)
@pytest.mark.statement("given-back")
def test_before_the_first_log_line_the_old_run_is_restored(script, words, tmp_path):
    """The signal comes in the first optimizer step in rlhf/, before the evaluation of step 0 in train/."""
    out = tmp_path / "run"
    old_run(out)
    output = interrupt(script, words(script), out, WRITTEN + 1 if script.startswith("rlhf.") else WRITTEN)
    assert "configuration: " in output and "\nstep " not in output
    assert content(out) == OLD and len(list(out.iterdir())) == 4


@pytest.mark.parametrize("event", [2, MOVED, MOVED + 1])
@pytest.mark.statement("given-back")
def test_a_signal_while_the_old_run_is_moved_aside_loses_nothing(event, words, tmp_path):
    out = tmp_path / "run"
    old_run(out)
    interrupt("rlhf.grpo_train", words("rlhf.grpo_train"), out, event)
    assert content(out) == OLD and len(list(out.iterdir())) == 4


@pytest.mark.parametrize("script", ["train.train_lm", "rlhf.dpo_train"])
@pytest.mark.statement("given-back")
def test_a_folder_that_was_not_there_is_gone(script, words, tmp_path):
    out = tmp_path / "run"
    assert "configuration: " in interrupt(script, words(script), out, WRITTEN - MOVED)
    assert not out.exists()


@pytest.mark.statement("given-back")
def test_after_the_first_log_line_the_step_is_saved_and_the_same_command_goes_on(words, tmp_path):
    out = tmp_path / "run"
    old_run(out)
    words = words("rlhf.grpo_train")
    assert run("rlhf.grpo_train", words, out, die_at=WRITTEN + 2, die_by=signal.SIGINT) == 130, said(out)
    assert "SIGINT: stopped after step 2 of 2, which is saved" in said(out)
    assert not (out / "notes").exists() and not (out / run_folder.REPLACED).exists()
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert run("rlhf.grpo_train", words, out) == 0, said(out)
    assert "continuing from step" in said(out)


@pytest.mark.statement("given-back")
def test_a_run_that_was_killed_before_it_began_is_given_back_as_the_run_before_it(words, tmp_path):
    out = tmp_path / "run"
    old_run(out)
    words = words("rlhf.grpo_train")
    assert run("rlhf.grpo_train", words, out, die_at=WRITTEN) == -signal.SIGKILL
    assert (out / run_folder.REPLACED / "model.safetensors").is_file()
    assert run("rlhf.grpo_train", words, out, die_at=3, die_by=signal.SIGINT) == 130, said(out)
    assert content(out) == OLD


def test_signals_wait_until_the_context_is_left():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # another test may have left its own
    done = []
    with pytest.raises(KeyboardInterrupt), undisturbed():
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.01)
        done.append(1)
    assert done == [1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_stops_what_is_undone_then_and_not_the_rest(monkeypatch):
    undone = []

    def slow():
        undone.append("begun")
        signal.raise_signal(signal.SIGINT)
        undone.append("never")

    monkeypatch.setattr(run_folder, "on_refusal", [lambda: undone.append("folder"), slow])
    run_folder.undo_all()
    assert undone == ["begun", "folder"]
