"""The hidden states of packed blocks. Each sample must get the same states as alone.

There are several ways: transformers finds the samples by positions that restart; a mask separates the samples (one
mask, or one for each kind of layer); or each sample gets a separate row. models/admission.py takes the first way that
is right for a model.
"""

from __future__ import annotations

import torch

from models.admission import admit, check_tokens, kinds_of_layers, masks_by_layer, plain_states
from models.fast.head import hidden_states

POSITIONS, MASK, LAYERS, APART = "by positions", "with a mask", "with a mask for each kind of layer", "one sample a row"
COSTS = {
    MASK: "Attention reads a mask of the block's length squared.",
    LAYERS: "Attention reads masks of the block's length squared.",
    APART: "Samples are padded to the longest of a batch, which takes more time.",
}


def block_states(model, input_ids, position_ids):
    """The hidden states (B, T, H) of blocks. input_ids, position_ids: (B, T); positions restart with each sample."""
    return _states(model, input_ids, position_ids, packed_way(model, input_ids.shape[1]))


def packed_way(model, longest):
    """The way in which this model computes packed blocks of `longest` tokens. The first call checks the ways.

    The check needs all weights. Call it before the weights are spread over processes.
    """
    ways = (POSITIONS, MASK, *([LAYERS] if kinds_of_layers(model) else []), APART)
    return admit(model, "samples packed into one row", ways, lambda *a: _check(model, *a), longest, COSTS)


def _states(model, input_ids, position_ids, way):
    if way == POSITIONS:
        return hidden_states(model, input_ids, position_ids=position_ids)
    sample = (position_ids == 0).cumsum(-1)  # (B, T): the number of the sample that a token belongs to
    if way == APART:
        return _apart(model, input_ids, position_ids, sample)
    causal = torch.ones(sample.shape[1], sample.shape[1], dtype=torch.bool, device=sample.device).tril()
    mask = ((sample[:, :, None] == sample[:, None, :]) & causal)[:, None]  # (B, 1, T, T)
    return hidden_states(model, input_ids, masks_by_layer(model, mask) if way == LAYERS else mask, position_ids)


def _apart(model, input_ids, position_ids, sample):
    """Each sample in a separate row, padded on the right. A causal model ignores this padding."""
    row = torch.arange(len(sample), device=sample.device)[:, None]
    _, number = torch.unique(row * (sample.max() + 1) + sample, return_inverse=True)  # (B, T): of all samples
    rows = input_ids.new_zeros(int(number.max()) + 1, int(position_ids.max()) + 1)
    rows[number, position_ids] = input_ids
    return hidden_states(model, rows)[number, position_ids]


def _check(model, way, lengths):
    sequences, device = check_tokens(model, lengths), model.get_input_embeddings().weight.device
    ids = torch.tensor([[t for s in sequences for t in s]], device=device)
    positions = torch.tensor([[p for s in sequences for p in range(len(s))]], device=device)
    found = _states(model, ids, positions, way)[0].split([len(s) for s in sequences])
    return found, plain_states(model, sequences)
