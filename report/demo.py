"""Run every stage in order, from the fetched model to the comparison. `make demo` runs this script.

    python report/demo.py
    python report/demo.py --smoke true      # the same stages on a tiny model with random weights

Each stage is a command of the README in a separate process. A stage that is already done prints this and ends at once.
So after a failure or an interruption, the same command continues from there. This file itself trains and measures
nothing.
"""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass

from configs.config import ROOT, UserError, option
from report.methods import METHODS
from runtime.cli import cli
from runtime.console import duration, say
from runtime.files import in_root
from runtime.memory import AT_START
from runtime.run_folder import hold_output

# Seconds of each stage on two cores of an AMD EPYC with avx512_bf16. They are rescaled by the pace of this machine.
# GRPO online was timed with other work of low priority beside it.
MEASURED = {"fetch": 26, "preferences": 110, "groups": 30, "lm": 41, "reward": 50, "compare": 274}
MEASURED |= {method.key: method.seconds for method in METHODS if method.script}
THERE = 444e9  # FLOP/s of those cores in a bf16 matmul
# The stages are not only matmuls: one core with 86e9 FLOP/s in fp32 took 1 / 0.43 of the time of 390e9 in bf16
GROWTH = math.log(0.43) / math.log(86 / 390)
FIRST = 300  # seconds of the table; the weight of the first estimate, because one or two stages tell little
SMOKE_PACE = 0.1  # the pace of the stages on a tiny model, until the first one has been timed
DONE_SECONDS = 6  # a stage that is already done only starts Python and reads a manifest
ALREADY = ("this very ", ": already in ")  # parts of what the scripts print then, such as "holds this very run"


@dataclass
class Config:
    smoke: bool = option(False, "the same stages with configs/smoke/: seconds each, on random weights")


@dataclass(frozen=True)
class Stage:
    """One command. made: a file; if it exists, the stage was finished before.

    name: its key in MEASURED. share: its work as a share of the demo's stage of this name.
    """

    name: str
    title: str
    command: tuple[str, ...]
    made: str
    share: float = 1.0

    @property
    def seconds(self):
        """On the machine of MEASURED."""
        return MEASURED[self.name] * self.share


FETCH = Stage("fetch", "the pretrained model and the text", ("models/fetch.py",), "models/smollm2-135m/config.json")


def stages(smoke=False):
    """The stages in order."""
    where, data, models = ("configs/smoke", "data/smoke", "models/smoke") if smoke else ("configs", "data", "models")

    def stage(name, title, script, config, made, *edits, always=False):
        """A `Stage`. Its command has `--config` only if the script would not read this file by default."""
        given = ("--config", f"{where}/{config}.yaml") if smoke or always else ()
        return Stage(name, title, (script, *given, *edits), made)

    def train(method):
        made = f"{models}/{method.key}/manifest.json"
        return stage(method.key, method.label, method.script, method.key, made, always=not method.own_config)

    short = () if smoke else ("--max_steps", "4", "--eval_blocks", "8")
    lm = (*short, "--out", "models/smoke/lm" if smoke else "models/lm_demo")
    return [
        *([] if smoke else [FETCH]),  # a tiny model is built where it is needed
        stage("preferences", "preference pairs", "data/generate_preferences.py", "preferences",
              f"{data}/preferences.manifest.json"),
        stage("groups", "groups with several rejections", "data/generate_preferences_multi.py", "preferences_multi",
              f"{data}/groups.manifest.json"),
        stage("lm", "language-model training, a few steps", "train/train_lm.py", "train_base",
              f"{lm[-1]}/manifest.json", *lm),
        *[train(method) for method in METHODS if method.learns_from == "text"],
        stage("reward", "reward model", "rlhf/train_reward_model.py", "reward", f"{models}/reward/manifest.json"),
        *[train(method) for method in METHODS if method.script and method.learns_from != "text"],
        stage("compare", "measure and compare", "report/compare.py", "compare", ""),
    ]  # fmt: skip


def first_pace():
    """The expected pace of this machine before any stage has been timed, from the speed of its matmuls."""
    import torch  # imported here: only this function needs it

    from models.device import frozen_dtype, pick_device, pick_precision

    device = pick_device()
    x = torch.randn(1024, 1024, device=device).to(frozen_dtype(pick_precision("auto", device)))
    seconds = []
    for _ in range(4):
        clock = time.perf_counter()
        (x @ x).sum().item()  # waits for a GPU
        seconds.append(time.perf_counter() - clock)
    return (THERE / (2 * len(x) ** 3 / min(seconds))) ** GROWTH


def seconds_left(todo, pace):
    """The seconds that these stages will take: their `seconds` times `pace`, or DONE_SECONDS if it is done."""
    return sum(DONE_SECONDS if s.made and in_root(s.made).is_file() else s.seconds * pace for s in todo)


def run_stage(stage):
    """Run one stage and print its output line by line. Returns (exit status, whether its work was already done)."""
    environment = {**AT_START, **os.environ, "PYTHONUNBUFFERED": "1"}
    already = False
    process = subprocess.Popen(
        [sys.executable, *stage.command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, encoding="utf-8", errors="replace", bufsize=1,
    )  # fmt: skip
    try:
        for line in process.stdout:
            already = already or any(words in line for words in ALREADY)
            say(line, end="")
        return process.wait(), already
    except KeyboardInterrupt:  # the stage got it, too: wait until it ends
        process.wait()
        raise


def run_all(todo, again, pace=1.0):
    """Run the stages one after the other. again: the command that continues after a failure.

    pace: the expected time of the stages as a share of MEASURED, before any has been timed.
    Raises UserError if a stage fails, because the next stages need its results.
    """
    started = time.time()
    spent, expected = FIRST * pace, FIRST  # seconds; stages that had work to do are added to both
    for k, stage in enumerate(todo):
        minutes = max(1, round(seconds_left(todo[k:], spent / expected) / 60))
        elapsed = duration(time.time() - started)
        say(f"\nstage {k + 1} of {len(todo)}: {stage.title} | {elapsed} | about {minutes} min left")
        say(f"$ {shlex.join(['python', *stage.command])}")
        clock = time.time()
        try:
            status, already = run_stage(stage)
        except KeyboardInterrupt:
            say(f"\nstopped in stage {k + 1} of {len(todo)} ({stage.title}). To go on from there: {again}")
            raise
        if status:
            raise UserError(
                f"stage {k + 1} of {len(todo)} ({stage.title}) ended with status {status}; its own message is above. "
                f"What was finished stays. To go on from there: {again}"
            )
        if not already:
            spent, expected = spent + time.time() - clock, expected + stage.seconds
    say(f"\nall {len(todo)} stages in {duration(time.time() - started)}")


def main(config):
    place = in_root("models/smoke" if config.smoke else "models")
    hold_output(place, lambda: place.mkdir(exist_ok=True), 0, "it is this demo; wait until it has ended")
    again = "python report/demo.py --smoke true" if config.smoke else "make demo (or python report/demo.py)"
    run_all(stages(config.smoke), again, SMOKE_PACE if config.smoke else first_pace())
    report = "report/runs/smoke/REPORT.md" if config.smoke else "report/demo/REPORT.md"
    say(f"the comparison above, with figures and sample completions: {report}")


if __name__ == "__main__":
    cli(main, Config)
