"""The same command twice at once: one does the work; the other says one thing, and touches nothing."""

import fcntl
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest

from configs.config import ROOT, UserError, option
from report import demo
from runtime import run_folder
from runtime.checkpoint import Saving
from runtime.run import Run
from runtime.run_folder import RunFolder, hold_output, release

pytestmark = pytest.mark.slow

SCRIPTS = (
    "train/train_lm.py", "rlhf/dpo_train.py", "rlhf/grpo_train.py", "data/generate_preferences.py",
    "report/evaluate.py", "report/compare.py", "inference/inference.py",
)  # fmt: skip
ALREADY = ("this very", "is there already")  # what a script says that finds the work done


def words_of(script, pairs, here):
    """The command line of a script, in seconds on a tiny model."""
    config = {"train/train_lm.py": "train_base", "data/generate_preferences.py": "preferences"}
    name = config.get(script, script.partition("/")[2].removesuffix(".py").removesuffix("_train"))
    words = ["--config", str(ROOT / "configs" / "smoke" / f"{name}.yaml")]
    if script == "inference/inference.py":
        words = ["--model_name", "tiny-llama", "--out", str(here / "out.jsonl"), "--max_new_tokens", "200"]
    elif script == "report/evaluate.py":
        words += ["--model_name", "tiny-llama", "--out", str(here / "out.json")]
    elif script == "report/compare.py":
        words += ["--models", str(here), "--allow_missing", "true", "--runs", str(here / "runs"), "--out", str(here)]
    else:
        words += ["--out", str(here / ("out.jsonl" if script.startswith("data/") else "out"))]
    return words + (["--data", str(pairs)] if name == "dpo" else [])


def start(script, words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, str(ROOT / script), *words], env=environment, text=True, **pipes)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    here = tmp_path_factory.mktemp("pairs")
    process = start("data/generate_preferences.py", words_of("data/generate_preferences.py", None, here))
    assert process.wait(120) == 0, process.communicate()
    return here / "out.jsonl"


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.statement("twice-at-once")
def test_one_does_the_work_and_the_other_says_so(script, pairs, tmp_path):
    words = words_of(script, pairs, tmp_path)
    both = [start(script, words) for _ in range(2)]
    said = [process.communicate(timeout=200) for process in both]
    statuses = [process.returncode for process in both]
    assert "Traceback" not in str(said)
    assert sorted(statuses) in ([0, 0], [0, 2]), said
    found = [any(words in out for words in ALREADY) for out, _ in said]
    assert sorted(status == 2 or done for status, done in zip(statuses, found)) == [False, True], said
    for status, (_, error) in zip(statuses, said):
        assert error.startswith("error: another process writes to ") and error.count("\n") == 1 if status else not error
    assert not list(tmp_path.rglob("*.partial"))


def flock(path):
    """Lock a path as another process would."""
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def test_a_second_demo_says_that_the_first_one_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "in_root", lambda name: tmp_path / name.replace("/", "-"))
    monkeypatch.setattr(demo, "run_all", lambda *_: pytest.fail("two demos at once"))
    (tmp_path / "models-smoke").mkdir()
    other = flock(tmp_path / "models-smoke")
    with pytest.raises(UserError, match="another process writes to .*: it is this demo; wait until it has ended"):
        demo.main(demo.Config(smoke=True))
    os.close(other)


@dataclass
class Config(Saving):
    out: str = option("", identity=False)
    overwrite: bool = False


@pytest.mark.statement("twice-at-once")
def test_who_has_waited_looks_at_what_is_there_then(tmp_path, monkeypatch, capsys):
    """The folder was empty when the second process came; the first one finishes the run while it waits."""
    config, done = Config(out=str(tmp_path / "run")), Config(out=str(tmp_path / "done"))
    finished = Run(done, done.out, total_steps=1)
    finished.restart()
    finished.log(1, loss=1.0)
    finished.finish({"steps": 1})
    (tmp_path / "run").mkdir()
    other = flock(tmp_path / "run")

    def first_process_ends(_):
        shutil.copytree(done.out, config.out, dirs_exist_ok=True)
        os.close(other)

    monkeypatch.setattr(run_folder.time, "sleep", first_process_ends)
    with pytest.raises(SystemExit) as stop:
        Run(config, config.out)
    assert stop.value.code == 0 and "holds this very run, finished" in capsys.readouterr().out
    assert (tmp_path / "run" / "manifest.json").read_bytes() == (tmp_path / "done" / "manifest.json").read_bytes()
    release(tmp_path / "run")


@pytest.mark.statement("twice-at-once")
def test_who_is_refused_after_waiting_leaves_the_run_that_another_process_made(tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def made_by_another(path, make, *rest):
        make()
        (path / "config.yaml").write_text("seed: 1")

    monkeypatch.setattr(run_folder, "hold", made_by_another)
    monkeypatch.setattr(run_folder, "on_refusal", [])
    refused = run_folder.RunFolder(folder)
    refused.roll_back()
    assert (folder / "config.yaml").is_file()


@pytest.mark.statement("twice-at-once")
def test_a_folder_that_is_removed_before_it_is_locked_is_made_anew(tmp_path, monkeypatch):
    """The first process is refused and takes its folder away; the second must not write into what is gone."""
    folder, lock, calls = tmp_path / "a", run_folder._lock, []

    def after_the_removal(descriptor):
        if not calls:
            folder.rmdir()
        calls.append(descriptor)
        return lock(descriptor)

    monkeypatch.setattr(run_folder, "_lock", after_the_removal)
    RunFolder(folder)
    assert len(calls) == 2 and folder.is_dir()
    descriptor = os.open(folder, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)
    release(folder)


@pytest.mark.statement("twice-at-once")
def test_a_run_that_is_refused_leaves_the_one_beside_it(tmp_path, monkeypatch):
    """Both make the folder above them; the one that fails must not take the other's run away."""
    monkeypatch.setattr(run_folder, "on_refusal", [])
    refused = RunFolder(tmp_path / "new" / "a")
    goes_on = RunFolder(tmp_path / "new" / "b")
    refused.roll_back()
    assert not (tmp_path / "new" / "a").exists() and (tmp_path / "new" / "b").is_dir()
    release(goes_on.path)


def test_a_refused_command_leaves_no_file_that_only_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "on_refusal", [])
    path = tmp_path / "new" / "x.partial"
    hold_output(path, path.touch)
    assert path.is_file()
    run_folder.on_refusal.pop()()
    assert not (tmp_path / "new").exists()
    path = tmp_path / "y.partial"
    hold_output(path, path.touch)
    path.write_text("kept completions")
    run_folder.on_refusal.pop()()
    assert path.read_text() == "kept completions"
