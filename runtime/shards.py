"""Sharded tensors of a checkpoint: each process writes its parts, and reads the parts that it has then.

A sharded tensor is a DTensor, as `fully_shard` of torch makes it of a weight. torch.distributed.checkpoint writes one
file for each process and knows which part of which tensor lies where. So the processes that read may be more or fewer.
"""

from __future__ import annotations

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Shard, empty

from runtime.console import rank
from runtime.files import described
from runtime.processes import gather


def sharded_tensors(value, name):
    """{name by place: tensor} of the sharded tensors in a nested value, which is named `name`."""
    if isinstance(value, DTensor):
        return {name: value.detach()}
    if isinstance(value, dict):
        items = list(value.items())
    else:
        items = list(enumerate(value)) if isinstance(value, (list, tuple)) else []
    return {key: x for k, inner in items for key, x in sharded_tensors(inner, f"{name}.{k}").items()}


def with_marks(value, name):
    """A nested value with a mark, a small dict, in place of each sharded tensor. The arguments are those above."""
    if isinstance(value, DTensor):
        (placement,) = value.placements
        return {"sharded": name, "shape": list(value.shape), "dtype": str(value.dtype), "dim": placement.dim}
    if isinstance(value, dict):
        return {k: with_marks(inner, f"{name}.{k}") for k, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_marks(inner, f"{name}.{k}") for k, inner in enumerate(value)]
    return value


def write_shards(tensors, folder):
    """Write the result of `sharded_tensors`. All processes call it together.

    Returns {name of a file in `folder`: its size and sha256}, of the files of all processes. Raises OSError.
    """
    try:
        dcp.save(tensors, checkpoint_id=folder)
    except dcp.api.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        raise OSError(0, next((getattr(x, "strerror", None) for x in causes), None) or str(causes[0])) from None
    names = [".metadata"] if rank() == 0 else []
    names += [path.name for path in folder.glob(f"__{rank()}_*")]
    return {name: size for files in gather({n: described(folder / n) for n in names}) for name, size in files.items()}


def read_shards(value, folder, mesh):
    """`value`, the result of `with_marks`, with the tensors in place of the marks. All processes call it together.

    mesh: of the processes that share the tensors now. folder: that of `write_shards`.
    """
    marks = _marks(value)
    tensors = {
        m["sharded"]: empty(
            m["shape"],
            dtype=getattr(torch, m["dtype"].removeprefix("torch.")),
            device_mesh=mesh,
            placements=[Shard(m["dim"])],
        )
        for m in marks
    }
    if tensors:
        dcp.load(tensors, checkpoint_id=folder)
    return _filled(value, tensors)


def _marks(value):
    if isinstance(value, dict):
        return [value] if "sharded" in value else [m for inner in value.values() for m in _marks(inner)]
    return [m for inner in value for m in _marks(inner)] if isinstance(value, list) else []


def _filled(value, tensors):
    if isinstance(value, dict):
        mark = value.get("sharded")
        return tensors[mark] if mark else {k: _filled(inner, tensors) for k, inner in value.items()}
    return [_filled(inner, tensors) for inner in value] if isinstance(value, list) else value
