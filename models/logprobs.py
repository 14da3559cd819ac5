"""Log-probs of given tokens without ever holding all logits.

A model's logits over 49 k tokens in float32 are most of the memory of a training step. So the transformer's body runs
once, and its head runs over a few hundred positions at a time, only where a token counts; with several pieces the
backward pass computes each one's logits again.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # positions whose logits are held at once: 1024 * 49152 * 4 bytes = 200 MB


def unwrapped(model):
    """The transformers model inside a PEFT wrapper (adapters stay active: they live in its layers)."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def positions(attention_mask):
    """Position ids (B, T) that count from 0 at each row's first real token, for left and right padding alike."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def hidden_states(model, input_ids, attention_mask=None, position_ids=None):
    """The transformer body's output (B, T, H), after its final norm: what the head reads."""
    if position_ids is None and attention_mask is not None:
        position_ids = positions(attention_mask)
    body = unwrapped(model).base_model
    return body(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state


def head_logprobs(head, hidden, targets, temperature=1.0, entropy=False):
    """log softmax(head(hidden) / temperature)[targets] in float32 (float64 for a float64 model), in chunks.

    head: the output embedding, a Linear. hidden: (N, H). targets: (N,) token ids. Returns (N,), and with `entropy` also
    the entropy of each distribution in nats, (N,) without gradient.
    """

    def piece(h, t):
        logits = head(h)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # float64 stays
        if temperature != 1.0:
            logits = logits / temperature
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(-1, t[:, None])[:, 0]
        if not entropy:
            return chosen, None
        with torch.no_grad():
            return chosen, -(logprobs.exp() * logprobs).sum(-1)

    chosen, entropies = [], []
    for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK)):
        if torch.is_grad_enabled() and len(hidden) > CHUNK:  # recomputing a single piece would save nothing
            c, e = checkpoint(piece, h, t, use_reentrant=False)
        else:
            c, e = piece(h, t)
        chosen.append(c)
        entropies.append(e)
    if not chosen:
        chosen, entropies = [hidden.new_zeros(0, dtype=torch.float32)], [hidden.new_zeros(0, dtype=torch.float32)]
    return (torch.cat(chosen), torch.cat(entropies)) if entropy else torch.cat(chosen)
