"""Ours beside a baseline on the same work: seconds a step, tokens a second, peak memory, and the losses of both.

    python benchmarks/run.py lm                  # or dpo, dpo_lora, reward, grpo, ppo, generate
    python benchmarks/run.py dpo --rounds 1 --json dpo.json
    python benchmarks/run.py grpo --page true    # measures one job, and puts it into report/benchmarks.md
    python benchmarks/run.py all                 # every job, into report/benchmarks.md (make bench)

The baselines are TRL's trainers, and transformers for generation. The sides take turns (ours, baseline, ours, ...), and
each run has its own process. The speed ratio is taken within a round; the median over the rounds is reported. The top
of each job's script says what is equal on both sides. Needs the development packages:
pip install -r requirements-dev.txt

Exit status 1 means that the losses of the two sides differ by more than 0.01: they did not do the same work. If they
differ in bf16 or fp16, both sides run once more in fp32, not timed, and those losses decide, because a difference in
rounding is not a difference in work.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from benchmarks import lm, measure, page
from configs.config import UserError, option, shown
from models.device import pick_device
from runtime.cli import cli
from runtime.console import beside, duration, fold, say
from runtime.files import in_root, write_atomically
from runtime.progress import Progress
from runtime.provenance import git_commit, machine, versions
from runtime.run_folder import check_place

IN_FP32 = {measure.IN_PRECISION: "fp32"}
ALLOWED = 1e-2  # how far the losses of the two sides may be apart, nats


@dataclass(frozen=True)
class Job:
    """A job: its script in this folder, the name of its baseline, and what it changes of the script's sizes."""

    module: str
    baseline: str | None  # None: ours alone
    changes: dict = field(default_factory=dict)

    @property
    def sides(self):
        return ("ours", "baseline") if self.baseline else ("ours",)


JOBS = {
    "lm": Job("lm", "TRL SFTTrainer"),
    "dpo": Job("dpo", "TRL DPOTrainer"),
    "dpo_lora": Job("dpo", "TRL DPOTrainer", {"lora_r": 16, "lr": 1e-4}),
    "reward": Job("reward", "TRL RewardTrainer"),
    "grpo": Job("grpo", "TRL GRPOTrainer"),
    "ppo": Job("ppo", None),
    "generate": Job("generate", "transformers generate"),
}


@dataclass
class Config:
    job: Literal["lm", "dpo", "dpo_lora", "reward", "grpo", "ppo", "generate", "all"] = option(
        "", "what is measured; also as the first word"
    )
    rounds: int = option(5, "times that each side runs", at_least=1)
    json: str | None = option(None, "the file that receives the figures")
    steps: int = option(
        0, "timed steps a run, after the warm-up step; 0 = as many as the job's script says", at_least=0
    )
    model_name: str | None = option(None, "another model than the job's own")
    page: bool = option(False, f"also put the figures into {page.PAGE}; all always does so")
    smoke: bool = option(False, "tiny model and sizes: whether everything runs, not how fast")

    def check(self):
        if not self.job:
            raise UserError(f"which job? python benchmarks/run.py JOB, one of {', '.join([*JOBS, 'all'])}")
        if self.job == "all" and self.json is not None:
            raise UserError(f"json = {self.json!r} has no effect with all: its figures go to {page.FIGURES}")
        if self.smoke and (self.page or self.job == "all"):
            raise UserError(f"smoke = True would write figures of a tiny model into {page.PAGE}: give one job, no page")


def main(config):
    names = list(JOBS) if config.job == "all" else [config.job]
    baselines = [JOBS[name].baseline or "" for name in names]
    if any(baseline.startswith("TRL") for baseline in baselines) and importlib.util.find_spec("trl") is None:
        raise UserError("the baseline, TRL, is not installed: pip install -r requirements-dev.txt")
    if config.json:
        check_place(in_root(config.json))
    disagree, progress = [], Progress(*planned(names, config))
    for name in names:
        found = run_job(name, config, progress)
        if config.page or config.job == "all":
            page.update(**{page.JOBS[pick_device().type]: {name: found}})
        if config.json:
            write_atomically(in_root(config.json), json.dumps(found, indent=1) + "\n")
            say(f"written to {shown(in_root(config.json))}")
        disagree += [name] if found["losses_agree"] is False else []
    if disagree:
        say(f"\nTHE LOSSES DISAGREE in {', '.join(disagree)}: both sides did not do the same work")
        sys.exit(1)


def planned(names, config):
    """What `Progress` needs: the runs of each side of each job, and how long they took when the page was written."""
    runs = {(name, side): config.rounds for name in names for side in JOBS[name].sides}
    before = page.measured().get(page.JOBS[pick_device().type], {})
    expected = {name: job["seconds"] / job["rounds"] / len(JOBS[name].sides) for name, job in before.items()}
    return runs, {(name, side): expected[name] for name, side in runs if name in expected}


def sizes(name, config):
    """The sizes of a job: those of its script, then on a GPU the larger ones, the job's changes, the command line's."""
    module = importlib.import_module(f"benchmarks.{JOBS[name].module}")
    on_gpu = module.ON_GPU if pick_device().type == "cuda" else {}
    size = {**module.SIZE, **on_gpu, **JOBS[name].changes}
    if config.smoke:
        size |= module.SMOKE | {"lora_r": 4} if JOBS[name].changes else module.SMOKE
    if config.steps:
        size["steps"] = config.steps
    return size | ({"model_name": config.model_name} if config.model_name else {})


def run_job(name, config, progress):
    """Measure one job over all rounds, print each run as it ends, and return the job's figures."""
    job, size, began = JOBS[name], sizes(name, config), time.time()
    module = importlib.import_module(f"benchmarks.{job.module}")
    say("\n" + fold(f"{name}: {', '.join(f'{k} {v}' for k, v in size.items())}; {measure.precision()}"))
    rounds = {side: [] for side in job.sides}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        folder = Path(folder)
        peaks = [measure.measure_peak(config.smoke, folder / "peak-before")]
        prepare(name, size, folder)
        for i in range(config.rounds):
            for side, found in rounds.items():
                started = time.time()
                found.append(measure.measure_side(job.module, side, size, folder / f"{side}-{i}"))
                done = progress.done((name, side), time.time() - started)
                say(beside(f"  round {i + 1}/{config.rounds}, {side}: {in_words(found[-1])}", done))
            if name == "generate":
                module.settle(rounds["ours"][-1], rounds["baseline"][-1])
        peaks.append(measure.measure_peak(config.smoke, folder / "peak-after"))
        found = figures(name, size, rounds, max(p["flops_per_second"] for p in peaks))
        if found["losses_agree"] is False and found["precision"] != "fp32":
            say(f"  in {found['precision']} the losses are {found['loss_difference']:.1e} apart: once more in fp32")
            sides = [measure.measure_side(job.module, s, size, folder / f"{s}-fp32", IN_FP32) for s in rounds]
            if name == "generate":
                module.settle(*sides)
            apart = measure.difference(*(side["losses"] for side in sides))
            found |= {"losses_fp32": [side["losses"] for side in sides], "loss_difference_fp32": apart}
            found["losses_agree"] = apart <= ALLOWED
    found["size"].pop("prepared", None)
    found["peaks"] = [p["shapes"] for p in peaks]
    found["seconds"] = round(time.time() - began, 1)
    show(found)
    return found


def prepare(name, size, folder):
    """If a job needs a model of its own, let another process write it: size["prepared"] is its folder."""
    if name == "ppo" or (name, size["model_name"]) == ("lm", lm.GPT2):
        size["prepared"] = str(folder / "prepared")
        measure.measure_side(JOBS[name].module, "prepare", size, folder / "prepare")


def figures(name, size, rounds, matmul_peak):
    """What the JSON of a job holds. rounds: the reports of each side's runs."""
    sides = {side: measure.side_figures(found, matmul_peak) for side, found in rounds.items()}
    first, where = rounds["ours"][0], machine()
    found = {
        "job": name,
        "rounds": len(rounds["ours"]),
        "baseline_name": JOBS[name].baseline,
        "speed_ratio": None,
        "memory_ratio": None,
        "ours": sides["ours"],
        "baseline": sides.get("baseline"),
        "losses_agree": None,
        "tokens_per_step": first["tokens"],
        "flops_per_step": first["flops"],
        "matmul_peak_flops_per_second": matmul_peak,
        "data_sheet_flops_per_second": measure.data_sheet_peak(where["gpu"], measure.precision()),
        "precision": measure.precision(),
        "threads": first["threads"],
        "size": size,
        "machine": where,
        "load": os.getloadavg(),
        "versions": versions() | {"trl": version("trl") if importlib.util.find_spec("trl") else None},
        "git_commit": git_commit(),
    }
    if "baseline" in rounds:
        speed, memory, of_rounds = measure.ratios(rounds["ours"], rounds["baseline"])
        apart = measure.difference(sides["ours"]["losses"], sides["baseline"]["losses"])
        found |= {"speed_ratio": speed, "memory_ratio": memory, "speed_ratios": of_rounds}
        found |= {"loss_difference": apart, "losses_agree": apart <= ALLOWED}
        if "same_tokens" in first:
            found["same_tokens"] = first["same_tokens"]
    return found


def in_words(found):
    """What a side reports of one run: the seconds of its steps, and its memory."""
    return f"{' '.join(f'{s:.2f}' for s in found['seconds'])} s a step, {found['peak_memory_gb']:.2f} GB"


def show(found):
    """Print a job's figures."""
    mfu_header = f" {'MFU':>7}" if found["data_sheet_flops_per_second"] else ""
    header = f"{'s a step (min to max)':>28} {'tokens/s':>9} {'peak GB':>8} {'% of peak':>10}{mfu_header}"
    say(f"\n  {'':<24} {header}")
    for side in ("ours", "baseline"):
        if not (x := found[side]):
            continue
        s = x["seconds_per_step"]
        spread = f"{s['median']:.3f} ({s['min']:.3f} to {s['max']:.3f})"
        name = side if side == "ours" else found["baseline_name"]
        speed, share, of_sheet = f"{x['tokens_per_second']:,.0f}", f"{x['share_of_peak']:.1%}", measure.mfu(found, x)
        of_sheet = "" if of_sheet is None else f" {of_sheet:>7.1%}"
        say(f"  {name:<24} {spread:>28} {speed:>9} {x['peak_memory_gb']:>8.2f} {share:>10}{of_sheet}")
    peak, tera = found["matmul_peak_flops_per_second"] / 1e9, found["flops_per_step"] / 1e12
    say(f"  a step is {tera:.3f} TFLOP; the peak is {peak:,.0f} GFLOP/s, the fastest matmul in {found['precision']}")
    if found["baseline"]:
        say(f"  {found['speed_ratio']:.2f} times the speed, {found['memory_ratio']:.2f} times the memory")
    for side in ("ours", "baseline"):
        if found[side] and found[side]["losses"]:
            norms = " ".join(f"{x:.4f}" for x in found[side]["grad_norms"])
            losses = " ".join(f"{x:.6f}" for x in found[side]["losses"])
            say(f"  losses {side}: {losses}" + (f"; gradient norms {norms}" if norms else ""))
    if found["baseline"]:
        good = "agree" if found["losses_agree"] else "DISAGREE"
        exact = found.get("loss_difference_fp32")
        in_fp32 = "" if exact is None else f"; in fp32 {exact:.1e}"
        same = f"; {found['same_tokens']:.0%} of the greedy tokens are compared" if "same_tokens" in found else ""
        say(f"  the losses {good}: at most {found['loss_difference']:.1e} apart, {ALLOWED} is allowed{in_fp32}{same}")
    say(f"  {duration(found['seconds'])} in all, {found['threads']} threads")


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--job")
    cli(main, Config)
