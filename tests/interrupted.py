"""Run a script's main in processes that are killed on the way, the same command again each time, until one finishes.

Each process is a fork of a server that has imported the libraries once. It dies by SIGKILL at its n-th event. Events
are the optimizer's steps and everything that makes a file last: fsync, rename, replace, and the middle of a
checkpoint's tensors. So it dies within steps, while a checkpoint is written, and while the final weights are. What it
was doing is kept in a file that outlives it.
"""

import contextlib
import importlib
import json
import mmap
import multiprocessing
import os
import random
import resource
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import safetensors.torch
import torch
from chaos import PHASES  # steps: all that comes after the start-up, but for saving
from safetensors.torch import load_file

from models import resumable

TRAIN = ("train_lm", "train_lm_ddp", "train_lm_amp_ckpt", "train_lm_lora", "train_lm_wandb")
TRAIN += ("train_lm_fsdp", "train_lm_tp")
SCRIPTS = [f"train.{name}" for name in TRAIN]
SCRIPTS += [f"rlhf.{name}" for name in ("train_reward_model", "dpo_train", "ppo_train", "grpo_train")]
SCRIPTS += ["data.generate_preferences", "data.generate_preferences_multi", "report.evaluate"]
SCRIPTS += ["report.compare", "report.demo"]
LIBRARIES = ["datasets", "torch.optim.adamw", "transformers.models.llama.modeling_llama", "interrupted", "numpy"]


def start(script, words, out, die_at=0, die_by=signal.SIGKILL, largest_file=None, spoil_from=None, environment=None):
    """A process that runs `python SCRIPT WORDS --out OUT`; what it prints is added to the file OUT.said.

    die_at: the event at which it sends itself the signal die_by. largest_file: bytes; what would be longer cannot be
    written, as on a full disk. spoil_from: from this optimizer step on, counted from 1, gradients are NaN.
    environment: variables to set, such as RANK.
    """
    words = [*map(str, words), "--out", str(out)]
    return _start(_child, out, script, words, out, die_at, die_by, largest_file, spoil_from, environment or {})


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_ranks(script, words, out, count, last=None, **environment):
    """`count` connected processes as a launcher would start them. last: how the last of them dies, as in `start`."""
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), **environment}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(count)]
    dies = [{}] * (count - 1) + [last or {}]
    return [start(script, words, out, environment=environment, **die) for environment, die in zip(ranks, dies)]


def finish(processes, out):
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * len(processes), said(out)


def start_demo(stages, out, die_in=None, die_at=0):
    """A process, and a process group, that runs these stages as `python report/demo.py` does; it prints to OUT.said.

    A stage is a fork here, too, in place of a new Python. die_in, die_at: the script and the event in it at which the
    demo and the stage are killed together.
    """
    return _start(_demo, out, stages, out, die_in, die_at)


def _start(function, out, *arguments):
    Path(out).parent.mkdir(exist_ok=True)
    Path(f"{out}.said").touch()
    if not Path(f"{out}.phase").exists():  # another process of the run may have it open
        Path(f"{out}.phase").write_bytes(b"\0")
    return fork(function, *arguments)


def fork(function, *arguments):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*SCRIPTS, *LIBRARIES])
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def start_server():
    """Have the server import the libraries now, not when the first process is started and its time is taken."""
    fork(int).join()


def run(script, words, out, **options):
    """The exit status of such a process: negative when a signal ended it."""
    process = start(script, words, out, **options)
    process.join(240)
    return process.exitcode


def phase(out):
    """What the last process that writes to `out` is doing, or was doing when it died: one of PHASES."""
    return PHASES[Path(f"{out}.phase").read_bytes()[0]]


def said(out):
    return Path(f"{out}.said").read_text()


def wait_for(out, words, seconds=120):
    """Wait until a process that writes to `out` has said this."""
    end = time.time() + seconds
    while words not in said(out):
        assert time.time() < end, said(out)
        time.sleep(0.01)


def run_whole(script, words, out):
    assert run(script, words, out) == 0, said(out)


def run_killed(script, words, out, whole, kills=4, seed=0):
    """Run until it finishes, killed `kills` times before; the events at which it died. whole: the uninterrupted one."""
    chance, died = random.Random(seed), []
    events = torch.load(f"{whole}.end")["events"]
    while len(died) < kills and not Path(f"{out}.end").is_file():
        died.append(chance.randint(1, events))
        assert run(script, words, out, die_at=died[-1]) in (0, -signal.SIGKILL), said(out)
    if not Path(f"{out}.end").is_file():
        run_whole(script, words, out)
    return died


def _child(script, words, out, die_at, die_by, largest_file, spoil_from, environment):
    from runtime.cli import cli

    os.environ.pop("WANDB_SERVICE", None)  # W&B of the process that started this one may have ended
    os.environ.update(environment)
    torch.set_num_threads(1)
    replace = os.replace
    with open(f"{out}.said", "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        module = importlib.import_module(script)
        sys.argv = [script.replace(".", "/") + ".py", *words]
        updates, events = [], [0]
        _count(events, die_at, lambda: os.kill(os.getpid(), die_by), updates)
        _watch(f"{out}.phase")
        if spoil_from:
            _spoil_gradients(spoil_from)
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        cli(module.main if "main" in vars(module) else module.train, module.Config, several=True)
        f.flush()
        if environment.get("RANK", "0") == "0":
            states = [each.state_dict() for each in updates]  # optimizer, scaler and counts, as a checkpoint has them
            end = {"updates": states, "random": torch.get_rng_state(), "events": events[0]}
            torch.save(end, f"{out}.end.new")
            replace(f"{out}.end.new", f"{out}.end")


def _demo(stages, out, die_in, die_at):
    from configs.config import UserError
    from report import demo

    os.setsid()  # so that the stage can be killed with it
    torch.set_num_threads(1)
    demo.subprocess = SimpleNamespace(Popen=Fork, PIPE=subprocess.PIPE, STDOUT=subprocess.STDOUT)
    with open(f"{out}.said", "a", buffering=1) as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        Fork.phase, Fork.die_in, Fork.die_at = _watch(f"{out}.phase"), die_in, die_at
        try:
            demo.run_all(stages, "the same again")
        except UserError as error:
            print(f"error: {error}")
            sys.exit(2)


class Fork:
    """`subprocess.Popen([python, script, *words])` as far as the demo uses it; the libraries are imported already."""

    def __init__(self, command, cwd, stdout, **_):
        read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(read)
            Fork.phase[0] = 0
            os.dup2(write, 1), os.dup2(write, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            os.chdir(cwd)
            _, script, *words = command
            sys.argv, sys.path[0] = [script, *words], str(Path(script).parent.absolute())
            if script == Fork.die_in:
                _count([0], Fork.die_at, lambda: os.killpg(0, signal.SIGKILL), [])
            status = 1
            try:
                runpy.run_path(script, run_name="__main__")
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(write)
        self.stdout = os.fdopen(read)

    def wait(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _watch(path):
    """Keep in the file `path` in which of PHASES this process is, or what it forks; the file's one byte, to change."""
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from runtime.checkpoint import Checkpoints
    from runtime.run import Run

    with open(path, "r+b") as f:
        now = mmap.mmap(f.fileno(), 1)  # what is written here stays when the process dies
    now[0] = 0

    def begins(function):
        def call(*args, **kwargs):
            now[0] = 1
            return function(*args, **kwargs)

        return call

    def saves(function):
        def call(*args, **kwargs):
            before = now[0]
            now[0] = 2 if before else 0  # a file of the start-up, else
            try:
                return function(*args, **kwargs)
            finally:
                now[0] = before

        return call

    Run.begin_steps, resumable.generate = begins(Run.begin_steps), begins(resumable.generate)
    for owner in (PreTrainedModel, PeftModel, PreTrainedTokenizerBase):
        owner.save_pretrained = saves(owner.save_pretrained)
    Checkpoints.save, Run.finish = saves(Checkpoints.save), saves(Run.finish)
    for name in ("fsync", "rename", "replace"):
        setattr(os, name, saves(getattr(os, name)))
    return now


def _count(events, die_at, die, updates):
    """Count events and call `die` at the one of number die_at; `updates` receives every `Updates` that is made."""

    def counted(function):
        def call(*args, **kwargs):
            events[0] += 1
            if events[0] == die_at:
                die()
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    from runtime import checkpoint
    from train.updates import Updates

    save_file = checkpoint.save_file

    def torn(tensors, path):
        events[0] += 1
        if events[0] == die_at:
            whole = safetensors.torch.save(tensors)
            path.write_bytes(whole[: len(whole) // 2])
            die()
        save_file(tensors, path)

    checkpoint.save_file = torn
    torch.optim.AdamW.step = counted(torch.optim.AdamW.step)
    made = Updates.__init__

    def remember(self, *args, **kwargs):
        made(self, *args, **kwargs)
        updates.append(self)

    Updates.__init__ = remember


def _spoil_gradients(first):
    clip, steps = torch.nn.utils.clip_grad_norm_, [0]

    def spoilt(parameters, *args):
        steps[0] += 1
        parameters = list(parameters)
        if steps[0] >= first:
            next(p for p in parameters if p.grad is not None).grad.view(-1)[0] = float("nan")
        return clip(parameters, *args)

    torch.nn.utils.clip_grad_norm_ = spoilt


def differences(a, b):
    """What two finished runs differ in: weights, updates and random state bit by bit, metrics but for their times.

    a, b: what `--out` named, a folder or a file.
    """
    a, b = Path(a), Path(b)
    if a.is_file():
        both = [(a, b), (manifest_of(a), manifest_of(b))]
        return [one for mine, theirs in both if mine.is_file() for one in file_differences(mine, theirs)]
    found = tree_differences(a, b)
    if not Path(f"{b}.end").is_file():  # killed when all was written, and then found to be finished
        return found
    ends = [torch.load(f"{x}.end") for x in (a, b)]
    return found + [key for key in ("updates", "random") if not _same(ends[0][key], ends[1][key])]


def tree_differences(a, b):
    """What two folders differ in: names, and what `file_differences` compares; W&B's own files are left out."""
    names = [{p.relative_to(x) for p in x.rglob("*") if p.is_file() and "wandb" not in p.parts} for x in (a, b)]
    found = [f"{name}: in one of them only" for name in sorted(names[0] ^ names[1])]
    return found + [one for name in sorted(names[0] & names[1]) for one in file_differences(a / name, b / name)]


def file_differences(a, b):
    """What two files differ in, but for times and where they lie; what is neither data nor weights is not compared."""
    if a.suffix == ".safetensors":
        mine, theirs = load_file(a), load_file(b)
        return [f"{a.name}: {k}" for k in mine.keys() | theirs.keys() if not _same(mine.get(k), theirs.get(k))]
    if a.name == "metrics.jsonl":
        same = lines(a.parent) == lines(b.parent)
    elif a.name == "manifest.json":
        same = record(a)["result"] == record(b)["result"]
    elif a.suffix == ".json":
        same = record(a) == record(b)
    else:
        same = a.suffix != ".jsonl" or a.read_bytes() == b.read_bytes()
    return [] if same else [a.name]


def manifest_of(path):
    return path.with_suffix(".manifest.json")


def record(path):
    """What a manifest or a measurement says but for its times and where it was made."""
    found = json.loads(Path(path).read_text())
    if "command" in found:
        words = shlex.split(found["command"])
        found["command"] = [word for before, word in zip(["", *words], words) if before != "--out"]
    left_out = ("seconds", "peak_memory_gb", "config", "git_commit", "admission")  # admission: of the last process
    return {k: v for k, v in found.items() if k not in left_out}


def lines(folder):
    """The rows of metrics.jsonl without their times."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tok/s")} for row in rows]


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b
