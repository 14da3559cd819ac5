"""The figures of the report: PNG, readable at the width of a README, in colours for colour-blind people, too."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from report.methods import method_of
from runtime.curves import new_figure, running_mean, smoothing

SIZE = {"*": 13, "P": 9}


def point(ax, row, x, y):
    """Draw one method with both its intervals. x, y: dicts of `interval` in report/intervals.py."""
    color, marker = method_of(row.key).color, method_of(row.key).marker
    ax.errorbar(
        x["mean"], y["mean"], xerr=x["half"] or 0, yerr=y["half"] or 0, fmt=marker, color=color,
        ms=SIZE.get(marker, 8), mec="white", mew=0.6, elinewidth=1.2, capsize=2.5, label=row.label,
    )  # fmt: skip


def scores_figure(rows, path):
    """Draw gold score against KL to the base, and against the reward model's score, with 95 % intervals."""
    proxied = all(row.measured["proxy"] for row in rows)
    figure, axes = new_figure(10.5 if proxied else 6.5, 4.6, 2 if proxied else 1)
    for row in rows:
        if row.measured["kl"]:
            point(axes[0], row, row.measured["kl"], row.gold)
        if proxied:
            point(axes[1], row, row.measured["proxy"], row.gold)
    axes[0].set_xlabel("KL to the base, nats per sequence (best-of-n: upper bound)")
    axes[0].set_title("Gold score against KL")
    if proxied:
        axes[1].set_xlabel("reward model's score (proxy)")
        axes[1].set_title("Gold score against proxy")
    base = next(row for row in rows if row.key == "base")
    for ax in axes:
        ax.set_ylabel(f"gold score: {gold_is(rows)}")
        if min(row.gold["mean"] for row in rows) >= 0:  # a reward function may be below
            ax.set_ylim(bottom=0)
        ax.axhline(base.gold["mean"], color="0.6", lw=0.8, ls=":", zorder=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(rows), 7), frameon=False)
    figure.suptitle("Prompts that no method trained on; bars are 95 % intervals", fontsize=10, color="0.35")
    figure.savefig(path)


def gold_is(rows):
    """What the gold score of a comparison is, in words."""
    reward = rows[0].runs[0]["identity"]["config"].get("reward")
    return f"reward by {reward}" if reward else "share of checks passed"


def curve(ax, row, key, per_step, **style):
    """Draw one logged value of a run as a thin line, and its running mean as a thick line. Returns whether it exists.

    per_step: what a step sees (completions or pairs); the x axis is step * per_step.
    """
    points = [(line["step"] * per_step, line[key]) for line in row.curves or () if key in line]
    if not points:
        return False
    x, y = zip(*points)
    color = style.pop("color", method_of(row.key).color)
    ax.plot(x, y, color=color, lw=0.8, alpha=0.35)
    ax.plot(x, running_mean(y, smoothing(y)), color=color, lw=2, **style)
    return True


def rows_that_learn_from(what, rows):
    return [row for row in rows if method_of(row.key).learns_from == what]


def curves_figure(rows, path):
    """Draw learning curves: gold score of PPO and GRPO, reward and KL of PPO, accuracy and loss of DPO."""
    figure, axes = new_figure(11.5, 4.0, 3)
    drawn = [False] * 3
    for row in rows_that_learn_from("rollouts", rows):
        per_step = row.settings["prompts_per_step"] * row.settings["samples_per_prompt"]
        drawn[0] |= curve(axes[0], row, "gold", per_step, label=row.label)
        if row.key == "ppo":
            drawn[1] |= curve(axes[1], row, "reward", per_step, label="reward model's score")
            curve(axes[1], row, "kl", per_step, color="#0072B2", ls="--", label="KL to the base, nats per sequence")
    for row in rows_that_learn_from("pairs", rows):
        pairs = row.settings["batch_size"]
        drawn[2] |= curve(axes[2], row, "accuracy", pairs, label="accuracy: chosen above rejected")
        curve(axes[2], row, "loss", pairs, color="#D55E00", ls="--", label="loss, nats a pair")
        axes[2].axhline(math.log(2), color="0.6", lw=0.8, ls=":")
        axes[2].annotate("ln 2", (1, math.log(2)), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    titles = ("Gold score while learning", "PPO: what it is paid for, and the price", "DPO on its pairs")
    labels = ("gold score of the sampled completions", "score; nats", "accuracy; loss")
    for ax, title, label, what, seen in zip(axes, titles, labels, ("completions", "completions", "pairs"), drawn):
        ax.set_title(title, fontsize=11)
        ax.set_xlabel(f"training {what} seen")
        ax.set_ylabel(label)
        if seen:
            ax.legend(frameon=False, fontsize=8.5)
        else:
            ax.text(0.5, 0.5, "no such run", transform=ax.transAxes, ha="center", color="0.5")
    axes[0].set_ylim(bottom=0)
    figure.suptitle("Training prompts; thick: running mean over about an eighth of the run", fontsize=10, color="0.35")
    figure.savefig(path)


def checks_figure(rows, path):
    """Draw the share of completions that pass, by type of prompt, as a map. Unseen types stand apart."""
    base = next(row for row in rows if row.key == "base")
    unseen = base.runs[0]["unseen_types"]
    checks = base.measured["checks"]
    groups = [[name for name in checks if name not in unseen], [name for name in checks if name in unseen]]
    groups = [sorted(group, key=lambda name: checks[name]["mean"]) for group in groups if group]
    figure = Figure(figsize=(max(6.0, 2.6 + 0.56 * len(checks)), 1.9 + 0.42 * len(rows)), dpi=130, layout="constrained")
    axes = figure.subplots(1, len(groups), squeeze=False, width_ratios=[len(group) for group in groups])[0]
    colors = matplotlib.colormaps["cividis"]
    for k, (ax, names) in enumerate(zip(axes, groups)):
        # (methods, types)
        shares = np.array([[row.measured["checks"][name]["mean"] for name in names] for row in rows])
        image = ax.imshow(shares, vmin=0, vmax=1, cmap=colors, aspect="auto")
        for (i, j), share in np.ndenumerate(shares):
            ax.text(j, i, f"{share:.2f}"[0 if share >= 0.995 else 1 :], ha="center", va="center", fontsize=8.5,
                    color="black" if share > 0.55 else "white")  # fmt: skip
        ticks = [f"{name} ({checks[name]['n']})" for name in names]
        ax.set_xticks(range(len(names)), ticks, rotation=45, ha="right", rotation_mode="anchor", fontsize=9)
        ax.set_yticks(range(len(rows)), [row.label for row in rows] if k == 0 else [])
        ax.set_title("types seen in training" if names[0] not in unseen else "only held-out", fontsize=10)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
    bar = figure.colorbar(image, ax=list(axes), fraction=0.03, pad=0.01)
    bar.set_label("share of completions that pass")
    figure.supxlabel("type (number of prompts)", fontsize=9)
    figure.savefig(path)


def beside_figure(rows, panels, path):
    """Draw one panel per value: the change of each method against the base with its interval, one line a method.

    panels: (label, one {"mean", "half"} for each row). The first one is the gain on the task.
    """
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(3.1 * across, 0.9 + (0.9 + 0.27 * len(rows)) * down), dpi=130, layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for k, (ax, (label, changes)) in enumerate(zip(axes, panels)):
        for i, (row, x) in enumerate(zip(rows, changes)):
            method = method_of(row.key)
            ax.errorbar(
                x["mean"], -i, xerr=x["half"] or 0, fmt=method.marker, color=method.color,
                ms=SIZE.get(method.marker, 8) - 2, mec="white", mew=0.6, elinewidth=1.2, capsize=2.5,
            )  # fmt: skip
        ax.axvline(0, color="0.6", lw=0.8, ls=":", zorder=0)
        ax.set_yticks([-i for i in range(len(rows))], [row.label for row in rows] if k % across == 0 else [])
        ax.set_ylim(-len(rows) + 0.4, 0.6)
        ax.locator_params(axis="x", nbins=5)
        ax.set_title(label, fontsize=10, fontweight="bold" if k == 0 else "normal")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.92", axis="x")
        ax.set_axisbelow(True)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    figure.suptitle("Change against the base; bars are 95 % intervals", fontsize=10, color="0.35")
    figure.savefig(path)
