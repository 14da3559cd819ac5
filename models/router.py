"""The auxiliary loss of the router in a mixture of experts, where the model's configuration asks for it.

It is small if the tokens are spread evenly over the experts (Fedus et al. 2021, "Switch Transformers", eq. 4 to 6):
experts * sum over experts of f * P, with f the share of the tokens that are sent to an expert (times the experts per
token), and P the mean probability that the router gives to it. Both are means over all layers and all real tokens of
one row. A product of means depends on what the means are taken over. With one row as the unit, any split of a step into
micro-batches and processes gives the same step.

In LM training a row is a block. In rlhf/ it is one sequence, a prompt with one of its completions, as transformers
would compute it alone. Completions that share a prompt share its pass (rlhf/packing.py): each token is computed once,
and a token of the prompt counts in the means of each sequence that it belongs to.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from configs.config import UserError
from models.fast.head import body, hidden_states, name_of, unwrapped
from runtime.console import say


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


def load_balancing_losses(
    router_logits: Sequence[torch.Tensor], top_k: int, real: torch.Tensor, at: torch.Tensor | None = None
) -> torch.Tensor:
    """The auxiliary loss of each row, (B,), in float32.

    router_logits: of each layer, (tokens of the pass, experts). top_k: the experts per token. real: (B, T), False on
    padding. at: (B, T), the token of the pass in each place; None: the tokens of the pass are the B * T places.
    """
    weight = (real / real.sum(-1, keepdim=True).clamp(min=1) / len(router_logits))[..., None]  # (B, T, 1)
    shares = probabilities = weight.new_zeros(len(real), router_logits[0].shape[-1])  # f and P of eq. 5 and 6
    for logits in router_logits:
        p = logits.float().softmax(-1)
        p = p.unflatten(0, real.shape) if at is None else p[at]  # (B, T, experts)
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


class RouterLoss:
    """The router's auxiliary loss of the passes of one model that train. `router_of` gives that of a model.

    with router.watching():
        hidden = ...                 # one forward pass of the model's body
    router.measure(real, weight)     # the losses of its rows

    total: the sum over the rows of the last measured pass of weight * auxiliary loss, a scalar with gradients. 0.0 if
    the configuration asks for no such loss. Passes without gradients do not change it.
    term: coefficient * total, to be added to a sum of losses.
    """

    total: Any = 0.0
    term: Any = 0.0

    def __init__(self, model: torch.nn.Module):
        self._model: Any = weakref.ref(model)
        self._passes: list = []  # what the body returned in the watched pass

    @property
    def coefficient(self) -> float:
        """By the model's configuration; 0.0 if it asks for none."""
        return auxiliary_coefficient(self._model())

    @property
    def value(self) -> torch.Tensor:
        """`total` without gradients, for the log."""
        return torch.as_tensor(self.total).detach()

    @property
    def watched(self) -> bool:
        """Whether a pass was kept that `measure` has not read."""
        return bool(self._passes)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A context for one forward pass. Without gradients, or if no loss is asked for, nothing is kept."""
        self._passes = []
        if torch.is_grad_enabled():
            self.total = self.term = 0.0
        if not (torch.is_grad_enabled() and self.coefficient):
            yield
            return
        hook = body(self._model()).register_forward_hook(lambda module, given, output: self._passes.append(output))
        try:
            yield
        finally:
            hook.remove()

    def measure(
        self, real: torch.Tensor, weight: torch.Tensor, at: torch.Tensor | None = None, tokens: int | None = None
    ) -> None:
        """Set `total` and `term` from the pass that was watched.

        real, at: as of `load_balancing_losses`. weight: (B,), of the rows. tokens: of the pass; default B * T.
        Raises UserError if the pass does not give the router's logits of these tokens.
        """
        model, passes, self._passes = self._model(), self._passes, []
        logits = getattr(passes[-1], "router_logits", None) or ()
        top_k = _setting(model, "num_experts_per_tok")
        if not (logits and top_k) or any(x.shape[:-1] != (tokens or real.numel(),) for x in logits):
            raise UserError(
                f"{name_of(model)} is a {type(model).__name__}, whose configuration asks for the router's auxiliary "
                "loss. It cannot be computed here. Set output_router_logits to false in its config.json to train "
                "without it"
            )
        self.total = (load_balancing_losses(logits, top_k, real, at) * weight).sum()
        self.term = self.coefficient * self.total

    def beside(self, loss: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The loss of the pass with the same value. Its gradients are those of the loss + `term`.

        loss: a sum over the counted tokens of the pass. mask: (B, T-1), True on counted tokens, from the second token
        on. The weight of a row is its number of counted tokens. So divided by the tokens of a step, the auxiliary loss
        is a mean over tokens like the loss.
        """
        if not self.watched:
            return loss
        before_end = mask.flip(-1).cumsum(-1).flip(-1) > 0  # padding follows the last counted token of a row
        real = torch.cat([torch.ones_like(mask[:, :1]), before_end], -1)  # (B, T)
        self.measure(real, mask.sum(-1))
        return _Beside.apply(loss, self.term)


_routers: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model: its RouterLoss


def router_of(model: torch.nn.Module) -> RouterLoss:
    """The `RouterLoss` of a model; always the same one."""
    inner = unwrapped(model)
    if inner not in _routers:
        _routers[inner] = RouterLoss(inner)
    return _routers[inner]


def check_router(model: Any) -> None:
    """Before training: say that the auxiliary loss is added. Raise UserError if it cannot be computed."""
    router = router_of(model)
    if not router.coefficient:
        return
    say(f"the router's auxiliary loss is added to the training loss, times {router.coefficient}")
    embedding = model.get_input_embeddings().weight
    ids = torch.arange(2, device=embedding.device)[None] % len(embedding)
    with torch.enable_grad(), router.watching():
        hidden_states(model, ids)
    router.measure(torch.ones_like(ids).bool(), torch.ones(1, device=ids.device))
    router.total = router.term = 0.0


@contextlib.contextmanager
def without_router_logits(model: torch.nn.Module) -> Iterator[None]:
    """A context in which the model's passes do not return the router's logits, whatever its configuration asks for.

    With them, transformers computes the auxiliary loss of each pass, for which it takes no mask of four dimensions.
    """
    config = unwrapped(model).config.get_text_config()
    asked = config.to_dict().get("output_router_logits")
    if asked:
        config.output_router_logits = False
    try:
        yield
    finally:
        if asked:
            config.output_router_logits = asked
