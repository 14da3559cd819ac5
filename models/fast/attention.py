"""Attention: matmul attention on a CPU where PyTorch's fused kernels are slow, and PyTorch's kernels everywhere else.

Matmul attention (plain matrix products) is used on a CPU in two cases:

- Decoding, with one new token per row: two batched matmuls over the key-value heads are several times faster.
- bf16 and fp16: for rows of some hundred tokens, the backward pass of the kernel takes four times as long. Matmul
  attention computes the queries in blocks, each only with the keys that it sees. For a causal row of 512 tokens these
  are five eighths of the work. For a row of a prompt and eight completions, they are the keys of the prompt and of the
  block's own completions.

Everything else uses `scaled_dot_product_attention`, which is faster in float32 and on a GPU. On a GPU, cuDNN's kernel
is not used if there is a mask, because shapes then change from batch to batch.

A ragged batch (`Ragged`) holds rows of different lengths without padding. Only attention pads them; linear layers do
not.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from models.fast.layers import product_dtype

BLOCK = 128  # queries per block
MOST_WITH_GAPS = 0.75  # if a block sees at most this share of the keys between its first and last, it gathers them
ALIGNED = {"cpu": 1, "cuda": 16}  # the padded length is a multiple of this; else the kernel pads each layer's mask
HALVES = (torch.bfloat16, torch.float16)
NAME = "matmul"  # the name of matmul attention in transformers' table of attention functions
HAS_CUDNN = ("cuda",)
# PyTorch's kernels except cuDNN's, which makes a plan for each new shape: seconds for each batch with other lengths
OF_ANY_SHAPE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
BEYOND = ("is_causal", "position_bias", "softcap", "cache")  # arguments that matmul attention does not support


@dataclass(frozen=True)
class Ragged:
    """A ragged batch: where its N tokens stand in R padded rows of T places. The model gets it as `rows=`.

    padded: (R * T,), the index of the token in each place; any token where the place is padding.
    places: (N,), the place of each token. shape: (R, T).
    shared: the length of the common prefix of all rows. Its tokens are in the ragged batch once and stand in every
    padded row; `unpad` takes them from the first row. See `takes_ragged`.
    """

    padded: torch.Tensor
    places: torch.Tensor
    shape: tuple[int, int]  # R, T
    shared: int = 0

    @staticmethod
    def of(lengths: Sequence[int], device: torch.device | str, shared: int = 0) -> Ragged:
        """The `Ragged` for rows of these lengths. Each length includes the `shared` tokens."""
        places: Any  # a list, then a tensor
        aligned = ALIGNED[torch.device(device).type]
        width, places = -(-max(lengths) // aligned) * aligned, []
        for r, length in enumerate(lengths):
            places += range(r * width + (shared if r else 0), r * width + length)
        places = torch.tensor(places, device=device)
        padded = torch.zeros(len(lengths), width, dtype=torch.long, device=device)
        padded[:, :shared] = torch.arange(shared, device=device)
        padded.view(-1)[places] = torch.arange(len(places), device=device)
        return Ragged(padded.view(-1), places, (len(lengths), width), shared)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """(1, heads, N, D) as (R, heads, T, D)."""
        return _Padded.apply(x[0].transpose(0, 1), self).unflatten(0, self.shape).transpose(1, 2)

    def unpad(self, x: torch.Tensor) -> torch.Tensor:
        """(R, T, ...) as (1, N, ...)."""
        return _Unpadded.apply(x.flatten(0, 1), self)[None]


class _Padded(torch.autograd.Function):
    """x[rows.padded]. In the backward pass, padding gives no gradient, and a shared token gets the sum over all rows.

    The sum is computed in float32 or wider.
    """

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
    """x[rows.places]: each token once, a shared token from the first row. Padding gets gradient 0."""

    @staticmethod
    def forward(ctx, x, rows):
        ctx.rows = rows
        return x.index_select(0, rows.places)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        empty = gradient.new_zeros(len(ctx.rows.padded), *gradient.shape[1:])
        return empty.index_copy_(0, ctx.rows.places, gradient), None


def takes_ragged(model: Any) -> bool:
    """Whether the transformers model `model` uses matmul attention. Then its forward pass takes `rows=`."""
    return model.config._attn_implementation == NAME


def use_matmul_attention(model: Any) -> Any:
    """Replace PyTorch's attention kernel by `attention` in the transformers model `model`. Returns `model`.

    Architectures that do not support a custom attention function keep their own.
    """
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(NAME)
    return model


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    rows: Ragged | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """softmax(query key^T * scaling + mask) value. The arguments are those of an attention function of transformers.

    query: (B, heads, T, D). key, value: (B, kv_heads, L, D); each serves heads / kv_heads query heads.
    attention_mask: (B or 1, 1, T, L), bool (True is seen) or numbers added to the scores; None is causal.
    rows: a `Ragged`. Then B is 1, T = L is the number of tokens of the ragged batch, and the mask is that of the
    padded rows. Returns ((B, T, heads, D), None).
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


def mask_of_pass(*args, dtype: torch.dtype = torch.float32, **kwargs) -> torch.Tensor | None:
    """The mask of a forward pass. For matmul attention it is made additive here, once for all layers."""
    mask = sdpa_mask(*args, dtype=dtype, **kwargs)
    if mask is None or mask.device.type != "cpu":
        return mask
    dtype = product_dtype(torch.empty(0, dtype=dtype))
    return added_mask(mask, dtype) if dtype in HALVES else mask


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask_of_pass)


@functools.lru_cache(maxsize=1)
def causal_mask(length: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """An additive causal mask (1, 1, length, keys): each of the last `length` tokens sees itself and earlier tokens."""
    return added_mask(torch.ones(length, keys, dtype=torch.bool).tril(keys - length)[None, None], dtype)


def added_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn a bool mask (True where a key is seen) into numbers of `dtype` that are added to the scores.

    An additive mask is only cast to `dtype`. A key that is not seen gets a large negative number instead of -inf:
    with -inf, a padding row that sees no key would become NaN.
    """
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill_(~mask, torch.finfo(dtype).min / 2)


@functools.lru_cache(maxsize=1)  # a tensor is known by its identity: all layers of a pass get the same mask
def windowed(mask: torch.Tensor, window: int) -> torch.Tensor:
    """The mask, bool or additive, restricted to a window: each token sees the last `window` of its tokens, with itself.

    A token sees the tokens of its sequence in order, and itself last. So the number of seen tokens from a key on is the
    difference of positions plus one, wherever the tokens are in the row. A mask with this window does not change.
    """
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 4
    from_here = seen.flip(-1).cumsum(-1).flip(-1)
    kept = seen & (from_here <= window)
    return kept if mask.dtype == torch.bool else added_mask(kept, mask.dtype)


@dataclass(frozen=True)
class Block:
    """Queries that are computed together, and the keys that at least one of them sees in at least one row."""

    queries: slice  # of the T queries
    keys: slice | torch.Tensor  # of the L keys; an index tensor if there are gaps
    mask: torch.Tensor  # (B or 1, 1, queries, keys)
    length: int  # T

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """The part of x (B, kv_heads, T * group, ...) that belongs to the queries of this block."""
        group = x.shape[2] // self.length
        return x[:, :, self.queries.start * group : self.queries.stop * group]

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """The part of x (B, kv_heads, L, ...) that belongs to the keys of this block."""
        return x[:, :, self.keys] if isinstance(self.keys, slice) else x.index_select(2, self.keys)


class _Attention(torch.autograd.Function):
    """softmax(query key^T + mask) value. It keeps query, key, value and mask, and recomputes the probabilities.

    query: (B, kv_heads, T * group, D), already scaled; the queries of a group are next to each other.
    key, value: (B, kv_heads, L, D). mask: (B or 1, 1, T, L), additive; None: every key is seen.
    blocks: the result of `blocks_of`.
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
            of_query, of_key, of_value = _gradients(gradient, query, key, value, mask)
            return of_query, of_key, of_value, None, None
        exact = torch.promote_types(query.dtype, torch.float32)
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(x, dtype=exact) for x in (key, value))
        for b in ctx.blocks:
            of_rows, k, v = _gradients(b.rows(gradient), b.rows(query), b.seen(key), b.seen(value), b.mask)
            b.rows(of_query)[:] = of_rows
            of_key[:, :, b.keys] += k
            of_value[:, :, b.keys] += v
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None


def blocks_of(mask: torch.Tensor | None) -> list[Block] | None:
    """The `Block`s of an additive mask; None if one block would hold all queries."""
    return None if mask is None or mask.shape[2] <= BLOCK else _find_blocks(mask)


@functools.lru_cache(maxsize=1)  # as above
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
    """The attention probabilities (B, kv_heads, T * group, L). The softmax computes in float32 internally."""
    scores = query @ key.transpose(2, 3)
    if mask is not None:
        scores.view(*scores.shape[:2], mask.shape[2], -1, mask.shape[3]).add_(mask[:, :, :, None])
    return scores.softmax(-1)


def _gradients(gradient, query, key, value, mask):
    """The gradients of query, key and value."""
    p = _probabilities(query, key, mask)
    of_value = p.transpose(2, 3) @ gradient
    of_scores = torch.ops.aten._softmax_backward_data(gradient @ value.transpose(2, 3), p, -1, p.dtype)
    return of_scores @ key, of_scores.transpose(2, 3) @ query, of_value
