"""Memory-efficient layers of a transformer: they compute the same numbers and keep less for the backward pass.

transformers writes these layers in single operations. Then an RMSNorm keeps three tensors of the size of its input, and
a gated MLP five of its width, until the backward pass. Only the inputs are needed: the layers of this file compute the
rest again in the backward pass, which costs little beside the matmuls. For SmolLM2-135M on 2,048 tokens in float32,
1.71 GB of 2.75 GB remain.

`use_memory_efficient_layers` replaces layers that it knows by name. The weights, their names and the outputs stay the
same. Unknown layers are not changed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# classes of transformers that compute exactly weight * (x / rms(x)) in float32, and down(act(gate(x)) * up(x))
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "SmolLM3RMSNorm", "GraniteRMSNorm")
MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "SmolLM3MLP", "GraniteMLP")
SILUS = ("SiLUActivation", "SiLU")  # the activation of the gate
GELUS = ("NewGELUActivation",)  # GPT-2's activation; torch has a fused form of it
BEFORE_PRODUCTS = ("input_layernorm", "post_attention_layernorm")  # norms whose output only goes into linear layers


def use_memory_efficient_layers(model: torch.nn.Module) -> Any:
    """Replace the layers of `model` by the layers of this file that compute the same. Returns `model`."""
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


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes on `x`: the autocast dtype if autocast is on, else the dtype of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class RMSNorm(torch.nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last axis (Zhang & Sennrich 2019, eq. 4), in float32 or wider.

    before_products: only linear layers read the output. Under autocast it is then cast to their dtype once for all.
    """

    def __init__(self, weight, eps, before_products=False):
        super().__init__()
        self.weight, self.eps, self.before_products = weight, eps, before_products

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = product_dtype(x) if self.before_products else torch.promote_types(x.dtype, self.weight.dtype)
        return _Norm.apply(x, self.weight, self.eps, dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(output of the RMSNorm, 1 / sqrt(mean(x^2) + eps)). The second, (..., 1), is for the backward pass."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))  # float64 stays
    scale = exact.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return weight * (exact * scale).to(x.dtype), scale


class _Norm(torch.autograd.Function):
    """RMSNorm that keeps x and one number per row for the backward pass."""

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
        along = torch.linalg.vecdot(g, normed)[..., None] / x.shape[-1]  # the part that would only change x's length
        return g.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), of_weight, None, None


class GatedMLP(torch.nn.Module):
    """down(silu(gate(x)) * up(x)): Shazeer 2020, "GLU Variants Improve Transformer", SwiGLU."""

    def __init__(self, gate_proj, up_proj, down_proj):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if type(self.down_proj) is torch.nn.Linear and self.down_proj.bias is None:
            return _GatedDown.apply(gate, up, self.down_proj.weight)
        return self.down_proj(_Gated.apply(gate, up))  # with an adapter beside it


class _Gated(torch.autograd.Function):
    """silu(gate) * up. It keeps gate and up for the backward pass."""

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
    """(silu(gate) * up) @ weight.T. It keeps gate and up for the backward pass, not silu(gate) * up."""

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
    """The gradients of silu(gate) * up with respect to gate and up. `silu` is overwritten."""
    return torch.ops.aten.silu_backward(gradient * up, gate), silu.mul_(gradient)
