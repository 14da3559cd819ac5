"""The picture of a run: curves.png in its folder, drawn from metrics.jsonl while the run goes on.

Points are logged lines, lines are running means, and a band is a 95 % interval where a step samples prompts. The
colours are those of Okabe and Ito (2008), which colour-blind people can tell apart. The background is opaque, so the
picture is readable on a dark page, too.

matplotlib is imported when the first picture is drawn, because the import takes longer than many a training step.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from configs.config import shown
from runtime.console import say
from runtime.files import read_lines

NAME = "curves.png"
SHARE = 1 / 200  # of a run's time, at most, to draw while it goes on
FIRST = 0.6  # seconds that the first picture takes: the import of matplotlib, and the drawing
STYLES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."))  # of the keys of a panel
EXACT = ("lr", "nats_per_token")  # keys without noise from step to step: drawn as they are


@dataclass(frozen=True)
class Panel:
    """Numbers that share an axis.

    keys: {key of metrics.jsonl: its name in the legend}; a panel is drawn if one of them was logged. lines: {a value to
    compare with: its name}. limits: of the axis.
    """

    title: str
    unit: str
    keys: dict[str, str]
    lines: dict[float, str] = field(default_factory=dict)
    limits: tuple[float | None, float | None] = (None, None)


TEXTS = {"loss": "training text", "nats_per_token": "held-out text"}
LOSS = Panel("Loss on training text and on held-out text", "nats per token", TEXTS)
LR = Panel("Learning rate", "learning rate", {"lr": "learning rate"}, limits=(0, None))
NORM = Panel("Gradient norm before clipping", "gradient norm", {"grad_norm": "gradient norm"}, limits=(0, None))
REWARD = Panel(
    "Reward, and the score of the task itself", "mean over completions", {"reward": "reward", "gold": "gold score"}
)
KL = Panel("Distance from the reference", "KL, nats per sequence", {"kl": "KL to the reference"}, limits=(0, None))
ENTROPY = Panel("How undecided the policy is", "entropy, nats per token", {"entropy": "entropy"}, limits=(0, None))
LENGTH = Panel("Length of the completions", "tokens", {"mean_length": "mean length"}, limits=(0, None))
SHARES = Panel(
    "Shares that are better low", "share",
    {"clipped_ratio": "completions cut at the limit", "clipfrac": "tokens with a clipped ratio",
     "frac_reward_zero_std": "groups of equal rewards"}, limits=(0, 1),
)  # fmt: skip
MARGIN = {"chosen_reward": "chosen", "rejected_reward": "rejected"}
LOGPS = {"chosen_logps": "chosen", "rejected_logps": "rejected"}
ACCURACY = Panel(
    "Chosen above rejected, training pairs", "share of pairs", {"accuracy": "accuracy"}, {0.5: "chance"}, (0, 1)
)
STAGES = {  # {a key that only this stage logs: (what a step is, panels)}; the first that fits is taken
    "chosen_logps": ("optimizer step", (
        Panel("Loss of the training pairs", "loss per pair", {"loss": "loss"}, {math.log(2): "ln 2: undecided"}),
        ACCURACY,
        Panel("Implicit rewards", "beta x log-ratio, nats", MARGIN, {0.0: ""}),
        Panel("Log-probs: both may fall", "nats per sequence", LOGPS),
        NORM, LR,
    )),
    "score": ("optimizer step", (
        Panel("Loss of the training pairs", "loss per pair", {"loss": "loss"}, {math.log(2): "ln 2: undecided"}),
        ACCURACY,
        Panel("Chosen score minus rejected score", "score", {"margin": "margin"}, {0.0: ""}),
        Panel("Mean of all scores: near 0", "score", {"score": "mean score"}, {0.0: ""}),
        NORM, LR,
    )),
    "value_loss": ("rollout", (
        REWARD, KL, ENTROPY, LENGTH, SHARES,
        Panel("Error of the value head", "half squared error", {"value_loss": "value loss"}, limits=(0, None)),
    )),
    "frac_reward_zero_std": ("rollout", (REWARD, KL, ENTROPY, LENGTH, SHARES, NORM)),
    "": ("optimizer step", (
        LOSS,
        NORM, LR,
        Panel("Speed", "tokens per second", {"tok/s": "tokens per second"}, limits=(0, None)),
    )),
}  # fmt: skip


class Curves:
    """Draws curves.png of one run, now and then. A picture that cannot be drawn ends no run: one line says why."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.last, self.cost = time.monotonic(), FIRST
        self.failed = False

    def draw_if_due(self) -> None:
        """Draw if the last picture is so old that drawing takes at most SHARE of the time."""
        if not self.failed and time.monotonic() - self.last >= self.cost / SHARE:
            self.draw()

    def draw(self) -> None:
        """Draw the lines that metrics.jsonl has now, in place of the last picture."""
        began = time.monotonic()
        temporary = self.folder / (NAME + ".tmp")
        try:
            draw(read_lines(self.folder / "metrics.jsonl"), self.folder.absolute().name, temporary)
            os.replace(temporary, self.folder / NAME)
        except Exception as error:  # whatever it is: the run is worth more than its picture
            self.failed = True
            say(f"{shown(self.folder / NAME)} is not drawn: {type(error).__name__}: {error}")
        self.last = time.monotonic()
        self.cost = self.last - began


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """For each value, the mean of the `width` values around it; fewer at both ends."""
    sums = list(itertools.accumulate(values, initial=0.0))
    spans = [span(i, width, len(values)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def span(i: int, width: int, length: int) -> tuple[int, int]:
    """(start, end) of the `width` places around place i, as far as they lie within 0 and length."""
    return max(0, i - width // 2), min(length, i + (width + 1) // 2)


def smoothing(values: Sequence[float]) -> int:
    """The width of the running mean, an odd number: about an eighth of the run."""
    return len(values) // 16 * 2 + 1


def new_figure(width: float, height: float, columns: int, rows: int = 1) -> tuple[Any, list]:
    """(figure, axes): columns x rows axes, as a flat list. The figure needs no display and no global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.92")
        ax.set_axisbelow(True)
    return figure, axes


def draw(lines: list[dict], name: str, path: Path | IO[bytes]) -> None:
    """Draw the lines of a metrics.jsonl as a PNG. name: of the run, for the title. Raises what matplotlib raises."""
    logged = {key for line in lines for key in line}
    what, panels = next(found for key, found in STAGES.items() if key in logged or not key)
    panels = tuple(panel for panel in panels if logged & panel.keys.keys())
    columns = 3 if len(panels) > 4 else 2
    rows = max(1, math.ceil(len(panels) / columns))
    figure, axes = new_figure(3.9 * columns, 0.5 + 2.6 * rows, columns, rows)
    for ax, panel in zip(axes, panels):
        draw_panel(ax, panel, lines)
        ax.set_xlabel(what, fontsize=9)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    words = f"{name}, up to {what} {lines[-1]['step']:,}. Points: the log; lines: running means" if lines else name
    band = "; bands: 95 % intervals over the prompts" if any(key.endswith("_se") for key in logged) else ""
    figure.suptitle(words + band, fontsize=10, color="0.35")
    figure.savefig(path, format="png", facecolor="white")


def draw_panel(ax: Any, panel: Panel, lines: list[dict]) -> None:
    """Draw the keys of a panel: points, running mean, and a band where KEY_se is logged, too."""
    for style, (key, label) in zip(STYLES, panel.keys.items()):
        found = [line for line in lines if key in line]
        if not found:
            continue
        steps, values = [line["step"] for line in found], [line[key] for line in found]
        width = 1 if key in EXACT else smoothing(values)
        means = running_mean(values, width)
        if width > 1:
            ax.plot(steps, values, color=style[0], ls="none", marker=".", ms=4.5, mew=0, alpha=0.5, clip_on=False)
        ax.plot(
            steps, means, color=style[0], ls=style[1], lw=2, label=label, marker="o" if len(steps) < 10 else "", ms=4
        )
        if all(f"{key}_se" in line for line in found):
            variances = running_mean([line[f"{key}_se"] ** 2 for line in found], width)
            counts = [end - start for start, end in (span(i, width, len(found)) for i in range(len(found)))]
            half = [1.96 * math.sqrt(variance / count) for variance, count in zip(variances, counts)]
            low, high = ([m + sign * h for m, h in zip(means, half)] for sign in (-1, 1))
            ax.fill_between(steps, low, high, color=style[0], alpha=0.15, lw=0)
    low, high = panel.limits
    if low == 0 and high is None:
        high = 1.08 * ax.dataLim.y1 or 1
    ax.set_ylim(low, high)
    for value, label in panel.lines.items():
        if ax.get_ylim()[0] <= value <= ax.get_ylim()[1]:
            ax.axhline(value, color="0.4", lw=0.9, ls=":")
            ax.annotate(label, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    ax.ticklabel_format(axis="y", scilimits=(-3, 5))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.tick_params(labelsize=8)
    ax.yaxis.get_offset_text().set_fontsize(8)
    ax.set_title(panel.title, fontsize=10)
    ax.set_ylabel(panel.unit, fontsize=9)
    if len(panel.keys) > 1:
        ax.legend(frameon=False, fontsize=8)
