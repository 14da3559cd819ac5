"""Shared functions of the RLHF scripts: log-probs and scores, masked statistics, KL estimators, padded batches.

Per-token tensors of packed completions have shape (N, L): N completions, L tokens of the longest one. Those of padded
rows have shape (B, T-1) and are aligned with `input_ids[:, 1:]`: entry t belongs to token t+1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from configs.config import UserError
from models.fast.head import head_logprobs, hidden_states, output_head
from rlhf.packing import Packed, pack, token_states


def packed_logprobs(
    model: torch.nn.Module,
    packed: Packed,
    temperature: float = 1.0,
    entropy: bool = False,
    value_head: torch.nn.Module | None = None,
) -> Any:
    """Log-probs (N, L), float32, nats, of the tokens of the completions at the sampling temperature.

    Entries outside the mask are 0. entropy=True also returns the entropies (N, L) in nats, without gradient.
    value_head: a module (..., H) -> (..., 1). With it, the function also returns the values (N, L) of the states before
    each token, and the values (N,) after the last token.
    """
    head = output_head(model)  # before the states: it may run the model in eval mode
    hidden = token_states(model, packed)
    at = packed.mask.bool()
    states = hidden[packed.predictor[at]]  # (tokens of the completions, H)
    measured = head_logprobs(head, states, packed.targets[at], temperature, entropy)
    found = [packed.to_completions(x) for x in (measured if entropy else (measured,))]
    if value_head is not None:
        found.append(packed.to_completions(value_head(states.float()).float().squeeze(-1)))
        found.append(value_head(hidden[packed.last].float()).float().squeeze(-1))
    return found[0] if len(found) == 1 else tuple(found)


def packed_scores(model: torch.nn.Module, packed: Packed, head: torch.nn.Module) -> torch.Tensor:
    """Scores (N,) of a reward model: its head at the last token of each completion."""
    hidden = token_states(model, packed)
    return head(hidden[packed.last]).float().squeeze(-1)


def scores_so_far(model: torch.nn.Module, packed: Packed, head: torch.nn.Module) -> torch.Tensor:
    """Scores (N, L) at each token of the completions: what a completion that ends there would get."""
    hidden, at = token_states(model, packed), packed.mask.bool()
    first = packed.last - packed.mask.sum(1) + 1  # (N,): a completion lies end to end
    places = first[:, None] + torch.arange(at.shape[1], device=at.device)
    return packed.to_completions(head(hidden[places[at]]).float().squeeze(-1))


@torch.no_grad()
def score_completions(
    reward_model: Any, prompts: list[list[int]], completions: list[list[int]], pad_id: int, batch_size: int = 64
) -> list[float]:
    """The scores of a RewardModel, a list of floats in the given order.

    Completions of one prompt should be consecutive, so that their prompt is computed once.
    """
    device = next(reward_model.parameters()).device
    scores = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        packed = pack(prompts[part], completions[part], pad_id, device)
        scores += packed_scores(reward_model.model, packed, reward_model.head).tolist()
    return scores


@torch.no_grad()
def completion_logprobs(
    model: Any,
    prompts: list[list[int]],
    completions: list[list[int]],
    pad_id: int,
    temperature: float = 1.0,
    batch_size: int = 64,
    progress: Callable | None = None,
) -> list[list[float]]:
    """The log-prob in nats of each completion token given its prompt: a list of lists, in the given order.

    Completions of one prompt should be consecutive. Runs in the autocast context of the caller. progress(done, all) is
    called after each batch.
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


def token_logprobs(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    temperature: float = 1.0,
    where: torch.Tensor | None = None,
    entropy: bool = False,
) -> Any:
    """Log-prob of each token given the tokens before it, (B, T-1), float32, nats, at the sampling temperature.

    Positions come from the mask, so left-padded, right-padded and unpadded rows get the same values.
    where: (B, T-1), 1 for the tokens that count. The head runs only for these tokens; other entries are 0. Without
    `where`, every real token that follows a real token counts.
    entropy=True also returns the entropies (B, T-1) in nats, without gradient.
    """
    if where is None:
        where = attention_mask[:, 1:] * attention_mask[:, :-1]
    at = where.bool()
    hidden = hidden_states(model, input_ids, attention_mask)  # (B, T, H): position t predicts token t+1
    measured = head_logprobs(output_head(model), hidden[:, :-1][at], input_ids[:, 1:][at], temperature, entropy)
    empty = hidden.new_zeros(at.shape, dtype=(measured[0] if entropy else measured).dtype)
    if entropy:
        return tuple(empty.masked_scatter(at, x) for x in measured)
    return empty.masked_scatter(at, measured)


def masked_mean(x: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Mean of x over the entries with mask 1; 0 if there are none. Masked entries may be anything, inf and NaN too."""
    x = torch.where(mask.bool(), x, 0.0)
    if dim is None:
        return x.sum() / mask.sum().clamp(min=1)
    return x.sum(dim) / mask.sum(dim).clamp(min=1)


def masked_whiten(
    x: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True, reduce: Callable | None = None
) -> torch.Tensor:
    """(x - mean) / sqrt(population variance + 1e-8) over the counted entries. Masked entries become 0.

    shift_mean=False keeps the mean. reduce: a function that sums a tensor over all processes; then mean and variance
    are those of the counted tokens of all processes.
    """
    mask = mask.bool()
    x = torch.where(mask, x, 0.0)
    sums = torch.stack([x.sum(), mask.sum().to(x.dtype)])
    total, count = reduce(sums) if reduce else sums
    mean = total / count.clamp(min=1)
    squares = torch.where(mask, x - mean, 0.0).square().sum()
    variance = (reduce(squares) if reduce else squares) / count.clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        white = white + mean
    return torch.where(mask, white, 0.0)


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, kind: str) -> torch.Tensor:
    """Per-token estimates (B, T-1) of KL(policy || reference) on tokens that the policy sampled.

    With d = logprobs - ref_logprobs:  k1 = d,  k2 = d^2 / 2,  k3 = exp(-d) - 1 + d
    (Schulman, "Approximating KL divergence", 2020). The values of k1 and k3 are unbiased estimates of the KL; k2 is
    biased. Their gradients are different. As an on-policy loss, the expected gradient is 0 for k1, that of the reverse
    KL for k2, and that of the forward KL for k3. It is that of the reverse KL for ratio * k3 ("ratio_k3" of
    `grpo_loss`). These are gradients of the KL of each next token, with the earlier tokens fixed. But a token also
    decides the tokens after it and their KL. Only k1 in the reward (`token_rewards` in ppo_train.py) includes this
    effect in the gradient. proof/EXACT.md has the numbers. Raises UserError for another kind.
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        return torch.exp(-d) - 1 + d
    raise UserError(f"KL estimator {kind!r}: must be k1, k2 or k3")


def pad_rows(
    rows: Sequence[Sequence[float]], value: float, device: torch.device | str, left: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(tensor (B, longest), mask) of lists of numbers, padded with `value` on the right, or on the left with `left`.

    The mask is 1 on real entries. A float `value` gives a float32 tensor, an int gives int64.
    """
    width = max(map(len, rows))
    dtype = torch.float32 if isinstance(value, float) else torch.long
    filled, mask = [], []
    for row in rows:
        gap = [value] * (width - len(row))
        filled.append([*gap, *row] if left else [*row, *gap])
        mask.append([0] * len(gap) + [1] * len(row) if left else [1] * len(row) + [0] * len(gap))
    return torch.tensor(filled, dtype=dtype, device=device), torch.tensor(mask, device=device)
