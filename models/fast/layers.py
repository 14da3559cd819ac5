"""Layers of a transformer that keep less for the backward pass: the same numbers from less memory.

Written out in single operations, as transformers has them, an RMSNorm keeps three tensors of its input's size and a
gated MLP five of its width until the backward pass. What each needs is its input: the rest is computed again on the way
back, in passes over a tensor that cost little beside the matrix products. Of SmolLM2-135M on 2,048 tokens in float32
that leaves 1.71 GB of 2.75 GB.

`use_memory_efficient_layers` puts these layers into a model in place of those whose equation it knows by name; weights, their names and
what comes out stay. It leaves alone what it does not know.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# weight * (x / rms(x)) in float32, and down(act(gate(x)) * up(x)): classes of transformers that are exactly this
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "SmolLM3RMSNorm", "GraniteRMSNorm")
MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "SmolLM3MLP", "GraniteMLP")
SILUS = ("SiLUActivation", "SiLU")  # what the gate goes through
GELUS = ("NewGELUActivation",)  # GPT-2's, of which torch has a fused form
BEFORE_PRODUCTS = ("input_layernorm", "post_attention_layernorm")  # norms whose output goes into linear layers alone


def use_memory_efficient_layers(model):
    """Put the layers of this file in place of those of `model` that compute the same; returns `model`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            kind = type(child).__name__
            if kind in NORMS:
                setattr(parent, name, RMSNorm(child.weight, child.variance_epsilon, name in BEFORE_PRODUCTS))
            elif kind in MLPS and type(child.act_fn).__name__ in SILUS:
                setattr(parent, name, GatedMLP(child.gate_proj, child.up_proj, child.down_proj))
            elif kind in GELUS:
                setattr(parent, name, torch.nn.GELU(approximate="tanh"))
    return model


def product_dtype(x):
    """The dtype in which a linear layer reads `x`: that of autocast where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class RMSNorm(torch.nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis (Zhang & Sennrich 2019, eq. 4), in float32 at least.

    before_products: only linear layers read the output, so under autocast it comes in their dtype: one copy for all.
    """

    def __init__(self, weight, eps, before_products=False):
        super().__init__()
        self.weight, self.eps, self.before_products = weight, eps, before_products

    def forward(self, x):
        dtype = product_dtype(x) if self.before_products else torch.promote_types(x.dtype, self.weight.dtype)
        return _Norm.apply(x, self.weight, self.eps, dtype)


def rms_norm(x, weight, eps):
    """The equation, and 1 / sqrt(mean(x^2) + eps), (..., 1), for the backward pass."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))  # float64 stays
    scale = exact.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return weight * (exact * scale).to(x.dtype), scale


class _Norm(torch.autograd.Function):
    """Keeps x and one number a row."""

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        out, scale = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        of_weight = (gradient * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        g = gradient * weight.to(scale.dtype)
        along = torch.linalg.vecdot(g, normed)[..., None] / x.shape[-1]  # what would only change the length of x
        return g.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), of_weight, None, None


class GatedMLP(torch.nn.Module):
    """down(silu(gate(x)) * up(x)): Shazeer 2020, "GLU Variants Improve Transformer", SwiGLU."""

    def __init__(self, gate_proj, up_proj, down_proj):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        if type(self.down_proj) is torch.nn.Linear and self.down_proj.bias is None:
            return _GatedDown.apply(gate, up, self.down_proj.weight)
        return self.down_proj(_Gated.apply(gate, up))  # with an adapter beside it


class _Gated(torch.autograd.Function):
    """silu(gate) * up, which keeps these two."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        return _backward_gated(gradient, gate, up, F.silu(gate))


class _GatedDown(torch.autograd.Function):
    """(silu(gate) * up) @ weight.T, which keeps gate and up and not their product."""

    @staticmethod
    def forward(ctx, gate, up, weight):
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight.to(gate.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gate, up, weight = ctx.saved_tensors
        silu, of_weight = F.silu(gate), None
        if ctx.needs_input_grad[2]:
            of_weight = (gradient.flatten(0, -2).T @ (silu * up).flatten(0, -2)).to(weight.dtype)
        return *_backward_gated(gradient @ weight.to(gate.dtype), gate, up, silu), of_weight


def _backward_gated(gradient, gate, up, silu):
    """Gradients of silu(gate) * up with respect to gate and up; `silu` is overwritten."""
    return torch.ops.aten.silu_backward(gradient * up, gate), silu.mul_(gradient)
