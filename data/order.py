"""In which order rows are read: functions of (seed, epoch) or (seed, step) alone."""

from __future__ import annotations

import torch


def step_indices(total, count, step, seed):
    """Indices of the `count` items of step `step` (from 1): a fresh permutation of all `total` for each epoch."""
    found, order_of = [], {}
    for position in range((step - 1) * count, step * count):
        epoch, offset = divmod(position, total)
        if epoch not in order_of:
            generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
            order_of[epoch] = torch.randperm(total, generator=generator).tolist()
        found.append(order_of[epoch][offset])
    return found


def data_order(rows, seed, epoch):
    """The order in which an epoch reads `rows` rows: a permutation that depends on (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(rows, generator=generator).tolist()
