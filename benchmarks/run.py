"""Ours beside its peer on the same work: seconds a step, tokens a second, peak memory, and the losses of both.

    python benchmarks/run.py lm                  # or dpo, dpo_lora, reward, grpo, ppo, generate
    python benchmarks/run.py dpo --rounds 1 --json dpo.json
    python benchmarks/run.py grpo --page true    # that job's rows of report/benchmarks.md, measured anew
    python benchmarks/run.py all                 # every job, into report/benchmarks.md (make bench)

The peers are TRL's trainers and, for generation, transformers. Sides alternate (ours, peer, ours, peer, ...), each in a
process of its own; the ratio is taken within a round, and the median over rounds. What is equal on both sides, and how,
stands at the top of each job's script. Needs the development packages: pip install -r requirements-dev.txt

Exit status 1 if the losses of both sides differ by more than 0.01: then they did not do the same work. Where they
differ in bf16 or fp16, both sides run once more in fp32, untimed, and those losses decide: rounding is not other work.
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
from runtime.console import duration, say
from runtime.files import in_root, write_atomically
from runtime.provenance import git_commit, machine, versions
from runtime.run_folder import check_place

IN_FP32 = {measure.IN_PRECISION: "fp32"}
ALLOWED = 1e-2  # how far the losses of both sides may lie apart, nats


@dataclass(frozen=True)
class Job:
    """A job: its script in this folder, what it changes of the script's sizes, and the peer's name."""

    module: str
    peer: str | None  # None: measured against the machine alone
    changes: dict = field(default_factory=dict)


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
    steps: int = option(0, "timed steps a run, after one that is not; 0 = as many as the job's script says", at_least=0)
    model_name: str | None = option(None, "another model than the job's own")
    page: bool = option(False, f"put the figures into {page.PAGE}, too; all does so in any case")
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
    peers = [JOBS[name].peer or "" for name in names]
    if any(peer.startswith("TRL") for peer in peers) and importlib.util.find_spec("trl") is None:
        raise UserError("the peer, TRL, is not installed: pip install -r requirements-dev.txt")
    if config.json:
        check_place(in_root(config.json))
    disagree = []
    for name in names:
        found = run_job(name, config)
        if config.page or config.job == "all":
            page.update(**{page.JOBS[pick_device().type]: {name: found}})
        if config.json:
            write_atomically(in_root(config.json), json.dumps(found, indent=1) + "\n")
            say(f"written to {shown(in_root(config.json))}")
        disagree += [name] if found["losses_agree"] is False else []
    if disagree:
        say(f"\nTHE LOSSES DISAGREE in {', '.join(disagree)}: both sides did not do the same work")
        sys.exit(1)


def sizes(name, config):
    """The sizes of a job: its script's, on a GPU with what is larger there, the job's changes, the command line's."""
    module = importlib.import_module(f"benchmarks.{JOBS[name].module}")
    on_gpu = module.ON_GPU if pick_device().type == "cuda" else {}
    size = {**module.SIZE, **on_gpu, **JOBS[name].changes}
    if config.smoke:
        size |= module.SMOKE | {"lora_r": 4} if JOBS[name].changes else module.SMOKE
    if config.steps:
        size["steps"] = config.steps
    return size | ({"model_name": config.model_name} if config.model_name else {})


def run_job(name, config):
    """Measure one job over all rounds, print what comes, and return its figures."""
    job, size, began = JOBS[name], sizes(name, config), time.time()
    module = importlib.import_module(f"benchmarks.{job.module}")
    say(f"\n{name}: {', '.join(f'{k} {v}' for k, v in size.items())}; {measure.precision()}")
    rounds = {"ours": [], "peer": []} if job.peer else {"ours": []}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        folder = Path(folder)
        peaks = [measure.measure_peak(config.smoke, folder / "peak-before")]
        prepare(name, size, folder)
        for i in range(config.rounds):
            for side, found in rounds.items():
                found.append(measure.measure_side(job.module, side, size, folder / f"{side}-{i}"))
            if name == "generate":
                module.settle(rounds["ours"][-1], rounds["peer"][-1])
            say(round_line(i + 1, config.rounds, {side: found[-1] for side, found in rounds.items()}))
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
    """Let a process of its own write the model of a job that needs one: size["prepared"] is its folder."""
    if name == "ppo" or (name, size["model_name"]) == ("lm", lm.GPT2):
        size["prepared"] = str(folder / "prepared")
        measure.measure_side(JOBS[name].module, "prepare", size, folder / "prepare")


def figures(name, size, rounds, matmul_peak):
    """What a job's JSON holds, from the reports of each side's rounds."""
    sides = {side: measure.side_figures(found, matmul_peak) for side, found in rounds.items()}
    first = rounds["ours"][0]
    found = {
        "job": name,
        "rounds": len(rounds["ours"]),
        "peer_name": JOBS[name].peer,
        "speed_ratio": None,
        "memory_ratio": None,
        "ours": sides["ours"],
        "peer": sides.get("peer"),
        "losses_agree": None,
        "tokens_per_step": first["tokens"],
        "flops_per_step": first["flops"],
        "matmul_peak_flops_per_second": matmul_peak,
        "precision": measure.precision(),
        "threads": first["threads"],
        "size": size,
        "machine": machine(),
        "load": os.getloadavg(),
        "versions": versions() | {"trl": version("trl") if importlib.util.find_spec("trl") else None},
        "git_commit": git_commit(),
    }
    if "peer" in rounds:
        speed, memory, of_rounds = measure.ratios(rounds["ours"], rounds["peer"])
        apart = measure.difference(sides["ours"]["losses"], sides["peer"]["losses"])
        found |= {"speed_ratio": speed, "memory_ratio": memory, "speed_ratios": of_rounds}
        found |= {"loss_difference": apart, "losses_agree": apart <= ALLOWED}
        if "same_tokens" in first:
            found["same_tokens"] = first["same_tokens"]
    return found


def round_line(i, rounds, sides):
    """One round: the seconds of each side's steps, and its memory."""
    words = [
        f"{side} {' '.join(f'{s:.2f}' for s in found['seconds'])} s, {found['peak_memory_gb']:.2f} GB"
        for side, found in sides.items()
    ]
    return f"  round {i}/{rounds} | " + " | ".join(words)


def show(found):
    """Print a job's figures."""
    say(f"\n  {'':<24} {'s a step (min to max)':>28} {'tokens/s':>9} {'peak GB':>8} {'of the limit':>12}")
    for side in ("ours", "peer"):
        if not (x := found[side]):
            continue
        s = x["seconds_per_step"]
        spread = f"{s['median']:.3f} ({s['min']:.3f} to {s['max']:.3f})"
        name = side if side == "ours" else found["peer_name"]
        speed, share = f"{x['tokens_per_second']:,.0f}", f"{x['share_of_peak']:.1%}"
        say(f"  {name:<24} {spread:>28} {speed:>9} {x['peak_memory_gb']:>8.2f} {share:>12}")
    limit, tera = found["matmul_peak_flops_per_second"] / 1e9, found["flops_per_step"] / 1e12
    say(f"  a step is {tera:.3f} TFLOP; the limit is {limit:,.0f} GFLOP/s, a matrix product in {found['precision']}")
    if found["peer"]:
        say(f"  {found['speed_ratio']:.2f} times the speed, {found['memory_ratio']:.2f} times the memory")
    for side in ("ours", "peer"):
        if found[side] and found[side]["losses"]:
            norms = " ".join(f"{x:.4f}" for x in found[side]["grad_norms"])
            losses = " ".join(f"{x:.6f}" for x in found[side]["losses"])
            say(f"  losses {side}: {losses}" + (f"; gradient norms {norms}" if norms else ""))
    if found["peer"]:
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
