"""Checkpoints: an interrupted run continues from its last checkpoint, with the same results as without interruption.

    checkpoints = Checkpoints(run, model=model, updates=updates)
    checkpoints.load()                                   # continue this run if it was interrupted
    for step in checkpoints.remaining():
        ...
        checkpoints.save_if_due(step)                    # by steps, by minutes, or after a signal

A checkpoint is a folder OUT/checkpoints/step-00000040: tensors as safetensors, the rest as JSON, and a manifest with
the size and the sha256 of both. It is written under another name, flushed to the disk and renamed, so it is complete or
not there. The last `keep_checkpoints` are kept. When the run is finished, all are removed, because its weights are
saved.

A checkpoint has the weights that train, the state of each other part (updates, value head, meter), the values that the
loop carries over (`carried`), the clock and counters of the run, and the random state of every process. Data order and
rollouts are functions of (seed, step), so they need no state. Process 0 writes and reads, and sends the others what
they need. Their number may be different from before.

A weight that is sharded over the processes is never gathered: each process writes its part of it into `shards`, a
subfolder of the checkpoint (runtime/shards.py). Then all processes must see the run's folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from configs.config import UserError, option, shown
from runtime.console import clock, command, rank, say
from runtime.failures import reason
from runtime.files import described, sha256_file, synced, write_atomically
from runtime.plan import Planning
from runtime.processes import communication_device, gather, largest_over_processes, on_main, several
from runtime.run import CHECKPOINTS
from runtime.shards import read_shards, sharded_tensors, with_marks, write_shards
from runtime.signals import WISHES
from runtime.tracking import Tracking

FIRST_PAUSE = 20.0  # seconds of steps before the first checkpoint by time; each pause is twice as long as the last
FILES = ("tensors.safetensors", "state.json")
SHARDS = "shards"  # subfolder of a checkpoint


@dataclass
class Saving(Planning, Tracking):
    """The options of every training script that do not change its results: a dry run, checkpoints, log, tokens, W&B."""

    verbose: bool = option(False, "print every number of a log line, not only the important ones", identity=False)
    wandb_model: bool = option(False, "also send the trained model to W&B, as an artifact", identity=False)
    save_every: int = option(
        0, "steps (rollouts in PPO and GRPO) between checkpoints; 0: by time alone", at_least=0, identity=False
    )
    save_minutes: float = option(
        5.0, "minutes between checkpoints, fewer at first; 0: by steps alone", at_least=0, identity=False
    )
    keep_checkpoints: int = option(2, "the last so many are kept while the run goes on", at_least=1, identity=False)
    keep_tokens: int = option(
        0, "keep the tokens of so many sequences at five steps, for report/token_view.py; 0: none",
        at_least=0, at_most=64, identity=False,
    )  # fmt: skip
    max_skipped: int = option(
        3, "end at so many steps in a row whose loss or gradient is not finite", at_least=1, identity=False
    )


class Checkpoints:
    """The checkpoints of one run.

    parts: {name: object with a state}. Of a module, the weights with requires_grad are saved. Any other object needs
        state_dict and load_state_dict.
    """

    def __init__(self, run, **parts):
        self.run, self.parts, self.config = run, parts, run.config
        self.folder = run.folder / CHECKPOINTS
        self.done = 0  # steps taken before this process began
        self._since = None  # time of the last checkpoint, or of the beginning of the steps
        self._pause = min(FIRST_PAUSE, 60 * self.config.save_minutes)
        self._came, self._came_at = 0, 0.0  # the SIGINT or SIGTERM that this process received, and its time
        self._signal = 0  # the same signal when all processes know it
        self._saved = False  # whether there is a checkpoint

    def load(self):
        """Restore the newest complete checkpoint. Returns its (step, carried), or (0, {}) if there is none.

        If a checkpoint is damaged, a message names it, and the one before it is used. Raises UserError if another
        script wrote the checkpoint, or if a file that the run reads has changed since. Once the steps have begun,
        SIGTERM saves a checkpoint and then stops the run. So does Ctrl-C if there is a log line or a checkpoint; else
        the run's folder is given back as it was.
        """
        found = []
        on_main(lambda: found.append(self._newest()))
        state = from_main(found[0] if found else None)
        if state is None:
            self.run.restart()
        else:
            if state["parts"].keys() != self.parts.keys():
                raise UserError("the checkpoint is of another version of this script. --overwrite true begins again")
            state["parts"] = self._with_shards(state["step"], state["parts"])
            for name, part in self.parts.items():
                put_back(part, state["parts"][name])
            self.done, self._saved = state["step"], True
            if rank() < len(state["random"]):  # a process that was not there before keeps the state from its seed
                set_random_state(state["random"][rank()])
            self.run.resume(state["run"])
        self._listen()
        return (0, {}) if state is None else (state["step"], state["carried"])

    def remaining(self):
        """Yield the numbers of the remaining steps, counted from 1. Starts the clock of the run's steps."""
        self.run.begin_steps(self.done)
        yield from range(self.done + 1, self.run.total_steps + 1)

    def save_if_due(self, step, carried=None):
        """Save after `step` if it is due or if a signal came. After a signal, this ends the process; see `save`."""
        if self.due(step):
            self.save(step, carried)

    @contextlib.contextmanager
    def saved_before(self, step):
        """A context for work that changes nothing yet, at the beginning of `step`: a UserError in it loses no step.

        The steps before are saved, if one of them was not skipped, and the message says so. All processes must raise
        the UserError.
        """
        before = self.run.skipped, self.run.skips
        try:
            yield
        except UserError as error:
            self.run.skipped, self.run.skips = before  # this step will be made again
            if step - 1 - self.run.skipped <= self.done:
                raise
            self.save(step - 1)
            raise UserError(f"{error}. Step {step - 1} is saved; to go on: {command()}") from None

    def due(self, step):
        """Whether to save after `step`. All processes get the same result."""
        now = time.time()
        self._since = self._since or self.run.steps_began
        by_steps = self.config.save_every and step % self.config.save_every == 0
        by_time = self.config.save_minutes and now - self._since >= self._pause
        wanted = bool(by_steps or by_time) and not self.run.skipped  # no checkpoint while steps are skipped
        wanted, self._signal = largest_over_processes(wanted, self._came)
        if step == self.run.total_steps:
            self._listen(False)  # the rest of the run is short and does not check for signals
        return bool(wanted or self._signal)

    def save(self, step, carried=None):
        """Write a checkpoint of `step`. After a signal, also print how to continue, and end the process.

        carried: a dict of tensors, numbers, texts, lists and dicts that the loop carries over.
        Raises UserError if the checkpoint cannot be written; earlier checkpoints stay.
        """
        began = time.time()
        states = gather(random_state())
        parts = {name: state_of(part) for name, part in self.parts.items()}  # in all processes: a meter sums over them
        sharded = sharded_tensors(parts, "parts")
        shards = self._write_shards(step, sharded) if sharded else {}
        on_main(lambda: self._write(step, with_marks(parts, "parts"), carried or {}, states, shards))
        self._saved = True
        self._since = time.time()
        cost = self._since - began
        self._pause = min(max(2 * self._pause, 20 * cost), 60 * self.config.save_minutes)  # 5 % of the time at most
        if self._signal:
            self._listen(False)
            on_main(self.run.curves.draw)
            name = signal.Signals(self._signal).name
            say(f"\n{name}: stopped after step {step} of {self.run.total_steps}, which is saved. To go on: {command()}")
            sys.exit(128 + self._signal)

    def _write(self, step, parts, carried, states, shards):
        state = {"script": self.run.script, "step": step, "carried": carried, "parts": parts, "random": states}
        state |= {"run": self.run.state(), "files": self.run.files}
        temporary, path = self.folder / "saving.tmp", self.folder / f"step-{step:08d}"
        with self._writing(step):
            if not shards:
                self._make_temporary()
            tensors = {}
            tree = flatten(state, tensors)
            save_file(tensors, temporary / FILES[0])
            (temporary / FILES[1]).write_text(json.dumps(tree), encoding="utf-8")
            files = {name: described(temporary / name) for name in FILES} | shards
            manifest = {"step": step, "written": time.strftime("%Y-%m-%d %H:%M:%S"), "files": files}
            write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            synced(temporary / FILES[0], temporary / FILES[1], temporary)
            shutil.rmtree(path, ignore_errors=True)
            os.rename(temporary, path)
            synced(self.folder)
        self.run.checkpoint = path
        self.run.keep()
        mine = [p for p in self._all() if p <= path]  # later ones are damaged: the run continued from before them
        for old in {*self._all()} - {*mine[-self.config.keep_checkpoints :]}:
            shutil.rmtree(old, ignore_errors=True)

    def _make_temporary(self):
        temporary = self.folder / "saving.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)  # not its parent: without the run's folder, its configuration is lost
        temporary.mkdir()

    @contextlib.contextmanager
    def _writing(self, step):
        """A context for writing the checkpoint of `step`. If the disk refuses, a UserError says what stays."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            shutil.rmtree(self.folder / "saving.tmp", ignore_errors=True)
            last = self.run.checkpoint
            stays = f"that of {shown(last)} stays" if last and last.is_dir() else "there is none before it"
            raise UserError(
                f"the checkpoint of step {step} cannot be written to {shown(self.folder)}: {reason(error)}; {stays}. "
                f"Once there is room to write, go on with: {command()}"
            ) from None

    def _write_shards(self, step, sharded):
        """Write the sharded tensors into the temporary folder, all processes together. Returns their files."""
        temporary, unseen = self.folder / "saving.tmp", []

        def make():
            with self._writing(step):
                self._make_temporary()

        on_main(make)
        with self._writing(step):
            files = write_shards(sharded, temporary / SHARDS)
        files = {f"{SHARDS}/{name}": size for name, size in files.items()}
        on_main(lambda: unseen.extend(name for name in files if not (temporary / name).is_file()))
        if any(gather(bool(unseen))):
            raise UserError(
                f"out = {shown(self.run.folder)}: process 0 does not see what the other processes write there. A model "
                "that is sharded over several machines needs a folder that all of them share"
            )
        return files

    def _with_shards(self, step, state):
        modules = [trained_weights(part) for part in self.parts.values() if isinstance(part, torch.nn.Module)]
        mine = sharded_tensors(modules, "parts")
        if not mine:
            return state
        mesh = next(iter(mine.values())).device_mesh
        return read_shards(state, self.folder / f"step-{step:08d}" / SHARDS, mesh)

    def _all(self):
        return sorted(self.folder.glob("step-*"))

    def _newest(self):
        """The state in the newest complete checkpoint, or None."""
        for path in reversed(self._all()):
            damage = find_damage(path)
            if damage:
                say(f"checkpoint {shown(path)} is damaged: {damage}. It is left out")
                continue
            state = unflatten(json.loads((path / FILES[1]).read_text(encoding="utf-8")), load_file(path / FILES[0]))
            if state["script"] != self.run.script:
                raise UserError(
                    f"checkpoint {shown(path)} was written by {state['script']}, not by {self.run.script}. "
                    "Give another --out, or --overwrite true to begin again"
                )
            self.run.refuse_changes(state["files"], f"the checkpoint {shown(path)} was written")
            self.run.checkpoint = path
            written = clock((path / "manifest.json").stat().st_mtime)
            say(
                f"continuing from step {state['step']} of {self.run.total_steps} "
                f"(checkpoint {shown(path)}, written {written})"
            )
            return state
        if self.run.unfinished:
            say(f"{shown(self.run.folder)} holds this run, unfinished, without a checkpoint: it begins again")
        return None

    def _listen(self, on=True):
        """Handle signals: SIGTERM and the first Ctrl-C save and stop; a second Ctrl-C ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in WISHES:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup has SIGHUP ignored: so it stays
                signal.signal(number, self._asked if on else signal.SIG_DFL)
        signal.signal(signal.SIGINT, self._asked if on else signal.default_int_handler)

    def _asked(self, number, frame):
        now = time.time()
        again = self._came == number and now - self._came_at > 1  # a launcher may repeat a signal of the terminal
        if number == signal.SIGINT and (again or not (self.run.steps_began and (self.run.logged or self._saved))):
            raise KeyboardInterrupt
        if not self.run.steps_began:  # nothing to save yet
            sys.exit(128 + number)
        if not self._came:
            self._came, self._came_at = number, now
            if rank() == 0:
                os.write(2, b"\nfinishing this step, then saving; once more to end at once\n")


def find_damage(folder):
    """A text that says what is wrong with the files of a checkpoint; None if they are complete and unchanged."""
    try:
        expected = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        for name in [*FILES, *(expected.keys() - {*FILES})]:
            size = (folder / name).stat().st_size
            if size != expected[name]["bytes"]:
                return f"{name} has {size:,} of {expected[name]['bytes']:,} bytes"
            if sha256_file(folder / name) != expected[name]["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return "manifest.json is not what was written"
    return None


def trained_weights(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def state_of(part):
    """The state of a part: the trained weights of a module, else its state_dict()."""
    return trained_weights(part) if isinstance(part, torch.nn.Module) else part.state_dict()


def put_back(part, state):
    """Restore the state from `state_of` in a part. Raises UserError for a module with other weights."""
    if not isinstance(part, torch.nn.Module):
        part.load_state_dict(state)
        return
    mine = trained_weights(part)
    if {k: p.shape for k, p in mine.items()} != {k: x.shape for k, x in state.items()}:
        raise UserError("the checkpoint has other weights than this model. --overwrite true begins again")
    with torch.no_grad():
        for name, p in mine.items():
            p.copy_(state[name])


def flatten(value, tensors, name="state"):
    """Turn a nested value into one that JSON can hold. Its tensors are moved to the dict `tensors`, named by place."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs, because JSON would turn the optimizer's integer keys into texts
        return {"dict": [[key, flatten(x, tensors, f"{name}.{key}")] for key, x in value.items()]}
    if isinstance(value, (list, tuple)):
        return [flatten(x, tensors, f"{name}.{i}") for i, x in enumerate(value)]
    return value


def unflatten(tree, tensors):
    """The inverse of `flatten`. Tuples become lists."""
    if isinstance(tree, list):
        return [unflatten(x, tensors) for x in tree]
    if isinstance(tree, dict):
        return tensors[tree["tensor"]] if "tensor" in tree else {k: unflatten(x, tensors) for k, x in tree["dict"]}
    return tree


def random_state():
    """The state of every random generator of this process."""
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest], "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def set_random_state(state):
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def from_main(state):
    """Send the state of process 0 to all processes, tensor by tensor, because all together may be large."""
    if not several():
        return state
    tensors = {}
    message = [(flatten(state, tensors), {k: (x.dtype, x.shape) for k, x in tensors.items()})]
    dist.broadcast_object_list(message)
    tree, kinds = message[0]
    for name, (dtype, shape) in kinds.items():
        here = tensors[name] if rank() == 0 else torch.empty(shape, dtype=dtype)
        there = here.to(communication_device())
        dist.broadcast(there, 0)
        tensors[name] = there.cpu()
    return unflatten(tree, tensors)
