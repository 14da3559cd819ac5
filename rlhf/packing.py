"""Completions to the same prompt in one row, so that the prompt is computed once: the layout of every RLHF forward pass.

A row is [prompt, completion 1, completion 2, ...]. Each completion sees the prompt and itself, and its positions go on where the
prompt ends, so every number is the one that the completion gets in a row of its own; with 8 short completions a prompt there
are half as many tokens to compute. What all prompts begin with, a chat template's first tokens or a system message, is
computed once for all rows. The rows lie end to end, so that only attention pads them to one width. What comes out is
per completion again: (N, L), N completions, L tokens of the longest one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from models.admission import admit, check_tokens, kinds_of_layers, masks_by_layer, plain_states
from models.fast.attention import Ragged, takes_ragged
from models.fast.head import head_logprobs, hidden_states, output_head, unwrapped
from models.generation import common_prefix


@dataclass
class Packed:
    """N completions in R rows, of `tokens` tokens together; T is the width to which attention pads the rows.

    End to end there are fewer: what all rows begin with lies there once.
    """

    input_ids: torch.Tensor  # (1, end to end)
    position_ids: torch.Tensor  # (1, end to end)
    rows: Ragged
    attention_mask: torch.Tensor  # (R, 1, T, T), True where a token (third axis) sees another (fourth)
    targets: torch.Tensor  # (N, L) the completions' ids
    mask: torch.Tensor  # (N, L) 1 on the completions' tokens
    predictor: torch.Tensor  # (N, L) index among the tokens end to end of the one that predicts each target
    last: torch.Tensor  # (N,) index of each completion's last token
    tokens: int
    sequences: list[tuple[list[int], list[int]]]  # prompt and completion of each of the N
    origin: torch.Tensor  # (2, tokens of the ragged batch): in which of these sequences each stands, and where in it

    def to_completions(self, values):
        """Values of the counted tokens, in the order of `mask`, as (N, L) with zeros elsewhere."""
        empty = torch.zeros(self.mask.shape, dtype=values.dtype, device=values.device)
        return empty.masked_scatter(self.mask.bool(), values)

    def align(self, lists):
        """A list of numbers for each completion as (N, L)."""
        numbers = [x for row in lists for x in row]
        return self.to_completions(torch.tensor(numbers, dtype=torch.float32, device=self.mask.device))


def pack(prompts, completions, pad_id, device):
    """Pack completions; consecutive ones with the same prompt share a row, and all rows what all prompts begin with.

    prompts, completions: lists of token ids, one each a completion. Completions come back in the order given. Padding is told
    by length, never by token id.
    """
    rows, segments, positions, predictor, last, origin = [], [], [], [], [], []
    shared = common_prefix([p for i, p in enumerate(prompts) if i == 0 or p != prompts[i - 1]])
    tokens = end_of_prompt = 0
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        if i == 0 or prompt != prompts[i - 1]:
            first = shared if rows else 0  # those that are shared are there with the first row
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
    """The hidden states (tokens of the ragged batch, H), each as the sequence gets it alone; see models/admission.py."""
    padded = (PADDED, *([LAYERS] if kinds_of_layers(model) else []), APART)
    ways = (RAGGED, *padded) if takes_ragged(unwrapped(model)) else padded
    longest = packed.rows.shape[1]
    way = admit(model, "completions that share a prompt", ways, lambda *a: _check(model, *a), longest, COSTS)
    return _states(model, packed, way)


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
    """Each completion after its own copy of the prompt, padded on the right: a causal model never looks there."""
    device, width = packed.input_ids.device, max(len(p) + len(c) for p, c in packed.sequences)
    ids = torch.zeros(len(packed.sequences), width, dtype=torch.long)
    for i, (prompt, completion) in enumerate(packed.sequences):
        ids[i, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
    hidden = hidden_states(model, ids.to(device))
    row, place = packed.origin.to(device)
    return hidden[row, place]


def _check(model, way, lengths):
    """Two completions of one prompt, the first of which is long, and one of another; with what they get alone."""
    device = model.get_input_embeddings().weight.device
    long, other, last = check_tokens(model, lengths)
    shared, head = check_tokens(model, (7, 5), seed=1)
    prompts, completions = [shared, shared, head], [long, other, last]
    states = _states(model, pack(prompts, completions, 0, device), way)
    packed = pack(prompts, completions, 0, device)
    found = [states[packed.last[i] - len(c) + 1 : packed.last[i] + 1] for i, c in enumerate(completions)]
    alone = plain_states(model, [p + c for p, c in zip(prompts, completions)])
    return found, [x[-len(c) :] for x, c in zip(alone, completions)]


def packed_logprobs(model, packed, temperature=1.0, entropy=False, value_head=None):
    """Log-probs (N, L) of the completions' tokens in float32, at the sampling temperature; entries outside the mask are 0.

    entropy=True also returns the entropies (N, L) in nats, without gradient. With a value head, a module
    (..., H) -> (..., 1), also the values (N, L) of the states in which each token is chosen, and (N,) after the last.
    """
    hidden = token_states(model, packed)
    at = packed.mask.bool()
    states = hidden[packed.predictor[at]]  # (tokens of the completions, H)
    measured = head_logprobs(output_head(model), states, packed.targets[at], temperature, entropy)
    found = [packed.to_completions(x) for x in (measured if entropy else (measured,))]
    if value_head is not None:
        found.append(packed.to_completions(value_head(states.float()).float().squeeze(-1)))
        found.append(value_head(hidden[packed.last].float()).float().squeeze(-1))
    return found[0] if len(found) == 1 else tuple(found)


def packed_scores(model, packed, head):
    """Scores (N,) of a reward model: its head on the last token of each completion."""
    hidden = token_states(model, packed)
    return head(hidden[packed.last]).float().squeeze(-1)


@torch.no_grad()
def score_completions(reward_model, prompts, completions, pad_id, batch_size=64):
    """Scores by a RewardModel, as floats in the order given; completions to one prompt should stand together."""
    device = next(reward_model.parameters()).device
    scores = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        packed = pack(prompts[part], completions[part], pad_id, device)
        scores += packed_scores(reward_model.model, packed, reward_model.head).tolist()
    return scores


@torch.no_grad()
def completion_logprobs(model, prompts, completions, pad_id, temperature=1.0, batch_size=64, progress=None):
    """Log-prob of each completion token given its prompt: a list of lists, in the order given.

    Completions to one prompt should stand together. Runs in the caller's autocast context. progress(done, all).
    """
    device = model.get_input_embeddings().weight.device
    found = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        packed = pack(prompts[part], completions[part], pad_id, device)
        logprobs = packed_logprobs(model, packed, temperature)
        found += [row[: len(c)].tolist() for row, c in zip(logprobs, completions[part])]
        if progress:
            progress(len(found), len(prompts))
    return found
