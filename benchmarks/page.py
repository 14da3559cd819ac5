"""report/benchmarks.md and its figures, from report/benchmarks.json and benchmarks/notes.md.

run.py and scaling.py put what they measured into the JSON; the page is written anew each time.
"""

from __future__ import annotations

import json

from configs.config import ROOT
from models.device import pick_device
from report.plots import new_figure
from runtime.console import say
from runtime.files import read_json, write_atomically

FIGURES = "report/benchmarks.json"
PAGE = "report/benchmarks.md"
NOTES = "benchmarks/notes.md"
COLORS = {"ours": "#0072B2", "peer": "#999999"}  # Okabe & Ito
MARKERS = ("o", "^", "s")
JOBS = {"cpu": "jobs", "cuda": "gpu_jobs"}  # in the JSON, by the kind of the device
JOB_WORDS = {
    "lm": "LM training, full weights, {batch_size} x {length} tokens",
    "dpo": "DPO, full weights, {pairs} pairs",
    "dpo_lora": "DPO, LoRA r={lora_r}, {pairs} pairs",
    "reward": "reward model, LoRA r={lora_r}, {pairs} pairs",
    "grpo": "GRPO, full weights, {prompts} x {group} x {new} tokens",
    "ppo": "PPO, LoRA r={lora_r}, {prompts} x {samples} x {new} tokens",
    "generate": "generation, batch {batch_size}, {prompt} + {new} tokens",
}
HOW = """
A step's time runs from the end of one optimizer step to the end of the next, which torch tells both sides' clock alike;
the first step is not timed, loading and saving lie outside. Each side of each round runs in a process of its own, ours
and the peer in turn; ratios are taken within a round, and their median is shown. Memory is the most that the process
held up to its last step, loading included. Both sides have the same model, token ids, trained weights, precision,
optimizer, learning rate and batch; what else is equal, and how, stands at the top of each script in `benchmarks/`.

"Of the limit" is the arithmetic that the job needs (matrix products of each token once, `benchmarks/flops.py`) over the
time, as a share of the fastest square matrix product that this machine did before or after the job. Tokens are those of
a block (LM), of prompts once and both answers (pairs), and new ones (GRPO, PPO, generation).
"""


def update(jobs=None, gpu_jobs=None, **parts):
    """Put what was measured into the JSON, and write the page and its figures from all that is there."""
    path = ROOT / FIGURES
    found = read_json(path) if path.is_file() else {}
    for key, measured in zip(JOBS.values(), (jobs, gpu_jobs)):
        parts[key] = {**found.get(key, {}), **(measured or {})}
    found = {**found, **parts}
    write_atomically(path, json.dumps(found, indent=1) + "\n")
    (ROOT / "report" / "figures").mkdir(exist_ok=True)
    write_atomically(ROOT / PAGE, write(found))
    say(f"written to {FIGURES} and {PAGE}")


def holds(config):
    """Whether the page receives what scaling.py and operations.py measured: those sections are a CPU's."""
    if config.smoke:
        return False
    if pick_device().type == "cuda":
        say(f"not written to {PAGE}, whose section on this is of a CPU")
        return False
    return True


def write(found):
    """The page as Markdown; draws the figures of the parts that are there."""
    jobs, on_gpu = ({k: found.get(key, {})[k] for k in JOB_WORDS if k in found.get(key, {})} for key in JOBS.values())
    text = ["# Benchmarks", ""]
    if jobs:
        compared = {name: job for name, job in jobs.items() if job["peer"]}
        bars_figure(compared or jobs, ROOT / "report/figures/benchmarks.png")
        text += ["![times the peer's speed, and of the peer's memory](figures/benchmarks.png)", ""]
        text += [*jobs_table(jobs), "", *about(jobs), HOW]
    text += ["## The losses of both sides", "", *losses_table(jobs), ""] if jobs else []
    if on_gpu:
        text += ["## On a GPU", "", *jobs_table(on_gpu), "", *about(on_gpu), "", *losses_table(on_gpu), ""]
    if "scaling" in found:
        scaling_figure(found["scaling"], ROOT / "report/figures/benchmarks_scaling.png")
        text += [*scaling_part(found["scaling"]), ""]
    if "ddp" in found:
        text += [*ddp_part(found["ddp"]), ""]
    if "operations" in found:
        text += [*operations_part(found["operations"]), ""]
    text.append((ROOT / NOTES).read_text(encoding="utf-8"))
    return "\n".join(text).rstrip() + "\n"


def title(job):
    return JOB_WORDS[job["job"]].format(**job["size"])


def seconds(side):
    s = side["seconds_per_step"]
    return f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})"


def jobs_table(jobs):
    lines = [
        "| job | side | seconds a step, median (min to max) | tokens/s | peak GB | of the limit | speed | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for job in jobs.values():
        for key in ("ours", "peer"):
            if not (side := job[key]):
                continue
            first, name = (title(job), "ours") if key == "ours" else ("", job["peer_name"])
            ratio = key == "ours" and job["peer"]
            speed = f"**{job['speed_ratio']:.2f} x**" if ratio else ""
            memory = f"**{job['memory_ratio']:.2f} x**" if ratio else ""
            lines.append(
                f"| {first} | {name} | {seconds(side)} | {side['tokens_per_second']:,.0f} "
                f"| {side['peak_memory_gb']:.2f} | {side['share_of_peak']:.1%} | {speed} | {memory} |"
            )
    return lines


def about(jobs):
    """Where and with what it was measured: one line for each set of jobs for which that is the same."""
    lines = {}
    for name, job in jobs.items():
        where = job["machine"]
        on = ", ".join([where["cpu"], f"threads: {job['threads']}", *where["gpu"]])
        libraries = ", ".join(f"{key} {value}" for key, value in job["versions"].items() if value)
        key = f"on {on}, in {job['precision']}, rounds: {job['rounds']}; commit `{job['git_commit']}`; {libraries}"
        lines.setdefault(key, []).append((name, job["matmul_peak_flops_per_second"] / 1e9))
    found = []
    for key, measured in lines.items():
        peaks = ", ".join(f"{name} {peak:,.0f}" for name, peak in measured)
        found.append(f"Measured by `python benchmarks/run.py JOB` {key}. The limit, GFLOP/s at each job: {peaks}.")
    return found


def losses_table(jobs):
    lines = ["| job | losses, ours | losses, peer | largest difference |", "|---|---|---|---|"]
    for job in jobs.values():
        both = [" ".join(f"{x:.5f}" for x in job[key]["losses"]) if job[key] else "" for key in ("ours", "peer")]
        apart = f"{job['loss_difference']:.1e}" if job["peer"] else ""
        apart += f", in fp32 {job['loss_difference_fp32']:.1e}" if "loss_difference_fp32" in job else ""
        apart += "" if job["losses_agree"] in (None, True) else " **DISAGREE**"
        lines.append(f"| {job['job']} | {both[0]} | {both[1]} | {apart} |")
    return lines


def bars_figure(jobs, path):
    """How many times faster, and with which share of the memory."""
    figure, axes = new_figure(10.5, 0.9 + 0.42 * len(jobs), 2)
    names = list(jobs)[::-1]
    for ax, key, label in zip(
        axes, ("speed_ratio", "memory_ratio"), ("times the peer's speed", "of the peer's memory")
    ):
        values = [jobs[name][key] or 0 for name in names]
        bars = ax.barh(names, values, color=COLORS["ours"], height=0.6)
        ax.bar_label(bars, [f"{v:.2f}" for v in values], label_type="center", color="white")
        ax.axvline(1, color=COLORS["peer"], lw=1.2, ls="--")
        ax.set_xlim(0, 1.15 * max([*values, 1]))
        ax.set_xlabel(label)
    for name, y in zip(names, range(len(names))):  # the spread of the rounds
        found = jobs[name].get("speed_ratios")
        if found:
            axes[0].plot([min(found), max(found)], [y, y], color="black", lw=1.2)
            axes[0].set_xlim(right=max(axes[0].get_xlim()[1], 1.05 * max(found)))
    figure.savefig(path)


def scaling_figure(scaling, path):
    """Time a token against sequence length, batch and group size, with what each asks of the machine."""
    figure, axes = new_figure(11.5, 3.9, 3)
    for ax, sweep in zip(axes, scaling["sweeps"]):
        x = [point["value"] for point in sweep["points"]]
        measured = [1e3 * point["seconds"] / point["tokens"] for point in sweep["points"]]
        needed = [1e3 * point["flops"] / point["tokens"] / sweep["peak"] for point in sweep["points"]]
        ax.plot(x, measured, "o-", color=COLORS["ours"], label="measured")
        ax.plot(x, needed, "--", color=COLORS["peer"], label="its arithmetic at the limit")
        ax.set_xscale("log", base=2)
        ax.set_xticks(x, [str(v) for v in x])
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
        ax.set_title(sweep["title"], fontsize=11)
        ax.set_xlabel(sweep["key"].replace("_", " "))
        ax.set_ylabel("ms a token")
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path)


def scaling_part(scaling):
    """The section on how cost grows."""
    text = ["## How cost grows", "", "![time a token](figures/benchmarks_scaling.png)", ""]
    text += ["Ours alone, by `python benchmarks/scaling.py`; medians of the timed steps.", ""]
    text += ["| sweep | | ms a token | tokens/s | peak GB | of the limit |", "|---|---|---|---|---|---|"]
    for sweep in scaling["sweeps"]:
        for point in sweep["points"]:
            share = point["flops"] / point["seconds"] / sweep["peak"]
            text.append(
                f"| {sweep['title']} | {point['value']} | {1e3 * point['seconds'] / point['tokens']:.2f} "
                f"| {point['tokens'] / point['seconds']:,.0f} | {point['peak_memory_gb']:.2f} | {share:.1%} |"
            )
    return text


def operations_part(jobs):
    """The section on where a step's time goes: kinds of operations as rows, jobs as columns."""
    first = next(iter(jobs.values()))
    rest = list(first["kinds"])[-1]
    kinds = [*dict.fromkeys(kind for job in jobs.values() for kind in job["kinds"] if kind != rest), rest]
    text = [
        "## Where the time goes",
        "",
        "One step of ours under torch's profiler, which makes it some hundredths slower, by `python "
        f"benchmarks/operations.py` in {first['precision']}, commit `{first['git_commit']}`: seconds, and their share "
        "of the step. The arithmetic at the limit is what the job needs over the fastest matrix product before it.",
        "",
        "| | " + " | ".join(jobs) + " |",
        "|---|" + "---|" * len(jobs),
    ]
    for kind in kinds:
        spent = [job["kinds"].get(kind, (0.0, 0))[0] for job in jobs.values()]
        cells = [f"{s:.2f} ({s / job['seconds']:.0%})" for s, job in zip(spent, jobs.values())]
        text.append(f"| {kind} | " + " | ".join(cells) + " |")
    text.append("| **the step** | " + " | ".join(f"**{job['seconds']:.2f}**" for job in jobs.values()) + " |")
    limits = [job["flops"] / job["peak"] for job in jobs.values()]
    return [*text, "| its arithmetic at the limit | " + " | ".join(f"{limit:.2f}" for limit in limits) + " |"]


def ddp_part(ddp):
    """The section on what two processes cost."""
    apart, joined, threads = (ddp[key]["seconds"] for key in ("apart", "ddp", "threads"))
    return [
        "## Two processes",
        "",
        f"`train_lm_ddp.py` on two processes of one thread each, {ddp['batch_size']} x {ddp['length']} tokens in each; "
        "the ideal is two processes that do the same work beside each other and never speak: the plain loop of "
        "`train_lm_amp_ckpt.py` twice at once, one thread each, on the same share of the batch. What DDP adds is the "
        "exchange of gradients, and waiting for the slower of the two. The plain loop with two threads on the whole "
        "batch is what one would run instead.",
        "",
        "| | seconds a step | over the ideal |",
        "|---|---|---|",
        f"| two processes apart (ideal) | {apart:.3f} | |",
        f"| two processes, DDP | {joined:.3f} | {joined / apart - 1:+.1%} |",
        f"| one process, two threads | {threads:.3f} | {threads / apart - 1:+.1%} |",
    ]
