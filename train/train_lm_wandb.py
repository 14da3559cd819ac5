"""Weights & Biases (W&B): the plain loop of train_lm.py, watched in a browser while it runs.

    python train/train_lm_wandb.py                            # offline unless wandb finds a login
    python train/train_lm_wandb.py --wandb_model true         # the trained model as an artifact

A tracker receives what a run says of itself: its configuration once, one row of numbers at each logged step, samples as
a table, and at the end the result. It can then draw many runs over each other, filter them by any option, and keep
their models. A loop should not know of it: `Run.log` writes a line of metrics.jsonl and hands the same line to the
tracker (runtime/tracking.py). So each training script has `--wandb`, off by default. This one only turns it on.

Three things are easily done wrong. A resumed run must be the same W&B run, without gaps and without steps that come
twice: its id lies in the run's folder, and row k of its history is line k of metrics.jsonl. Without a network the run
must go on: offline it writes files, and `wandb sync` sends them later. With several processes only one may talk.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from runtime.cli import cli
from train.common import LMConfig
from train.train_lm import train


@dataclass
class Config(LMConfig):
    RENAMED: ClassVar[dict] = {"wandb_mode": "wandb", "wandb_log_model": "wandb_model"}
    out: str = "models/lm_wandb"
    wandb: Literal["off", "auto", "online", "offline"] = "auto"


if __name__ == "__main__":
    cli(train, Config)
