"""Attention as PyTorch's fused kernels do it, but for where they are slow: there on a CPU as plain matrix products.

- One new token a row, as in decoding: two batched products over the key-value heads are several times as fast.
- bf16 and fp16: for rows of some hundred tokens the kernel's backward pass takes four times as long as the products.
  They go over the queries in blocks, each with the keys that it can see: of a causal row of 512 tokens, five eighths;
  of a row of a prompt and eight completions, the prompt and the block's own.

Everything else goes to `scaled_dot_product_attention`, which is the faster one in float32 and on a GPU; there not to
cuDNN's kernel where a mask says that shapes will change.

Rows of different length may come end to end (`Ragged`): then attention alone pads them, and no linear layer does.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from models.fast.layers import product_dtype

BLOCK = 128  # queries
MOST_WITH_GAPS = 0.75  # of the keys from the first to the last that a block sees: up to so many are picked out
ALIGNED = {"cpu": 1, "cuda": 16}  # places of a padded row: a multiple of it, or the kernel pads each layer's mask
HALVES = (torch.bfloat16, torch.float16)
NAME = "products"  # of this implementation in transformers' table of them
HAS_CUDNN = ("cuda",)
# PyTorch's kernels but cuDNN's, which makes a plan for each new shape: seconds for every batch of other lengths
OF_ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
BEYOND = ("is_causal", "position_bias", "softcap", "cache")  # what a model may ask for and the products do not do


@dataclass(frozen=True)
class Ragged:
    """Where N tokens that lie end to end stand in R padded rows of T. Goes to the model as `rows=`, see `takes_ragged`.

    padded: (R * T,) the token of each place, any one where the place is padding. places: (N,) the place of each token.
    The first `shared` tokens, with which all rows begin, are there once: they stand in every row, and what comes back
    is that of the first.
    """

    padded: torch.Tensor
    places: torch.Tensor
    shape: tuple[int, int]  # R, T
    shared: int = 0

    @staticmethod
    def of(lengths, device, shared=0):
        """For rows of these lengths, the `shared` tokens of each among them."""
        aligned = ALIGNED[torch.device(device).type]
        width, places = -(-max(lengths) // aligned) * aligned, []
        for r, length in enumerate(lengths):
            places += range(r * width + (shared if r else 0), r * width + length)
        places = torch.tensor(places, device=device)
        padded = torch.zeros(len(lengths), width, dtype=torch.long, device=device)
        padded[:, :shared] = torch.arange(shared, device=device)
        padded.view(-1)[places] = torch.arange(len(places), device=device)
        return Ragged(padded.view(-1), places, (len(lengths), width), shared)

    def pad(self, x):
        """(1, heads, N, D) as (R, heads, T, D)."""
        return _Padded.apply(x[0].transpose(0, 1), self).unflatten(0, self.shape).transpose(1, 2)

    def unpad(self, x):
        """(R, T, ...) as (1, N, ...)."""
        return _Unpadded.apply(x.flatten(0, 1), self)[None]


class _Padded(torch.autograd.Function):
    """x[rows.padded]: padding gives no gradient, a shared token gets that of all rows, added up in float32 at least."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.rows = rows
        return x.index_select(0, rows.padded)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows = ctx.rows
        found = gradient.index_select(0, rows.places)
        if rows.shared:
            exact = torch.promote_types(gradient.dtype, torch.float32)
            found[: rows.shared] = gradient.unflatten(0, rows.shape)[:, : rows.shared].sum(0, dtype=exact)
        return found, None


class _Unpadded(torch.autograd.Function):
    """x[rows.places], which takes each token once: of padding, and of a shared token but in the first row, nothing."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.rows = rows
        return x.index_select(0, rows.places)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        empty = gradient.new_zeros(len(ctx.rows.padded), *gradient.shape[1:])
        return empty.index_copy_(0, ctx.rows.places, gradient), None


def takes_ragged(model):
    """Whether `model`, of transformers, attends by this file, so that it takes `rows=`."""
    return model.config._attn_implementation == NAME


def use_matmul_attention(model):
    """Let `model`, of transformers, attend by this file where it would call PyTorch's kernel; returns it.

    Architectures that do not hand all that a pass is given on to an attention function of choice keep their own.
    """
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(NAME)
    return model


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, rows=None, **kwargs):
    """softmax(query key^T * scaling + mask) value, with what transformers hands to an attention function.

    query: (B, heads, T, D). key, value: (B, kv_heads, L, D), each for heads / kv_heads query heads.
    attention_mask: (B or 1, 1, T, L), bool (True is seen) or added to the scores; None is causal.
    rows: B is 1 and T = L the tokens of R rows end to end; the mask is that of the padded rows.
    Returns ((B, T, heads, D), None).
    """
    if rows is not None:
        query, key, value = (rows.pad(x) for x in (query, key, value))
        out, _ = attention(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
        return rows.unpad(out), None
    window = kwargs.get("sliding_window")
    if window and attention_mask is not None and attention_mask.shape[-1] > window:
        attention_mask = windowed(attention_mask, window)
    dtype = product_dtype(query)
    decoding = query.shape[2] == 1 and not torch.is_grad_enabled()
    here = query.device.type == "cpu" and (decoding or dtype in HALVES)
    beyond = dropout or getattr(module, "is_causal", True) is False or any(kwargs.get(x) is not None for x in BEYOND)
    if beyond or not here:
        varied = query.device.type in HAS_CUDNN and attention_mask is not None
        with sdpa_kernel(OF_ANY_SHAPE) if varied else contextlib.nullcontext():
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
    _, heads, length, size = query.shape
    group = heads // key.shape[1]
    scaling = size**-0.5 if scaling is None else scaling
    grouped = (query.to(dtype) * scaling).unflatten(1, (-1, group)).transpose(2, 3).flatten(2, 3)
    if attention_mask is None:
        mask = causal_mask(length, key.shape[2], dtype) if length > 1 else None
    else:
        mask = added_mask(attention_mask, dtype)
    out = _Attention.apply(grouped, key.to(dtype), value.to(dtype), mask, blocks_of(mask))
    return out.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3), None


def mask_of_pass(*args, dtype=torch.float32, **kwargs):
    """The mask that transformers makes for a pass; where the products add it, in that form, once for all layers."""
    mask = sdpa_mask(*args, dtype=dtype, **kwargs)
    if mask is None or mask.device.type != "cpu":
        return mask
    dtype = product_dtype(torch.empty(0, dtype=dtype))
    return added_mask(mask, dtype) if dtype in HALVES else mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask_of_pass)


@functools.lru_cache(maxsize=1)
def causal_mask(length, keys, dtype):
    """(1, 1, length, keys), added: each of the last `length` of `keys` tokens sees itself and those before it."""
    return added_mask(torch.ones(length, keys, dtype=torch.bool).tril(keys - length)[None, None], dtype)


def added_mask(mask, dtype):
    """A mask, True where a key is seen, as what is added to the scores; one that is that already, in `dtype`.

    What is not seen gets a large negative number, not -inf: padding that sees nothing at all must not become NaN.
    """
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill_(~mask, torch.finfo(dtype).min / 2)


@functools.lru_cache(maxsize=4)  # a tensor is known by its identity: all layers of a pass get the same mask
def windowed(mask, window):
    """A mask, bool or added, in which each token sees only the last `window` of the tokens that it sees, with itself.

    A token sees its row's tokens in their order, and itself as the last. So the number of tokens seen from a key on is
    the difference of their positions plus one, wherever they stand in the row; a mask that has the window stays.
    """
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 4
    from_here = seen.flip(-1).cumsum(-1).flip(-1)
    kept = seen & (from_here <= window)
    return kept if mask.dtype == torch.bool else added_mask(kept, mask.dtype)


@dataclass(frozen=True)
class Block:
    """Queries that are computed together, and the keys that any of them sees in any row of the batch."""

    queries: slice  # of T
    keys: slice | torch.Tensor  # of L: an index where there are gaps
    mask: torch.Tensor  # (B or 1, 1, queries, keys)
    length: int  # T

    def rows(self, x):
        """This block's part of the axis T * group of x."""
        group = x.shape[2] // self.length
        return x[:, :, self.queries.start * group : self.queries.stop * group]

    def seen(self, x):
        """The keys' part of the third axis of x."""
        return x[:, :, self.keys] if isinstance(self.keys, slice) else x.index_select(2, self.keys)


class _Attention(torch.autograd.Function):
    """softmax(query key^T + mask) value, which keeps these four: the probabilities are computed again.

    query: (B, kv_heads, T * group, D), scaled, the queries of a group next to each other. key, value: (B, kv_heads, L,
    D). mask: (B or 1, 1, T, L), or None: all is seen. blocks: those of `blocks_of`.
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, blocks):
        ctx.save_for_backward(query, key, value, mask)
        ctx.blocks = blocks
        if not blocks:
            return _probabilities(query, key, mask) @ value
        out = torch.empty_like(query)
        for b in blocks:
            b.rows(out)[:] = _probabilities(b.rows(query), b.seen(key), b.mask) @ b.seen(value)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, value, mask = ctx.saved_tensors
        if not ctx.blocks:
            return *_gradients(gradient, query, key, value, mask), None, None
        exact = torch.promote_types(query.dtype, torch.float32)
        of_query, of_key, of_value = torch.empty_like(query), *(torch.zeros_like(x, dtype=exact) for x in (key, value))
        for b in ctx.blocks:
            of_rows, k, v = _gradients(b.rows(gradient), b.rows(query), b.seen(key), b.seen(value), b.mask)
            b.rows(of_query)[:] = of_rows
            of_key[:, :, b.keys] += k
            of_value[:, :, b.keys] += v
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None


def blocks_of(mask):
    """The `Block`s of an added mask; None where one would hold all its queries."""
    return None if mask is None or mask.shape[2] <= BLOCK else _find_blocks(mask)


@functools.lru_cache(maxsize=4)  # all layers of a pass get the same mask, or one a kind of layer
def _find_blocks(mask):
    seen_at_all = (mask > torch.finfo(mask.dtype).min / 4).flatten(0, 1).any(0)  # (T, L)
    length, found = len(seen_at_all), []
    for start in range(0, length, BLOCK):
        queries = slice(start, min(start + BLOCK, length))
        index = seen_at_all[queries].any(0).nonzero()[:, 0]
        if not len(index):  # all of it is padding
            index = torch.zeros(1, dtype=torch.long)
        keys = slice(index[0].item(), index[-1].item() + 1)
        if len(index) <= MOST_WITH_GAPS * (keys.stop - keys.start):
            keys = index
        found.append(Block(queries, keys, mask[:, :, queries][..., keys].contiguous(), length))
    return found


def _probabilities(query, key, mask):
    """(B, kv_heads, T * group, L); the softmax itself computes in float32."""
    scores = query @ key.transpose(2, 3)
    if mask is not None:
        scores.view(*scores.shape[:2], mask.shape[2], -1, mask.shape[3]).add_(mask[:, :, :, None])
    return scores.softmax(-1)


def _gradients(gradient, query, key, value, mask):
    """Those of query, key and value."""
    p = _probabilities(query, key, mask)
    of_value = p.transpose(2, 3) @ gradient
    of_scores = torch.ops.aten._softmax_backward_data(gradient @ value.transpose(2, 3), p, -1, p.dtype)
    return of_scores @ key, of_scores.transpose(2, 3) @ query, of_value
