"""The measures beside the task: what a checkpoint says of groups, to harmful requests, and how its text reads.

    python report/evaluate.py --model_name models/dpo --suite task,bias,toxicity,refusals,text

Each measure has its result under its own key of report/runs/NAME.json, with what decided it. A measure that is there
already is not done again; one that was interrupted goes on. docs/measures.md says what each means.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from configs.config import ROOT, UserError
from models.completions import show_table
from models.device import cast_weights, frozen_dtype, pick_device
from models.fast.head import check_head
from models.fetch import SOURCES
from models.loader import load_model, load_tokenizer
from models.options import quantisation
from models.resumable import discard
from report.measures import bias, refusals, text_quality, toxicity
from report.measures.subject import Subject
from runtime.console import duration, quiet_libraries, say
from runtime.files import write_atomically
from runtime.provenance import provenance, sha256_files

TASK = "task"


@dataclass(frozen=True)
class Member:
    """One measure of the suite.

    key: where its result lies in the measurement. module: has `measure(subject)`, `lines(result)`, and SOURCES, the
    packages that it reads. files: code and data that decide the result. seconds: on two cores of an AMD EPYC.
    ready: raises UserError if what it needs is not installed.
    """

    key: str
    module: ModuleType
    files: tuple[str, ...]
    seconds: float
    ready: Callable[[], Any] | None = None


MEASURES = {
    "bias": Member("bias", bias, ("report/measures/bias.py", "report/measures/choices.py"), 60),
    "toxicity": Member("toxicity", toxicity, ("report/measures/toxicity.py",), 15, toxicity.classifier),
    "refusals": Member("refusals", refusals, ("report/measures/refusals.py", refusals.PROMPTS), 10),
    "text": Member(
        "text_quality",
        text_quality,
        tuple(f"report/measures/{x}.py" for x in ("text_quality", "mauve", "bertscore")),
        100,
    ),
}

KEYS = tuple(measure.key for measure in MEASURES.values())


def read_suite(suite: str) -> list[str]:
    """The measures that a suite names, in order. Raises UserError for a name that is no measure, and for none."""
    names = [name.strip() for name in suite.split(",")]
    known = (TASK, *MEASURES)
    for name in names:
        if name not in known or names.count(name) > 1:
            raise UserError(f"suite = {suite!r}: must be different names out of {', '.join(known)}, with commas")
    return names


def identity(measure: Member, config: Any, task: dict) -> dict:
    """Everything that decides a measure: settings, and hashes of the weights, the code and the data."""
    settings = ("suite_limit", "precision", "chat_template_kwargs", "seed")
    hashes = {"model": task["hashes"]["model"], "base": task["hashes"]["base"]}
    hashes |= {"files": sha256_files([ROOT / file for file in measure.files], ROOT)}
    hashes |= {name: SOURCES[name].sha256[:16] for name in measure.module.SOURCES}
    chosen = {key: task["config"][key] if key in task["config"] else getattr(config, key) for key in settings}
    return {"config": chosen, "hashes": hashes}


def measure_suite(config: Any, task: dict, result: dict, path: Any) -> dict:
    """Add the measures of config.suite to `result`, and write the file `path` after each. Returns the result.

    task: the `identity` of the measurement of the task, which holds the hashes of the weights.
    """
    wanted = [MEASURES[name] for name in read_suite(config.suite) if name != TASK]
    who = {measure.key: identity(measure, config, task) for measure in wanted}
    todo = [measure for measure in wanted if result.get(measure.key, {}).get("identity") != who[measure.key]]
    if not todo:
        return result
    for measure in todo:  # before any work
        if measure.ready:
            measure.ready()
    quiet_libraries()
    device = pick_device()
    dtype = frozen_dtype(task["config"]["precision"])
    tokenizer = load_tokenizer(config.model_name, config.chat_template_kwargs)
    how = quantisation(config, dtype)
    model = load_model(config.model_name, torch.float32, device, merge_adapter=True, quantisation=how)
    check_head(model, config.model_name)
    model = cast_weights(model, dtype)
    started, expected = time.time(), 0.0
    for number, measure in enumerate(todo, 1):
        left = sum(other.seconds for other in todo[number - 1 :])
        passed = time.time() - started
        pace = f" | about {duration(passed / expected * left)} left" if expected else ""
        say(f"measure {number} of {len(todo)}: {measure.key} | {duration(passed)}{pace}")
        clock = time.time()
        subject = Subject(
            model, tokenizer, config.model_name, config.base, dtype, config.suite_limit, config.sampling_batch_size,
            config.seed, path, who[measure.key],
        )  # fmt: skip
        found = measure.module.measure(subject)
        origin = provenance(time.time() - clock)
        kept = {key: origin[key] for key in ("command", "git_commit", "versions", "machine", "seconds")}
        result[measure.key] = {"identity": who[measure.key], **found, **kept}
        write_atomically(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        for partial in subject.parts:
            discard(partial)
        expected += measure.seconds
    return result


def show_suite(result: dict) -> None:
    """Print the measures of a result."""
    for measure in MEASURES.values():
        if measure.key in result:
            say(f"\n{measure.key}; intervals hold 95 %")
            head, *body = measure.module.lines(result[measure.key])
            show_table(head, body)
