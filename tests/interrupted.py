"""Run a script's main in processes that are killed on the way, the same command again each time, until one finishes.

Each process is a fork of a server that has imported the libraries once. It dies by SIGKILL at its n-th event; events
are the optimizer's steps and everything that makes a file last: fsync, rename, replace. So it dies within steps, while
a checkpoint is written, and while the final weights are.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

SCRIPTS = [f"train.{name}" for name in ("train_lm", "train_lm_ddp", "train_lm_amp_ckpt", "train_lm_lora")]
SCRIPTS += [f"rlhf.{name}" for name in ("train_reward_model", "dpo_train", "ppo_train", "grpo_train")]
SCRIPTS += ["data.generate_preferences", "report.evaluate"]
LIBRARIES = ["datasets", "torch.optim.adamw", "transformers.models.llama.modeling_llama", "interrupted", "numpy"]


def start(script, words, out, die_at=0, largest_file=None, environment=None):
    """A process that runs `python SCRIPT WORDS --out OUT`; what it prints is added to the file OUT.said.

    die_at: the event at which it kills itself. largest_file: bytes; what would be longer cannot be written, as on a
    full disk. environment: variables to set, such as RANK.
    """
    Path(out).parent.mkdir(exist_ok=True)
    Path(f"{out}.said").touch()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*SCRIPTS, *LIBRARIES])
    words = [*map(str, words), "--out", str(out)]
    process = context.Process(target=_child, args=(script, words, out, die_at, largest_file, environment or {}))
    process.start()
    return process


def run(script, words, out, **options):
    """The exit status of such a process: negative when a signal ended it."""
    process = start(script, words, out, **options)
    process.join(240)
    return process.exitcode


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


def _child(script, words, out, die_at, largest_file, environment):
    from configs.config import cli

    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(f"{out}.said", "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        module = importlib.import_module(script)
        sys.argv = [script.replace(".", "/") + ".py", *words]
        optimizers, events = [], [0]
        _count(events, die_at, optimizers)
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        cli(module.main if "main" in vars(module) else module.train, module.Config)
        f.flush()
        if environment.get("RANK", "0") == "0":
            states = [optimizer.state_dict() for optimizer in optimizers]
            torch.save({"optimizers": states, "random": torch.get_rng_state(), "events": events[0]}, f"{out}.end")


def _count(events, die_at, optimizers):
    def counted(function):
        def call(*args, **kwargs):
            events[0] += 1
            if events[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace"):
        setattr(os, name, counted(getattr(os, name)))
    adamw, made = torch.optim.AdamW, torch.optim.AdamW.__init__
    adamw.step = counted(adamw.step)

    def remember(self, *args, **kwargs):
        made(self, *args, **kwargs)
        optimizers.append(self)

    adamw.__init__ = remember


def differences(a, b):
    """What two finished runs differ in: weights, optimizer and random state bit by bit, metrics but for their times."""
    a, b = Path(a), Path(b)
    found = []
    for path in sorted(a.rglob("*.safetensors")):
        mine, theirs = load_file(path), load_file(b / path.relative_to(a))
        found += [f"{path.name}: {k}" for k in mine.keys() | theirs.keys() if not _same(mine.get(k), theirs.get(k))]
    ends = [torch.load(f"{x}.end") for x in (a, b)]
    found += [key for key in ("optimizers", "random") if not _same(ends[0][key], ends[1][key])]
    found += [] if lines(a) == lines(b) else ["metrics.jsonl"]
    found += [] if _bytes(a / "samples.jsonl") == _bytes(b / "samples.jsonl") else ["samples.jsonl"]
    results = [json.loads((x / "manifest.json").read_text())["result"] for x in (a, b)]
    return found + ([] if results[0] == results[1] else ["result"])


def _bytes(path):
    return path.read_bytes() if path.is_file() else None


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
