"""Run RLHF trainers with plain SGD, and keep what each rank saw.

    torchrun --nproc_per_node=2 watched_driver.py FOLDER PLAN     # PLAN: JSON, {name: [module, words of its command]}

Writes FOLDER/NAME.RANK.pt: the parameters after each optimizer step, and how often all gradients were reduced.
"""

import importlib
import json
import sys
from pathlib import Path

import torch

from configs.config import load_config
from rlhf import utils
from runtime.cli import leave_processes
from runtime.console import rank


def watch(script):
    """(parameters after each step, sizes of the tensors summed over ranks) of the script, as it runs."""
    trained, after, sizes = [], [], []
    step, reduce = script.optimizer_step, utils.sum_over_ranks

    def make_optimizer(parameters, lr, *_):
        trained.extend(parameters)
        return torch.optim.SGD(trained, lr=lr)

    def optimizer_step(*given):
        found = step(*given)
        after.append(torch.cat([p.detach().reshape(-1) for p in trained]).double())
        return found

    def sum_over_ranks(accelerator, x):
        sizes.append(x.numel())
        return reduce(accelerator, x)

    script.make_optimizer, script.optimizer_step, utils.sum_over_ranks = make_optimizer, optimizer_step, sum_over_ranks
    return after, sizes


def main(folder, plan):
    for name, (module, words) in plan.items():
        script = importlib.import_module(module)
        after, sizes = watch(script)
        script.main(load_config(script.Config, words))
        reduced = sum(size == len(after[0]) for size in sizes)
        torch.save({"after_step": after, "reduced": reduced}, folder / f"{name}.{rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave_processes()  # as the scripts do: gloo's threads may abort an interpreter that ends without
