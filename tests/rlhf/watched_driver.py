"""Run RLHF trainers with plain SGD, and keep what each rank saw.

    torchrun --nproc_per_node=2 watched_driver.py FOLDER PLAN     # PLAN: JSON, {name: [module, words of its command]}

Writes FOLDER/NAME.RANK.pt: the parameters after each optimizer step, and how often all gradients were reduced.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from configs.config import load_config
from runtime.cli import leave_processes
from runtime.console import rank
from train import updates


def watch():
    """(parameters that train, all of them after each step, sizes of the tensors reduced), as trainers fill them."""
    trained, after, sizes = [], [], []
    step, reduce = updates.Updates.step, dist.all_reduce

    def make_optimizer(parameters, lr, weight_decay=0.0):
        trained.extend(parameters)
        return torch.optim.SGD(trained, lr=lr)

    def watched_step(*given, **more):
        found = step(*given, **more)
        after.append(torch.cat([p.detach().reshape(-1) for p in trained]).double())
        return found

    def all_reduce(x, *given, **more):
        sizes.append(x.numel())
        return reduce(x, *given, **more)

    updates.make_optimizer, updates.Updates.step, dist.all_reduce = make_optimizer, watched_step, all_reduce
    return trained, after, sizes


def main(folder, plan):
    seen = trained, after, sizes = watch()
    for name, (module, words) in plan.items():
        script = importlib.import_module(module)
        for one in seen:
            one.clear()
        script.main(load_config(script.Config, words))
        reduced = sum(size == len(after[0]) for size in sizes)
        torch.save({"after_step": after, "reduced": reduced}, folder / f"{name}.{rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    leave_processes()  # as the scripts do: gloo's threads may abort an interpreter that ends without
