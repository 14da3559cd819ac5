"""In which order rows are read: functions of (seed, epoch) or (seed, step) alone."""

from __future__ import annotations

import torch


def epoch_order(rows, seed, epoch, stride=1_000_003):
    """The order in which an epoch reads `rows` rows: a permutation that depends on (seed, epoch) alone.

    stride: how far apart the seeds of two runs with neighbouring seeds are, in epochs.
    """
    generator = torch.Generator().manual_seed(seed * stride + epoch)
    return torch.randperm(rows, generator=generator).tolist()


def step_indices(total, count, step, seed):
    """Indices of the `count` items of step `step` (from 1): a fresh permutation of all `total` for each epoch."""
    found, order_of = [], {}
    for position in range((step - 1) * count, step * count):
        epoch, offset = divmod(position, total)
        if epoch not in order_of:
            order_of[epoch] = epoch_order(total, seed, epoch, stride=100_003)
        found.append(order_of[epoch][offset])
    return found
