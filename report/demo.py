"""Every stage in order, from the fetched model to the comparison: what `make demo` runs.

    python report/demo.py
    python report/demo.py --smoke true      # the same stages on a tiny model with random weights

Each stage is one of README's commands in a process of its own. A stage that is done already says so and ends at once:
after a failure or an interruption the same command goes on from there. Nothing here trains or measures.
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

# Seconds that each stage took on two cores of an AMD EPYC with avx512_bf16. The pace of this machine rescales them.
MEASURED = {"fetch": 26, "preferences": 108, "groups": 32, "lm": 41, "reward": 118, "compare": 220}
MEASURED |= {method.key: method.seconds for method in METHODS if method.script}
THERE = 444e9  # FLOP/s of those cores in a bf16 matrix product
# The stages are not all matrix products: one core with 86e9 FLOP/s in fp32 took 1 / 0.43 of the time of 390e9 in bf16
GROWTH = math.log(0.43) / math.log(86 / 390)
FIRST = 300  # seconds of the table for which the first estimate counts: a stage or two say little of all the others
SMOKE_PACE = 0.1  # of the stages on a tiny model, until the first of them has been timed
DONE_SECONDS = 6  # a stage that finds its work done only starts Python and reads a manifest
ALREADY = ("this very ", ": already in ")  # what the scripts print then: "holds this very run", for one


@dataclass
class Config:
    smoke: bool = option(False, "the same stages with configs/smoke/: seconds each, on random weights")


@dataclass(frozen=True)
class Stage:
    """One command. `made`: the file whose presence says that the stage was finished before."""

    name: str
    title: str
    command: tuple[str, ...]
    made: str


def stages(smoke=False):
    """The stages in order."""
    where, data, models = ("configs/smoke", "data/smoke", "models/smoke") if smoke else ("configs", "data", "models")

    def stage(name, title, script, config, made, *edits, always=False):
        """`--config` is written out where the script would not read it by itself."""
        given = ("--config", f"{where}/{config}.yaml") if smoke or always else ()
        return Stage(name, title, (script, *given, *edits), made)

    def train(method):
        made = f"{models}/{method.key}/manifest.json"
        return stage(method.key, method.label, method.script, method.key, made, always=not method.own_config)

    short = () if smoke else ("--max_steps", "4", "--eval_blocks", "8")
    lm = (*short, "--out", "models/smoke/lm" if smoke else "models/lm_demo")
    fetch = Stage("fetch", "the pretrained model and the text", ("models/fetch.py",), "models/smollm2-135m/config.json")
    return [
        *([] if smoke else [fetch]),  # a tiny model is built where it is needed
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
    """The pace to expect of this machine before a stage has been timed: from its speed in matrix products."""
    import torch  # late, as the stages have processes of their own

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
    """Seconds that these stages will take: the measured ones times `pace`; next to none for what is there already."""
    return sum(DONE_SECONDS if s.made and in_root(s.made).is_file() else MEASURED[s.name] * pace for s in todo)


def run_stage(stage):
    """Run one stage and pass its output on line by line. Returns (exit status, whether it found its work done)."""
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
    except KeyboardInterrupt:  # the stage got it too: let it end in its own way
        process.wait()
        raise


def run_all(todo, again, pace=1.0):
    """Run the stages one after the other. `again`: the command that goes on after a failure.

    pace: how long stages are expected to take as a share of MEASURED, before any has been timed.
    Raises UserError when a stage fails: the stages after it would learn from what is not there.
    """
    started = time.time()
    spent, expected = FIRST * pace, FIRST  # and then by the stages that had work to do: how fast this machine is
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
            spent, expected = spent + time.time() - clock, expected + MEASURED[stage.name]
    say(f"\nall {len(todo)} stages in {duration(time.time() - started)}")


def main(config):
    again = "python report/demo.py --smoke true" if config.smoke else "make demo (or python report/demo.py)"
    run_all(stages(config.smoke), again, SMOKE_PACE if config.smoke else first_pace())
    report = "report/runs/smoke/REPORT.md" if config.smoke else "report/REPORT.md"
    say(f"the comparison above, with figures and sample completions: {report}")


if __name__ == "__main__":
    cli(main, Config)
