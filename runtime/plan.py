"""What a run will need before it starts: steps, tokens, memory by part, time. `--dry_run true` prints this and ends.

    python rlhf/dpo_train.py --dry_run true
    python rlhf/dpo_train.py --model_name my_7b --dry_run true --dry_run_gb 80 --dry_run_devices 8

This file is arithmetic on bytes and knows no model. Each stage gives a `Plan` its parts: `plan` of its configuration.
A GPU gives freed memory to the next tensor, so the work that needs most decides the peak. On a CPU freed memory stays
with the process (runtime/memory.py), in pieces that other kinds of work mostly cannot use, so the kinds of work add up.
"""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.config import option, refuse_unused
from runtime.console import duration
from runtime.failures import lighter
from runtime.memory import available_memory

WIDTH = 80  # columns
BASE = 0.5e9  # bytes of Python, torch, transformers and a tokenizer, where this process is not the run


@dataclass
class Planning:
    """The options of a dry run. They do not change the results of a run.

    A configuration with them has a method plan(data=None), which returns the `Plan` of its run. data: what the run has
    read already; None: read it, or use bounds.
    """

    dry_run: bool = option(
        False, "print steps, tokens, memory by part and time, and end; nothing is loaded or written", identity=False
    )
    dry_run_gb: float | None = option(
        None, "dry run: plan for GPUs of so many GB; none: for this machine", above=0, identity=False
    )
    dry_run_devices: int | None = option(None, "dry run: so many of these GPUs; none: one", at_least=1, identity=False)


@dataclass(frozen=True)
class Part:
    """A part of the memory of one process, in bytes. sharded: whether sharding divides it among the devices."""

    name: str
    bytes: float
    sharded: bool = False


@dataclass(frozen=True)
class Target:
    """The device that is planned for: its kind, its memory in bytes (None: not known), the number of processes.

    named: whether it is not this machine's.
    """

    kind: str
    bytes: float | None
    processes: int = 1
    named: bool = False


@dataclass
class Plan:
    """What one process of a run needs.

    held: parts that stay for the whole run. work: {kind of work: its parts}, one after the other. base: bytes of Python
    and the libraries; on a GPU they are not in its memory. notes: sentences on how it was planned. flops: of all
    processes. seconds_of: seconds for so many FLOP on the target; None if it is not here. shards: processes among which
    the run divides the parts that can be; 1: each process holds all of them.
    """

    target: Target
    model: str
    steps: str
    tokens: str
    held: list[Part]
    work: dict[str, list[Part]]
    base: float = BASE
    notes: list[str] = field(default_factory=list)
    flops: float = 0.0
    at_most: bool = False
    seconds_of: Callable | None = None
    shards: int = 1

    def part(self, name: str) -> float:
        """The bytes of all parts with this name."""
        parts = [*self.held, *(part for parts in self.work.values() for part in parts)]
        return sum(part.bytes for part in parts if part.name == name)

    def peak(self, shards: int | None = None) -> float:
        """The predicted peak in bytes. shards: in place of those of the run."""
        shards = shards or self.shards
        kinds = [_sum(parts, shards) for parts in self.work.values()]
        both = sum if self.target.kind == "cpu" else max
        base = self.base if self.target.kind == "cpu" else 0.0
        return base + _sum(self.held, shards) + (both(kinds) if kinds else 0.0)

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits. None if the memory of the target is not known."""
        return None if self.target.bytes is None else self.peak() <= self.target.bytes

    def lines(self) -> list[str]:
        """The table of the parts, in GB."""
        rows = [("Python and torch", self.base)] if self.target.kind == "cpu" else []
        rows += [(part.name + self._of(part), _sum([part], self.shards)) for part in self.held]
        found = [_row(name, size) for name, size in rows]
        largest = max(self.work, key=lambda kind: _sum(self.work[kind], self.shards))
        for kind, parts in self.work.items():
            counts = self.target.kind == "cpu" or kind == largest
            found.append(f"  {kind}:" if counts else f"  {kind}, which needs less:")
            found += [_row("  " + part.name + self._of(part), _sum([part], self.shards)) for part in parts]
        return [*found, _row("predicted peak", self.peak())]

    def _of(self, part):
        return f", 1/{self.shards} of it" if part.sharded and self.shards > 1 else ""


def _sum(parts, shards):
    return sum(part.bytes / (shards if part.sharded else 1) for part in parts)


def _row(name, size):
    return f"  {name:<52} {size / 1e9:>9.2f} GB"


def planned_target(config: Any, here: str, processes: int) -> Target:
    """The `Target` of a dry run: GPUs by their memory, or this machine, whose device is `here` ("cpu" or "cuda")."""
    if config.dry_run_gb is not None:
        return Target("cuda", 1e9 * config.dry_run_gb, config.dry_run_devices or 1, named=True)
    refuse_unused(config, ["dry_run_devices"], "dry_run_gb = none: this machine has the devices that it has")
    free = available_memory(here)
    return Target(here, free and free / (processes if here == "cpu" else 1), processes)


def report(config: Any, plan: Plan) -> str:
    """The text of a dry run, at most WIDTH columns wide."""
    target = plan.target
    where = f"{target.processes} x {target.bytes / 1e9:.0f} GB" if target.named else f"this machine's {target.kind}"
    if not target.named and target.processes > 1:
        where += f", {target.processes} processes"
    lines = [f"dry run of {Path(sys.argv[0]).name}: nothing is loaded, trained or written"]
    for name, text in (("model", plan.model), ("device", where), ("steps", plan.steps), ("tokens", plan.tokens)):
        lines += textwrap.wrap(f"{name:<8}{text}", WIDTH, subsequent_indent=" " * 8)
    lines += ["memory of one process" + (", the kinds of work add up" if target.kind == "cpu" else ""), *plan.lines()]
    n = target.processes
    if plan.shards == 1 < n:
        lines += _wrapped(
            "",
            f"{n} processes share the work, not the memory: each holds all of this, and adds the gradients again for "
            f"their exchange. Weights, gradients and optimizer sharded over {n} devices: {_gb(plan.peak(n))} on each",
        )
    lines += _wrapped("time", _time(plan))
    for note in plan.notes:
        lines += _wrapped("note", note)
    return "\n".join(lines + _wrapped("", "\n".join(_verdict(config, plan))))


def _wrapped(name, text):
    found = []
    for line in text.splitlines():
        lead = f"{name:<8}" if name else ""
        found += textwrap.wrap(lead + line, WIDTH, subsequent_indent=" " * 8 if name else "  ", break_on_hyphens=False)
    return found


def _gb(size):
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e9:.2f} GB"


def _time(plan):
    if not plan.flops:
        return "not known, because the steps are not"
    if plan.seconds_of is None:
        return f"{plan.flops:.1e} FLOP in matrix products; how long they take is not known, the device is not here"
    seconds, how = plan.seconds_of(plan.flops / plan.target.processes)
    about = "at most" if plan.at_most else "about"
    return f"{about} {duration(seconds)}: {plan.flops:.1e} FLOP in matrix products, {how}"


def _verdict(config, plan):
    """Whether it fits, and if not, what would: each option with the peak that the plan has with it."""
    have, peak = plan.target.bytes, plan.peak()
    if have is None:
        return [f"{_gb(peak)} needed; how much this machine has is not known"]
    if plan.fits:
        return [f"fits: {_gb(peak)} of {_gb(have)}"]
    found = [f"does not fit: {_gb(peak)}, and there are {_gb(have)}. What needs less:"]
    for key, value, _ in lighter(config):
        less = dataclasses.replace(config, **{key: value}).plan()
        if less.peak() < peak:
            found.append(f"  --{key} {_shown(value)}: saves {_gb(peak - less.peak())}, {_gb(less.peak())} remain")
    n = plan.target.processes
    if plan.shards == 1 < n:
        found.append(f"  sharded over the {n} devices: {_gb(plan.peak(n))} on each")
    return [*found, "  a smaller --model_name"]


def _shown(value):
    return str(value).lower() if isinstance(value, bool) else value


def dry_run(config: Any) -> bool:
    """Print the plan if `config` asks for a dry run. Returns whether it did. The exit status is 0, fit or not."""
    if not isinstance(config, Planning):
        return False
    if not config.dry_run:
        refuse_unused(config, ["dry_run_gb", "dry_run_devices"], "dry_run = False")
        return False
    from runtime.console import quiet_libraries, say

    quiet_libraries()
    say(report(config, config.plan()))
    return True
