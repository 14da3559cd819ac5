"""What a run left, as numbers to reason about: the lines of its metrics.jsonl, its configuration and its manifest."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from dataclasses import dataclass, field

from configs.config import UserError, read_yaml, shown
from runtime.files import in_root, json_error, read_manifest
from runtime.means import interval, t975

LEAST = 9  # lines with a metric, for its trend: three in each third
EARLIER = 20  # runs with which the speed is compared, at most
# options that do not change the time of a step; runs that differ only in these are comparable in tok/s
NOT_SPEED = {
    "out", "seed", "lr", "warmup_steps", "min_lr_ratio", "weight_decay", "max_grad_norm", "beta", "kl_coef", "clip_low",
    "clip_high", "clip_eps", "vf_coef", "gamma", "lam", "label_smoothing", "epochs", "max_steps", "steps", "log_every",
    "save_every", "save_minutes", "keep_checkpoints", "max_skipped", "overwrite", "eval_every", "eval_blocks",
    "heldout_fraction", "sample_prompt", "sample_tokens", "wandb", "wandb_project", "wandb_model",
}  # fmt: skip


def number(value, digits=3):
    """A number with `digits` significant digits, or all digits before the point: 0.0123, 4.55, 1,230."""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


@dataclass(frozen=True)
class Part:
    """A metric over consecutive lines: its mean, standard error and number of lines, and the first and last step."""

    mean: float
    se: float
    n: int
    first: int
    last: int

    @property
    def half(self):
        """Half of the 95 % interval of the mean."""
        return t975(self.n - 1) * self.se

    def __str__(self):
        return f"{number(self.mean)} +- {number(self.half, 2)}"

    @property
    def steps(self):
        return f"steps {self.first} to {self.last}"


@dataclass
class Readings:
    """The record of one run.

    lines: the rows of metrics.jsonl. config, manifest: {} if the run has none (yet). earlier: the median tok/s of each
    earlier run of the same script, model, sizes and machine.
    """

    lines: list[dict]
    config: dict = field(default_factory=dict)
    manifest: dict = field(default_factory=dict)
    earlier: list[float] = field(default_factory=list)

    @property
    def result(self):
        return self.manifest.get("result", {})

    @property
    def stored(self):
        """Whether the completions came from a file, as in offline GRPO: their rewards are not those of the policy."""
        return bool(self.series("reward")) and not self.series("sampler_kl")

    def series(self, key):
        """[(step, value)] of the lines that have this metric."""
        return [(line["step"], line[key]) for line in self.lines if key in line]

    def count(self, key):
        """The number of lines with a metric. `result.NAME` is the entry NAME of the manifest's result: LEAST or 0."""
        if key.startswith("result."):
            return LEAST if key.removeprefix("result.") in self.result else 0
        return len(self.series(key))

    def values(self, key):
        return [value for _, value in self.series(key)]

    def thirds(self, key):
        """The first, second and last third of the lines with this metric, as `Part`s. It takes LEAST lines."""
        found = self.series(key)
        size = len(found) // 3
        return [_part(piece) for piece in (found[:size], found[size : len(found) - size], found[len(found) - size :])]

    def whole(self, key):
        """All lines with this metric as one `Part`. It takes two lines."""
        return _part(self.series(key))

    def scaled(self, key, factor, at_zero=None):
        """The option `--key` with `factor` times the value of this run, or at_zero if that was 0, as a text."""
        before = self.config.get(key)
        if before is None:
            return f"--{key} at {factor:.2g} times its value"
        if before == 0:
            return f"--{key} {at_zero}" if at_zero else None
        return (
            f"--{key} {max(1, round(before * factor))}" if isinstance(before, int) else f"--{key} {before * factor:.2g}"
        )

    def option(self, key, value):
        """The option `--key value` as a text. None if the run had this value."""
        return None if self.config.get(key) == value else f"--{key} {value}"


def _part(pairs):
    found = interval([value for _, value in pairs])
    return Part(found["mean"], found["se"], found["n"], pairs[0][0], pairs[-1][0])


def change(before, after):
    """(difference of two means, half of its 95 % interval): Welch's standard error, Student's t."""
    half = t975(before.n + after.n - 2) * math.hypot(before.se, after.se)
    return after.mean - before.mean, half


def rose(before, after):
    """Whether the mean of `after` is above that of `before`, beyond the 95 % interval of the difference."""
    difference, half = change(before, after)
    return difference > half


def fell(before, after):
    """Whether the mean of `after` is below that of `before`, beyond the 95 % interval of the difference."""
    return rose(after, before)


def read_readings(path):
    """The `Readings` of a run's folder, or of a metrics.jsonl alone. A last line that is not complete is left out.

    Raises UserError if there is no metrics.jsonl, or if it holds something else than lines with a step.
    """
    path = in_root(path)
    file = path / "metrics.jsonl" if path.is_dir() else path
    lines, held = read_metrics(file), file.with_name("config.yaml")
    config = read_yaml(held) if held.is_file() else {}
    manifest = read_manifest(file.parent) or {}
    return Readings(lines, config, manifest, earlier_speeds(file.parent, config, manifest))


def read_metrics(file):
    """The lines of a metrics.jsonl, checked. Raises UserError naming the line."""
    if not file.is_file():
        raise UserError(f"{shown(file)} is not there: give the folder of a run, or a metrics.jsonl")
    try:
        texts = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{shown(file)}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(texts):
                break  # of a run that is writing it, or was killed
            raise UserError(f"{shown(file)} line {number}: not JSON ({json_error(error)})") from None
        if not isinstance(line, dict) or not is_number(line.get("step")):
            raise UserError(f"{shown(file)} line {number}: must be an object with a step, as in the log of a run")
        lines.append({key: x for key, x in line.items() if is_number(x)})
    if not lines:
        raise UserError(f"{shown(file)} holds no line: the run has logged nothing yet")
    return lines


def is_number(value):
    """Whether a value of a line is a finite number. Others, such as texts that a changed script logs, are left out."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def earlier_speeds(folder, config, manifest):
    """The median tok/s of each finished run beside `folder` that is comparable with it: see `Readings`."""
    found = []
    for other in sorted(folder.absolute().parent.glob("*/manifest.json")):
        if len(found) == EARLIER or not manifest or other.parent == folder.absolute():
            continue
        with contextlib.suppress(UserError):  # a damaged run beside this one is no measure
            if _setting(read_manifest(other.parent)) == _setting(manifest):
                same = _sizes(read_yaml(other.with_name("config.yaml"))) == _sizes(config)
                speeds = [line["tok/s"] for line in read_metrics(other.with_name("metrics.jsonl")) if "tok/s" in line]
                found += [statistics.median(speeds)] if same and speeds else []
    return found


def _setting(manifest):
    """The script, the number of processes and the machine of a run; not the version of its system."""
    machine = manifest.get("machine", {})
    return [manifest.get("script"), manifest.get("processes"), *(machine.get(key) for key in ("cpu", "cores", "gpu"))]


def _sizes(config):
    return {key: value for key, value in config.items() if key not in NOT_SPEED}
