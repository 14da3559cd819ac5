"""The figures of EXACT.md, from what proof/exact.py measured."""

from __future__ import annotations

from proof.exact_report import number
from report.methods import method_of
from report.plots import new_figure

COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")  # Okabe & Ito
CURVES = {  # method: (colour, line)
    "DPO": (method_of("dpo").color, "-"),
    "PPO": (method_of("ppo").color, "-"),
    "GRPO, KL × (G-1)/G": ("#CC79A7", "--"),
    "GRPO, constant, no std": (method_of("grpo").color, "--"),
    "IPO": ("#D55E00", "-"),
    "GRPO": (method_of("grpo").color, "-"),
    "offline GRPO": (method_of("grpo_offline").color, "-"),
}


def estimators_figure(found, path):
    """Draw the relative error of the KL's gradient against the distance from the reference, and from the sampler."""
    figure, axes = new_figure(10.5, 4.2, 2)
    markers = ("o", "P", "s", "^", "v")
    for ax, path_of in zip(axes, found["paths"]):
        distances = [distance for distance, _ in path_of]
        for name, color, marker in zip(path_of[0][1], COLORS, markers):
            errors = [max(e[name], 1e-4) for _, e in path_of]
            line = "--" if name.startswith("k2") else "-"
            ax.plot(distances, errors, color=color, marker=marker, ms=5, lw=1.6, ls=line, label=name)
        ax.set_yscale("log")
        ax.set_ylim(7e-5, 30)
        ax.set_ylabel("relative error of the gradient")
    axes[0].text(axes[0].get_xlim()[1], 1.5e-4, "exact (drawn at 1e-4)", ha="right", fontsize=8.5, color=COLORS[0])
    axes[0].set_title("On policy", fontsize=11)
    axes[0].set_xlabel("KL(π‖ref), nats per sequence")
    axes[1].set_title("Samples of an earlier policy μ", fontsize=11)
    axes[1].set_xlabel("KL(μ‖π), nats per sequence")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle("Expected gradient of the KL, estimates summed over tokens; exact sums", fontsize=10, color="0.35")
    figure.savefig(path)


def gradients_figure(found, path):
    """Draw the advantage that a completion gets against its own, for two aggregations; a prompt's weight against its
    success rate."""
    figure, axes = new_figure(12.5, 4.4, 3)
    exact, lengths = found["completions"]["exact"], found["completions"]["lengths"]
    size = found["config"].samples_per_prompt
    rows = {(r["aggregate"], r["scale_std"]): r for r in found["aggregations"]}
    for ax, aggregate in zip(axes, ("constant", "sequence")):
        advantages = rows[aggregate, False]["advantages"]
        for length, color in zip(sorted(set(lengths)), COLORS):
            for prompt, (marker, name) in enumerate((("o", "graded"), ("^", "hard"))):
                points = [(exact[prompt][i], advantages[prompt][i]) for i, n in enumerate(lengths) if n == length]
                label = f"{length} token{'s' * (length > 1)}, {name} prompt"
                ax.plot(*zip(*points), marker, color=color, ms=7, mec="white", mew=0.6, label=label)
        edge = max(abs(x) for row in exact for x in row)
        slope = (size - 1) / size
        ax.plot([-edge, edge], [-slope * edge, slope * edge], color="0.5", lw=1, zorder=0)
        ax.set_title(f"Divided by: {aggregate}", fontsize=11)
        ax.set_xlabel("exact advantage: reward - mean")
        ax.set_ylabel("advantage in the expected gradient")
    for (group, scale_std), weights in found["weights"].items():
        label = f"G = {group}, {'over' if scale_std else 'without'} std"
        line = "-" if scale_std else "--"
        axes[2].plot(found["rates"], weights, line, color=COLORS[3 if group == 8 else 4], lw=1.8, label=label)
    axes[2].set_ylim(bottom=0)
    axes[2].set_title("A prompt with rewards 0 and 1", fontsize=11)
    axes[2].set_xlabel("success rate of the prompt")
    axes[2].set_ylabel("weight of its gradient (exact: 1)")
    axes[2].legend(frameon=False, fontsize=8.5, loc="upper center")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    title = f"GRPO's expected gradient over all groups of {size}; grey: (G-1)/G times the exact advantage"
    figure.suptitle(title, fontsize=10, color="0.35")
    figure.savefig(path)


def fixed_points_figure(found, path):
    """Draw the exact KL to pi* against steps, and at the end."""
    figure, axes = new_figure(12.5, 4.6, 2)
    rows = {r["name"]: r for r in found["fixed_points"]}
    for name, (color, line) in CURVES.items():
        trace = [max(x, 1e-17) for x in rows[name]["trace"][:200]]
        axes[0].plot(range(len(trace)), trace, line, color=color, lw=1.8, label=name)
    axes[0].set_yscale("log")
    axes[0].set_ylim(1e-15, 3)
    axes[0].set_xlabel("steps of natural gradient descent")
    axes[0].set_ylabel("KL(π‖π*), nats per sequence")
    axes[0].set_title("On the way", fontsize=11)
    axes[0].legend(frameon=False, fontsize=8.5, loc="center right", bbox_to_anchor=(1.0, 0.45))
    names = list(rows)[::-1]
    ends = [rows[name]["to_best"] for name in names]
    colors = [CURVES[name][0] if name in CURVES else "0.6" for name in names]
    axes[1].barh(names, ends, color=colors)
    for i, x in enumerate(ends):
        axes[1].text(x + 0.008, i, number(x, 3), va="center", fontsize=9)
    axes[1].axvline(found["start"]["to_best"], color="0.5", lw=1, ls=":")
    style = {"ha": "right", "va": "center", "fontsize": 9, "color": "0.4"}
    axes[1].text(found["start"]["to_best"] - 0.008, 0, "the reference", **style)
    axes[1].set_xlabel("KL(π‖π*) at the end, nats per sequence")
    axes[1].set_title("At the end", fontsize=11)
    axes[1].grid(axis="y", visible=False)
    figure.suptitle("Each method on its exact expected loss; mean over two prompts", fontsize=10, color="0.35")
    figure.savefig(path)
