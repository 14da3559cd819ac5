"""The doctor: looks for the patterns of runtime/patterns.py in a run, and says what it found."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, field, replace

from configs.config import shown
from runtime.console import WIDTH, fold
from runtime.patterns import PATTERNS, Finding
from runtime.readings import LEAST, Readings, read_readings

LEVELS = ("act", "look", "normal")  # whether to worry, the worst first


@dataclass
class Diagnosis:
    """What the doctor says of one run.

    lines: the number of lines of its metrics. looked_for: the keys of the patterns whose metrics are there, in enough
    lines. too_short: the keys of those for which there are too few lines. findings: the worst first.
    """

    lines: int
    findings: list[Finding] = field(default_factory=list)
    looked_for: list[str] = field(default_factory=list)
    too_short: list[str] = field(default_factory=list)

    @property
    def judged(self):
        """Whether most patterns could be looked for."""
        return len(self.looked_for) > len(self.too_short)

    @property
    def worries(self):
        return [finding for finding in self.findings if finding.level != "normal"]


def diagnose(run: Readings) -> Diagnosis:
    """Look for all patterns of the table in one run."""
    found = Diagnosis(len(run.lines))
    for entry in PATTERNS:
        there = {key: run.count(key) for key in entry.needs}
        if not all(there.values()):
            continue
        if any(there[key] < count for key, count in entry.needs.items()):
            found.too_short.append(entry.key)
            continue
        found.looked_for.append(entry.key)
        finding = entry.find(run, **entry.limits)
        if finding:
            found.findings.append(replace(finding, pattern=entry.key))
    found.findings.sort(key=lambda finding: LEVELS.index(finding.level))
    return found


def examine(path) -> Diagnosis:
    """The `Diagnosis` of a run's folder, or of a metrics.jsonl. Raises UserError as `read_readings` does."""
    return diagnose(read_readings(path))


def closing_lines(found: Diagnosis, path) -> list[str]:
    """At most three lines for the end of a run. path: of its folder."""
    more = f"python report/doctor.py {shown(path)}"
    worries, rest = found.worries, [finding for finding in found.findings if finding.level == "normal"]
    if worries:
        lines = [f"{finding.level}: {finding.short}" for finding in worries[:2]]
        left = f"{len(worries) - 2} more; " if len(worries) > 2 else ""
        return [f"doctor: {line}" for line in (*lines, f"{left}what to try: {more}")]
    lines = [f"no worry in {found.lines} lines; patterns looked for: {len(found.looked_for)}"] * found.judged
    if found.too_short:
        lines.append(
            f"{found.lines} lines, too short to tell of {len(found.too_short)} patterns: a trend takes {LEAST}"
        )
    lines += [f"normal: {finding.short}" for finding in rest]
    return [f"doctor: {line}" for line in lines[:3]]


def full_text(found: Diagnosis, name) -> str:
    """All findings of one run, at 80 columns. name: of the run."""
    head = f"{name}: logged lines {found.lines}, patterns looked for {len(found.looked_for)}"
    parts = [fold(head)]
    if found.too_short:
        said = f"Too short to tell of: {', '.join(found.too_short)}. A trend takes {LEAST} lines with its metrics."
        parts.append(_wrapped("", said))
    if not found.worries and found.judged:
        parts.append(_wrapped("", "Nothing to worry about."))
    for finding in found.findings:
        title = next(entry.title for entry in PATTERNS if entry.key == finding.pattern)
        words = {"seen": finding.seen, "means": finding.means, "try": finding.advice}
        parts.append("\n".join([f"{finding.level}: {title}", *(_wrapped(f"{k}:", v) for k, v in words.items())]))
    return "\n\n".join(parts)


def _wrapped(label, text):
    first = f"  {label:<7}" if label else "  "
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip


def patterns_table() -> str:
    """The table of the patterns in Markdown, which docs/doctor.md shows."""
    lines = ["| pattern | metrics | found when | source of the thresholds |", "|---|---|---|---|"]
    for entry in PATTERNS:
        needs = ", ".join(f"`{key}`" for key in entry.needs)
        lines.append(f"| {entry.title} (`{entry.key}`) | {needs} | {entry.when} | {entry.source} |")
    return "\n".join(lines)
