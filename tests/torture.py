"""What tests/chaos.py does to a stage: run it, kill it, run it again, compare. In a process of its own, with torch."""

import contextlib
import os
import random
import shutil
import signal
import time
from collections import Counter

import torch
from chaos import INPUTS, MADE, OUT, PHASES, ROOT, STAGES
from interrupted import differences, phase, run_whole, said, start, start_demo, start_server, tree_differences

from report.demo import stages

_reports = []  # the queue of the main process


def begin_worker(queue):
    _reports.append(queue)
    start_server()


def report(*words):
    """Tell the main process (stage, what happened, kills so far)."""
    _reports[0].put(words)


class Failed(Exception):
    """A process ended in another way than it should."""


class Script:
    """A stage that is one script."""

    def __init__(self, name, folder):
        self.name, self.folder, self.runs = name, folder / name, 0
        self.script, words = STAGES[name]
        files = {key: str(folder / "inputs" / out) for key, (_, _, out) in INPUTS.items()}
        self.words = [files.get(word, word) for word in words]
        self.folder.mkdir()

    def begin(self):
        """The next run; the first is the one that is not killed."""
        self.runs += 1
        self.out = self.folder / f"{self.runs}" / OUT.get(self.name, "run")

    def start(self, die_at=0):
        return start(self.script, self.words, self.out, die_at=die_at)

    def kill(self, process, chance):
        process.kill()

    def events(self):
        return torch.load(f"{self.out}.end")["events"]

    def differences(self):
        """What the run that has just finished differs in from the first."""
        whole = self.folder / "1" / self.out.name
        found = differences(whole, self.out)
        rest = self.out.parent.rglob("*")
        left = [p.name for p in rest if p.name == "checkpoints" or p.suffix in (".tmp", ".partial")]
        return found + [f"{name} is left" for name in left]


class Demo:
    """The demo with all of its stages. It writes to the same folders each time: they are moved when it has finished."""

    def __init__(self, folder):
        self.name, self.folder, self.runs, self.stages = "demo", folder / "demo", 0, stages(smoke=True)

    def begin(self):
        self.runs += 1
        self.out = self.folder / f"{self.runs}"
        for name in MADE:
            shutil.rmtree(ROOT / name, ignore_errors=True)

    def start(self, die_at=0):
        return start_demo(self.stages, self.out)

    def kill(self, process, chance):
        """As a machine that goes down, or alone: then the stage goes on until it has something to print."""
        if chance.random() < 0.5:
            with contextlib.suppress(ProcessLookupError):  # it has not made its group yet
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()

    def events(self):
        return 0

    def differences(self):
        for name in MADE:
            shutil.copytree(ROOT / name, self.out / name)
        return tree_differences(self.folder / "1", self.out) if self.runs > 1 else []


def torture(name, folder, kills, seed):
    """Kill a stage so many times; what became of it as a dict. Every kill is reported to the queue of the main process.

    Raises nothing: what goes wrong is a difference.
    """
    began, chance = time.time(), random.Random(f"{seed} {name}")
    moments, found = Counter(), []
    stage = Demo(folder) if name == "demo" else Script(name, folder)
    report(name, "begins", 0)
    try:
        stage.begin()
        clock = time.time()
        expect(stage, stage.start(), 0)
        seconds, events = time.time() - clock, stage.events()
        stage.differences()
        while moments.total() < kills:
            stage.begin()
            status, fresh = -signal.SIGKILL, True
            while status != 0 and moments.total() < kills:
                clock = time.time()
                if events and chance.random() < 0.5:
                    process = stage.start(die_at=chance.randint(1, events))
                else:
                    process = stage.start()
                    process.join(chance.uniform(0, seconds))
                    if process.exitcode is None:
                        stage.kill(process, chance)
                status = expect(stage, process, 0, -signal.SIGKILL)
                if status == 0 and fresh:
                    seconds = min(seconds, time.time() - clock)  # the first may have had to share its core
                elif status != 0:
                    moments[phase(stage.out)] += 1
                    report(name, phase(stage.out), moments.total())
                fresh = False
            if status != 0:
                expect(stage, stage.start(), 0)
            found += [f"run {stage.runs}: {one}" for one in stage.differences()]
    except Failed as error:
        found.append(f"run {stage.runs}: {error}")
    seconds = round(time.time() - began, 1)
    report(name, "differs" if found else "done", moments.total())
    counts = {moment: moments[moment] for moment in PHASES}
    return {"stage": name, "runs": stage.runs - 1, "kills": moments.total(), **counts, "differences": found,
            "seconds": seconds}  # fmt: skip


def expect(stage, process, *allowed):
    """The exit status of a process. Raises Failed if it is none of these, with what the process said last."""
    process.join(300)
    if process.exitcode is None:
        process.kill()
        raise Failed("hung for 300 s")
    if process.exitcode not in allowed:
        raise Failed(f"exit status {process.exitcode} after saying:\n" + "\n".join(said(stage.out).splitlines()[-25:]))
    return process.exitcode


def make_inputs(folder):
    """What the stages read, made by the scripts themselves."""
    files = {key: str(folder / "inputs" / out) for key, (_, _, out) in INPUTS.items()}
    for key, (script, words, _) in INPUTS.items():
        run_whole(script, [files.get(word, word) for word in words], files[key])
