"""Which way of computing is right for a model, found out on that very model.

There are fast ways to compute a batch (samples packed into one row, completions that share their prompt, a left-padded
batch with a cache) and slow ones that are right for every causal model: each sequence in a row of its own. Whether a
fast way is right depends on the architecture: one may ignore position ids, carry a state from token to token, or look
at a window. So the first time that a model is used for a kind of work, a check runs: a few dozen tokens by the plain
forward pass of transformers, one sequence at a time, and by each way in turn. The first way that agrees is taken. A
slower way is said; where none agrees the work is refused. There is no switch that turns this off.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from dataclasses import dataclass

import torch

from configs.config import UserError
from models.fast.attention import takes_ragged, use_matmul_attention, windowed
from models.fast.head import unwrapped
from runtime.console import say

# of the mean difference over the mean size of what is compared: far above rounding, far below any mistake seen
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
MOST_IN_FLOAT32 = 1_500_000_000  # weights of half precision that are cast for a check
LAST = 8  # tokens of each sequence that are compared: the last ones, which see the most


@dataclass
class Admitted:
    """What a check found: the way to take, how far it is from the plain forward pass, and those that differed."""

    kind: str
    way: str
    deviation: float
    differed: dict[str, float]
    seconds: float


_admitted: weakref.WeakKeyDictionary = (
    weakref.WeakKeyDictionary()
)  # model: {(kind, whether beyond its window): Admitted}


_said: set[tuple] = set()  # what was said: a run loads some models twice


def window_of(model):
    """The smallest number of tokens that a layer of the model looks back on, by its configuration; None: all of them."""
    config = unwrapped(model).config.get_text_config().to_dict()
    if config.get("use_sliding_window") is False:
        return None
    names = ("sliding_window", "window_size", "attention_chunk_size", "local_window_size")
    sizes = [config[name] for name in names if isinstance(config.get(name), int) and config[name] > 0]
    return min(sizes, default=None)


def admit(model, kind, ways, check, longest, costs=None):
    """The way to compute `kind` with `model`: the first of `ways` by which check(way, lengths) finds no difference.

    check: runs in eval mode without gradients, and returns (found, expected): lists of tensors, one a sequence, of which
        the last tokens are compared. lengths: of the sequences that it makes; one is longer than the model's window
        where rows of `longest` tokens are.
    costs: {way: what it costs, in words}, said when a way after the first is taken.
    Raises UserError, naming the model, the check and the difference, if no way agrees.
    """
    inner = unwrapped(model)
    window = window_of(model)
    beyond = window is not None and longest > window
    known = _admitted.setdefault(inner, {})
    if (kind, beyond) not in known:
        lengths = (window + LAST + 4 if beyond else 19, 11, 14)
        known[kind, beyond] = _try_ways(model, kind, ways, check, lengths)
        found = known[kind, beyond]
        said = (type(inner).__name__, kind, found.way)
        if found.way != ways[0] and said not in _said:
            _said.add(said)
            name = getattr(inner.config, "name_or_path", "") or type(inner).__name__
            why = ", ".join(
                f"{way} is {apart:.1e} from the plain forward pass" for way, apart in found.differed.items()
            )
            say(f"{type(inner).__name__} ({name}), {kind}: {found.way}. {(costs or {}).get(found.way, '')} ({why})")
    return known[kind, beyond].way


def admitted(model):
    """What was found out about a model so far, for a manifest: a list of dicts."""
    return [vars(found) for found in _admitted.get(unwrapped(model), {}).values()]


@torch.no_grad()
def _try_ways(model, kind, ways, check, lengths):
    began, training, differed = time.time(), model.training, {}
    weight = model.get_input_embeddings().weight
    model.eval()
    try:
        with torch.autocast(weight.device.type, enabled=False), exact_weights(unwrapped(model)):
            for way in ways:
                far = apart(*_attempt(check, way, lengths))
                if far <= TOLERANCE[weight.dtype]:
                    return Admitted(kind, way, far, differed, time.time() - began)
                differed[way] = far
    finally:
        model.train(training)
    name = getattr(unwrapped(model).config, "name_or_path", "") or "the model"
    tried = "; ".join(f"{way}: {apart:.1e}" for way, apart in differed.items())
    raise UserError(
        f"{name} is a {type(unwrapped(model)).__name__}: {kind} cannot be computed right with it. Beside the plain "
        f"forward pass of transformers, one sequence at a time, each way differs ({tried}; allowed is "
        f"{TOLERANCE[weight.dtype]:.0e})"
    )


@contextlib.contextmanager
def exact_weights(model):
    """A model of half precision in float32, where that takes little memory: rounding then hides no mistake.

    Afterwards the weights are bit for bit what they were.
    """
    half = [p for p in model.parameters() if p.dtype in (torch.float16, torch.bfloat16)]
    kinds = [p.dtype for p in half]
    few = sum(p.numel() for p in half) <= MOST_IN_FLOAT32
    for p in half if few else ():
        p.data = p.data.float()
    try:
        yield
    finally:
        for p, kind in zip(half, kinds):
            p.data = p.data.to(kind)


def _attempt(check, way, lengths):
    """(found, expected) of a check; a way that an architecture does not take at all finds nothing."""
    try:
        return check(way, lengths)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        if isinstance(error, UserError) or "out of memory" in str(error).lower():
            raise
        return None, None


def apart(found, expected):
    """Mean difference over mean size, over the last tokens of each sequence; the largest of the sequences."""
    if found is None:
        return float("inf")
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        a, b = a[-LAST:].double(), b[-LAST:].double()
        far = ((a - b).abs().mean() / b.abs().mean().clamp(min=1e-30)).item()
        worst = max(worst, far if far == far else float("inf"))  # NaN is no agreement
    return worst


def check_tokens(model, lengths, seed=0):
    """Sequences of token ids of these lengths, for a check: random, and the same each time."""
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, max(4, weight.shape[0] - 4), (n,), generator=generator).tolist() for n in lengths]


def masks_by_layer(model, mask):
    """{kind of layer: its mask} of a bool mask (B, 1, T, T): layers with a window see less of it."""
    window = window_of(model)
    kinds = kinds_of_layers(model)
    return {kind: windowed(mask, window) if "sliding" in kind and window else mask for kind in kinds}


def kinds_of_layers(model):
    """The kinds of attention layers of a model by name, where there are several; else none."""
    kinds = unwrapped(model).config.get_text_config().to_dict().get("layer_types") or []
    return sorted(set(kinds)) if len(set(kinds)) > 1 else []


def plain_states(model, sequences):
    """The hidden states (T, H) of each sequence alone, by the plain forward pass of transformers."""
    device = model.get_input_embeddings().weight.device
    body = unwrapped(model).base_model
    rows = [torch.tensor([ids], device=device) for ids in sequences]
    with plain_attention(model):
        return [body(input_ids=row, use_cache=False).last_hidden_state[0] for row in rows]


def plain_logits(model, sequences, last):
    """The logits (last, V) of the last tokens of each sequence alone, by the plain forward pass of transformers."""
    device = model.get_input_embeddings().weight.device
    rows = [torch.tensor([ids], device=device) for ids in sequences]
    with plain_attention(model):
        return [model(input_ids=row, use_cache=False).logits[0, -last:] for row in rows]


@contextlib.contextmanager
def plain_attention(model):
    """The model with the attention of transformers in place of that of models/fast/attention.py."""
    inner = unwrapped(model)
    ours = takes_ragged(inner)
    if ours:
        inner.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if ours:
            use_matmul_attention(inner)
