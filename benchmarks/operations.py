"""Where the time of our steps goes: torch's profiler over one step of a job, its operations in a few kinds.

    python benchmarks/operations.py                  # lm, grpo and generate, into report/benchmarks.md
    python benchmarks/operations.py --job dpo_lora   # one of run.py's jobs, printed alone

The profile is that of the last step; the steps before it are as many as the job's script times. An operation counts
with its own time, without the operations that it calls. On a GPU it counts with the time of its kernels. The rest of
the step is overhead: torch starts operations, and Python runs.
"""

from __future__ import annotations

import importlib
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks import measure, page, run
from configs.config import option
from runtime.cli import cli
from runtime.console import say
from runtime.progress import Progress
from runtime.provenance import git_commit, machine, versions

ON_THE_PAGE = ("lm", "grpo", "generate")
REST = "overhead of torch and Python"
KINDS = {  # of operations, by parts of their names; the first that fits
    "matmuls with weights": r"::mm|addmm|_linear_pointwise",
    "matmuls of attention": r"bmm|scaled_dot_product|flash_attention",
    "softmax, exp": r"softmax|::exp_?$|logsumexp",
    "optimizer, gradient norm": r"adam|vector_norm|_foreach_",
    "copies, casts, indexing": r"copy_|::cat|fill|zero_|index|gather|scatter|embedding|roll",
    "other elementwise operations": (
        r"::(mul|add|sub|div|neg|pow|square|rsqrt|sqrt|sum|mean|where|sin|cos|clamp|any|max|min|argmax|sort|topk)(_|$)|"
        r"::(lt|gt|le|ge|eq|ne)(_|$)|silu|gelu|cumsum|vecdot|_norm|searchsorted|nonzero"
    ),
}


@dataclass
class Config:
    job: Literal["lm", "dpo", "dpo_lora", "reward", "grpo", "generate"] | None = option(
        None, "one job, which is printed and not written; default: the jobs of the page, which is written"
    )
    smoke: bool = option(False, "tiny model and sizes, and nothing is written: whether everything runs")


def main(config):
    names = [config.job] if config.job else ON_THE_PAGE
    found, progress = {}, Progress(dict.fromkeys(names, 1))
    for name in names:
        started, size = time.time(), run.sizes(name, run.Config(job=name, smoke=config.smoke))
        with tempfile.TemporaryDirectory(prefix="operations-") as folder:
            peak = measure.measure_peak(config.smoke, Path(folder) / "peak")["flops_per_second"]
            run.prepare(name, size, Path(folder))
            side = measure.measure_side("operations", "watched", size | {"job": name}, Path(folder) / "ours")
        size.pop("prepared", None)
        side |= {"size": size, "precision": measure.precision(), "peak": peak, "machine": machine()}
        found[name] = side | {"versions": versions(), "git_commit": git_commit()}
        show(name, found[name])
        say(f"  {progress.done(name, time.time() - started)}")
    if not config.job and page.holds(config):
        page.update(operations=found)
    return found


def show(name, found):
    """Print one job's kinds of operations."""
    at_peak = found["flops"] / found["peak"]
    say(f"\n{name}: a step of {found['seconds']:.2f} s; at peak its arithmetic takes {at_peak:.2f} s")
    for kind, (seconds, count) in found["kinds"].items():
        say(f"  {kind:<32} {seconds:7.3f} s {seconds / found['seconds']:6.1%} {count or '':>7}")


def watched(size, folder):
    """A side: the seconds of the last step of ours under the profiler, and {kind: [seconds, operations]}."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler, moments = torch.profiler.profile(activities=activities), []

    class Watching(measure.Clock):
        def tick(self):
            super().tick()
            if len(self.moments) == size.steps:  # the last step begins
                profiler.start()
                moments.append(time.perf_counter())
            elif len(self.moments) == size.steps + measure.WARM_UP:
                moments.append(time.perf_counter())
                profiler.stop()

    clock, measure.Clock = measure.Clock, Watching  # the job's script listens with it
    try:
        done = importlib.import_module(f"benchmarks.{run.JOBS[size.job].module}").ours(size, folder)
    finally:
        measure.Clock = clock
    seconds = moments[1] - moments[0]
    return {"seconds": seconds, "flops": done["flops"], "kinds": kinds(profiler.key_averages(), seconds)}


def kinds(events, seconds):
    """{kind: [seconds, operations]} of a profile, the largest first. The last one is the rest of `seconds`."""
    found = {}
    for event in events:
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), None)
        if kind:
            microseconds = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
            before = found.get(kind, (0.0, 0))
            found[kind] = (before[0] + microseconds / 1e6, before[1] + event.count)
    found = dict(sorted(found.items(), key=lambda item: -item[1][0]))
    left = seconds - sum(spent for spent, _ in found.values())
    return {kind: list(value) for kind, value in (found | {REST: (max(left, 0.0), 0)}).items()}


if __name__ == "__main__":
    cli(main, Config)
