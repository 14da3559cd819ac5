"""One decoding step (one new token per row) of a Llama model, in as few operations as possible.

One decoding step of a small model is about a thousand small operations. Starting them, and changing the layout of the
weights for each matmul, costs as much as the matmuls themselves. Therefore this file

- computes queries, keys and values in one matmul, and both halves of the MLP in another;
- packs bf16 weights on a CPU once, in the layout of oneDNN;
- makes masks and rotary angles once for all layers;
- runs all operations of a step as one CUDA graph on a GPU (`CudaGraphDecoder`).

The results equal transformers' forward pass up to the order of sums. `decoder_for` accepts models whose layers this
file knows. All other models go through transformers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn import Linear

from models.fast.attention import added_mask
from models.fast.layers import GatedMLP, RMSNorm, rms_norm

ROWS = 32  # the batch size that the packed layout is made for; other batch sizes work, too


def decoder_for(model: Any) -> Decoder | None:
    """A `Decoder` of `model`. None if a part of the model is not supported here: an adapter, a bias, a hook."""
    if type(model).__name__ != "LlamaForCausalLM" or model.device.type not in ("cpu", "cuda"):
        return None
    body, layers = model.model, model.model.layers
    linears = [model.lm_head, *(linear for layer in layers for linear in _linears(layer))]
    norms = [body.norm, *(norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm))]
    known = all(type(x) is Linear and x.bias is None for x in linears) and all(type(x) is RMSNorm for x in norms)
    known = known and all(type(layer.mlp) is GatedMLP for layer in layers)
    hooked = any(x._forward_hooks or x._forward_pre_hooks for x in model.modules())
    return Decoder(model) if known and not hooked else None


def _linears(layer):
    attention, mlp = layer.self_attn, layer.mlp
    of_attention = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return [*of_attention, mlp.gate_proj, mlp.up_proj, mlp.down_proj]


class Decoder:
    """One decoding step with the current weights of `model`. Its packed copy of the weights is as large as the model.

    decoder(token, positions, place, seen, layers) -> logits (B, V). token, positions: (B,). place: (1,), the place of
    the new token in the cache. seen: (B, capacity) bool, True where a row sees a place; the new place is seen, too.
    layers: the layers of the cache, each with `keys` and `values` (B, kv_heads, capacity, D). The step writes the keys
    and values of the new token into them.
    """

    def __init__(self, model):
        body, config = model.model, model.config
        self.embedding, self.angles, self.norm = body.embed_tokens.weight, body.rotary_emb, body.norm
        # whether every step runs the same operations: rotary angles that depend on the length read it on the CPU
        self.graphable = body.rotary_emb.rope_type not in ("dynamic", "longrope")
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scaling, self.size = body.layers[0].self_attn.scaling, body.layers[0].self_attn.head_dim
        self.head = _product(model.lm_head)
        self.layers = []
        for layer in body.layers:
            q, k, v, out, gate, up, down = _linears(layer)
            norms = layer.input_layernorm, layer.post_attention_layernorm
            self.layers.append((*norms, _product(q, k, v), _product(out), _product(gate, up), _product(down)))

    @torch.inference_mode()  # starts an operation faster than no_grad
    def __call__(self, token, positions, place, seen, layers):
        rows, half = len(token), self.size // 2
        x = F.embedding(token, self.embedding)  # (B, H)
        cos, sin = self.angles(x, positions[:, None])  # (B, 1, D)
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)  # (-b, a) * sin is (b, a) * this
        mask = added_mask(seen, x.dtype).repeat_interleave(self.kv_heads, 0)[:, None]  # (B * kv_heads, 1, capacity)
        for (before, after, qkv, out, gate_up, down), cache in zip(self.layers, layers):
            heads = qkv(_normed(x, before)).unflatten(-1, (-1, self.size))  # queries, keys, values: (B, all heads, D)
            turned, values = heads[:, : -self.kv_heads], heads[:, -self.kv_heads :]
            turned = (turned * cos).add_(turned.roll(half, -1).mul_(sin))
            cache.keys.index_copy_(2, place, turned[:, self.heads :, None])
            cache.values.index_copy_(2, place, values[:, :, None])
            query = (turned[:, : self.heads] * self.scaling).view(len(mask), -1, self.size)
            keys, values = cache.keys.flatten(0, 1), cache.values.flatten(0, 1)
            p = torch.bmm(query, keys.transpose(1, 2)).add_(mask).softmax(-1)
            x = x + out(torch.bmm(p, values).view(rows, -1))
            gate, up = gate_up(_normed(x, after)).chunk(2, -1)
            x = x + down(F.silu(gate).mul_(up))
        return self.head(_normed(x, self.norm))


class CudaGraphDecoder:
    """A decoder that captures its operations on a GPU once, as a CUDA graph, and then replays the graph.

    Python needs three times as long to start a thousand kernels as the GPU needs to run them. A CUDA graph reads and
    writes fixed memory. So `token`, `positions` and `place` are copied into fixed tensors, and `seen` and `layers` are
    those of one batch. When rows leave at the end of the batch, or its cache grows, another graph is captured.
    """

    def __init__(self, decoder):
        self.decoder, self.shape = decoder, None  # (rows, capacity) of the graph

    def __call__(self, token, positions, place, seen, layers):
        new = (token, positions, place)
        if seen.shape != self.shape:
            self.shape = seen.shape
            self.given = given = [x.clone() for x in new]
            self.replay, self.logits = record(lambda: self.decoder(*given, seen, layers), token.device)
        for mine, x in zip(self.given, new):
            mine.copy_(x)
        self.replay()
        return self.logits


def record(run: Callable, device: torch.device) -> tuple[Callable, Any]:
    """Capture run() as a CUDA graph. Returns (replay, result): replay() repeats the GPU work and updates `result`.

    It works like `torch.cuda.graph`, but does not empty the allocator's cache, because the passes after sampling would
    have to fill it again.
    """
    graph, stream, kind = torch.cuda.CUDAGraph(), side_stream(device), torch.get_autocast_dtype("cuda")
    stream.wait_stream(torch.cuda.current_stream(device))
    # the graph must include the casts of weights: autocast's cached casts are freed, and the graph would read them
    autocast = torch.autocast("cuda", kind, torch.is_autocast_enabled("cuda"), cache_enabled=False)
    with torch.cuda.stream(stream), autocast:
        run()  # libraries set themselves up at their first use; a graph cannot capture that
        stream.synchronize()
        graph.capture_begin()
        try:
            result = run()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the capture has failed; the first error is raised below
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay, result


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One CUDA stream for all captures: each stream that is used keeps a cuBLAS workspace until the process ends."""
    return torch.cuda.Stream(device)


def _normed(x, norm):
    return rms_norm(x, norm.weight, norm.eps)[0]


def _product(*linears):
    """A function of x that returns the concatenated outputs of these linear layers.

    In bf16 on a CPU it is one matmul with a weight in oneDNN's layout. On a GPU it is one matmul with the concatenated
    weights. Elsewhere it is one matmul per layer.
    """
    weights = [linear.weight for linear in linears]
    if weights[0].device.type == "cuda" and len(weights) > 1:
        weights = [torch.cat(weights)]
    elif weights[0].device.type == "cpu" and weights[0].dtype == torch.bfloat16 and packs():
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat(weights), ROWS)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    if len(weights) == 1:
        return lambda x: F.linear(x, weights[0])
    return lambda x: torch.cat([F.linear(x, w) for w in weights], -1)


@functools.cache
def packs() -> bool:
    """Whether torch can pack weights for oneDNN here. The operation is internal to torch's compiler and may change."""
    weight, x = torch.eye(16, dtype=torch.bfloat16), torch.ones(2, 16, dtype=torch.bfloat16)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), x)
    except (AttributeError, RuntimeError, TypeError):
        return False
