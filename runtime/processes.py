"""Several processes of one run: what they tell each other."""

from __future__ import annotations

import torch
import torch.distributed as dist

from configs.config import UserError
from runtime.console import rank


def several():
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def meeting_device():
    """Where tensors must lie for the processes to exchange them."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def gather(value):
    """A list of the value of each process, on all of them."""
    if not several():
        return [value]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def largest_over_ranks(*numbers):
    """Each number's maximum over the processes, as a list."""
    if not several():
        return list(numbers)
    both = torch.tensor([int(x) for x in numbers], device=meeting_device())
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return both.tolist()


def on_main(action):
    """Call `action()` on rank 0. If it ends in a UserError or an exit there, all ranks end so: none waits for ever."""
    import torch.distributed as dist

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
