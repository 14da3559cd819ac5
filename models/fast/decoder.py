"""One new token a row through a model of the Llama family, in as few operations as that takes.

While completions are sampled, a token of a small model is a thousand small operations: what they cost to start, and to lay
weights out anew for each product, is as much as the products themselves. So here queries, keys and values are one
product, as are the two halves of the MLP; in bf16 on a CPU the weights are laid out once, as oneDNN reads them; masks
and angles are made once for all layers. On a GPU all operations of a token are started as one (`CudaGraphDecoder`). The numbers
are those of transformers' forward pass, but for the order of sums.

`decoder_for` takes the models whose layers are known here; all others go through transformers.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch.nn import Linear

from models.fast.attention import added_mask
from models.fast.layers import GatedMLP, RMSNorm, rms_norm

ROWS = 32  # that the layout is made for; it does for others, too


def decoder_for(model):
    """A `Decoder` of `model`, or None where a part of it is not what is computed here: an adapter, a bias, a hook."""
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
    """Reads the weights of `model` as they are now; what it lays out anew is as large as the model.

    decoder(token, positions, place, seen, layers) -> logits (B, V). token, positions: (B,). place: (1,), where the new
    token goes in the cache. seen: (B, capacity) bool, True where a row sees a place, the new one among them. layers:
    the cache's, each with `keys` and `values` (B, kv_heads, capacity, D), which receive those of the new token.
    """

    def __init__(self, model):
        body, config = model.model, model.config
        self.embedding, self.angles, self.norm = body.embed_tokens.weight, body.rotary_emb, body.norm
        # whether a token's operations are the same each time: angles that depend on the length ask for it
        self.graphable = body.rotary_emb.rope_type not in ("dynamic", "longrope")
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.scaling, self.size = body.layers[0].self_attn.scaling, body.layers[0].self_attn.head_dim
        self.head = _product(model.lm_head)
        self.layers = []
        for layer in body.layers:
            q, k, v, out, gate, up, down = _linears(layer)
            norms = layer.input_layernorm, layer.post_attention_layernorm
            self.layers.append((*norms, _product(q, k, v), _product(out), _product(gate, up), _product(down)))

    @torch.inference_mode()  # which starts an operation sooner than no_grad
    def __call__(self, token, positions, place, seen, layers):
        rows, half = len(token), self.size // 2
        x = F.embedding(token, self.embedding)  # (B, H)
        cos, sin = self.angles(x, positions[:, None])  # (B, 1, D)
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)  # (-b, a) * sin is (b, a) * this
        mask = added_mask(seen, x.dtype).repeat_interleave(self.kv_heads, 0)[:, None]  # (B * kv_heads, 1, capacity)
        for (before, after, qkv, out, gate_up, down), cache in zip(self.layers, layers):
            heads = qkv(_normed(x, before)).unflatten(-1, (-1, self.size))  # of queries, keys, values: (B, all, D)
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
    """A decoder whose operations on a GPU are recorded once, as a CUDA graph, and then started as one.

    To start a thousand kernels takes Python three times as long as the GPU takes to run them. A graph reads and writes
    fixed memory: the arguments are copied into it, `seen` and the cache are that of one batch, whose rows may leave at
    its end; then a smaller graph is recorded.
    """

    def __init__(self, decoder):
        self.decoder, self.given = decoder, None

    def __call__(self, token, positions, place, seen, layers):
        new = (token, positions, place)
        if self.given is None or len(token) != len(self.given[0]):
            self.given = given = [x.clone() for x in new]
            self.replay, self.logits = record(lambda: self.decoder(*given, seen, layers), token.device)
        for mine, x in zip(self.given, new):
            mine.copy_(x)
        self.replay()
        return self.logits


def record(run, device):
    """(replay, result): replay() does the GPU's work of run() again, in the same memory, and writes the result anew.

    As `torch.cuda.graph` does it, but for emptying the allocator's cache, which the passes after sampling would fill
    again.
    """
    graph, stream, kind = torch.cuda.CUDAGraph(), side_stream(device), torch.get_autocast_dtype("cuda")
    stream.wait_stream(torch.cuda.current_stream(device))
    # casts of weights belong into the graph: of those that autocast keeps, it would read memory that is gone
    autocast = torch.autocast("cuda", kind, torch.is_autocast_enabled("cuda"), cache_enabled=False)
    with torch.cuda.stream(stream), autocast:
        run()  # what libraries set up at their first use cannot be recorded
        stream.synchronize()
        graph.capture_begin()
        try:
            result = run()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # the recording is spoilt; what spoilt it is said
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay, result


@functools.cache
def side_stream(device):
    """One stream for all recordings: each that is used keeps a workspace of cuBLAS for good."""
    return torch.cuda.Stream(device)


def _normed(x, norm):
    return rms_norm(x, norm.weight, norm.eps)[0]


def _product(*linears):
    """x -> what these layers make of x, side by side.

    In bf16 on a CPU as one product, of a weight as oneDNN lays it out; on a GPU as one, of all weights in one.
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
def packs():
    """Whether torch lays weights out for oneDNN here: a way of its own compiler, which it does not promise to keep."""
    weight, x = torch.eye(16, dtype=torch.bfloat16), torch.ones(2, 16, dtype=torch.bfloat16)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), x)
    except (AttributeError, RuntimeError, TypeError):
        return False
