"""Check on a model which fast ways to compute a batch give the right results for it.

There are fast ways to compute a batch: samples packed into one row, completions that share their prompt, a left-padded
batch with a cache. The slow way, each sequence in a separate row, is right for every causal model. Whether a fast way
is right depends on the architecture: a model may ignore position ids, carry a state from token to token, or see only a
window. So a check runs when a model is first used for a kind of work. It computes a few dozen tokens by the plain
forward pass of transformers, one sequence at a time, and by each way. The first way with equal results is used. A
message names a slower way. If no way is right, a UserError is raised. So is it for a model whose tokens see later
tokens (BERT, XLNet): it is no causal model. The check cannot be turned off. Its result is in the manifest of the run.
"""

from __future__ import annotations

import contextlib
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.config import UserError, shown
from models.fast.attention import takes_ragged, use_matmul_attention, windowed
from models.fast.head import body, hidden_states, name_of, unsupported, unwrapped
from models.fast.quantised import quantised_layers
from models.loader import context_length
from runtime.console import fold, say
from runtime.provenance import note_admission

# allowed mean difference / mean size of the compared numbers: far above rounding, far below all known errors
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
MOST_IN_FLOAT32 = 1_500_000_000  # a model with at most so many bf16 or fp16 weights is cast to float32 for a check
BEFORE = 4  # tokens of a prompt that a check puts before a sequence
# so many last tokens of each sequence are compared, because they see the most tokens; and so many first ones, because a
# short window or convolution lets only those see what lies before the sequence
LAST = 8


@dataclass
class Admitted:
    """The result of a check: the way to use, its deviation from the plain forward pass, and the ways that differed.

    A deviation is as of `apart`; infinity stands for a way that the architecture does not support.
    """

    kind: str
    way: str
    deviation: float
    differed: dict[str, float]
    seconds: float


# model: {(kind, whether beyond its window): Admitted}
_admitted: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_roles: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # model: what the run calls it; see `known_as`
_causal: weakref.WeakSet = weakref.WeakSet()  # models whose tokens see no later tokens
_said: set[tuple] = set()  # messages that were printed: a run loads some models twice


def known_as(model: Any, role: str) -> Any:
    """The model, which the manifest of the run will call `role`: "policy", "reference", "sampler", "reward model"."""
    _roles[unwrapped(model)] = role
    return model


def record(model: torch.nn.Module, found: Admitted, beyond: bool = False) -> None:
    """Keep the result of a check with its model, and for the manifest of the run.

    beyond: whether rows longer than the model's window were checked. In the manifest, a deviation that is not finite is
    None, because JSON has no such number.
    """
    inner = unwrapped(model)
    _admitted.setdefault(inner, {})[found.kind, beyond] = found
    path = Path(name_of(model))
    finite = {way: far if math.isfinite(far) else None for way, far in found.differed.items()}
    note_admission(
        {
            "model": _roles.get(inner, "model"),
            "name": shown(path) if path.is_dir() else str(path),
            **vars(found),
            "differed": finite,
            "seconds": round(found.seconds, 3),
            "beyond_window": beyond,
        }
    )


def window_of(model: torch.nn.Module) -> int | None:
    """The smallest attention window of the model's layers, in tokens, by its configuration. None without a window."""
    config = unwrapped(model).config.get_text_config().to_dict()
    if config.get("use_sliding_window") is False:
        return None
    names = ("sliding_window", "window_size", "attention_chunk_size", "local_window_size")
    sizes = [config[name] for name in names if isinstance(config.get(name), int) and config[name] > 0]
    return min(sizes, default=None)


def admit(
    model: torch.nn.Module,
    kind: str,
    ways: Sequence[str],
    check: Callable,
    longest: int,
    costs: dict[str, str] | None = None,
) -> str:
    """The first of `ways` to compute `kind` with `model` for which check(way, lengths) finds no difference.

    check: runs in eval mode without gradients. It returns (found, expected), lists with one tensor per sequence; the
        first and the last tokens are compared. lengths: of its sequences; if rows of `longest` tokens exceed the
        model's window, one of them does, too.
    costs: {way: a text on its cost}, printed if it is not the first way.
    Raises UserError that names the model, the check and the difference, if no way is right.
    """
    inner = unwrapped(model)
    window: Any = window_of(model)
    beyond = window is not None and longest > window
    known = _admitted.setdefault(inner, {})
    if (kind, beyond) not in known:
        began = time.time()
        _check_causal(model)
        most = max(2, (context_length(model) or 1 << 30) - BEFORE)
        lengths = tuple(min(n, most) for n in (window + LAST + 4 if beyond else 19, 11, 14))
        found = _try_ways(model, kind, ways, check, lengths, began)
        record(model, found, beyond)
        said = (type(inner).__name__, kind, found.way)
        if found.way != ways[0] and said not in _said:
            _said.add(said)
            why = ", ".join(
                f"{way} is {apart:.1e} from the plain forward pass" for way, apart in found.differed.items()
            )
            cost = (costs or {}).get(found.way, "")
            say(fold(f"{type(inner).__name__} ({name_of(model)}), {kind}: {found.way}. {cost} ({why})"))
    return known[kind, beyond].way


def admitted(model: torch.nn.Module) -> list[dict]:
    """The results of all checks of a model so far, as a list of dicts for a manifest."""
    return [vars(found) for found in _admitted.get(unwrapped(model), {}).values()]


@contextlib.contextmanager
def _checking(model):
    """A context for a check: eval mode, no gradients, no autocast, exact weights. It gives the dtype of the weights."""
    training, embedding = model.training, model.get_input_embeddings()
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(embedding.weight.device.type, enabled=False):
            with exact_weights(unwrapped(model)):
                yield embedding.weight.dtype
    finally:
        model.train(training)


def _check_causal(model):
    """Raise UserError if the hidden state of a token changes with the tokens after it."""
    inner = unwrapped(model)
    if inner in _causal:
        return
    [ids] = check_tokens(model, [min(12, context_length(model) or 12)])
    first = len(ids) // 2

    def check(way, lengths):
        longer, alone = plain_states(model, [ids, ids[:first]])
        return [longer[:first]], [alone]

    errors: list = []
    with _checking(model) as dtype:
        far = apart(*_attempt(check, "", (), errors))
    if far > TOLERANCE[dtype]:
        why = errors[-1] if errors else f"the states of a token change by {far:.1e} with the tokens after it"
        raise UserError(f"{name_of(model)} is a {type(inner).__name__}, which is no causal language model here: {why}")
    _causal.add(inner)


def check_training(model: torch.nn.Module, noise: bool = False) -> None:
    """Raise UserError if `model`, in the mode that it is in, has no gradients or is not the model of eval mode.

    noise: whether it may differ from eval mode, because dropout is wanted.
    """
    began, training = time.time(), model.training
    [ids] = check_tokens(model, [min(12, context_length(model) or 12)])
    kind, trained = type(unwrapped(model)).__name__, [p for p in model.parameters() if p.requires_grad]
    try:
        with _checking(model) as dtype, torch.enable_grad():
            [expected] = plain_states(model, [ids])
            model.train(training)
            states = hidden_states(model, torch.tensor([ids], device=expected.device))[0]
            torch.autograd.grad(states.float().square().sum(), trained, allow_unused=True)
            far = apart([states.detach()], [expected.detach()])
    except Exception as error:
        if not unsupported(error):
            raise
        raise UserError(
            f"{name_of(model)} is a {kind}, which cannot be trained: {type(error).__name__}: {error}"
        ) from None
    if far > TOLERANCE[dtype] and not noise:
        raise UserError(
            f"{name_of(model)} is a {kind}, which computes other numbers in train mode than in eval mode ({far:.1e} "
            "apart) though every dropout is 0. Try --gradient_checkpointing false, which trains in eval mode"
        )
    way = "in train mode" if training else "in eval mode"
    record(model, Admitted("gradients", way, far, {}, time.time() - began))


def _try_ways(model, kind, ways, check, lengths, began):
    differed, errors = {}, []
    with _checking(model) as dtype:
        for way in ways:
            far = apart(*_attempt(check, way, lengths, errors))
            if far <= TOLERANCE[dtype]:
                return Admitted(kind, way, far, differed, time.time() - began)
            differed[way] = far
    tried = "; ".join(f"{way}: {apart:.1e}" for way, apart in differed.items())
    raise UserError(
        f"{name_of(model)} is a {type(unwrapped(model)).__name__}: {kind} cannot be computed right with it. Beside the "
        f"plain forward pass of transformers, one sequence at a time, each way differs ({tried}; allowed is "
        f"{TOLERANCE[dtype]:.0e})" + (f". The last error was: {errors[-1]}" if errors else "")
    )


@contextlib.contextmanager
def exact_weights(model: torch.nn.Module) -> Iterator[None]:
    """A context with the bf16 and fp16 weights of a model in float32, so that rounding hides no error.

    Layers of 4 or 8 bits compute in float32, too. Large models keep their dtype. Afterwards the weights are exactly the
    same as before.
    """
    rounded = [(layer, layer.compute_dtype) for layer in quantised_layers(model)]
    half = [p for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    kinds = [p.dtype for p in half]
    few = sum(p.numel() for p in half) <= MOST_IN_FLOAT32
    for p in half if few else ():
        p.data = p.data.float()
    for layer, _ in rounded if few else ():
        layer.compute_dtype = None
    try:
        yield
    finally:
        for p, kind in zip(half, kinds):
            p.data = p.data.to(kind)
        for layer, dtype in rounded:
            layer.compute_dtype = dtype


def _attempt(check, way, lengths, errors):
    """(found, expected) of a check; (None, None) if the architecture does not support this way."""
    try:
        return check(way, lengths)
    except Exception as error:
        if not unsupported(error):
            raise
        errors.append(f"{type(error).__name__}: {str(error)[:200]}")
        return None, None


def apart(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Mean difference / mean size over the first or the last tokens of a sequence; the maximum over the sequences."""
    if found is None:
        return float("inf")
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        for at in (slice(LAST), slice(-LAST, None)):
            far = (a[at].double() - b[at].double()).abs().mean() / b[at].double().abs().mean().clamp(min=1e-30)
            worst = max(worst, far.item() if far == far else float("inf"))  # NaN counts as a difference
    return worst


def check_tokens(model: Any, lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    """Random token ids in sequences of these lengths, for a check. The same seed gives the same ids."""
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    rows = weight.shape[0]
    low, high = (3, rows - 4) if rows > 7 else (0, rows)  # the first and the last ids are often special
    return [torch.randint(low, high, (n,), generator=generator).tolist() for n in lengths]


def masks_by_layer(model: torch.nn.Module, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """{kind of layer: its mask} from a bool mask (B, 1, T, T). Layers with a window see only the window."""
    window = window_of(model)
    kinds = kinds_of_layers(model)
    return {kind: windowed(mask, window) if "sliding" in kind and window else mask for kind in kinds}


def kinds_of_layers(model: torch.nn.Module) -> list[str]:
    """The names of the kinds of attention layers of a model; [] if it has only one kind."""
    kinds = unwrapped(model).config.get_text_config().to_dict().get("layer_types") or []
    return sorted(set(kinds)) if len(set(kinds)) > 1 else []


def plain_states(model: Any, sequences: list[list[int]]) -> list[torch.Tensor]:
    """The hidden states (T, H) of each sequence alone, by the plain forward pass of transformers."""
    device = model.get_input_embeddings().weight.device
    rows = [torch.tensor([ids], device=device) for ids in sequences]
    with plain_attention(model):
        return [body(model)(input_ids=row, use_cache=False).last_hidden_state[0] for row in rows]


def plain_logits(model: Any, sequences: list[list[int]], last: int) -> list[torch.Tensor]:
    """The logits (last, V) of the last tokens of each sequence alone, by the plain forward pass of transformers."""
    device = model.get_input_embeddings().weight.device
    rows = [torch.tensor([ids], device=device) for ids in sequences]
    with plain_attention(model):
        return [model(input_ids=row, use_cache=False).logits[0, -last:] for row in rows]


@contextlib.contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """A context in which the model uses the attention of transformers instead of matmul attention."""
    inner = unwrapped(model)
    ours = takes_ragged(inner)
    if ours:
        inner.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if ours:
            use_matmul_attention(inner)
