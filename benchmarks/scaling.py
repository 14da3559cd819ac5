"""How our cost grows: time a token against sequence length, batch and group size, and what two processes cost.

    python benchmarks/scaling.py                # into report/benchmarks.md
    python benchmarks/scaling.py --rounds 3     # each point in so many processes, one after the other

Sequence length is varied at the same number of tokens a step, the others alone. The part on two processes needs two
cores: DDP beside two processes that do the same work and never speak.
"""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import grpo, lm, measure, page
from configs.config import UserError, option
from runtime.cli import cli
from runtime.console import say
from runtime.provenance import git_commit, machine, versions


@dataclass(frozen=True)
class Sweep:
    """A job of ours whose size is varied. points: what is drawn, and the changes to the job's sizes."""

    title: str
    key: str
    module: object
    points: dict[int, dict]


SWEEPS = (
    Sweep(
        "LM, 2,048 tokens a step",
        "tokens_in_a_row",
        lm,
        {n: {"length": n, "batch_size": 2048 // n} for n in (128, 256, 512, 1024, 2048)},
    ),
    Sweep("LM, rows of 512 tokens", "rows_in_a_batch", lm, {n: {"batch_size": n} for n in (1, 2, 4, 8)}),
    Sweep("GRPO, 4 prompts, 64 new tokens", "answers_in_a_group", grpo, {n: {"group": n} for n in (2, 4, 8, 16)}),
)
SMOKE = (
    Sweep("LM", "tokens_in_a_row", lm, {n: {"length": n, "batch_size": 128 // n} for n in (32, 64)}),
    Sweep("LM", "rows_in_a_batch", lm, {n: {"batch_size": n} for n in (1, 2)}),
    Sweep("GRPO", "answers_in_a_group", grpo, {n: {"group": n} for n in (2, 4)}),
)


@dataclass
class Config:
    rounds: int = option(1, "processes for each point", at_least=1)
    ddp: bool = option(True, "also measure two processes")
    sweeps: bool = option(True, "measure the sweeps")
    smoke: bool = option(False, "tiny models, and nothing is written: whether everything runs, not how fast")

    def check(self):
        if not (self.ddp or self.sweeps):
            raise UserError("ddp = False and sweeps = False: nothing is left to measure")
        if self.ddp and (os.cpu_count() or 1) < 2:
            raise UserError("two processes need two cores: --ddp false measures the rest")
        if self.ddp and torch.cuda.device_count() == 1:
            raise UserError("two processes need two GPUs or none: --ddp false measures the rest")


def main(config):
    found = {}
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        folder = Path(folder)
        peak = measure.measure_peak(config.smoke, folder / "peak")["flops_per_second"]
        if config.sweeps:
            swept = SMOKE if config.smoke else SWEEPS
            found["scaling"] = about() | {"sweeps": [run_sweep(s, config, peak, folder / s.key) for s in swept]}
            if page.holds(config):
                page.update(scaling=found["scaling"])
        if config.ddp:
            found["ddp"] = about() | run_ddp(config, folder / "ddp")
            if page.holds(config):
                page.update(ddp=found["ddp"])
    return found


def about():
    return {"machine": machine(), "versions": versions(), "git_commit": git_commit()}


def run_sweep(sweep, config, peak, folder):
    """The points of a sweep, printed as they come."""
    module, points = sweep.module, []
    name = module.__name__.rpartition(".")[2]
    say(f"\n{sweep.title}: {sweep.key.replace('_', ' ')}")
    for value, changes in sweep.points.items():
        size = (module.SMOKE if config.smoke else module.SIZE) | changes
        runs = [measure.measure_side(name, "ours", size, folder / f"{value}-{i}") for i in range(config.rounds)]
        seconds = statistics.median(s for run in runs for s in run["seconds"])
        point = {key: runs[0][key] for key in ("tokens", "flops", "peak_memory_gb")}
        points.append({"value": value, "seconds": seconds, **point})
        share = point["flops"] / seconds / peak
        per_token = f"{1e3 * seconds / point['tokens']:.2f} ms a token"
        say(f"  {value:>5}: {seconds:.3f} s a step, {per_token}, {share:.1%} of the limit")
    return {"title": sweep.title, "key": sweep.key, "peak": peak, "points": points}


def run_ddp(config, folder):
    """Seconds a step of two processes that never speak, of two under DDP, and of one with as many threads."""
    threads = max(1, (os.cpu_count() or 2) // 2)
    size = {**(lm.SMOKE if config.smoke else lm.SIZE), "accumulation": 1}
    size["batch_size"] //= 2
    whole = size | {"accumulation": 2}
    seconds = {"apart": [], "ddp": [], "threads": []}
    for i in range(config.rounds):
        few, many = {"OMP_NUM_THREADS": str(threads)}, {"OMP_NUM_THREADS": str(2 * threads)}
        alone = [measure.start_side("lm", "ours", size, folder / f"apart-{i}-{r}", few) for r in range(2)]
        seconds["apart"] += slower([wait() for wait in alone])
        joined = [
            measure.start_side("lm", "ddp", whole, folder / f"ddp-{i}-{r}", few | ranks)
            for r, ranks in enumerate(environments())
        ]
        seconds["ddp"] += slower([wait() for wait in joined])
        seconds["threads"] += measure.measure_side("lm", "ours", whole, folder / f"threads-{i}", many)["seconds"]
    found = {key: measure.spread(values) | {"seconds": statistics.median(values)} for key, values in seconds.items()}
    ideal = found["apart"]["seconds"]
    say(f"\ntwo processes, {threads} threads each, {size['batch_size']} x {size['length']} tokens in each:")
    say(f"  apart {ideal:.3f} s a step, DDP {found['ddp']['seconds']:.3f} ({found['ddp']['seconds'] / ideal - 1:+.1%})")
    say(f"  one process of {2 * threads} threads on the whole batch {found['threads']['seconds']:.3f}")
    return found | {"batch_size": size["batch_size"], "length": size["length"], "processes": 2, "threads_each": threads}


def slower(runs):
    """Of processes that run side by side, the slower one's seconds at each step: that is when a step is done."""
    return [max(pair) for pair in zip(*(run["seconds"] for run in runs), strict=True)]


def environments():
    """What torchrun tells each of two processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [both | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(2)]


if __name__ == "__main__":
    cli(main, Config)
