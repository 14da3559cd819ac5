"""The doctor reads the metrics of runs: known patterns, what they mean, whether to worry, and what to try.

    python report/doctor.py models/grpo                  # the folder of a run, or a metrics.jsonl; several are allowed
    python report/doctor.py models/ppo models/dpo --json true
    python report/doctor.py --patterns true              # the table of the patterns, which docs/doctor.md shows

It also says at most three lines at the end of each training run. The patterns are in runtime/patterns.py.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import ClassVar

from configs.config import UserError, option
from runtime.cli import cli
from runtime.console import say
from runtime.doctor import examine, full_text, patterns_table


@dataclass
class Config:
    WORDS: ClassVar[str] = "runs"
    runs: tuple[str, ...] = option((), "the folders of runs, or their metrics.jsonl; also as words without a key")
    json: bool = option(False, "print JSON: a list with one object for each run")
    patterns: bool = option(False, "print the table of the patterns")

    def check(self):
        if not self.runs and not self.patterns:
            raise UserError("give the folder of a run: python report/doctor.py models/grpo")


def main(config):
    if config.patterns:
        say(patterns_table())
    found = {path: examine(path) for path in config.runs}  # all are read before anything is printed
    if config.json and found:
        say(json.dumps([{"run": path, **asdict(one)} for path, one in found.items()], indent=2))
    elif found:
        say("\n\n\n".join(full_text(one, path) for path, one in found.items()))


if __name__ == "__main__":
    cli(main, Config)
