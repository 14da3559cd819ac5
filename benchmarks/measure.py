"""How a benchmark measures: each side of each round runs in its own process, and the clock listens to the optimizer.

torch calls the clock after every step of any optimizer. So the same lines time ours and the baseline, in the code that
their users run. The first step is the warm-up: it contains loading, the first allocations and compilation. The time of
a step runs from the end of the step before to its own end. Loading and saving are outside of it. Peak memory is the
most that the process has held until the last step, loading included (VmHWM; on a GPU: what torch allocated).
"""

from __future__ import annotations

import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from configs.config import ROOT, UserError
from models.device import PRECISIONS, pick_device, pick_precision
from runtime.console import quiet_libraries
from runtime.memory import AT_START, keep_freed_memory
from runtime.provenance import peak_memory_gb
from runtime.spinning import watch_cores

CHILD = "from benchmarks import measure; measure.run_side()"
SHAPES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192)}  # of the square matmuls; the fastest one is the peak
DATA_SHEET = {  # NVIDIA's TFLOP/s in bf16 or fp16, dense; the first name that the card's name contains
    "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121,
    "T4": 65,
}  # fmt: skip
IN_PRECISION = "BENCHMARK_PRECISION"  # an environment variable of a side's process
# With a mask torch may choose cuDNN's attention, which needs a second to plan each new shape. Ours never chooses it
# (models/fast/attention.py), so the baseline does not have to in these jobs
MASKED, CUDNN_LAST = ("dpo", "reward", "grpo"), "TORCH_CUDNN_SDPA_DEPRIORITIZED"
WARM_UP = 1  # steps that are not timed


class Clock:
    """When each step ended, and the peak memory then. As a context it listens to all optimizers of the process."""

    def __init__(self):
        self.moments, self.peak, self.hook = [], None, None

    def __enter__(self):
        self.hook = register_optimizer_step_post_hook(lambda *_: self.tick())
        return self

    def __exit__(self, *_):
        self.hook.remove()

    def tick(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.moments.append(time.perf_counter())
        self.peak = peak_memory_gb()

    def measured(self, work, losses=(), grad_norms=(), **more):
        """What a side reports. losses and grad_norms: one for each step, the warm-up included.

        work: {"tokens", "flops"} of one step, or a list with one for each step.
        """
        seconds = [b - a for a, b in zip(self.moments, self.moments[1:])]
        work = work if isinstance(work, list) else [work] * (len(seconds) + WARM_UP)
        if len(self.moments) < 2 or not {len(work), len(losses or work)} == {len(self.moments)}:
            raise AssertionError(f"{len(self.moments)} steps, {len(work)} pieces of work, {len(losses)} losses")
        return {
            "seconds": seconds,
            "losses": [float(x) for x in losses[WARM_UP:]],
            "grad_norms": [float(x) for x in grad_norms[WARM_UP:]],
            "peak_memory_gb": self.peak,
            "tokens": statistics.mean(w["tokens"] for w in work[WARM_UP:]),
            "flops": statistics.mean(w["flops"] for w in work[WARM_UP:]),
            "threads": torch.get_num_threads(),
            **more,
        }


def run_side():
    """The measured process: reads its task from standard input, and writes what its side reports to a file."""
    task = json.load(sys.stdin)
    quiet_libraries()
    if task["side"] != "baseline":  # as our scripts do; a user of the baseline has the C library as it is
        keep_freed_memory()
        watch_cores()
    side = getattr(importlib.import_module(f"benchmarks.{task['module']}"), task["side"])
    found = side(SimpleNamespace(**task["size"]), Path(task["folder"]))
    Path(task["result"]).write_text(json.dumps(found))


def measure_side(module, side, size, folder, environment=None):
    """What `side` of benchmarks/`module`.py reports, run in a new process with its files in `folder`."""
    return start_side(module, side, size, folder, environment)()


def start_side(module, side, size, folder, environment=None):
    """Start the process of a side. Returns a function that waits for it and returns what it reports.

    The function raises UserError with the end of the process's output if the process failed.
    """
    folder.mkdir(parents=True)
    result, log = folder / "result.json", folder / "log.txt"
    task = {"module": module, "side": side, "size": size, "folder": str(folder), "result": str(result)}
    both = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    theirs = {CUDNN_LAST: "1"} if side == "baseline" and module in MASKED else {}
    # for the baseline, too: torch's large pages, and what can only be set when a process starts
    environment = {"THP_MEM_ALLOC_ENABLE": "1", **AT_START, **os.environ, **both, **theirs, **(environment or {})}
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD], cwd=ROOT, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    process.stdin.write(json.dumps(task))
    process.stdin.close()

    def wait():
        try:
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        if status or not result.is_file():
            said = log.read_text(errors="replace")[-2000:]
            raise UserError(f"{module}, {side}: the measured process ended with status {status}. It said last:\n{said}")
        return json.loads(result.read_text())

    return wait


def logged(folder, *keys):
    """What our run in `folder` logged at each step: one list for each key."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if all(key in line for key in keys)]
    return [[line[key] for line in lines] for key in keys]


def precision():
    """The precision of both sides: what `precision: auto` means on this machine, unless IN_PRECISION says otherwise."""
    return os.environ.get(IN_PRECISION) or pick_precision("auto", pick_device())


def measure_peak(smoke, folder):
    """What `peak` reports. On a CPU it runs in its own process; on a GPU in this one, which the GPU does not mind."""
    kind = pick_device().type
    shapes = [128] if smoke else SHAPES[kind]
    if kind == "cuda":
        return peak(SimpleNamespace(shapes=shapes), folder)
    return measure_side("measure", "peak", {"shapes": shapes}, folder)


def peak(size, folder):
    """The peak of this machine, FLOP/s: its fastest square matmul in the benchmark's precision. A side of its own.

    Each shape counts with the median of ten matmuls, after two that are not timed.
    """
    device, dtype = pick_device(), PRECISIONS[precision()]
    speeds = {}
    for n in size.shapes:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = []
        for i in range(12):
            started = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds += [time.perf_counter() - started] if i > 1 else []
        speeds[n] = 2 * n**3 / statistics.median(seconds)
    return {"flops_per_second": max(speeds.values()), "shapes": speeds}


def data_sheet_peak(gpus, kind):
    """FLOP/s of the first of these GPUs (names) in the precision `kind`, as its data sheet says. None if not known."""
    if not gpus or kind == "fp32":
        return None
    known = (tera for name, tera in DATA_SHEET.items() if re.search(rf"\b{name}\b", gpus[0]))
    return next((1e12 * tera for tera in known), None)


def spread(values):
    """{"median", "min", "max"} of some numbers."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def side_figures(rounds, matmul_peak):
    """One side's figures over its rounds. rounds: what `Clock.measured` gave in each."""
    seconds = [s for found in rounds for s in found["seconds"]]
    first = rounds[0]
    typical = statistics.median(seconds)
    return {
        "seconds_per_step": spread(seconds),
        "tokens_per_second": first["tokens"] / typical,
        "peak_memory_gb": statistics.median(found["peak_memory_gb"] for found in rounds),
        "share_of_peak": first["flops"] / typical / matmul_peak,
        "losses": first["losses"],
        "grad_norms": first["grad_norms"],
    }


def ratios(ours, baseline):
    """(speed ratio, memory ratio, speed ratio of each round): baseline over ours in time, ours over baseline in memory.

    The two sides of a round ran one after the other, so they are compared with each other. The median is taken of that.
    """
    seconds = [statistics.median(b["seconds"]) / statistics.median(o["seconds"]) for o, b in zip(ours, baseline)]
    memory = [o["peak_memory_gb"] / b["peak_memory_gb"] for o, b in zip(ours, baseline)]
    return statistics.median(seconds), statistics.median(memory), seconds


def mfu(job, side):
    """Model FLOPs utilisation of a side: the job's arithmetic a second over the data sheet's FLOP/s. None if not known.

    "% of peak" is the same share of the fastest matmul that was measured.
    """
    sheet = job.get("data_sheet_flops_per_second")
    return side["share_of_peak"] * job["matmul_peak_flops_per_second"] / sheet if sheet else None


def difference(a, b):
    """The largest distance between two lists of losses, step by step."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))
