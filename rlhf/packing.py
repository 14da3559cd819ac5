"""Packing: all completions of a prompt are in one row, so the prompt is computed once. All RLHF forward passes use it.

A row is [prompt, completion 1, completion 2, ...]. Each completion sees the prompt and itself, and its positions
continue after the prompt. So every result is the same as for a row with only this completion. With 8 short completions
per prompt, half as many tokens are computed. The common prefix of all prompts (a system message, or the first tokens
of a chat template) is computed once for all rows. The rows form a ragged batch: only attention pads them. Results have
one row per completion again: (N, L), for N completions and L tokens of the longest one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.admission import admit, check_tokens, kinds_of_layers, masks_by_layer, plain_states
from models.fast.attention import Ragged, takes_ragged
from models.fast.head import hidden_states, unwrapped
from models.generation import common_prefix
from models.router import router_of


@dataclass
class Packed:
    """N completions in R rows with `tokens` tokens in total. Attention pads the rows to T tokens.

    The ragged batch has fewer tokens than `tokens`, because it contains the common prefix of all rows once.
    """

    input_ids: torch.Tensor  # (1, tokens of the ragged batch)
    position_ids: torch.Tensor  # (1, tokens of the ragged batch)
    rows: Ragged
    attention_mask: torch.Tensor  # (R, 1, T, T), True where a token (third axis) sees another (fourth)
    targets: torch.Tensor  # (N, L) the ids of the completions
    mask: torch.Tensor  # (N, L) 1 on the tokens of the completions
    predictor: torch.Tensor  # (N, L) index in the ragged batch of the token that predicts each target
    last: torch.Tensor  # (N,) index in the ragged batch of the last token of each completion
    tokens: int
    sequences: list[tuple[list[int], list[int]]]  # (prompt, completion), N of them
    origin: torch.Tensor  # (2, tokens of the ragged batch): the sequence of each token, and its place in the sequence

    def to_completions(self, values):
        """Put the values of the counted tokens, in the order of `mask`, into (N, L). Other entries are 0."""
        empty = torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device)
        return empty.masked_scatter(self.mask.bool(), values)

    def align(self, lists):
        """Put a list of numbers for each completion into (N, L), float32."""
        numbers = [x for row in lists for x in row]
        return self.to_completions(torch.tensor(numbers, dtype=torch.float32, device=self.mask.device))

    def whole_sequences(self):
        """(index in the ragged batch of each token of each sequence, real): (N, tokens of the longest one) each.

        real is False on padding, where the index is 0. A token that sequences share is in each of them.
        """
        device = self.mask.device
        prompts, lengths = torch.tensor([[len(p), len(p) + len(c)] for p, c in self.sequences], device=device).T
        place = torch.arange(int(lengths.max()), device=device)
        real = place < lengths[:, None]
        end_of_prompt = self.predictor[:, 0]
        in_prompt = place + (end_of_prompt - prompts + 1)[:, None]
        in_completion = place + (self.last - lengths + 1)[:, None]
        index = torch.where(place < prompts[:, None], in_prompt, in_completion)
        index = torch.where(place < self.rows.shared, place, index)  # of all rows, stored once
        return torch.where(real, index, 0), real


def pack(prompts, completions, pad_id, device):
    """Pack completions. Consecutive completions of the same prompt share a row; all rows share their common prefix.

    prompts, completions: lists of token ids, one of each per completion. The order of the completions is kept.
    Padding is recognised by lengths, never by token ids.
    """
    rows, segments, positions, predictor, last, origin = [], [], [], [], [], []
    shared = common_prefix([p for i, p in enumerate(prompts) if i == 0 or p != prompts[i - 1]])
    tokens = end_of_prompt = 0
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        if i == 0 or prompt != prompts[i - 1]:
            first = shared if rows else 0  # the shared tokens are stored with the first row
            tokens += len(prompt) - first
            origin += [(i, place) for place in range(first, len(prompt))]
            rows.append(list(prompt))
            segments.append([0] * len(prompt))
            positions.append(list(range(len(prompt))))
            end_of_prompt = tokens - 1
        predictor.append([end_of_prompt, *range(tokens, tokens + len(completion) - 1)])
        tokens += len(completion)
        origin += [(i, place) for place in range(len(prompt), len(prompt) + len(completion))]
        last.append(tokens - 1)
        rows[-1] += completion
        segments[-1] += [segments[-1][-1] + 1] * len(completion)
        positions[-1] += range(len(prompt), len(prompt) + len(completion))

    where = Ragged.of([len(row) for row in rows], device, shared)
    width, longest = where.shape[1], max(map(len, completions))

    def end_to_end(lists):
        return torch.tensor([[x for r, row in enumerate(lists) for x in row[shared if r else 0 :]]], device=device)

    def filled(lists, value, to):
        return torch.tensor([[*x, *[value] * (to - len(x))] for x in lists], device=device)

    segment = filled(segments, -1, width)
    causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    same = segment[:, :, None] == segment[:, None, :]  # padding (-1) sees padding: a row without any key would be NaN
    sees_prompt = (segment[:, None, :] == 0) & (segment[:, :, None] >= 0)
    return Packed(
        input_ids=end_to_end(rows),
        position_ids=end_to_end(positions),
        rows=where,
        attention_mask=(causal & (same | sees_prompt))[:, None],
        targets=filled(completions, pad_id, longest),
        mask=filled([[1] * len(c) for c in completions], 0, longest),
        predictor=filled(predictor, 0, longest),
        last=torch.tensor(last, device=device),
        tokens=sum(map(len, rows)),
        sequences=list(zip(prompts, completions)),
        origin=torch.tensor(origin).T,
    )


RAGGED, PADDED, LAYERS, APART = (
    "ragged rows",
    "padded rows",
    "padded rows, a mask a kind of layer",
    "one completion a row",
)
COSTS = {
    PADDED: "All layers compute the padding, too.",
    LAYERS: "All layers compute the padding, too.",
    APART: "A prompt is computed again for each of its completions, which takes more time.",
}


def token_states(model, packed):
    """The hidden states (tokens of the ragged batch, H), equal to those of each sequence alone; see `admit`.

    In training, this also measures the router's auxiliary loss of each sequence; see models/router.py.
    """
    padded = (PADDED, *([LAYERS] if kinds_of_layers(model) else []), APART)
    ways = (RAGGED, *padded) if takes_ragged(unwrapped(model)) else padded
    longest = packed.rows.shape[1]
    way = admit(model, "completions that share a prompt", ways, lambda *a: _check(model, *a), longest, COSTS)
    router = router_of(model)
    with router.watching():
        states = _states(model, packed, way)
    if router.watched:
        router.measure(**_router_places(packed, way))
    return states


def _router_places(packed, way):
    """Where the tokens of each sequence stand in the pass, for `RouterLoss.measure`."""
    index, real = packed.whole_sequences()
    weight = torch.ones(len(index), device=index.device)
    if way == APART:
        return {"real": real, "weight": weight}
    if way == RAGGED:
        return {"real": real, "weight": weight, "at": index, "tokens": packed.input_ids.shape[1]}
    return {"real": real, "weight": weight, "at": packed.rows.places[index], "tokens": len(packed.rows.padded)}


def _states(model, packed, way):
    rows, ids, positions = packed.rows, packed.input_ids, packed.position_ids
    if way == RAGGED:
        return hidden_states(model, ids, packed.attention_mask, positions, rows=rows)[0]
    if way == APART:
        return _apart(model, packed)
    ids, positions = (x[0][rows.padded].view(rows.shape) for x in (ids, positions))
    mask = masks_by_layer(model, packed.attention_mask) if way == LAYERS else packed.attention_mask
    return rows.unpad(hidden_states(model, ids, mask, positions))[0]


def _apart(model, packed):
    """Each completion in a separate row after its prompt, padded on the right. A causal model ignores this padding."""
    device, width = packed.input_ids.device, max(len(p) + len(c) for p, c in packed.sequences)
    ids = torch.zeros(len(packed.sequences), width, dtype=torch.long)
    for i, (prompt, completion) in enumerate(packed.sequences):
        ids[i, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
    hidden = hidden_states(model, ids.to(device))
    row, place = packed.origin.to(device)
    return hidden[row, place]


def _check(model, way, lengths):
    """(found, expected) hidden states of two completions of one prompt, the first one long, and of another pair."""
    device = model.get_input_embeddings().weight.device
    long, other, last = check_tokens(model, lengths)
    shared, head = check_tokens(model, (4, 3), seed=1)
    prompts, completions = [shared, shared, head], [long, other, last]
    states = _states(model, pack(prompts, completions, 0, device), way)
    packed = pack(prompts, completions, 0, device)
    found = [states[packed.last[i] - len(c) + 1 : packed.last[i] + 1] for i, c in enumerate(completions)]
    alone = plain_states(model, [p + c for p, c in zip(prompts, completions)])
    return found, [x[-len(c) :] for x, c in zip(alone, completions)]
