"""Log-probs of given tokens, computed without holding all logits in memory.

A model's float32 logits over 49 k tokens take most of the memory of a training step, and on a CPU much of its time. So
the body of the transformer runs once, and its head runs over a few rows at a time, only for tokens that count. The
backward pass needs one vector of the hidden size per row, and it can be computed together with the logits:

    d log p(target) / d hidden = (onehot(target) - p) @ W / temperature

The loss of a language model is the sum over its tokens. So each row's share of the gradient of W is known then, too.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from configs.config import UserError
from models.fast.attention import added_mask
from models.fast.layers import product_dtype
from runtime.failures import no_memory

# Bytes of float32 logits in one softmax; on a CPU they should fit into the last-level cache
PIECE = {"cpu": 26 << 20, "cuda": 128 << 20}
# Bytes of logits, in the matmul dtype, held at once if the head's weight trains: one gradient matmul per held part
HELD = {"cpu": 100 << 20, "cuda": 512 << 20}


def unwrapped(model: torch.nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper (adapters stay active: they live in its layers)."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def name_of(model: torch.nn.Module) -> str:
    """The name by which a model was loaded, for messages."""
    return getattr(unwrapped(model).config, "name_or_path", "") or "this model"


def body(model: torch.nn.Module) -> Any:
    """The transformer below the head: its `last_hidden_state` is what the head reads. `_find_head` checks this."""
    inner = unwrapped(model)
    if inner.base_model is not inner:
        return inner.base_model
    embedding = inner.get_input_embeddings()  # a model that does not name its body: the child with the embedding
    return next(child for child in inner.children() if any(module is embedding for module in child.modules()))


def unsupported(error: Exception) -> bool:
    """Whether an exception of transformers says that a model takes no such call. UserErrors and full memory do not."""
    kinds = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)
    return isinstance(error, kinds) and not isinstance(error, UserError) and not no_memory(error)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids (B, T). They count from 0 at the first real token of each row, with left or right padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def hidden_states(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: Any = None,
    position_ids: torch.Tensor | None = None,
    **options,
) -> torch.Tensor:
    """The output (B, T, H) of the transformer's body after its final norm. The head reads it.

    attention_mask: (B, T), 1 on real tokens; or (B, 1, T, T), True where a token (third axis) sees another (fourth),
    which needs position_ids, or a dict of such masks, {kind of layer: mask}. options: other arguments of the body.
    """
    if position_ids is None and attention_mask is not None:
        position_ids = positions(attention_mask)
    dtype = product_dtype(model.get_input_embeddings().weight)
    if isinstance(attention_mask, dict):
        attention_mask = {kind: added_mask(mask, dtype) for kind, mask in attention_mask.items()}
    elif attention_mask is not None and attention_mask.dim() == 4:  # in the form that each layer would make of it
        attention_mask = added_mask(attention_mask, dtype)
    return body(model)(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False, **options
    ).last_hidden_state


@dataclass(frozen=True)
class OutputHead:
    """How a model computes logits from hidden states: softcap * tanh(scale * (h @ weight.T + bias) / softcap).

    module: the output embedding; it may have a bias or an adapter. scale: used by Granite and Cohere; 1.0 is none.
    softcap: used by Gemma 2; None is none.
    """

    module: torch.nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @property
    def plain(self) -> bool:
        """Whether the logits are only the matmul; then this file needs little memory."""
        bare = type(self.module) is torch.nn.Linear and self.module.bias is None
        return bare and self.scale == 1.0 and self.softcap is None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, H) -> (N, V), in float32 at least."""
        made = self.module(hidden)
        made = made.to(torch.promote_types(made.dtype, torch.float32)) * self.scale
        return made if self.softcap is None else self.softcap * torch.tanh(made / self.softcap)


_heads: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model: its OutputHead


def output_head(model: torch.nn.Module, name: str | None = None) -> OutputHead:
    """The `OutputHead` of a model, detected once by a forward pass over two tokens.

    Raises UserError that names the model (by `name`; default `name_of`) if its logits have another form.
    """
    inner = unwrapped(model)
    module = inner.get_output_embeddings()
    known = _heads.get(inner)
    if known is None or known.module is not module:
        known = _heads[inner] = _find_head(model, module, name or name_of(model))
    return known


def check_head(model: torch.nn.Module, name: str) -> None:
    """Raise UserError unless an `OutputHead` gives the logits of `model`."""
    output_head(model, name)


@torch.no_grad()
def _find_head(model, module, name):
    training, device = model.training, model.get_input_embeddings().weight.device
    ids = torch.arange(3, 5, device=device)[None] % model.get_input_embeddings().weight.shape[0]
    model.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            logits = model(input_ids=ids, use_cache=False).logits.float()
            product = module(hidden_states(model, ids)).float()
    except Exception as error:
        if not unsupported(error):
            raise
        raise UserError(
            f"{name} is a {type(unwrapped(model)).__name__}, which does not compute logits from token ids alone "
            f"({type(error).__name__}: {error}): it cannot be trained or measured here"
        ) from None
    finally:
        model.train(training)
    config = unwrapped(model).config.get_text_config().to_dict()
    softcap = config.get("final_logit_softcapping")
    numbers = [v for v in config.values() if isinstance(v, float) and v > 0]
    for scale in (1.0, *numbers, *(1 / v for v in numbers)):
        made = product * scale
        made = made if softcap is None else softcap * torch.tanh(made / softcap)
        if logits.shape == made.shape and torch.allclose(logits, made, rtol=1e-2, atol=1e-2 * logits.std().item()):
            return OutputHead(module, scale, softcap)
    raise UserError(
        f"the logits of {name} are more than its last layer's product with a scale, a soft cap or a bias: such a model "
        "can be sampled from here, not trained or measured"
    )


def head_logprobs(
    head: OutputHead | torch.nn.Linear,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
) -> Any:
    """log softmax(logits / temperature)[targets] in float32 (float64 for a float64 model), piece by piece.

    head: an `OutputHead`, or a Linear without bias. hidden: (N, H). targets: (N,) token ids. Returns (N,), and with
    `entropy` also the entropy of each distribution in nats, (N,) without gradient. Runs in the autocast dtype.
    """
    head = head if isinstance(head, OutputHead) else OutputHead(head)
    if head.plain:
        dtype = product_dtype(hidden)
        found = HeadLogprobs.apply(hidden, head.module.weight, targets, temperature, entropy, dtype)
    else:
        found = _in_pieces(head, hidden, targets, temperature)
    return found if entropy else found[0]


def head_nll(
    head: OutputHead | torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor, compiled: bool = False
) -> torch.Tensor:
    """The sum over all rows of -log softmax(logits)[targets] in nats: a scalar; the arguments as above.

    compiled: compute the softmax and its gradient in one kernel; torch.compile makes it at the first call.
    """
    head = head if isinstance(head, OutputHead) else OutputHead(head)
    if head.plain:
        return HeadNLL.apply(hidden, head.module.weight, targets, product_dtype(hidden), compiled)
    return -_in_pieces(head, hidden, targets, 1.0)[0].sum()


def _in_pieces(head, hidden, targets, temperature):
    """(log-probs, entropies without gradient), (N,) each, for any head. The backward pass recomputes each piece."""

    def measure(rows, ids):
        log_p = (head.logits(rows) / temperature).log_softmax(-1)
        entropies = -(log_p.detach().exp() * log_p.detach()).sum(-1)
        return log_p.gather(-1, ids[:, None])[:, 0], entropies

    width = head.module.weight.shape[0]
    size = max(PIECE[hidden.device.type if hidden.device.type in PIECE else "cpu"] // (4 * width), 1)
    found = [checkpoint(measure, hidden[at], targets[at], use_reentrant=False) for at in pieces(len(hidden), size)]
    if not found:
        empty = hidden.sum(-1) * 0.0  # no rows, but a gradient of 0 for what made them
        return empty, empty.detach()
    return tuple(torch.cat(parts) for parts in zip(*found))


class HeadLogprobs(torch.autograd.Function):
    """`head_logprobs` with its own backward pass. It keeps (N, H) numbers of the forward pass, not (N, V).

    If the head's weight trains and all logits fit into one held part, the logits are kept for the backward pass, which
    would otherwise allocate as many again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy, dtype):
        ctx.temperature, ctx.dtype = temperature, dtype
        hidden_grad, weight_grad = ctx.needs_input_grad[:2]
        logits = Logits(hidden, weight, dtype, weight_grad)
        logprobs, entropies = (torch.empty(len(hidden), dtype=logits.exact, device=hidden.device) for _ in range(2))
        slope = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if hidden_grad else None
        probabilities = torch.empty_like(logits.room[: logits.piece]) if entropy else None  # of one part
        for rows, made in logits:
            for at in logits.parts(made):
                log_p = logits.log_softmax(made[at], temperature)
                logprobs[rows][at] = log_p.gather(-1, targets[rows][at, None])[:, 0]
                if entropy:
                    p = torch.exp(log_p, out=probabilities[: len(log_p)])
                    entropies[rows][at] = -log_p.mul_(p).sum(-1)
                if hidden_grad and not weight_grad:
                    minus_p = (p if entropy else log_p.exp_()).neg_()
                    slope[rows][at] = residual(minus_p, targets[rows][at], temperature).to(dtype) @ logits.weight
        if weight_grad:
            ctx.save_for_backward(hidden, weight, targets)
            ctx.made = logits.made if len(logits.pieces) == 1 and logits.made is not logits.room else None
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
        hidden, weight, targets = ctx.saved_tensors  # the weight's gradient needs p, which is computed again
        logits = Logits(hidden, weight, ctx.dtype, weight_grad=True, made=ctx.made)
        ctx.made = None  # it is overwritten below: a second backward pass computes the logits again
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        for rows, made in logits:
            for at in logits.parts(made):
                minus_p = logits.log_softmax(made[at], ctx.temperature).exp_().neg_()
                made[at] = residual(minus_p, targets[rows][at], ctx.temperature).mul_(gradient[rows][at, None])
            grad_hidden[rows] = made @ logits.weight
            grad_weight = add_product(grad_weight, made, hidden[rows], weight.dtype)
        return grad_hidden, torch.zeros_like(weight) if grad_weight is None else grad_weight, None, None, None, None


class HeadNLL(torch.autograd.Function):
    """`head_nll`. Every row has the same gradient, so the forward pass already computes those of hidden and weight."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, dtype, compiled):
        hidden_grad, weight_grad = ctx.needs_input_grad[:2]
        logits = Logits(hidden, weight, dtype, weight_grad, parted=not compiled)
        nll = torch.empty(len(hidden), dtype=logits.exact, device=hidden.device)
        grad_hidden, grad_weight = torch.empty_like(hidden) if hidden_grad else None, None
        for rows, made in logits:
            if compiled:
                nll[rows] = compiled_nll()(made, targets[rows])
            for at in () if compiled else logits.parts(made):
                log_p = logits.log_softmax(made[at], 1.0)
                nll[rows][at] = -log_p.gather(-1, targets[rows][at, None])[:, 0]
                if hidden_grad or weight_grad:
                    made[at] = residual(log_p.exp_().neg_(), targets[rows][at], 1.0).neg_()
            if hidden_grad:
                grad_hidden[rows] = made @ logits.weight
            if weight_grad:
                grad_weight = add_product(grad_weight, made, hidden[rows], weight.dtype)
        if weight_grad and grad_weight is None:  # no rows
            grad_weight = torch.zeros_like(weight)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return nll.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return *(None if x is None else x.mul_(gradient) for x in ctx.saved_tensors), None, None, None


def nll_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[targets], (n,), in nats. The logits (n, V) are overwritten by its gradient.

    These are the equations of `HeadNLL` on all logits at once. When compiled, only the logits are in memory.
    """
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    target = torch.arange(logits.shape[-1], device=logits.device) == targets[:, None]
    logits.copy_(log_p.exp() - target.to(log_p.dtype))
    return -log_p.gather(-1, targets[:, None])[:, 0]


@functools.cache
def compiled_nll() -> Callable:
    # Inductor's online softmax does not support rows this long: it would print a warning and use this one
    return torch.compile(nll_of_logits, options={"online_softmax": False})


def pieces(length: int, size: int) -> list[slice]:
    """Slices of `size` rows over `length` rows."""
    return [slice(start, start + size) for start in range(0, length, size)]


class Logits:
    """The logits piece by piece, all in the same memory: each piece is valid until the next one.

    Iterating gives (slice of the rows, their logits (n, V) in `dtype`). weight_grad: use large pieces, so that the
    weight's gradient is the sum of few matmuls; the softmax then runs over the `parts` of a piece. made: all logits, if
    an earlier pass kept them. parted: whether `parts` and `log_softmax` will be used.
    """

    def __init__(self, hidden, weight, dtype, weight_grad=False, made=None, parted=True):
        self.hidden, self.weight = hidden, weight.to(dtype)
        self.exact = torch.promote_types(dtype, torch.float32)  # float64 stays
        device, width = hidden.device, len(weight)
        self.piece = max(PIECE[device.type] // (self.exact.itemsize * width), 1)
        held = max(HELD[device.type] // (dtype.itemsize * width), self.piece) if weight_grad else self.piece
        self.pieces = pieces(len(hidden), held)
        self.kept = made is not None
        self.made = made if self.kept else torch.empty(min(held, len(hidden)), width, dtype=dtype, device=device)
        self.room = self.made  # where a part's softmax is taken
        if parted and dtype != self.exact:
            self.room = torch.empty(min(self.piece, len(hidden)), width, dtype=self.exact, device=device)

    def __iter__(self):
        for at in self.pieces:
            hidden = self.hidden[at].to(self.made.dtype)
            made = self.made[: len(hidden)]
            yield at, made if self.kept else torch.mm(hidden, self.weight.T, out=made)

    def parts(self, made: torch.Tensor) -> list[slice]:
        """Slices of the rows of `made`, small enough for one softmax."""
        return pieces(len(made), self.piece)

    def log_softmax(self, made: torch.Tensor, temperature: float) -> torch.Tensor:
        """log softmax(logits (n, V) / temperature), in float32 or wider. It may overwrite `made`."""
        logits = made if self.room is self.made else self.room[: len(made)].copy_(made)
        if temperature != 1.0:
            logits.div_(temperature)
        return torch.log_softmax(logits, -1, out=logits)


def residual(minus_p: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """(onehot(targets) - p) / temperature, from -p, in place: the gradient of log p(target) in the logits.

    1 - p is computed before any rounding to bf16: if p is almost 1, this small difference is the gradient.
    """
    minus_p[torch.arange(len(targets), device=targets.device), targets] += 1
    return minus_p.div_(temperature) if temperature != 1.0 else minus_p


def add_product(total: torch.Tensor | None, d: torch.Tensor, hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """total + d.T @ hidden in `dtype`, in place. A total of None counts as 0."""
    hidden = hidden.to(d.dtype)
    if total is None:
        return (d.T @ hidden).to(dtype)
    return total.addmm_(d.T, hidden) if d.dtype == dtype else total.add_(d.T @ hidden)
