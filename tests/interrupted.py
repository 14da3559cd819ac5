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
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

SCRIPTS = [f"train.{name}" for name in ("train_lm", "train_lm_ddp", "train_lm_amp_ckpt", "train_lm_lora")]
SCRIPTS += [f"rlhf.{name}" for name in ("train_reward_model", "dpo_train", "ppo_train", "grpo_train")]
LIBRARIES = ["datasets", "torch.optim.adamw", "transformers.models.llama.modeling_llama", "interrupted", "numpy"]


def start(script, words, die_at=0, said=os.devnull, actions=()):
    """A process that runs `python SCRIPT WORDS`; it kills itself at event `die_at`. said: the file for its output.

    actions: functions of this module, called first in the process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*SCRIPTS, *LIBRARIES])
    process = context.Process(target=_child, args=(script, [str(w) for w in words], die_at, str(said), actions))
    process.start()
    return process


def run(script, words, **options):
    """The exit status of such a process: negative when a signal ended it."""
    process = start(script, words, **options)
    process.join(240)
    return process.exitcode


def run_killed(script, words, out, kills=4, seed=0, said=os.devnull):
    """Run until it finishes, killed `kills` times before; the events at which it died."""
    chance, died = random.Random(seed), []
    events = json.loads((Path(str(out) + ".whole") / "events.json").read_text())
    while len(died) < kills:
        died.append(chance.randint(1, events))
        if run(script, [*words, "--out", out], die_at=died[-1], said=said) != -signal.SIGKILL:
            break  # it finished: less was left than events to die at
    if not (Path(out) / "end.pt").is_file():
        assert run(script, [*words, "--out", out], said=said) == 0, Path(said).read_text()
    return died


def _child(script, words, die_at, said, actions):
    from configs.config import cli

    torch.set_num_threads(1)
    with open(said, "a") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        for action in actions:
            action()
        module = importlib.import_module(script)
        sys.argv = [script.replace(".", "/") + ".py", *words]
        optimizers, events = [], [0]
        _count(events, die_at, optimizers)
        cli(module.main if "main" in vars(module) else module.train, module.Config)
        f.flush()
        out = Path(words[words.index("--out") + 1])
        state = {"optimizer": optimizers[-1].state_dict(), "random": torch.get_rng_state()}
        torch.save(state, out / "end.pt")
        (out / "events.json").write_text(str(events[0]))


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
    ends = [torch.load(x / "end.pt") for x in (a, b)]
    found += [] if _same(*ends) else ["optimizer or random state"]
    found += [] if lines(a) == lines(b) else ["metrics.jsonl"]
    for name in ("samples.jsonl",):
        if (a / name).is_file() and (a / name).read_bytes() != (b / name).read_bytes():
            found.append(name)
    results = [json.loads((x / "manifest.json").read_text())["result"] for x in (a, b)]
    return found + ([] if results[0] == results[1] else ["result"])


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
