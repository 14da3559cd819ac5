"""A memory-efficient LoRA layer: the output of the adapter is added into the output of the base in place.

peft computes base(x) + B(A(x)) * scaling in single operations. Under autocast it copies x to float32 and back for each
adapter, and it makes three tensors as large as the output: the product, its scaled copy and the sum. Here there are
none of them.

`use_memory_efficient_adapters` gives peft's layers this forward pass. The weights, their names, the saved files and
peft's methods (merge, disable, switch adapters) stay the same. `add_adapter` adds one to a model.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch.autograd.function import once_differentiable

from configs.config import UserError
from models.fast.head import hidden_states, unsupported
from models.fast.layers import product_dtype
from models.fast.quantised import QuantisedLinear, dequantise


def add_adapter(model: torch.nn.Module, r: int, alpha: float, **options) -> Any:
    """Freeze `model` and add a LoRA adapter of rank r to each linear layer except the head. Returns a PEFT model.

    alpha: the adapter's output is scaled by alpha / r. options: of peft's LoraConfig. A is drawn from torch's global
    generator, B is 0.
    Raises UserError if peft cannot put an adapter into this architecture.
    """
    from peft import LoraConfig, get_peft_model

    def adapted(exclude):
        settings = LoraConfig(
            r=r, lora_alpha=alpha, target_modules="all-linear", exclude_modules=exclude or None, **options
        )
        return use_memory_efficient_adapters(get_peft_model(model, settings))

    linear = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    # a router of experts is a subclass that returns more than x @ W^T + bias
    plain = (torch.nn.Linear.forward, QuantisedLinear.forward)
    exclude = [name for name, layer in linear if type(layer).forward not in plain]
    model.requires_grad_(False)
    try:
        found = adapted(exclude)
        useless = without_effect(found)
        if useless:
            found.unload()
            found = adapted(exclude + useless)
    except Exception as error:
        if not unsupported(error):
            raise
        raise UserError(f"peft cannot put an adapter into {type(model).__name__}: {error}. Try --lora_r 0") from None
    return found


def without_effect(model: Any) -> list[str]:
    """The names of the adapted linear layers whose weight the base model reads without calling the layer.

    The adapter of such a layer has no effect while it trains, but it would have one once it is merged. Jamba has one in
    each recurrent layer.
    """
    base = model.get_base_model()
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, Linear)}
    embedding, called = base.get_input_embeddings().weight, set()
    if embedding.device.type == "meta":  # models/plan.py: nothing can be run
        return []
    row = torch.arange(2, device=embedding.device)[None] % len(embedding)
    hooks = [x.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, x in layers.items()]
    with torch.no_grad():
        hidden_states(model, row)
    for hook in hooks:
        hook.remove()
    silent = [name for name in layers if name not in called]
    if not silent:
        return []
    odd = next((name for name in silent if isinstance(layers[name].base_layer, QuantisedLinear)), None)
    if odd:
        raise UserError(
            f"a forward pass of {type(base).__name__} does not call its layer {odd}: such a model cannot be trained "
            "on a base of 4 or 8 bits"
        )
    weights: list[Any] = [layers[name].base_layer.weight for name in silent]
    for weight in weights:  # of idle experts, too: those get no gradient
        weight.requires_grad_(True)
    with torch.enable_grad():
        states = hidden_states(model, row).float().square().sum()
        gradients = torch.autograd.grad(states, weights, allow_unused=True)
    for weight in weights:
        weight.requires_grad_(False)
    return [name for name, gradient in zip(silent, gradients) if gradient is not None]


def use_memory_efficient_adapters(model: torch.nn.Module) -> Any:
    """Give the plain LoRA layers of a PEFT model the forward pass of this file. Returns `model`."""
    for layer in model.modules():
        if type(layer) is Linear and type(layer.base_layer) in (torch.nn.Linear, QuantisedLinear):
            layer.__class__ = MemoryEfficientLinear
    return model


def merged(model: Any) -> Any:
    """The plain transformers model with the adapter of a PEFT model folded in. A base of 4 or 8 bits is made plain."""
    dtype = model.get_input_embeddings().weight.dtype
    return dequantise(model, dtype).merge_and_unload()


class MemoryEfficientLinear(Linear):
    """base(x) + B(A(x)) * scaling (Hu et al. 2022, eq. 3), for one adapter on a frozen base; else peft's forward."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1 or args or kwargs or not self._plain(names[0], x):
            return super().forward(x, *args, **kwargs)
        base, a, b = self.base_layer, self.lora_A[names[0]].weight, self.lora_B[names[0]].weight
        if isinstance(base, QuantisedLinear):
            return _Lora.apply(x, base, base.bias, a, b, self.scaling[names[0]], base.matmul_dtype(x)).to(
                product_dtype(x)
            )
        return _Lora.apply(x, base.weight, base.bias, a, b, self.scaling[names[0]], product_dtype(x))

    def _plain(self, name, x):
        """Whether the plain equation applies: no dropout, bias or peft variant, a frozen base that takes x uncast."""
        dropout, base = self.lora_dropout[name], self.base_layer
        takes = torch.is_autocast_enabled(x.device.type) or isinstance(base, QuantisedLinear)
        return (
            (isinstance(dropout, torch.nn.Identity) or not dropout.training)
            and name not in self.lora_variant
            and not self.lora_bias[name]
            and (isinstance(base, QuantisedLinear) or not base.weight.requires_grad)
            and (takes or x.dtype == base.weight.dtype)
        )


class _Lora(torch.autograd.Function):
    """x W^T + bias + scaling x A^T B^T. It keeps x and x A^T for the backward pass. All matmuls are in `dtype`.

    base: W, or the `QuantisedLinear` that makes it, once more in the backward pass.
    """

    @staticmethod
    def forward(ctx, x, base, bias, a, b, scaling, dtype):
        ctx.base = base if isinstance(base, QuantisedLinear) else None
        weight = base.to(dtype) if ctx.base is None else base.dequantised(dtype)
        rows = x.flatten(0, -2).to(dtype)
        a_cast, b_cast = a.to(dtype), (b * scaling).to(dtype)
        inner = rows @ a_cast.T  # (n, r)
        # in the shape of x from the start: the model may change this output in place, which autograd denies to a view
        out = torch.nn.functional.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))
        ctx.save_for_backward(rows, inner, weight if ctx.base is None else None, a_cast, b_cast)
        ctx.scaling, ctx.types = scaling, (x.dtype, a.dtype, b.dtype)
        out.view(len(rows), -1).addmm_(inner, b_cast.T)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows, inner, weight, a, b = ctx.saved_tensors
        of_x, of_a, of_b, (x_type, a_type, b_type) = None, None, None, ctx.types
        g = gradient.flatten(0, -2)
        of_inner = g @ b
        if ctx.needs_input_grad[0]:
            weight = weight if ctx.base is None else ctx.base.dequantised(g.dtype)
            of_x = (g @ weight).addmm_(of_inner, a).view(*gradient.shape[:-1], -1).to(x_type)
        if ctx.needs_input_grad[3]:
            of_a = (of_inner.T @ rows).to(a_type)
        if ctx.needs_input_grad[4]:
            of_b = (g.T @ inner).to(b_type).mul_(ctx.scaling)
        return of_x, None, None, of_a, of_b, None, None
