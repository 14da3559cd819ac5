"""Several processes of one run: they connect, exchange values, and end together.

    torchrun --nproc_per_node=2 rlhf/dpo_train.py         # over gloo on CPUs, over nccl on GPUs

Without a launcher there is one process. Then the functions of this file cost no time.
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
    """This process among the processes of the run.

    rank: its number, from 0. world_size: the number of processes.
    """

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self):
        return self.rank == 0

    def describe(self, device):
        """Print the number of processes, their device and their backend."""
        threads = f", {torch.get_num_threads()} threads each" if device.type == "cpu" else ""
        say(f"{self.world_size} processes on {device.type} ({dist.get_backend()}){threads}")

    def share(self, items):
        """This process's part of a list: every world_size-th item, starting at its rank. No item is left out."""
        return items[self.rank :: self.world_size]

    def equal_share(self, items):
        """This process's part of a list, as (item, weight) pairs. All processes get the same number of pairs.

        The weight is 1, or 0 for an item that only makes up the number. A pass whose processes exchange weights or
        activations needs all of them.
        """
        missing = -len(items) % self.world_size
        return self.share([(item, 1) for item in items] + [(items[0], 0)] * missing)

    def sum(self, x):
        """Sum a tensor over all processes, in place. Returns the tensor."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, value):
        """A list of the values of all processes, ordered by rank. Every process gets it."""
        return gather(value)

    def sum_gradients(self, parameters):
        """Sum the gradients of all processes in one all-reduce.

        If each loss is divided by the global count, the sum is the gradient that one process would compute. Call it
        once per optimizer step, after the last micro-batch. A process without rows takes part with zeros.
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

    device: of this process. group_of_one: make a group without a launcher, too; DistributedDataParallel needs one.
    """
    if dist.is_initialized():  # a second run in a notebook
        return Processes(dist.get_rank(), dist.get_world_size())
    refuse_accelerate_settings()
    backend = "nccl" if device.type == "cuda" else "gloo"
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and "RANK" not in os.environ:
        if group_of_one:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return Processes()
    if backend == "nccl":
        torch.cuda.set_device(device)
    elif os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's default; give each process its share of the cores
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    dist.init_process_group(backend)
    return Processes(dist.get_rank(), dist.get_world_size())


ACCELERATE = {  # variables by which `accelerate launch` hands on its configuration: what they ask for
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_TP": "tensor parallelism",
    "ACCELERATE_USE_CP": "context parallelism",
}


def refuse_accelerate_settings(environment=os.environ):
    """Raise UserError for what a configuration of accelerate asks for and these scripts would not do."""
    asked = [what for name, what in ACCELERATE.items() if environment.get(name, "false").lower() in ("true", "1")]
    mixed = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("no", ""):
        asked.append(f"mixed_precision = {mixed} (here: --precision {mixed})")
    if environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", ""):
        asked.append("gradient_accumulation_steps (here: --batch_size and --micro_batch_size)")
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("no", ""):
        asked.append("dynamo_backend")
    if asked:
        raise UserError(f"accelerate's configuration asks for {', '.join(asked)}, which is not taken. Use torchrun")
    if "ACCELERATE_MIXED_PRECISION" in environment and int(environment.get("WORLD_SIZE", 1)) == 1:
        say("accelerate launch started one process; for several: torchrun --nproc_per_node=N")


@contextmanager
def all_or_none():
    """A context: if one process leaves it by a UserError or an exit, all processes end, so that none waits for ever."""
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
    """Call `action()` in process 0. A UserError or an exit in it is raised in all processes, so that none waits."""
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
    """Whether the run has more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def communication_device():
    """The device on which tensors must be for an exchange between processes."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def gather(value):
    """A list of the values of all processes, ordered by rank. Every process gets it."""
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
