"""Log-probs of given tokens without ever holding all logits.

A model's logits over 49 k tokens in float32 are most of the memory of a training step, and on a CPU a good part of its
time. So the transformer's body runs once, and its head runs over a few rows at a time, only where a token counts. What
the backward pass needs of a row's logits is one vector of the hidden size, known as soon as the logits are:

    d log p(target) / d hidden = (onehot(target) - p) @ W / temperature
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

# Logits held at once, in bytes of float32. On a CPU: what fits into its last cache, and what the C library keeps for
# the next piece instead of giving it back to the system (32 MB and more it maps anew each time).
PIECE = {"cpu": 26 << 20, "cuda": 512 << 20}
ROWS_WITH_WEIGHT = 512  # at least, where the head's weight trains: its gradient is written once a piece


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
    """log softmax(head(hidden) / temperature)[targets] in float32 (float64 for a float64 model), piece by piece.

    head: the output embedding, a Linear without bias. hidden: (N, H). targets: (N,) token ids. Returns (N,), and with
    `entropy` also the entropy of each distribution in nats, (N,) without gradient. Runs in the autocast dtype.
    """
    assert head.bias is None, head
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    logprobs, entropies = HeadLogprobs.apply(hidden, head.weight, targets, temperature, entropy, dtype)
    return (logprobs, entropies) if entropy else logprobs


class HeadLogprobs(torch.autograd.Function):
    """`head_logprobs` with its own backward pass, which keeps (N, H) of the forward pass and not (N, V)."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy, dtype):
        ctx.temperature, ctx.dtype = temperature, dtype
        exact = torch.promote_types(dtype, torch.float32)  # float64 stays
        logprobs, entropies = (torch.empty(len(hidden), dtype=exact, device=hidden.device) for _ in range(2))
        hidden_grad, weight_grad = ctx.needs_input_grad[:2]
        slope = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if hidden_grad else None
        w = weight.to(dtype)
        for at in pieces(hidden, weight):
            log_p = tempered(hidden[at].to(dtype), w, temperature, exact)
            logprobs[at] = log_p.gather(-1, targets[at, None])[:, 0]
            if entropy:
                p = log_p.exp()
                entropies[at] = -torch.linalg.vecdot(p, log_p)
            if hidden_grad and not weight_grad:
                minus_p = (p if entropy else log_p.exp_()).neg_()
                slope[at] = residual(minus_p, targets[at], temperature).to(dtype) @ w
        if weight_grad:
            ctx.save_for_backward(hidden, weight, targets)
        elif hidden_grad:
            ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient, _):
        if not ctx.needs_input_grad[1]:
            (slope,) = ctx.saved_tensors
            return gradient[:, None].to(slope.dtype) * slope, None, None, None, None, None
        hidden, weight, targets = ctx.saved_tensors  # the weight's gradient needs p itself: computed again
        w, grad_hidden = weight.to(ctx.dtype), torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight)
        for at in pieces(hidden, weight, ROWS_WITH_WEIGHT):
            h = hidden[at].to(ctx.dtype)
            minus_p = tempered(h, w, ctx.temperature, gradient.dtype).exp_().neg_()
            d = (residual(minus_p, targets[at], ctx.temperature) * gradient[at, None]).to(ctx.dtype)
            grad_hidden[at] = (d @ w).to(hidden.dtype)
            grad_weight += d.T @ h
        return grad_hidden, grad_weight, None, None, None, None


def pieces(hidden, weight, least=1):
    """Slices over the rows of `hidden` whose logits fill PIECE, and which have at least `least` rows."""
    rows = max(PIECE[hidden.device.type] // (4 * len(weight)), least)
    return [slice(start, start + rows) for start in range(0, len(hidden), rows)]


def tempered(hidden, weight, temperature, dtype):
    """log softmax of the logits over the temperature, (n, V) in `dtype`."""
    logits = (hidden @ weight.T).to(dtype)
    if temperature != 1.0:
        logits = logits / temperature
    return logits.log_softmax(-1)


def residual(minus_p, targets, temperature):
    """(onehot(targets) - p) / temperature from -p, in place: the gradient of log p(target) with respect to the logits.

    1 - p is taken before any rounding to bf16: where p is almost 1, only this difference is left of the gradient.
    """
    minus_p[torch.arange(len(targets), device=targets.device), targets] += 1
    return minus_p.div_(temperature) if temperature != 1.0 else minus_p
