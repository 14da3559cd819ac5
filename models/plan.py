"""What a model of a configuration needs, without its weights: sizes of its parts, in numbers and in bytes.

The model is built on the meta device, where tensors have shapes and no memory. To learn what a forward pass keeps for
the backward pass, the model's own layers, those of models/fast/ among them, run on fake tensors of torch, which have a
device and a dtype, too. So the sizes hold for every architecture that transformers builds, and they follow our layers.
Of layers that are the same but for their place, two are run: the others need what the last one needs.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from configs.config import UserError
from models.device import PRECISIONS, autocast, pick_device, pick_precision
from models.fast.attention import causal_mask, use_matmul_attention
from models.fast.head import HELD, PIECE, hidden_states, unsupported, unwrapped
from models.fast.layers import use_memory_efficient_layers
from models.fast.lora import add_adapter
from models.fast.quantised import Quantisation, can_be_quantised
from models.fetch import EMBEDDED_MODELS
from models.flops import Cost
from models.generation import ROOM
from models.loader import model_config
from runtime.files import in_root
from runtime.plan import Part, Target, planned_target

PROBE = 32  # tokens of the shorter rows by which the kept bytes are found; the longer ones have twice as many
PLACES = ("layer_idx", "layer_id", "layer_number")  # what transformers calls the place of a layer
SHARE = 0.55  # of the fastest matmul, in LM training, DPO, GRPO and sampling: 49 to 64 % (report/benchmarks.md)
FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Sizes:
    """What a model needs. Sizes are in bytes, but for weights, trained and vocabulary, which are numbers."""

    architecture: str
    weights: int  # of the model and its adapter; a tied weight counts once
    trained: int
    frozen_bytes: int  # of the weights that do not train
    vocabulary: int  # rows of the output embedding
    width: int  # of the states that the head reads
    layers: int
    layer: int  # weights of the largest layer
    rest: int  # weights outside the layers: embedding, head, last norm
    state: int  # bytes of one number of the hidden states
    kept: float  # for the backward pass, by each token
    cast: float  # for the backward pass, by no token: copies of weights in the dtype of the matmuls
    mask: float  # for the backward pass, by each token of a row and each token that it could see
    cache: int  # keys and values of one token
    cost: Cost
    quantised: int = 0  # weights that are kept in 4 or 8 bits

    @property
    def base(self) -> int:
        """The number of weights without the adapter."""
        return self.weights - (self.trained if self.frozen_bytes else 0)


def planned_model(config: Any, scratch: Callable | None = None) -> Any:
    """The configuration of config.model_name; of the base, if that is an adapter. scratch: makes one for `scratch`.

    Raises UserError for an embedded model that is not here: a dry run fetches nothing.
    """
    name = config.model_name
    if name == "scratch" and scratch:
        return scratch()
    if name in EMBEDDED_MODELS and not in_root(f"models/{name}/config.json").is_file():
        raise UserError(f"{name} is not here, and a dry run fetches nothing. This fetches it: python models/fetch.py")
    return model_config(name)


def build_meta(config: Any, dtype: torch.dtype, score: bool = False) -> Any:
    """The model of a configuration with our layers, on the meta device. score: with the head of a reward model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForSequenceClassification if score else AutoModelForCausalLM
    if score:
        config.num_labels = 1
    with torch.device("meta"):
        return use_matmul_attention(use_memory_efficient_layers(kind.from_config(config, dtype=dtype)))


def outer_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of a transformers model that are in no other layer. FSDP gathers these one by one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        inner = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and not inner:
            found[name] = module
    return list(found.values())


def leave_two(layers: list[torch.nn.Module]) -> dict[torch.nn.Module, int]:
    """Of layers that are the same but for their place, empty all but the first and the last.

    An empty layer has no weights and returns the states that it gets. Returns {last one: layers that it stands for}.
    """
    alike: dict[tuple, list] = {}
    for layer in layers:
        alike.setdefault(_description(layer), []).append(layer)
    for first, *between, _ in (same for same in alike.values() if len(same) > 2):
        pass_on = _passing_like(first)
        for layer in between:
            layer._modules.clear()
            layer._parameters.clear()
            layer.forward = pass_on
    return {same[-1]: len(same) - 1 for same in alike.values() if len(same) > 1}


def _description(layer):
    """All that two layers which are the same have in common: parts, settings, shapes of the weights."""
    found = []
    for name, module in layer.named_modules():
        settings = {
            k: v for k, v in vars(module).items() if isinstance(v, int | float | str | None) and k not in PLACES
        }
        tensors = [(key, x.shape, x.dtype) for key, x in module.named_parameters(recurse=False)]
        found.append((name, type(module), *sorted(settings.items()), *tensors))
    return tuple(found)


def _passing_like(first):
    """A forward pass that gives its states on, in the form in which `first` returned its own: with more in a tuple."""
    more = {}
    first.register_forward_hook(lambda _, __, out: more.update(of=out[1:] if isinstance(out, tuple) else None))

    def pass_on(hidden_states, *_, **__):
        return hidden_states if more["of"] is None else (hidden_states, *more["of"])

    return pass_on


def named(config: Any) -> str:
    """The architecture in a configuration, for messages."""
    return (config.architectures or [type(config).__name__])[0]


_known: dict[tuple, Sizes] = {}  # {arguments of `sizes`: its result}: what would need less is asked of the same model


def sizes(
    config: Any,
    precision: str,
    dtype: torch.dtype,
    lora_r: int = 0,
    score: bool = False,
    how: Quantisation | None = None,
) -> Sizes:
    """The `Sizes` of the model of a configuration.

    precision: of the forward passes (their autocast). dtype: of the weights. lora_r: rank of an adapter on it; 0: none.
    score: with the head of a reward model in place of the language model's. how: the linear layers are rounded.
    Raises UserError that names the architecture if it cannot be built or run without data.
    """
    key = config.to_json_string(use_diff=False), precision, dtype, lora_r, score
    try:
        if key not in _known:
            with torch.random.fork_rng(devices=[]):
                _known[key] = _sizes(config, precision, dtype, lora_r, score)
    except Exception as error:
        if not unsupported(error):
            raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"a {named(config)} cannot be planned: {why}") from None
    return _rounded(_known[key], build_meta(config, dtype, score), how) if how else _known[key]


def _sizes(config, precision, dtype, lora_r, score):
    cost = _cost(config, lora_r)
    model = build_meta(config, dtype, score)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    weights, layers = list(model.parameters()), outer_layers(model)
    total, size = sum(p.numel() for p in weights), sum(p.nbytes for p in weights)
    inside = {p for layer in layers for p in layer.parameters()}
    largest = max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0)
    times = leave_two(layers)
    trained = total
    if lora_r:
        task = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]} if score else {"task_type": "CAUSAL_LM"}
        with torch.device("meta"):
            model = add_adapter(model, lora_r, 2 * lora_r, **task)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        trained += sum((n - 1) * p.numel() for layer, n in times.items() for p in layer.parameters() if p.requires_grad)
    kept, cast, mask, state, cache = probe(model, times, precision)
    return Sizes(
        architecture=named(config),
        weights=total + (trained if lora_r else 0),
        trained=trained,
        frozen_bytes=size if lora_r else 0,
        vocabulary=len(embedding) if head is None else len(head.weight),
        width=embedding.shape[1] if head is None else head.weight.shape[1],
        layers=config.get_text_config().num_hidden_layers,
        layer=largest,
        rest=total - sum(p.numel() for p in inside),
        state=state,
        kept=kept,
        cast=cast,
        mask=mask,
        cache=cache,
        cost=cost,
    )


def _rounded(s, model, how):
    """The sizes `s` with the linear layers of `model` in 4 or 8 bits. A pass makes the weight of one of them."""
    weights = list({id(x): x.weight for x in can_be_quantised(model).values()}.values())
    plain = sum(w.numel() * w.itemsize for w in weights)
    rounded = sum(how.size(*w.shape) for w in weights)
    largest = max((w.numel() * w.itemsize for w in weights), default=0)
    return replace(
        s,
        frozen_bytes=s.frozen_bytes - plain + rounded,
        quantised=sum(w.numel() for w in weights),
        cast=s.cast + largest,
    )


def _cost(config, lora_r):
    return Cost.of_model(build_meta(config, torch.bfloat16), lora_r)


def probe(model: Any, times: dict[torch.nn.Module, int], precision: str) -> tuple[float, float, float, int, int]:
    """`kept`, `cast`, `mask`, `state` and `cache` of the `Sizes` of a model. times: see `leave_two`.

    The layers run on fake tensors. The fused kernel of experts takes bf16 only there: such models are run in bf16, and
    where a run computes in float32, what they keep counts twice. torch raises an error for layers whose shapes depend
    on the data.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    experts = any(p.dim() == 3 and len(p) > 1 and "expert" in key for key, p in model.named_parameters())
    twice = 2 if experts and precision == "fp32" and next(model.parameters()).dtype == torch.float32 else 1
    if experts:
        model = model.to(torch.bfloat16)
    loud = logging.getLogger("torch._subclasses.fake_tensor")
    level, training = loud.level, model.training
    loud.setLevel(logging.CRITICAL + 1)  # it logs what is raised
    causal_mask.cache_clear()
    try:
        with FakeTensorMode():
            fake_weights(model)
            model.eval()
            (a, states), (b, _), (c, _), (d, _) = (
                _kept(model, times, rows, width, precision) for width in (PROBE, 2 * PROBE) for rows in (1, 2)
            )
            cache = _cache(model, times)
    finally:
        causal_mask.cache_clear()  # the mask that it remembers is fake
        loud.setLevel(level)
        model.train(training)
    # bytes = cast + kept * rows * width + (mask of each row * rows + mask of all rows) * width^2
    square = PROBE**2
    of_row = ((d - c) - 2 * (b - a)) / (2 * square)
    token = (b - a - of_row * square) / PROBE
    of_all = (c - a - token * PROBE) / (3 * square) - of_row
    mask = of_row + of_all  # a run gives each row a mask of its own
    cast = a - token * PROBE - mask * square
    return token * twice, max(cast, 0.0) * twice, mask * twice, states.dtype.itemsize * twice, cache


def fake_weights(model: torch.nn.Module) -> None:
    """Replace the tensors of a model on the meta device by new ones: fake CPU tensors, under FakeTensorMode."""
    new: dict[int, Any] = {}

    def replaced(x):
        if id(x) not in new:
            y = torch.empty(x.shape, dtype=x.dtype, device="cpu")
            kept = torch.nn.Parameter(y, requires_grad=x.requires_grad) if isinstance(x, torch.nn.Parameter) else y
            new[id(x)] = kept, x  # x must live as long as its id is a key
        return new[id(x)][0]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, x in tensors.items():
                if x is not None:
                    tensors[key] = replaced(x)


def _kept(model, times, rows, width, precision):
    """(bytes of the tensors that a pass over rows x width tokens keeps for the backward pass, its hidden states)."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept, stands_for = {}, [1]

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = storage.nbytes() * stands_for[-1], x
        return x

    hooks = []
    for layer, n in times.items():
        hooks.append(layer.register_forward_pre_hook(lambda *_, n=n: stands_for.append(n)))
        hooks.append(layer.register_forward_hook(lambda *_: stands_for.pop() and None))
    ids = torch.zeros(rows, width, dtype=torch.long)
    places = torch.arange(width).expand(rows, width)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast(torch.device("cpu"), precision):
        states = hidden_states(model, ids, position_ids=places)
    for hook in hooks:
        hook.remove()
    return sum(size for size, _ in kept.values()), states


@torch.no_grad()
def _cache(model, times):
    """Bytes of the keys and values of one token. 0 for a model without a cache of keys and values."""
    inner = unwrapped(model)
    if inner.get_output_embeddings() is None:
        return 0
    found = inner(input_ids=torch.zeros(1, 8, dtype=torch.long), use_cache=True).get("past_key_values")
    if found is None:
        return 0
    stands_for = [times.get(layer, 1) for layer in outer_layers(inner.get_decoder())]
    layers = [(vars(layer), n) for layer, n in zip(found.layers, stands_for, strict=True)]
    pairs = [(layer[key], n) for layer, n in layers for key in ("keys", "values") if layer.get(key) is not None]
    return sum(x.nbytes * n for x, n in pairs) // 8


def training_parts(s: Sizes, name: str, dtype: torch.dtype, processes: int = 1, ddp: bool = False) -> list[Part]:
    """What the model that trains holds for the whole run: weights, gradients, AdamW's two moments; in bytes.

    ddp: with DistributedDataParallel, whose buckets are a copy of the gradients, with one process too.
    """
    parts = []
    if s.frozen_bytes:
        parts += [
            Part(
                f"{name}: frozen weights, {'rounded and ' if s.quantised else ''}{_kind(dtype)}", s.frozen_bytes, True
            ),
            Part(f"{name}: adapter, float32", FLOAT * s.trained, True),
        ]
    else:
        parts.append(Part(f"{name}: weights, float32", FLOAT * s.trained, True))
    parts += [
        Part("gradients", FLOAT * s.trained, True),
        Part("optimizer: two moments of AdamW", 2 * FLOAT * s.trained, True),
    ]
    if ddp or processes > 1:
        parts.append(Part("gradients in exchange between processes", FLOAT * s.trained, True))
    return parts


def _kind(dtype):
    return str(dtype).removeprefix("torch.")


def passes(s: Sizes, tokens: int, width: int, rows: int, checkpointing: bool) -> list[Part]:
    """The activations of a forward pass with gradients: `tokens` tokens in `rows` rows of `width`, and their mask."""
    kept = s.kept * tokens
    if checkpointing:  # what enters each layer, and all of one layer
        kept = s.layers * s.width * s.state * tokens + kept / s.layers
    mask = rows * width * width * (1 + s.mask)  # as bool, and as numbers that are added to the scores
    return [Part("activations", kept + s.cast), Part("attention mask", mask)]


def gathered(s: Sizes, itemsize: int) -> list[Part]:
    """What FSDP holds in whole during a pass: two layers, as one is gathered ahead, and all that is in no layer.

    itemsize: bytes of a number of what is gathered. Gradients are added up over the devices in float32.
    """
    sums = FLOAT if itemsize < FLOAT else 0
    return [
        Part("gathered: two layers", 2 * s.layer * itemsize),
        Part("gathered: embedding, head and last norm", s.rest * itemsize),
        Part("gradients of a layer, or of these", max(s.layer, s.rest) * (itemsize + sums)),
    ]


def logits(s: Sizes, rows: int, kind: str, itemsize: int, trained: bool, entropy: bool = False) -> list[Part]:
    """What the head needs for `rows` tokens: pieces of the logits, and gradients. See models/fast/head.py.

    kind: of the device. itemsize: bytes of a number in a matmul. trained: whether the head's weight trains.
    """
    piece = max(PIECE[kind] // (FLOAT * s.vocabulary), 1)
    held = max(HELD[kind] // (itemsize * s.vocabulary), piece) if trained else piece
    size = min(held, rows) * s.vocabulary * itemsize
    size += min(piece, rows) * s.vocabulary * FLOAT * ((itemsize != FLOAT) + entropy)
    parts = [Part("logits", size + rows * s.width * itemsize)]
    if trained:  # that of the head, and that of the embedding if it is the same weight: they are added up
        parts.append(Part("gradient of the head", s.vocabulary * s.width * (2 * FLOAT + itemsize * (itemsize < FLOAT))))
    return parts


def sampling(s: Sizes, rows: int, prompt: int, new: int, itemsize: int, copy: bool, kind: str) -> list[Part]:
    """What sampling `rows` completions of `new` tokens at once needs, after prompts of `prompt` tokens.

    copy: whether a copy of the policy with merged weights samples. On a CPU in bf16 the decoder packs all matrices once
    more. The cache gets memory for ROOM new tokens at once.
    """
    parts = []
    if copy:
        parts.append(Part("sampler: weights", s.base * itemsize))
    if copy and (kind == "cuda" or itemsize < FLOAT):
        parts.append(Part("sampler: matrices in the layout of the decoder", s.base * itemsize))
    parts.append(Part("KV cache", rows * (prompt + min(new, ROOM)) * s.cache))
    parts.append(Part("logits of the next tokens", 3 * FLOAT * rows * s.vocabulary))
    return parts


def target(config: Any, processes: int) -> Target:
    """The `Target` of a dry run of `config`; see `planned_target`."""
    return planned_target(config, "cpu" if config.dry_run_gb else pick_device().type, processes)


def planned_precision(precision: str, to: Target) -> str:
    """`pick_precision` on the target; a GPU that is not here computes in bf16."""
    if to.named:
        return "bf16" if precision == "auto" else precision
    return pick_precision(precision, pick_device())


def pace(s: Sizes, precision: str, to: Target) -> Callable | None:
    """A function from FLOP to (seconds, how they are known) on this device; None for a device that is not here."""
    return None if to.named else lambda flops: _seconds(flops, s, PRECISIONS[precision])


def _seconds(flops, s, dtype):
    """FLOP over the measured speed of a matmul of this model's width, at the usual share of it."""
    device, width = pick_device(), max(s.width, 256)
    a, b = torch.ones(1024, width, device=device, dtype=dtype), torch.ones(width, 4 * width, device=device, dtype=dtype)
    seconds, began = [], time.perf_counter()
    while time.perf_counter() - began < 1 or len(seconds) < 4:
        clock = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - clock)
    rate = 2 * a.numel() * b.shape[1] / statistics.median(seconds)
    return flops / rate / SHARE, f"at {SHARE:.0%} of the {rate / 1e9:,.0f} GFLOP/s of a product of this width here"


def in_words(s: Sizes, name: str) -> str:
    """The model in a few words."""
    part = "all train" if s.trained == s.weights else f"{s.trained / 1e6:,.2f} M train"
    return f"{name}: {s.architecture}, {s.weights / 1e6:,.1f} M weights, {part}"
