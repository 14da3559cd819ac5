"""How our cost grows: time a token by sequence length, batch size and samples per prompt; two processes; a busy core.

    python benchmarks/scaling.py                # into report/benchmarks.md
    python benchmarks/scaling.py --rounds 3     # each point in three processes, one after the other

The sweep over the sequence length keeps the number of tokens a step; each other sweep changes one size alone. The part
on two processes needs two cores. It compares DDP, FSDP and TP with two processes that do the same work independently.
"""

from __future__ import annotations

import importlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import grpo, lm, measure, page
from configs.config import UserError, option
from runtime.cli import cli
from runtime.console import beside, say
from runtime.progress import Progress
from runtime.provenance import git_commit, machine, versions


@dataclass(frozen=True)
class Sweep:
    """A job of ours at several sizes. key: what varies. points: its values, and the changes to the job's sizes."""

    title: str
    key: str
    module: object
    points: dict[int, dict]


def one_pass(batch_size, **more):
    """The changes to the sizes of the LM job for a step of one forward and backward pass."""
    return {"batch_size": batch_size, "micro_batch_size": batch_size, **more}


SWEEPS = (
    Sweep(
        "LM by sequence length, 2,048 tokens a step",
        "sequence_length",
        lm,
        {n: one_pass(2048 // n, length=n) for n in (128, 256, 512, 1024, 2048)},
    ),
    Sweep(
        "LM by batch size, 512 tokens a sequence",
        "batch_size",
        lm,
        {n: one_pass(n) for n in (1, 2, 4, 8)},
    ),
    Sweep(
        "GRPO by samples per prompt, 4 prompts, 64 new tokens",
        "samples_per_prompt",
        grpo,
        {n: {"samples": n} for n in (2, 4, 8, 16)},
    ),
)
SMOKE = (
    Sweep("LM", "sequence_length", lm, {n: one_pass(128 // n, length=n) for n in (32, 64)}),
    Sweep("LM", "batch_size", lm, {n: one_pass(n) for n in (1, 2)}),
    Sweep("GRPO", "samples_per_prompt", grpo, {n: {"samples": n} for n in (2, 4)}),
)
TWO_PROCESSES = {  # what is compared, by its name in the JSON
    "apart": "two independent processes",
    "ddp": "two processes, DDP",
    "fsdp": "two processes, FSDP",
    "tp": "two processes, TP",
    "threads": "one process on the whole batch",
}

BUSY = (sys.executable, "-c", "while True: pass")  # a program that takes one core
SHARED = {"generate": "sampling", "lm": "LM training"}  # the jobs that share the cores with it


@dataclass
class Config:
    rounds: int = option(1, "processes for each point", at_least=1)
    ddp: bool = option(True, "also measure two processes")
    sweeps: bool = option(True, "measure the sweeps")
    busy: bool = option(True, "also measure sampling and training while another program takes a core")
    smoke: bool = option(False, "tiny models, and nothing is written: whether everything runs, not how fast")

    def check(self):
        if not (self.ddp or self.sweeps or self.busy):
            raise UserError("ddp, sweeps and busy are False: nothing is left to measure")
        if self.ddp and (os.cpu_count() or 1) < 2:
            raise UserError("two processes need two cores: --ddp false measures the rest")
        if self.ddp and torch.cuda.device_count() == 1:
            raise UserError("two processes need two GPUs or none: --ddp false measures the rest")


def main(config):
    found = {}
    sweeps = (SMOKE if config.smoke else SWEEPS) if config.sweeps else ()
    progress = Progress(*planned(sweeps, config))
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        folder = Path(folder)
        say(f"{progress.total} runs, each in processes of its own; first the fastest matmul")
        peak = measure.measure_peak(config.smoke, folder / "peak")["flops_per_second"]
        if sweeps:
            points = [run_sweep(sweep, config, peak, folder / sweep.key, progress) for sweep in sweeps]
            found["scaling"] = about() | {"sweeps": points}
            if page.holds(config):
                page.update(scaling=found["scaling"])
        if config.ddp:
            found["ddp"] = about() | run_ddp(config, folder / "ddp", progress)
            if page.holds(config):
                page.update(ddp=found["ddp"])
        if config.busy:
            found["busy"] = about() | run_busy(config, folder / "busy", progress)
            if page.holds(config):
                page.update(busy=found["busy"])
    return found


def planned(sweeps, config):
    """What `Progress` needs: the runs of each point, and the seconds of a step of it when the page was written."""
    runs = {(sweep.key, value): config.rounds for sweep in sweeps for value in sweep.points}
    runs |= {("ddp", key): config.rounds for key in TWO_PROCESSES} if config.ddp else {}
    runs |= {("busy", job): 2 * config.rounds for job in SHARED} if config.busy else {}
    if config.smoke:
        return runs, {}
    before = page.measured()
    swept = before.get("scaling", {}).get("sweeps", [])
    seconds = {(sweep["key"], point["value"]): point["seconds"] for sweep in swept for point in sweep["points"]}
    seconds |= {("ddp", key): before["ddp"][key]["seconds"] for key in TWO_PROCESSES if "ddp" in before}
    return runs, {kind: seconds[kind] for kind in runs if kind in seconds}


def about():
    return {"machine": machine(), "versions": versions(), "git_commit": git_commit()}


def run_sweep(sweep, config, peak, folder, progress):
    """Measure the points of a sweep, and print each as it ends."""
    module, points = sweep.module, []
    name = module.__name__.rpartition(".")[2]
    say(f"\n{sweep.title}: {sweep.key.replace('_', ' ')}")
    for value, changes in sweep.points.items():
        size, runs = (module.SMOKE if config.smoke else module.SIZE) | changes, []
        for i in range(config.rounds):
            started = time.time()
            runs.append(measure.measure_side(name, "ours", size, folder / f"{value}-{i}"))
            done = progress.done((sweep.key, value), time.time() - started)
            if i + 1 < config.rounds:
                say(f"  {value:>5}: round {i + 1}/{config.rounds} | {done}")
        seconds = statistics.median(s for run in runs for s in run["seconds"])
        point = {key: runs[0][key] for key in ("tokens", "flops", "peak_memory_gb")}
        points.append({"value": value, "seconds": seconds, **point})
        share = point["flops"] / seconds / peak
        per_token = f"{1e3 * seconds / point['tokens']:.2f} ms a token"
        say(beside(f"  {value:>5}: {seconds:.3f} s a step, {per_token}, {share:.1%} of peak", done))
    return {"title": sweep.title, "key": sweep.key, "peak": peak, "points": points}


def run_ddp(config, folder, progress):
    """Seconds a step, and peak memory, of two independent processes, of two under DDP, FSDP and TP, and of one process
    with as many threads."""
    threads = max(1, (os.cpu_count() or 2) // 2)
    size = lm.SMOKE if config.smoke else lm.SIZE
    half = size | one_pass(size["batch_size"] // 2)
    whole = half | {"batch_size": size["batch_size"]}
    few, many = {"OMP_NUM_THREADS": str(threads)}, {"OMP_NUM_THREADS": str(2 * threads)}
    say(f"\ntwo processes, {threads} threads each, {half['batch_size']} x {half['length']} tokens in each:")
    seconds, memory = ({key: [] for key in TWO_PROCESSES} for _ in range(2))
    for i in range(config.rounds):
        for key in TWO_PROCESSES:
            started, place = time.time(), folder / f"{key}-{i}"
            if key == "apart":
                both = [measure.start_side("lm", "ours", half, place / str(r), few) for r in range(2)]
            elif key == "threads":
                both = [measure.start_side("lm", "ours", whole, place, many)]
            else:
                ranks = environments()
                both = [measure.start_side("lm", key, whole, place / str(r), few | ranks[r]) for r in range(2)]
            runs = [wait() for wait in both]
            steps = slower(runs)
            seconds[key] += steps
            memory[key].append(max(run["peak_memory_gb"] for run in runs))
            done = progress.done(("ddp", key), time.time() - started)
            words = " ".join(f"{s:.2f}" for s in steps)
            say(beside(f"  round {i + 1}/{config.rounds}, {TWO_PROCESSES[key]}: {words} s a step", done))
    found = {key: measure.spread(values) | {"seconds": statistics.median(values)} for key, values in seconds.items()}
    for key, title in TWO_PROCESSES.items():
        found[key]["peak_memory_gb"] = statistics.median(memory[key])
        step, gb = found[key]["seconds"], found[key]["peak_memory_gb"]
        say(f"  {title}: {step:.3f} s a step ({step / found['apart']['seconds'] - 1:+.1%}), {gb:.2f} GB each")
    return found | {"batch_size": half["batch_size"], "length": half["length"], "processes": 2, "threads_each": threads}


def run_busy(config, folder, progress):
    """Tokens per second of sampling and of LM training, on a quiet machine and while a program takes one core."""
    found = {}
    say("\nwith one busy core:")
    for job, title in SHARED.items():
        module = importlib.import_module(f"benchmarks.{job}")
        size, rates = module.SMOKE if config.smoke else module.SIZE, {"quiet": [], "busy": []}
        for i in range(config.rounds):
            for kind, measured in rates.items():
                started, program = time.time(), subprocess.Popen(BUSY) if kind == "busy" else None
                try:
                    run = measure.measure_side(job, "ours", size, folder / f"{job}-{kind}-{i}")
                finally:
                    if program:
                        program.kill()
                        program.wait()
                measured.append(run["tokens"] / statistics.median(run["seconds"]))
                done = progress.done(("busy", job), time.time() - started)
                say(f"  {title}, {kind}: {measured[-1]:,.1f} tokens/s | {done}")
        found[job] = {kind: statistics.median(measured) for kind, measured in rates.items()}
    return found


def slower(runs):
    """The seconds of each step of processes that run side by side: a step is done when the slower one is."""
    return [max(step) for step in zip(*(run["seconds"] for run in runs), strict=True)]


def environments():
    """What torchrun tells each of two processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [both | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(2)]


if __name__ == "__main__":
    cli(main, Config)
