"""report/benchmarks.md and its figures, from report/benchmarks.json and benchmarks/notes.md.

    python benchmarks/page.py       # writes the page again, after a change of the notes

run.py, scaling.py and operations.py put what they measured into the JSON, and write the page again.
"""

from __future__ import annotations

import json

from benchmarks.measure import mfu
from configs.config import ROOT
from models.device import pick_device
from report.plots import new_figure
from runtime.console import say
from runtime.files import read_json, write_atomically

FIGURES = "report/benchmarks.json"
PAGE = "report/benchmarks.md"
NOTES = "benchmarks/notes.md"
COLORS = {"ours": "#0072B2", "baseline": "#999999"}  # Okabe & Ito
JOBS = {"cpu": "jobs", "cuda": "gpu_jobs"}  # in the JSON, by the kind of the device
JOB_WORDS = {
    "lm": "LM training, full weights, {batch_size} x {length} tokens",
    "dpo": "DPO, full weights, {pairs} pairs",
    "dpo_lora": "DPO, LoRA r={lora_r}, {pairs} pairs",
    "reward": "reward model, LoRA r={lora_r}, {pairs} pairs",
    "grpo": "GRPO, full weights, {prompts} x {samples} x {new} tokens",
    "ppo": "PPO, LoRA r={lora_r}, {prompts} x {samples} x {new} tokens",
    "generate": "generation, batch {batch_size}, {prompt} + {new} tokens",
}
HOW = """
**Time.** The time of a step runs from the end of one optimizer step to the end of the next. torch calls the same clock
on both sides. The first step is not timed, and neither are loading and saving. Each side of each round runs in its own
process; ours and the baseline take turns. The ratios are taken within a round, and the table shows their median.
"Speed" is the baseline's time over ours; "memory" is our peak memory over the baseline's.

**Memory.** Peak memory is the most that the process held until its last step, loading included.

**Same work.** Both sides have the same model, token ids, trained weights, precision, optimizer, learning rate and
batch. The top of each script in `benchmarks/` says what else is equal, and how.

**% of peak.** This is the arithmetic that the job needs, over the time, as a share of the peak. The arithmetic is the
matmuls of each token once (`models/flops.py`). The peak is the fastest square matmul that this machine did before
or after the job.

**Tokens.** For LM training these are the tokens of the blocks. For pairs they are the prompts, each once, and both
completions. For GRPO, PPO and generation they are the new tokens.
"""
LOSSES = """The losses of LM training and of generation are in nats per token. Those of generation are of a greedy
batch, one for each quarter of the completions."""
MFU = """"MFU" (model FLOPs utilisation) is the same arithmetic over the time, as a share of the FLOP/s that the card's
data sheet states for dense matmuls in this precision."""


def measured():
    """What the JSON holds; {} without one."""
    path = ROOT / FIGURES
    return read_json(path) if path.is_file() else {}


def update(jobs=None, gpu_jobs=None, **parts):
    """Put what was measured into the JSON, and write the page and its figures from all that is there."""
    found = measured()
    for key, new in zip(JOBS.values(), (jobs, gpu_jobs)):
        parts[key] = {**found.get(key, {}), **(new or {})}
    found = {**found, **parts}
    write_atomically(ROOT / FIGURES, json.dumps(found, indent=1) + "\n")
    (ROOT / "report" / "figures").mkdir(exist_ok=True)
    draw(found)
    write_atomically(ROOT / PAGE, write(found))
    say(f"written to {FIGURES} and {PAGE}")


def holds(config):
    """Whether the page takes what scaling.py and operations.py measured: those sections are of a CPU."""
    if config.smoke:
        return False
    if pick_device().type == "cuda":
        say(f"not written to {PAGE}: its section on this is of a CPU")
        return False
    return True


def ordered(found, key):
    """The jobs under a key of the JSON, in the order of the page."""
    return {name: found.get(key, {})[name] for name in JOB_WORDS if name in found.get(key, {})}


def draw(found):
    """The figures of the parts that are there."""
    jobs = ordered(found, JOBS["cpu"])
    if jobs:
        compared = {name: job for name, job in jobs.items() if job["baseline"]}
        bars_figure(compared or jobs, ROOT / "report/figures/benchmarks.png")
    if "scaling" in found:
        scaling_figure(found["scaling"], ROOT / "report/figures/benchmarks_scaling.png")


def write(found):
    """The page as Markdown."""
    jobs, on_gpu = (ordered(found, key) for key in JOBS.values())
    text = ["# Benchmarks", ""]
    if jobs:
        text += ["![speed and memory of ours over those of the baseline](figures/benchmarks.png)", ""]
        text += [*jobs_table(jobs), "", *about(jobs), HOW]
        text += ["## The losses of both sides", "", LOSSES, "", *losses_table(jobs), ""]
    if on_gpu:
        text += ["## On a GPU", "", *jobs_table(on_gpu), "", *about(on_gpu), ""]
        text += [MFU, ""] if has_mfu(on_gpu) else []
        text += [*losses_table(on_gpu), ""]
    if "scaling" in found:
        text += [*scaling_part(found["scaling"]), ""]
    if "ddp" in found:
        text += [*ddp_part(found["ddp"]), ""]
    if "busy" in found:
        text += [*busy_part(found["busy"]), ""]
    if "operations" in found:
        text += [*operations_part(found["operations"]), ""]
    text.append((ROOT / NOTES).read_text(encoding="utf-8"))
    return "\n".join(text).rstrip() + "\n"


def title(job):
    return JOB_WORDS[job["job"]].format(**job["size"])


def seconds(side):
    s = side["seconds_per_step"]
    return f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})"


def has_mfu(jobs):
    """Whether the FLOP/s of a data sheet are known for one of these jobs."""
    return any(mfu(job, job["ours"]) is not None for job in jobs.values())


def jobs_table(jobs):
    with_mfu = has_mfu(jobs)
    columns = ["job", "side", "seconds a step, median (min to max)", "tokens/s", "peak GB", "% of peak"]
    columns += ["MFU", "speed", "memory"] if with_mfu else ["speed", "memory"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for job in jobs.values():
        for key in ("ours", "baseline"):
            if not (side := job[key]):
                continue
            first, name = (title(job), "ours") if key == "ours" else ("", job["baseline_name"])
            ratio = key == "ours" and job["baseline"]
            speed = f"**{job['speed_ratio']:.2f} x**" if ratio else ""
            memory = f"**{job['memory_ratio']:.2f} x**" if ratio else ""
            share = mfu(job, side)
            of_sheet = f" {share:.1%} |" if share is not None else " |"
            lines.append(
                f"| {first} | {name} | {seconds(side)} | {side['tokens_per_second']:,.0f} "
                f"| {side['peak_memory_gb']:.2f} | {side['share_of_peak']:.1%} |{of_sheet if with_mfu else ''} "
                f"{speed} | {memory} |"
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
    for key, of_jobs in lines.items():
        peaks = ", ".join(f"{name} {peak:,.0f}" for name, peak in of_jobs)
        found.append(f"Measured by `python benchmarks/run.py JOB` {key}. The peak at each job, GFLOP/s: {peaks}.")
    return found


def losses_table(jobs):
    lines = ["| job | losses, ours | losses, baseline | largest difference |", "|---|---|---|---|"]
    for job in jobs.values():
        both = [" ".join(f"{x:.5f}" for x in job[key]["losses"]) if job[key] else "" for key in ("ours", "baseline")]
        apart = f"{job['loss_difference']:.1e}" if job["baseline"] else ""
        apart += f", in fp32 {job['loss_difference_fp32']:.1e}" if "loss_difference_fp32" in job else ""
        apart += "" if job["losses_agree"] in (None, True) else " **DISAGREE**"
        lines.append(f"| {job['job']} | {both[0]} | {both[1]} | {apart} |")
    return lines


def bars_figure(jobs, path):
    """How many times faster, and with which share of the memory."""
    figure, axes = new_figure(10.5, 0.9 + 0.42 * len(jobs), 2)
    names = list(jobs)[::-1]
    labels = ("speed, times that of the baseline", "peak memory, times that of the baseline")
    for ax, key, label in zip(axes, ("speed_ratio", "memory_ratio"), labels):
        values = [jobs[name][key] or 0 for name in names]
        bars = ax.barh(names, values, color=COLORS["ours"], height=0.6)
        ax.bar_label(bars, [f"{v:.2f}" for v in values], label_type="center", color="white")
        ax.axvline(1, color=COLORS["baseline"], lw=1.2, ls="--")
        ax.set_xlim(0, 1.15 * max([*values, 1]))
        ax.set_xlabel(label)
    for name, y in zip(names, range(len(names))):  # the spread of the rounds
        found = jobs[name].get("speed_ratios")
        if found:
            axes[0].plot([min(found), max(found)], [y, y], color="black", lw=1.2)
            axes[0].set_xlim(right=max(axes[0].get_xlim()[1], 1.05 * max(found)))
    figure.savefig(path)


def scaling_figure(scaling, path):
    """Time a token in each sweep, and what its arithmetic takes at peak."""
    figure, axes = new_figure(11.5, 3.9, 3)
    for ax, sweep in zip(axes, scaling["sweeps"]):
        x = [point["value"] for point in sweep["points"]]
        took = [1e3 * point["seconds"] / point["tokens"] for point in sweep["points"]]
        needed = [1e3 * point["flops"] / point["tokens"] / sweep["peak"] for point in sweep["points"]]
        ax.plot(x, took, "o-", color=COLORS["ours"], label="measured")
        ax.plot(x, needed, "--", color=COLORS["baseline"], label="its arithmetic at peak")
        ax.set_xscale("log", base=2)
        ax.set_xticks(x, [str(v) for v in x])
        ax.minorticks_off()
        ax.set_ylim(bottom=0)
        ax.set_title(sweep["title"].replace(", ", "\n", 1), fontsize=11)
        ax.set_xlabel(sweep["key"].replace("_", " "))
        ax.set_ylabel("ms a token")
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path)


def scaling_part(scaling):
    """The section on how cost grows."""
    text = ["## How cost grows", "", "![time a token](figures/benchmarks_scaling.png)", ""]
    text += ["Ours alone, by `python benchmarks/scaling.py`. Each time is the median of the timed steps.", ""]
    text += ["| sweep | value | ms a token | tokens/s | peak GB | % of peak |", "|---|---|---|---|---|---|"]
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
        "One step of ours under torch's profiler, by `python benchmarks/operations.py` in "
        f"{first['precision']}, commit `{first['git_commit']}`. The profiler makes a step a few percent slower. The "
        "table has seconds, and their share of the step. The last row is the arithmetic that the job needs, over the "
        "peak that was measured before it.",
        "",
        "| | " + " | ".join(jobs) + " |",
        "|---|" + "---|" * len(jobs),
    ]
    for kind in kinds:
        spent = [job["kinds"].get(kind, (0.0, 0))[0] for job in jobs.values()]
        cells = [f"{s:.2f} ({s / job['seconds']:.0%})" for s, job in zip(spent, jobs.values())]
        text.append(f"| {kind} | " + " | ".join(cells) + " |")
    text.append("| **the step** | " + " | ".join(f"**{job['seconds']:.2f}**" for job in jobs.values()) + " |")
    at_peak = [job["flops"] / job["peak"] for job in jobs.values()]
    return [*text, "| its arithmetic at peak | " + " | ".join(f"{s:.2f}" for s in at_peak) + " |"]


def busy_part(busy):
    """The section on a machine that another program uses, too."""
    rows = []
    for job, title in (("generate", "sampling"), ("lm", "LM training")):
        quiet, shared = busy[job]["quiet"], busy[job]["busy"]
        rows.append(f"| {title} | {quiet:,.0f} | {shared:,.0f} | {shared / quiet:.0%} |")
    return [
        "## A busy core", "", "Tokens per second, alone and while another program takes one core.", "",
        "| | quiet | one core busy | share |", "|---|---:|---:|---:|", *rows,
    ]  # fmt: skip


def ddp_part(ddp):
    """The section on what two processes cost."""
    apart, joined, threads = (ddp[key]["seconds"] for key in ("apart", "ddp", "threads"))
    return [
        "## Two processes",
        "",
        f"DDP is `train_lm_ddp.py` on two processes of one thread each, with {ddp['batch_size']} x {ddp['length']} "
        "tokens in each. The ideal is two independent processes that do the same work side by side: the plain loop of "
        "`train_lm_amp_ckpt.py`, twice at once, with one thread each, on the same share of the batch. DDP adds the "
        "exchange of gradients, and the wait for the slower process. The last row is the "
        "alternative on one machine: the plain loop with two threads on the whole batch.",
        "",
        "| | seconds a step | over the ideal |",
        "|---|---|---|",
        f"| two independent processes (ideal) | {apart:.3f} | |",
        f"| two processes, DDP | {joined:.3f} | {joined / apart - 1:+.1%} |",
        f"| one process, two threads | {threads:.3f} | {threads / apart - 1:+.1%} |",
        *spread_part(ddp),
    ]


SPREAD = {"ddp": "DDP: all weights in each", "fsdp": "FSDP: half of each weight", "tp": "TP: half of each layer"}


def spread_part(ddp):
    """Rows on weights that are spread over the processes, beside DDP. [] if they were not measured."""
    if "fsdp" not in ddp:
        return []
    rows = [
        f"| {title} | {ddp[key]['seconds']:.3f} | {ddp[key]['peak_memory_gb']:.2f} |" for key, title in SPREAD.items()
    ]
    return [
        "",
        "The same steps with weights that are spread over the two processes (`train_lm_fsdp.py`, `train_lm_tp.py`), "
        "and the peak memory of a process:",
        "",
        "| | seconds a step | GB |",
        "|---|---|---|",
        *rows,
    ]


if __name__ == "__main__":
    update()
