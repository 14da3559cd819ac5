"""Checkpoints of a loop of a few lines: put back bit by bit, whole or not at all, named when damaged."""

import fcntl
import json
import math
import os
import random
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from configs.config import UserError, option
from runtime import checkpoint, run, run_folder
from runtime.checkpoint import FILES, Checkpoints, Saving
from runtime.run import Run
from runtime.run_folder import undo_all


@dataclass
class Config(Saving):
    out: str = option("")
    data: str = option("none", reads=True)
    lr: float = option(0.1)
    overwrite: bool = option(False)


def train(config, steps=6, stop_after=None, spoil=()):
    """Draw from every random generator in each step; returns (model, optimizer, what the loop carried over).

    stop_after: end there as a kill would. spoil: steps whose gradients are not finite.
    """
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    run = Run(config, config.out, total_steps=steps)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5), torch.nn.Linear(3, 1))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)
    checkpoints = Checkpoints(run, model=model, optimizer=optimizer)
    _, carried = checkpoints.load()
    carried = carried or {"sum": 0.0, "last": None, "list": [1, (2.5, float("inf"))], "tensor": torch.arange(3)}
    for step in checkpoints.remaining():
        x = torch.tensor([random.random(), np.random.rand(), 1.0])
        loss = model(x).square().sum() + (float("nan") if step in spoil else 0)
        loss.backward()
        if run.finite(step, f"row {step - 1}", loss=loss.item()):
            optimizer.step()
        optimizer.zero_grad()
        carried |= {"sum": carried["sum"] + x.sum().item(), "last": step}
        run.log(step, loss=loss.item())
        checkpoints.save_if_due(step, carried)
        if step == stop_after:
            return run
    return model, optimizer, carried


def end(config):
    """Train to the end; weights, optimizer state, carried values and logged lines as one comparable value."""
    model, optimizer, carried = train(config)
    logged = [json.loads(x) for x in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in logged]
    state = [model.state_dict(), optimizer.state_dict(), {k: v for k, v in carried.items() if k != "list"}]
    tensors = {}
    return checkpoint.flatten(state, tensors), {k: v.tolist() for k, v in tensors.items()}, lines


@pytest.fixture
def config(tmp_path):
    return Config(out=str(tmp_path / "run"), save_every=1, save_minutes=0)


@pytest.fixture
def whole(tmp_path):
    return end(Config(out=str(tmp_path / "whole"), save_minutes=0))


def names(config):
    return sorted(p.name for p in (Path(config.out) / "checkpoints").iterdir())


@pytest.mark.parametrize("stop_after", [1, 3, 6])
@pytest.mark.statement("resume")
def test_what_is_put_back_goes_on_bit_by_bit(config, whole, stop_after):
    train(config, stop_after=stop_after)
    assert end(config) == whole
    assert len(whole[2]) == 6


def test_carried_values_come_back_as_they_were(config):
    train(config, stop_after=2)
    _, _, carried = train(config, steps=2)
    assert carried["list"] == [1, [2.5, float("inf")]] and carried["last"] == 2
    assert torch.equal(carried["tensor"], torch.arange(3))


def test_steps_after_the_checkpoint_and_a_line_cut_short_leave_metrics(config, whole):
    config.save_every = 2
    train(config, stop_after=3)
    with open(Path(config.out) / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "lo')
    assert end(config) == whole


def test_what_was_logged_of_the_same_step_after_the_checkpoint_is_logged_once(config, whole):
    train(config, stop_after=6)
    with open(Path(config.out) / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "nats_per_token": 5.0}\n')  # the evaluation at the end, say, which comes again
    assert end(config) == whole


def test_the_last_two_are_kept(config):
    train(config, stop_after=5)
    assert names(config) == ["step-00000004", "step-00000005"]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["shorter", "flipped", "missing"])
@pytest.mark.statement("torn-checkpoint")
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(config, whole, name, damage, capsys):
    train(config, stop_after=4)
    path = Path(config.out) / "checkpoints" / "step-00000004" / name
    content = path.read_bytes()
    if damage == "shorter":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    else:
        path.unlink()
    assert end(config) == whole
    said = capsys.readouterr().out
    if (name, damage) == ("manifest.json", "flipped"):  # a bit of the moment of writing, say, does no harm
        return
    assert f"step-00000004 is damaged: {name}" in said
    assert "continuing from step 3 of 6" in said


def test_without_a_whole_checkpoint_it_begins_again_and_says_so(config, whole, capsys):
    train(config, stop_after=3)
    for path in (Path(config.out) / "checkpoints").rglob("*.safetensors"):
        path.write_bytes(b"")
    assert end(config) == whole
    assert capsys.readouterr().out.count("is damaged: tensors.safetensors has 0 of") == 2
    train(Config(out=config.out + "2"), stop_after=1)
    capsys.readouterr()
    train(Config(out=config.out + "2"))
    assert "unfinished, without a checkpoint: it begins again" in capsys.readouterr().out


def test_a_folder_that_vanished_is_not_made_anew_by_the_next_checkpoint(config, monkeypatch):
    folder, due = Path(config.out), Checkpoints.due

    def vanishes(self, step):
        if step == 3:
            shutil.rmtree(folder)
        return due(self, step)

    monkeypatch.setattr(Checkpoints, "due", vanishes)
    with pytest.raises(UserError, match="the checkpoint of step 3 cannot be written .*: No such file or directory"):
        train(config)
    assert not folder.exists()  # a run without its configuration and its first lines could not go on


@pytest.mark.parametrize("module, function", [(os, "rename"), (checkpoint, "save_file")])
def test_a_disk_that_is_full_leaves_the_last_checkpoint_and_says_how_to_go_on(
    config, whole, module, function, monkeypatch
):
    train(config, stop_after=2)

    def fail(*_):
        raise OSError(28, "No space left on device") if module is os else SafetensorError("No space left on device")

    monkeypatch.setattr(module, function, fail)
    with pytest.raises(UserError, match="step 3 .*No space left on device; that of .*02 stays. .* go on with: python"):
        train(config)
    monkeypatch.undo()
    assert names(config) == ["step-00000001", "step-00000002"]  # and nothing half-written
    assert end(config) == whole


@pytest.mark.parametrize("minutes, cost, expected", [(5, 0, [20, 40, 80, 160, 300, 300]), (30, 10, [20, 200, 400])])
def test_the_first_comes_soon_and_saving_takes_a_twentieth_of_the_time(config, minutes, cost, expected, monkeypatch):
    now, pauses = [1000.0], []
    monkeypatch.setattr(checkpoint.time, "time", lambda: now[0])
    config.save_every, config.save_minutes = 0, minutes
    run = Run(config, config.out, total_steps=100)
    checkpoints = Checkpoints(run)
    monkeypatch.setattr(checkpoints, "_write", lambda *_: now.__setitem__(0, now[0] + cost))
    checkpoints.load()
    run.begin_steps()
    for _ in expected:
        began = now[0]
        while not checkpoints.due(1):
            now[0] += 1
        pauses.append(now[0] - began)
        checkpoints.save(1)
    assert pauses == expected


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_after_the_step_and_says_how_to_go_on(config, whole, number, status, monkeypatch, capsys):
    config.save_every = 0
    log = Run.log

    def signalled(self, step, **metrics):
        log(self, step, **metrics)
        if step == 3:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Run, "log", signalled)
    with pytest.raises(SystemExit) as stop:
        train(config)
    assert stop.value.code == status
    assert f"{signal.Signals(number).name}: stopped after step 3 of 6, which is saved. To go on: python" in (
        capsys.readouterr().out
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    assert end(config) == whole
    assert "continuing from step 3 of 6" in capsys.readouterr().out


@pytest.mark.statement("given-back")
def test_a_checkpoint_before_the_first_log_line_stays_whatever_ends_the_run(config, monkeypatch):
    Path(config.out).mkdir(parents=True)
    for name in ("config.yaml", "notes.txt"):
        (Path(config.out) / name).write_text("seed: 3\n")
    config.overwrite = True
    run = Run(config, config.out, total_steps=6)
    checkpoints = Checkpoints(run, model=torch.nn.Linear(2, 2))
    checkpoints.load()
    run.begin_steps()
    checkpoints._asked(signal.SIGTERM, None)  # no exit: it is saved after the step
    assert checkpoints.due(2)
    with pytest.raises(SystemExit):
        checkpoints.save(2)
    undo_all()
    assert names(config) == ["step-00000002"] and not (Path(config.out) / "notes.txt").exists()
    assert not run.logged
    checkpoints._asked(signal.SIGINT, None)  # nor an exit by Ctrl-C, now that there is a checkpoint


def test_a_second_ctrl_c_ends_at_once_but_not_the_echo_of_a_launcher(config, monkeypatch):
    checkpoints = Checkpoints(Run(config, config.out, total_steps=6))
    with pytest.raises(KeyboardInterrupt):  # before the steps there is nothing to save
        checkpoints._asked(signal.SIGINT, None)
    checkpoints.run.begin_steps()
    with pytest.raises(KeyboardInterrupt):  # nor before the first log line
        checkpoints._asked(signal.SIGINT, None)
    checkpoints.run.log(1, loss=1.0)
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "time", lambda: now[0])
    checkpoints._asked(signal.SIGINT, None)
    now[0] += 0.5
    checkpoints._asked(signal.SIGINT, None)
    now[0] += 1
    with pytest.raises(KeyboardInterrupt):
        checkpoints._asked(signal.SIGINT, None)


def test_steps_that_are_not_finite_are_skipped_and_end_the_run_at_the_third_in_a_row(config, capsys):
    config.out += "-two"
    train(config, spoil=(2, 3, 5))
    lines = [json.loads(x) for x in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("skipped") for line in lines] == [None, 1, 1, None, 1, None]
    assert ["loss" in line for line in lines] == [True, False, False, True, False, True]
    config.out += "-three"
    with pytest.raises(UserError, match=r"step 5: loss is nan on row 4. 3 steps in a row .*step-00000002") as error:
        train(config, spoil=(3, 4, 5))
    assert "--max_skipped" in str(error.value)
    assert names(config)[-1] == "step-00000002"  # nothing was saved since
    config.max_skipped = 4
    train(config, spoil=(3, 4, 5))
    assert "continuing from step 2 of 6" in capsys.readouterr().out


def test_a_skipped_step_leaves_weights_and_moments_alone(config):
    config.save_every = 0
    model, optimizer, _ = train(config, steps=2, spoil=(1, 2))
    assert not optimizer.state_dict()["state"]
    assert all(p.isfinite().all() for p in model.parameters())


def test_what_the_run_reads_must_not_change_under_it(config, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("one")
    config.data = str(data)
    train(config, stop_after=2)
    data.write_text("two")
    with pytest.raises(UserError, match="data.jsonl: changed since the checkpoint .*step-00000002 was written"):
        train(config)
    data.write_text("one")
    train(config)
    Run(config, config.out).finish({})
    with pytest.raises(SystemExit):
        Run(config, config.out)
    data.write_text("two")
    with pytest.raises(UserError, match="data.jsonl: changed since .*run was finished. --overwrite true begins again"):
        Run(config, config.out)


def test_a_checkpoint_of_another_script_is_refused(config, monkeypatch):
    train(config, stop_after=1)
    monkeypatch.setattr("sys.argv", ["elsewhere.py"])
    with pytest.raises(UserError, match="was written by .*, not by elsewhere.py"):
        train(config)


def test_overwrite_replaces_a_run_once_and_then_goes_on(config, whole, capsys):
    train(config, stop_after=4)
    config.overwrite = True
    train(config, stop_after=2)
    assert names(config) == ["step-00000001", "step-00000002"]  # nothing of before
    assert "continuing" not in capsys.readouterr().out
    assert end(config) == whole  # the very command, killed and started again
    assert "continuing from step 2 of 6" in capsys.readouterr().out


def test_a_finished_run_keeps_no_checkpoints_and_its_seconds_add_up(config, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(run.time, "time", lambda: clock.__setitem__(0, clock[0] + 1) or clock[0])
    train(config, stop_after=3)
    seconds = json.loads((Path(config.out) / "metrics.jsonl").read_text().splitlines()[2])["seconds"]
    clock[0] += 10_000  # the pause does not count
    train(config)
    lines = [json.loads(x) for x in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]
    assert seconds < lines[3]["seconds"] < seconds + 100
    monkeypatch.undo()
    Run(config, config.out).finish({})
    assert not (Path(config.out) / "checkpoints").exists()


def test_two_processes_do_not_write_to_one_folder(config, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0)
    os.makedirs(config.out)
    other = os.open(config.out, os.O_RDONLY)  # as another process would
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process writes to"):
        Run(config, config.out)
    os.close(other)
    Run(config, config.out)
    third = os.open(config.out, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.statement("reward-left-out")
def test_a_step_that_ends_the_run_is_not_counted_in_the_checkpoint_before_it(config):
    """Steps 1 and 2 are learnt and step 3 is skipped as the last allowed one: the checkpoint says nothing of it."""
    config.max_skipped = 1
    model = torch.nn.Linear(1, 1)
    run = Run(config, config.out, total_steps=5)
    checkpoints = Checkpoints(run, model=model)
    checkpoints.load()
    with pytest.raises(UserError, match=r"checkpoint is .*step-00000002\. .* Step 2 is saved") as refusal:
        for step in checkpoints.remaining():
            with checkpoints.saved_before(step):
                run.finite(step, "all rows", reward=math.nan if step == 3 else 0.0)
            run.log(step, loss=1.0)
    assert "no checkpoint" not in str(refusal.value)
    run_folder.release(run.folder)
    again = Run(config, config.out, total_steps=5)
    checkpoints = Checkpoints(again, model=model)
    assert checkpoints.load()[0] == 2 and (again.skipped, again.skips) == (0, 0)
