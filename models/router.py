"""The auxiliary loss of the router in a mixture of experts, where the model's configuration asks for it.

It is small if the tokens are spread evenly over the experts (Fedus et al. 2021, "Switch Transformers", eq. 4 to 6):
experts * sum over experts of f * P, with f the share of the tokens that are sent to an expert (times the experts per
token), and P the mean probability that the router gives to it. Both are means over all layers and all real tokens of
one row. A product of means depends on what the means are taken over. With one row as the unit, any split of a step into
micro-batches and processes gives the same step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.autograd.function import once_differentiable

from configs.config import UserError
from models.fast.head import body, name_of, unwrapped


def auxiliary_coefficient(model: torch.nn.Module) -> float:
    """The coefficient of the router's auxiliary loss, by the model's configuration. 0.0 if it asks for none."""
    if not unwrapped(model).config.get_text_config().to_dict().get("output_router_logits"):
        return 0.0
    return float(_setting(model, "router_aux_loss_coef", "aux_loss_coef") or 0.0)


def _setting(model, *names):
    """The first of these that transformers' class has, or its configuration: a class may rename what it is built of."""
    inner = unwrapped(model)
    places = vars(inner), inner.config.get_text_config().to_dict()
    return next((place[name] for place in places for name in names if place.get(name) is not None), None)


def load_balancing_losses(router_logits: Sequence[torch.Tensor], top_k: int, real: torch.Tensor) -> torch.Tensor:
    """The auxiliary loss of each row, (B,), in float32.

    router_logits: of each layer, (B * T, experts). top_k: the experts per token. real: (B, T), False on padding.
    """
    weight = (real / real.sum(-1, keepdim=True).clamp(min=1) / len(router_logits))[..., None]  # (B, T, 1)
    shares = probabilities = weight.new_zeros(len(real), router_logits[0].shape[-1])  # f and P of eq. 5 and 6
    for logits in router_logits:
        p = logits.float().softmax(-1).unflatten(0, real.shape)  # (B, T, experts)
        sent = torch.zeros_like(p).scatter_(-1, p.topk(top_k, dim=-1).indices, 1.0)
        shares = shares + (sent * weight).sum(1)
        probabilities = probabilities + (p * weight).sum(1)
    return shares.shape[-1] * (shares * probabilities).sum(-1)


class _Beside(torch.autograd.Function):
    """The value of `loss`, with the gradients of loss + beside."""

    @staticmethod
    def forward(ctx, loss, beside):
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient, gradient


@contextlib.contextmanager
def router_loss(model: torch.nn.Module) -> Iterator[Callable]:
    """A context for one forward pass that trains. It gives a function (loss, mask) -> loss.

    loss: a sum over the counted tokens of the pass. mask: (B, T-1), True on counted tokens, from the second token on.
    The function returns the loss with the same value. Its gradients are those of the loss, plus for each counted token
    those of the coefficient times the auxiliary loss of its row. Divided by the tokens of a step, it is a mean over
    tokens like the loss. Without gradients, or if the configuration asks for no such loss, nothing is computed.
    Raises UserError if the model's passes do not give the router's logits of these rows.
    """
    coefficient = auxiliary_coefficient(model) if torch.is_grad_enabled() else 0.0
    if not coefficient:
        yield lambda loss, mask: loss
        return
    inner, passes = unwrapped(model), []
    hook = body(model).register_forward_hook(lambda module, given, output: passes.append(output))

    def add(loss, mask):
        before_end = mask.flip(-1).cumsum(-1).flip(-1) > 0  # padding follows the last counted token of a row
        real = torch.cat([torch.ones_like(mask[:, :1]), before_end], -1)  # (B, T)
        logits = getattr(passes[-1], "router_logits", None) or ()
        if not logits or any(x.shape[:-1] != (real.numel(),) for x in logits):
            raise UserError(
                f"{name_of(model)} is a {type(inner).__name__}, whose configuration asks for the router's auxiliary "
                "loss. It cannot be computed here. Set output_router_logits to false in its config.json to train "
                "without it"
            )
        losses = load_balancing_losses(logits, _setting(model, "num_experts_per_tok"), real)
        return _Beside.apply(loss, coefficient * (losses * mask.sum(-1)).sum())

    try:
        yield add
    finally:
        hook.remove()
