"""Several processes of one run: how they find each other, what they tell each other, how they end together.

    torchrun --nproc_per_node=2 rlhf/dpo_train.py         # over gloo on CPUs, over nccl on GPUs

Without a launcher there is one process, and every function here does nothing that costs time.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from configs.config import UserError
from runtime.console import rank, say


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    rank: its number, from 0. world_size: how many there are.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self):
        return self.rank == 0

    def describe(self, device):
        """Say how many processes run, where, and over what they talk."""
        threads = f", {torch.get_num_threads()} threads each" if device.type == "cpu" else ""
        say(f"{self.world_size} processes on {device.type} ({dist.get_backend()}){threads}")

    def share(self, items):
        """This process's part of a list: every world_size-th, from its rank on. Together the parts are the list."""
        return items[self.rank :: self.world_size]

    def sum(self, x):
        """Add up a tensor over all processes, in place; returns it."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, value):
        """A list of the value of each process, on all of them; by rank."""
        return gather(value)

    def sum_gradients(self, parameters):
        """Add up the gradients of all processes in one all-reduce: a loss over global counts is then one process's.

        Called once per optimizer step, after the last micro-batch. A process without any row takes part with zeros.
        """
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.world_size == 1:
            return
        flat = torch.cat([p.grad.reshape(-1) for p in parameters])
        flat = self.sum(flat)
        for p, piece in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad.copy_(piece.view_as(p))


def join_processes(device, group_of_one=False):
    """Connect the processes that a launcher started, over nccl for GPUs and gloo for CPUs. Returns `Processes`.

    device: this process's. group_of_one: also make a group without a launcher, for DistributedDataParallel needs one.
    """
    if dist.is_initialized():  # a second run in a notebook
        return Processes(dist.get_rank(), dist.get_world_size())
    backend = "nccl" if device.type == "cuda" else "gloo"
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and "RANK" not in os.environ:
        if group_of_one:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return Processes()
    if backend == "nccl":
        torch.cuda.set_device(device)
    elif os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's default: a share of the cores for each process instead
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    dist.init_process_group(backend)
    return Processes(dist.get_rank(), dist.get_world_size())


@contextmanager
def all_or_none():
    """If one process leaves this block by a user error or an exit, all leave; none waits for it for ever."""
    failure = None
    try:
        yield
    except (UserError, SystemExit) as error:
        failure = error
    codes = gather(2 if isinstance(failure, UserError) else 1 if failure else 0)
    here = dist.get_rank() if several() else 0
    if max(codes) == 2 and codes.index(2) == here:  # the first to fail says why
        raise failure
    if max(codes):
        sys.exit(2 if max(codes) == 2 else 0)


def on_main(action):
    """Call `action()` on rank 0. If it ends in a UserError or an exit there, all ranks end so: none waits for ever."""
    outcome = [None]
    if rank() == 0:
        try:
            action()
        except (UserError, SystemExit) as end:
            outcome = [end]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if outcome[0]:
        raise outcome[0]


def several():
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def communication_device():
    """Where tensors must lie for the processes to exchange them."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def gather(value):
    """A list of the value of each process, on all of them; by rank."""
    if not several():
        return [value]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def largest_over_processes(*numbers):
    """Each number's maximum over the processes, as a list."""
    if not several():
        return list(numbers)
    both = torch.tensor([int(x) for x in numbers], device=communication_device())
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return both.tolist()
