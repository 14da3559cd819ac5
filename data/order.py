"""The order in which rows are read: functions of (seed, epoch) or (seed, step) only."""

from __future__ import annotations

import torch


def epoch_order(rows: int, seed: int, epoch: int, stride: int = 1_000_003) -> list[int]:
    """A permutation of range(rows): the order in which an epoch reads the rows. It depends on (seed, epoch) only.

    The generator's seed is seed * stride + epoch. Runs with neighbouring seeds share an order after `stride` epochs.
    """
    generator = torch.Generator().manual_seed(seed * stride + epoch)
    return torch.randperm(rows, generator=generator).tolist()


def step_indices(total: int, count: int, step: int, seed: int) -> list[int]:
    """Indices of the `count` items of step `step` (from 1). Each epoch is a new permutation of all `total` items."""
    found, order_of = [], {}
    for position in range((step - 1) * count, step * count):
        epoch, offset = divmod(position, total)
        if epoch not in order_of:
            order_of[epoch] = epoch_order(total, seed, epoch, stride=100_003)
        found.append(order_of[epoch][offset])
    return found


def in_batches(rows: list, size: int) -> list[list]:
    """A list in pieces of `size`; the last one may be shorter."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]
