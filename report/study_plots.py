"""The figures of the study: intervals at every point, and colours that colour-blind people can distinguish."""

from __future__ import annotations

import math

from report.intervals import parts
from report.methods import method_of
from report.plots import gold_is, new_figure

DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # of Okabe & Ito (2008)
GREY = "0.45"


def band(ax, found, **style):
    """Draw the means of `parts` as a line, and their 95 % intervals as a band."""
    x, y = [x for x, _ in found], [value["mean"] for _, value in found]
    half = [value["half"] or 0.0 for _, value in found]
    ax.fill_between(
        x, [a - h for a, h in zip(y, half)], [a + h for a, h in zip(y, half)], color=style["color"], alpha=0.15, lw=0
    )
    ax.plot(x, y, lw=2, **style)


def finish(figure, axes, title, path):
    """Legends below the axes that have something, and the title; then the file."""
    for ax in axes:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=8.5)
    figure.suptitle(title, fontsize=10, color=GREY)
    figure.savefig(path)


def curves_figure(study, path):
    """Draw gold score (PPO, GRPO) and accuracy (DPO) while learning: means and intervals over steps and seeds."""
    figure, axes = new_figure(10.5, 4.2, 2)
    for key, ax, what in (("ppo", axes[0], "gold"), ("grpo", axes[0], "gold"), ("dpo", axes[1], "accuracy")):
        if key not in study.lines:
            continue
        row, method = study.row(key), method_of(key)
        rollouts = method.learns_from == "rollouts"
        sees = ("prompts_per_step", "samples_per_prompt") if rollouts else ("batch_size",)
        per_step = math.prod(row.settings[name] for name in sees)
        points = [(line["step"] * per_step, line[what]) for run in study.lines[key] for line in run if what in line]
        band(ax, parts(points), color=method.color, label=method.label, marker=method.marker, ms=5)
    for ax, title, label, seen in (
        (axes[0], "Gold score while learning", f"gold score: {gold_is(study.rows)}", "completions"),
        (axes[1], "DPO on its pairs", "accuracy: chosen above rejected", "pairs"),
    ):
        ax.set(title=title, ylabel=label, xlabel=f"training {seen} seen")
        ax.set_ylim(0, min(1.02, ax.get_ylim()[1]))
    finish(figure, axes, f"Training prompts, {len(study.config.seed_list())} seeds; bands are 95 % intervals", path)


def coefficients_figure(study, path):
    """Draw gold score against KL for each coefficient: along the training, and held-out at its end."""
    figure, axes = new_figure(10.5, 4.4, 2)
    base = study.row("base").gold
    for ax, key in zip(axes, ("grpo", "dpo")):
        ours = [point for point in study.points if point.key == key]
        for k, point in enumerate(ours):
            shade = {"color": COLORS[k % 4]}
            along = [(line["kl"], line["gold"]) for line in point.lines if "kl" in line and "gold" in line]
            if along:
                ax.plot(
                    *zip(*[(x, y["mean"]) for x, y in parts(along, 10)]), ls=DASHES[k % 4], lw=1.4, alpha=0.8, **shade
                )
            x, y = point.measured["kl"], point.measured["gold"]
            ax.errorbar(x["mean"], y["mean"], xerr=x["half"] or 0, yerr=y["half"] or 0, fmt=MARKERS[k % 4], ms=7,
                        mec="white", mew=0.6, capsize=2.5, elinewidth=1.2, label=point.what, **shade)  # fmt: skip
        ax.errorbar(0, base["mean"], yerr=base["half"] or 0, fmt="s", color="black", ms=6, capsize=2.5, label="base")
        ax.set(
            title=method_of(key).label,
            xlabel="KL to the base, nats per sequence",
            ylabel=f"gold score: {gold_is(study.rows)}",
        )
        ax.set_ylim(0, min(1.02, ax.get_ylim()[1]))
    title = f"Points: held-out, 95 % intervals. Lines: along the training, training prompts. Seed {study.runs.seed}"
    finish(figure, axes, title, path)


def optimisation_figure(study, path):
    """Draw gold score and proxy of the long PPO against KL, beside best-of-n."""
    figure, axes = new_figure(10.5, 4.4, 2)
    ppo, best = method_of("ppo"), method_of("best_of")
    for ax, key, measured, label in (
        (axes[0], "gold", "gold", f"gold score: {gold_is(study.rows)}"),
        (axes[1], "reward", "proxy", "reward model's score (proxy)"),
    ):
        band(
            ax, parts([(line["kl"], line[key]) for line in study.long]), color=ppo.color, label="PPO, training prompts"
        )
        x, y = study.long_measured["kl"], study.long_measured[measured]
        ax.errorbar(x["mean"], y["mean"], xerr=x["half"] or 0, yerr=y["half"] or 0, fmt=ppo.marker, color=ppo.color,
                    ms=8, mec="white", mew=0.6, capsize=2.5, label="PPO at its end, held-out")  # fmt: skip
        values = [(found["kl"]["mean"] if n > 1 else 0.0, found[measured]) for n, found in study.best_of]
        ax.errorbar([x for x, _ in values], [y["mean"] for _, y in values], yerr=[y["half"] or 0 for _, y in values],
                    fmt=best.marker + "--", color=best.color, ms=6, capsize=2.5,
                    label=f"best of 1 to {study.best_of[-1][0]}, held-out: log n - (n - 1)/n nats")  # fmt: skip
        ax.set(xlabel="KL to the base, nats per sequence", ylabel=label)
    axes[0].set_title("What is wanted")
    axes[1].set_title("What PPO is paid for")
    axes[0].set_ylim(0, min(1.02, axes[0].get_ylim()[1]))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    title = f"PPO for long at kl_coef {study.long_coef:g}; bands and bars are 95 % intervals"
    finish(figure, (), title, path)
