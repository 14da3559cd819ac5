"""Run the task files beside this one by lm-eval on a model or on the folder of a run, in an environment of its own.

    make lm-eval                                        # smollm2-135m, 40 rows a task
    make lm-eval MODEL=models/dpo LIMIT=200             # a run: a full model or an adapter

The sets of choices are read as plain text, as report/measures/bias.py reads them. The project's own two tasks are
asked through the chat template, greedily.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from configs.config import ROOT, UserError, option, shown
from models.loader import adapter_base, load_tokenizer, read_quantisation, resolve_model
from runtime.cli import cli
from runtime.console import say
from runtime.files import in_root

CHOICES = ("stereoset_intrasentence", "stereoset_intersentence", "crows_pairs", "bbq_ambiguous", "bbq_disambiguated")
OWN = ("arithmetic", "instructions")


@dataclass
class Config:
    model_name: str = option("smollm2-135m", "an embedded name, or a folder with a model or an adapter")
    limit: int = option(40, "rows of each task", at_least=1)
    tasks: str = option(",".join((*CHOICES, *OWN)), "the tasks, with commas")
    dtype: str = option("float32", "of the weights")
    out: str = option("report/runs/lm_eval", "the folder that receives lm-eval's results and its values of each row")


def model_args(name: str, dtype: str) -> str:
    """lm-eval's `--model_args` of a model: for an adapter also its base."""
    path = resolve_model(name)
    if isinstance(path, Path) and (path / "adapter_config.json").is_file():
        if read_quantisation(path):
            raise UserError(f"{name} was trained on a base of 4 or 8 bits: save it with --merge true and measure that")
        return f"pretrained={resolve_model(adapter_base(path))},peft={path},dtype={dtype}"
    return f"pretrained={path},dtype={dtype}"


def command(config: Config, tasks: list[str], templated: bool) -> list[str]:
    """The command of lm-eval for these tasks."""
    found = [sys.executable, "-m", "lm_eval", "run", "--model", "hf"]
    found += ["--model_args", model_args(config.model_name, config.dtype), "--include_path", "report/lm_eval"]
    found += ["--tasks", ",".join(f"llm_training_{task}" for task in tasks), "--limit", str(config.limit)]
    found += ["--log_samples", "--output_path", str(in_root(config.out)), "--batch_size", "16"]
    return found + (["--apply_chat_template"] if templated else [])


def main(config: Config) -> None:
    tasks = [task.strip() for task in config.tasks.split(",")]
    unknown = [task for task in tasks if task not in (*CHOICES, *OWN)]
    if unknown:
        raise UserError(
            f"tasks = {config.tasks!r}: no task is called {unknown[0]!r}; they are {', '.join(CHOICES + OWN)}"
        )
    template = load_tokenizer(config.model_name).chat_template is not None
    for part, templated in (([t for t in tasks if t in CHOICES], False), ([t for t in tasks if t in OWN], template)):
        if part and subprocess.run(command(config, part, templated), cwd=ROOT).returncode:
            raise UserError(
                f"lm-eval failed on {', '.join(part)}; its own message is above. `make lm-eval` installs it"
            )
    say(f"written to {shown(in_root(config.out))}/")


if __name__ == "__main__":
    cli(main, Config)
