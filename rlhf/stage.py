"""The setup of every script of rlhf/ before its loop: options, device, precision, processes, seed, the run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from configs.config import option
from models.device import autocast, pick_device, pick_precision
from models.options import ModelOptions, QuantisationOptions, check_quantisation
from runtime.checkpoint import Checkpoints, Saving
from runtime.console import quiet_libraries
from runtime.processes import join_processes
from runtime.run import Run


@dataclass
class TrainingConfig(ModelOptions, QuantisationOptions, Saving):
    """The common options of the scripts of rlhf/. Each script adds the options of its algorithm."""

    model_name: str = option("smollm2-135m", "the model that training starts from", reads=True)
    lr: float = option(1e-4, "peak learning rate", above=0)
    warmup_steps: int = option(0, "optimizer steps of linear warm-up", at_least=0)
    min_lr_ratio: float = option(0.1, "the cosine ends at lr times this", at_least=0, at_most=1)
    weight_decay: float = option(0.0, "AdamW's, on matrices", at_least=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm", above=0)
    lora_r: int = option(16, "rank of the adapter; 0 trains all weights", at_least=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "of the forward and backward passes")
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    seed: int = option(0, "of the weights that are new, of the order, and of the samples", at_least=0)
    log_every: int = option(1, "steps between log lines", at_least=1, identity=False)
    out: str = option("", "the run's folder", identity=False)
    overwrite: bool = option(False, "replace the run that the folder holds", identity=False)

    def check(self):
        check_quantisation(self, self.lora_r)


class Stage:
    """The setup of one process of a run.

    It has the `device` of this process, the `precision` ("fp32", "bf16" or "fp16"), the `processes` (`Processes`) and
    the `run` (`Run`).
    """

    def __init__(self, config, total_steps=None):
        quiet_libraries()
        self.config = config
        self.device = pick_device()
        self.processes = join_processes(self.device)
        self.precision = pick_precision(config.precision, self.device)
        torch.manual_seed(config.seed)
        self.run = Run(config, config.out, total_steps=total_steps)

    def autocast(self):
        """A context for forward passes: matmuls run in the run's precision."""
        return autocast(self.device, self.precision)

    def checkpoints(self, **parts):
        """The run's `Checkpoints`. If the run was interrupted, the parts get their state from the last checkpoint."""
        found = Checkpoints(self.run, **parts)
        found.load()
        return found

    def log_due(self, step):
        """Whether `step` is logged: the first step, the last step, and every log_every-th step."""
        return step % self.config.log_every == 0 or step in (1, self.run.total_steps)

    def log(self, step, means, updates, samples=(), **more):
        """Log a dict of means, with the learning rate and the gradient norm of the last update.

        samples: see `Run.log`.
        """
        self.run.log(step, samples, **means, **more, lr=updates.lr, grad_norm=updates.grad_norm)

    def finish(self, result, inputs, next_command):
        """Write the manifest. result: {name: number}. inputs: {name: hash} of the data and models that were read."""
        self.run.finish({"steps": self.run.total_steps, **result}, inputs, next_command)

    def reached(self, *keys):
        """{key: number} of the last logged line, for the keys that it has."""
        return {key: self.run.last[key] for key in keys if key in self.run.last}
