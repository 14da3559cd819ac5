"""Sample from a model: a left-padded batch, a key-value cache that grows in steps, nothing computed for finished rows.

On a CPU, reinforcement learning spends most of its time in this loop:

1. Prefill: each prompt runs once, no matter how many samples it gets. The common prefix of all prompts of a batch runs
   once for all of them.
2. The keys and values of each prompt are repeated for its samples.
3. Each step draws one token per row by inverse CDF, from a uniform number that belongs to this row and step only. So
   the completion of a row does not depend on the other rows of its batch.
4. Finished rows leave the batch. Without a CUDA graph they leave at once. With a CUDA graph (on a GPU, for the models
   of models/fast/decoder.py) they leave when half of the rows are finished, because a smaller batch is hardly faster
   there and needs a new graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, DynamicLayer

from configs.config import UserError
from models.admission import admit, check_tokens, plain_logits
from models.fast.attention import ALIGNED, added_mask, takes_ragged, use_matmul_attention
from models.fast.decoder import CudaGraphDecoder, decoder_for
from models.fast.head import unwrapped
from models.loader import context_length
from models.router import without_router_logits
from runtime.memory import bound_freed_memory

GRAPHED = ("cuda",)  # device types on which one decoding step runs as a CUDA graph
ROOM = 256  # new tokens for which a cache gets memory at once; a longer completion lets it grow
BLOCK = 256  # tokens of the vocabulary; see inverse_cdf


@dataclass
class Generation:
    """The completions of `generate`, in prompt order: `samples_per_prompt` consecutive rows per prompt."""

    completions: list[list[int]]  # sampled ids, the stop id included when it was sampled
    logprobs: list[list[float]]  # nats, of each sampled id under the tempered and truncated distribution
    finish_reasons: list[str]  # "stop": the model sampled a stop id; "length": it reached max_new_tokens


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    samples_per_prompt: int = 1,
    stop_ids: Iterable[int] = (),
    never: Sequence[int] = (),
    seed: int | None = None,
    uniforms: torch.Tensor | None = None,
    batch_size: int = 64,
    on_token: Callable | None = None,
    progress: Callable | None = None,
) -> Generation:
    """Sample `samples_per_prompt` completions for each prompt. Returns a `Generation`.

    prompts: token ids, one list per prompt. temperature: 0 is greedy; the log-probs are then those at temperature 1.
    top_k, top_p: 0 and 1.0 keep the whole distribution; training on the samples needs it.
    never: ids that are never drawn; see `never_sampled` of models/tokens.py.
    stop_ids: ids that end a completion. seed: None draws from torch's global generator.
    uniforms: (rows, max_new_tokens) numbers in [0, 1) that decide each draw; default: drawn with the seed.
    batch_size: rows that run at once. on_token(row, id): called for each sampled token.
    progress(rows_done, rows): called after each batch.
    Raises UserError for an empty prompt, for a prompt that leaves no room for `max_new_tokens` in the model's context,
    and for an option out of range.
    """
    check_sampling(model, prompts, max_new_tokens, temperature, top_k, top_p, samples_per_prompt)
    rows = len(prompts) * samples_per_prompt
    if uniforms is None:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        uniforms = torch.rand(rows, max_new_tokens, generator=generator, dtype=torch.float64)
    assert uniforms.shape == (rows, max_new_tokens), (uniforms.shape, rows, max_new_tokens)
    completions: list[list[int]]
    logprobs: list[list[float]]
    completions, logprobs, reasons = [[]] * rows, [[]] * rows, ["length"] * rows

    prompts_at_once = max(1, batch_size // samples_per_prompt)
    samples_at_once = min(samples_per_prompt, batch_size)
    was_training = model.training
    model.eval()
    try:
        with _decode_attention(model), without_router_logits(model):
            longest = max(map(len, prompts)) + max_new_tokens
            way = admit(model, "decoding", (SHARED, OWN, WITHOUT), lambda *a: _check(model, *a), longest, COSTS)
            decoder = decoder_for(model) if way == SHARED else None
            done = 0
            for chosen in batches_of(prompts, prompts_at_once, one_length=way != SHARED):
                done += len(chosen)
                for first in range(0, samples_per_prompt, samples_at_once):
                    samples = range(first, min(first + samples_at_once, samples_per_prompt))
                    index = [i * samples_per_prompt + s for i in chosen for s in samples]
                    batch = _batch(way, model, [prompts[i] for i in chosen], len(samples), max_new_tokens, decoder)
                    _sample(batch, index, uniforms, temperature, top_k, top_p, set(stop_ids), on_token, never)
                    for row, ids, values, reason in batch.results:
                        completions[row], logprobs[row], reasons[row] = ids, values, reason
                    del batch  # its cache, before that of the next one is made
                    bound_freed_memory()
                if progress:
                    progress(done * samples_per_prompt, rows)
    finally:
        model.train(was_training)
    return Generation(completions, logprobs, reasons)


def _sample(batch, index, uniforms, temperature, top_k, top_p, stop_ids, on_token, never=()):
    """Draw tokens until every row of the batch is finished. Adds (row, ids, logprobs, reason) to `batch.results`."""
    limit = uniforms.shape[1]
    device = batch.logits.device
    stops = torch.tensor(sorted(stop_ids), device=device)
    uniforms = uniforms[index].to(device)
    rows = torch.tensor(index)  # the number of the completion in each row of the batch
    ended = set()  # finished rows that are still in the batch
    ids = torch.zeros(len(index), limit, dtype=torch.long, device=device)
    values = torch.zeros(len(index), limit, dtype=torch.float32, device=device)
    for step in range(limit):
        logits = batch.logits
        if len(never):
            logits = logits.index_fill(-1, torch.tensor(never, device=device), -torch.inf)
        token, value = _draw(logits, uniforms[:, step], temperature, top_k, top_p)
        ids[:, step], values[:, step] = token, value
        running = [b for b in range(len(rows)) if b not in ended]
        if on_token:
            drawn = token.tolist()
            for b in running:
                on_token(int(rows[b]), drawn[b])
        stopped = torch.isin(token, stops).tolist()
        for b in running:
            if stopped[b] or step == limit - 1:
                reason = "stop" if stopped[b] else "length"
                row_ids, row_values = ids[b, : step + 1].tolist(), values[b, : step + 1].tolist()
                batch.results.append((int(rows[b]), row_ids, row_values, reason))
                ended.add(b)
        if len(ended) == len(rows):
            return
        if ended and batch.closes_up and (not batch.graphed or 2 * len(ended) >= len(rows)):
            moves = _moves(len(rows), sorted(ended))
            rows, ids, values, uniforms, token = (_moved(x, *moves) for x in (rows, ids, values, uniforms, token))
            batch.move(*moves)
            ended = set()
        batch.step(token)


def _draw(logits, uniform, temperature, top_k, top_p):
    """(token, log-prob in nats), (B,) each: the inverse CDF at `uniform` (B,), or the argmax at temperature 0."""
    logprobs = tempered_logprobs(logits, temperature or 1.0, top_k, top_p)
    if temperature == 0:
        token = logits.argmax(-1)
    else:
        token = inverse_cdf(logprobs.exp(), uniform)
    return token, logprobs.gather(-1, token[:, None])[:, 0]


def inverse_cdf(p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """For each row of p (B, V), the first token at which the running sum of p exceeds `uniform` (B,) times the total.

    It works in two steps: it finds a block of BLOCK tokens, then the token in the block. On a CPU, the running sum over
    a whole vocabulary takes longer than its softmax. p need not add up to 1. A token with p = 0 is never drawn.
    """
    p = F.pad(p, (0, -p.shape[-1] % BLOCK)) if p.shape[-1] % BLOCK else p
    blocks = p.unflatten(-1, (-1, BLOCK))  # (B, blocks, BLOCK)
    ends = blocks.sum(-1).cumsum(-1)
    target = uniform.to(p.dtype)[:, None] * ends[:, -1:]
    block = _first_above(ends, target)
    inside = blocks.gather(1, block[:, None].expand(-1, 1, BLOCK))[:, 0].cumsum(-1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    return (block * BLOCK + _first_above(inside, target - before))[:, 0]


def _first_above(ends, target):
    """(B, 1): the first index at which the running sums `ends` exceed `target` (B, 1), or reach their final value."""
    found = torch.searchsorted(ends, target, right=True)
    return torch.minimum(found, torch.searchsorted(ends, ends[:, -1:].contiguous()))


def tempered_logprobs(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """Log-probs (B, V), float32, nats, of the distribution that is sampled from logits (B, V).

    The logits are divided by the temperature, then truncated and renormalised. top_k keeps the k most probable tokens.
    top_p keeps the smallest set of tokens whose probability reaches p (Holtzman et al. 2020).
    """
    logits = logits.float() if temperature == 1.0 else logits.float() / temperature
    if top_k:
        threshold = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1.0:
        ordered, index = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of more probable tokens; the first is always kept
        logits = logits.masked_fill((before >= top_p).scatter(-1, index, before >= top_p), -torch.inf)
    return logits.log_softmax(-1)


def _moves(rows, done):
    """How the rows at `done` leave a batch of `rows` rows: (holes, movers, number of rows that stay).

    The last of the remaining rows are copied into the holes. So at most as many rows are copied as leave.
    """
    count, gone = rows - len(done), set(done)
    return [b for b in done if b < count], [b for b in range(count, rows) if b not in gone], count


def _moved(x, holes, movers, count):
    """Copy the rows of x at `movers` to the rows at `holes`, in place. Returns the first `count` rows, a view of x."""
    if holes:
        x[holes] = x[movers]
    return x[:count]


SHARED, OWN, WITHOUT = "in left-padded batches", "prompts of one length together", "without a cache"
COSTS = {
    OWN: "It takes the model's own cache, and more time: rows that have stopped stay in the batch.",
    WITHOUT: "Every token computes its whole row again, which takes much more time.",
}


def batches_of(prompts: list[list[int]], size: int, one_length: bool = False) -> list[list[int]]:
    """Indices of prompts in batches of `size`. Prompts of similar length share a batch, so that it has little padding.

    one_length: only prompts of the same length share a batch.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    if not one_length:
        return [order[start : start + size] for start in range(0, len(order), size)]
    groups: dict[int, list[int]] = {}
    for i in order:
        groups.setdefault(len(prompts[i]), []).append(i)
    return [g[start : start + size] for g in groups.values() for start in range(0, len(g), size)]


def _batch(way, model, prompts, samples, max_new_tokens, decoder=None):
    if way == SHARED:
        return _Batch(model, prompts, samples, max_new_tokens, decoder)
    return _PlainBatch(model, prompts, samples, with_cache=way == OWN)


def _check(model, way, lengths):
    """(found, expected) logits of some tokens after prompts of different lengths: by decoding, by one forward pass.

    A row leaves after the first token, and the cache must grow for the last one, as it happens while sampling.
    """
    sequences, new = check_tokens(model, lengths), 3
    prompts = [ids[:-new] for ids in sequences]
    found = [[] for _ in sequences]
    for chosen in batches_of(prompts, len(prompts), one_length=way != SHARED):
        decoder = decoder_for(model) if way == SHARED else None
        batch = _batch(way, model, [prompts[i] for i in chosen], 1, new - 1, decoder)
        if way == SHARED:
            batch.longest += 1  # its memory was made for the tokens before the last one
        for k in range(new):
            token = torch.tensor([sequences[i][k - new] for i in chosen], device=batch.logits.device)
            batch.step(token)
            for i, logits in zip(chosen, batch.logits):
                found[i].append(logits.clone())
            if k == 0 and batch.closes_up and len(chosen) > 1:
                moves = _moves(len(chosen), [0])
                chosen = _moved(torch.tensor(chosen), *moves).tolist()
                batch.move(*moves)
    expected = plain_logits(model, sequences, new)
    return [torch.stack(x) for x in found], [x[: len(own)] for x, own in zip(expected, found)]


class _PlainBatch:
    """Rows with prompts of one length. They use the model's own cache, or compute all tokens again in each step.

    It has the methods of `_Batch`. There is no padding, so it needs no mask and works with every architecture.
    """

    graphed, closes_up = False, False

    def __init__(self, model, prompts, samples, with_cache):
        device = model.get_input_embeddings().weight.device
        self.model, self.cache, self.with_cache, self.results = model, None, with_cache, []
        self.ids = torch.tensor(prompts, device=device).repeat_interleave(samples, 0)
        self._forward(self.ids)

    def step(self, token: torch.Tensor) -> None:
        """Append one token to each row. token: (B,)."""
        self.ids = torch.cat([self.ids, token[:, None]], 1)
        self._forward(token[:, None] if self.with_cache else self.ids)

    def _forward(self, ids):
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=self.with_cache)
        self.cache = out.past_key_values if self.with_cache else None
        if self.with_cache and self.cache is None:
            raise ValueError("the model has no cache")
        self.logits = out.logits[:, -1]


class _Batch:
    """Rows that decode together: their cache, their mask, and the logits (B, V) of their next token in `logits`."""

    closes_up = True

    def __init__(self, model, prompts, samples, max_new_tokens, decoder=None):
        self.device = device = model.get_input_embeddings().weight.device
        self.graphed = decoder is not None and decoder.graphable and device.type in GRAPHED
        self.model, self.decoder, self.results = model, CudaGraphDecoder(decoder) if self.graphed else decoder, []

        # the common prefix of all prompts (a system message) runs once; its keys and values serve every row
        shared = common_prefix(prompts)
        rest = [p[shared:] for p in prompts]
        width = max(map(len, rest))
        self.length = shared + width
        self.longest = self.length + max_new_tokens
        capacity = self._capacity()
        self.cache = _PreallocatedCache(model.config.get_text_config().num_hidden_layers, capacity)
        if shared:
            ids = torch.tensor([prompts[0][:shared]], device=device)
            self._forward(ids, torch.ones_like(ids), torch.arange(shared, device=device)[None])
            self.cache.batch_repeat_interleave(len(prompts))

        mask = torch.tensor([[1] * shared + [0] * (width - len(p)) + [1] * len(p) for p in rest], device=device)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in rest], device=device)
        self._forward(ids, mask, (mask.cumsum(-1) - 1)[:, shared:].clamp(min=0))
        self.logits = self.logits.repeat_interleave(samples, 0)
        self.cache.batch_repeat_interleave(samples)
        self.cache.decoding()
        self.next_position = mask.sum(-1).repeat_interleave(samples, 0)
        room = mask.new_zeros(len(prompts), capacity - self.length)
        self.seen = torch.cat([mask, room], 1).bool().repeat_interleave(samples, 0)  # (B, keys)

    def _capacity(self):
        """The tokens for which the cache gets memory: those of now and ROOM more, at most those of the longest row."""
        capacity = min(self.length + ROOM, self.longest)
        # for a CUDA graph: matmuls with a cache of an unaligned size are several times slower
        return capacity + (-capacity % ALIGNED[self.device.type] if self.graphed else 0)

    def step(self, token: torch.Tensor) -> None:
        """Append one token to each row. token: (B,)."""
        if self.length == self.seen.shape[1]:
            more = self._capacity() - self.length
            self.cache.grow(more)
            self.seen = F.pad(self.seen, (0, more))
        self.seen[:, self.length] = True
        if self.decoder:
            place = torch.tensor([self.length], device=token.device)
            self.logits = self.decoder(token, self.next_position, place, self.seen, self.cache.layers)
        else:  # (B, 1, 1, keys): transformers uses a 4-D mask unchanged; it would rebuild a 2-D mask for each token
            self._forward(token[:, None], self.seen[:, None, None], self.next_position[:, None])
        self.next_position = self.next_position + 1
        self.length += 1

    def move(self, holes: Any, movers: Any, count: int) -> None:
        """Continue with `count` rows; see `_moves`."""
        self.seen, self.next_position = (_moved(x, holes, movers, count) for x in (self.seen, self.next_position))
        self.cache.move(holes, movers, count)

    def _forward(self, ids, mask, position_ids):
        if mask.dim() == 4 and not takes_ragged(unwrapped(self.model)):  # what adds it to scores takes no bool
            mask = added_mask(mask, self.model.get_input_embeddings().weight.dtype)
        # an index tensor, not a number: the head then reads a copy. With a slice and a frozen weight, matmul would
        # repeat the weight for each row, which takes gigabytes
        last = torch.tensor([ids.shape[1] - 1], device=ids.device)
        out = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=last,
        )
        self.logits = out.logits[:, -1]


class _PreallocatedLayer(DynamicLayer):
    """The keys and values of one layer, in memory that is allocated for ROOM tokens at a time.

    In decoding, a new token attends to all of this memory under a mask. The memory is contiguous, so this is faster
    than attention to its filled part.
    """

    def __init__(self, capacity):
        super().__init__()
        self.capacity, self.length, self.decoding = capacity, 0, False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys: torch.Tensor = _room(key_states, self.capacity)
        self.values: torch.Tensor = _room(value_states, self.capacity)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return (self.keys, self.values) if self.decoding else (self.keys[:, :, :end], self.values[:, :, :end])

    def get_seq_length(self) -> int:
        return self.length


def _room(states, capacity):
    batch, heads, _, size = states.shape
    return states.new_zeros(batch, heads, capacity, size)


class _PreallocatedCache(Cache):
    def __init__(self, layers, capacity):
        super().__init__(layers=[_PreallocatedLayer(capacity) for _ in range(layers)])

    def decoding(self) -> None:
        """Call this after the prefill. From now on each step adds one token per row."""
        layer: Any  # a _PreallocatedLayer
        for layer in self.layers:
            layer.decoding = True

    def _used(self) -> list:
        """The layers with keys and values of their own: some models let a layer read those of another (Gemma 3n)."""
        layers: Any = self.layers
        return [layer for layer in layers if layer.is_initialized]

    def grow(self, more: int) -> None:
        """Give all layers memory for so many tokens more. The layers take turns, so that little is there twice."""
        layer: Any  # a _PreallocatedLayer
        for layer in self._used():
            layer.keys = F.pad(layer.keys, (0, 0, 0, more))
            layer.values = F.pad(layer.values, (0, 0, 0, more))

    def move(self, holes: Any, movers: Any, count: int) -> None:
        """Remove finished rows from all layers; see `_moves`."""
        layer: Any  # a _PreallocatedLayer
        for layer in self._used():
            layer.keys, layer.values = (_moved(x, holes, movers, count) for x in (layer.keys, layer.values))


def common_prefix(prompts: list[list[int]]) -> int:
    """The length of the common prefix of all prompts, in tokens. Each prompt keeps at least one token of its own.

    0 for a single prompt.
    """
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # the common prefix of these two is common to all
    longest = min(map(len, prompts)) - 1
    return next((i for i in range(longest) if first[i] != last[i]), longest)


@contextlib.contextmanager
def _decode_attention(model):
    """Use matmul attention while completions are sampled, no matter how the model was loaded."""
    inner = unwrapped(model)
    before = inner.config._attn_implementation
    use_matmul_attention(inner)
    try:
        yield
    finally:
        if inner.config._attn_implementation != before:
            inner.set_attn_implementation(before)


def check_sampling(
    model: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    samples_per_prompt: int,
) -> None:
    context = context_length(model)
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {i} is empty: a model needs at least one token to go on from")
        if context and len(prompt) + max_new_tokens > context:
            room = context - len(prompt)
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones it does not fit into the "
                f"model's context of {context}: shorten it"
                + (f", or set max_new_tokens to at most {room}" if room > 0 else "")
            )
    for name, value, good in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("temperature", temperature, temperature >= 0),
        ("top_k", top_k, top_k >= 0),
        ("top_p", top_p, 0 < top_p <= 1),
        ("samples_per_prompt", samples_per_prompt, samples_per_prompt >= 1),
    ):
        if not good:
            raise UserError(f"{name} = {value!r} is out of range")
