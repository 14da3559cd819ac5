"""Linear layers with frozen weights of 4 or 8 bits, and the base of QLoRA (Dettmers et al. 2023, arXiv:2305.14314).

`quantise` replaces the linear layers of a frozen model, except the head. bitsandbytes rounds the weights and makes
them again: NF4 or FP4 in blocks of 64, or 8 bits with one scale for each row. A pass makes the weight of one layer at a
time, in the dtype of the matmul. The backward pass makes it once more instead of keeping it.

Only these functions of bitsandbytes are used, not its layers, for three reasons (measured with version 0.50.2). On a
CPU with avx512_bf16 its 4-bit layer packs its weight anew in the first evaluation pass, and the gradients after this
pass are wrong by a factor, without an error. On such a CPU it also makes wrong weights where a matrix has 32, 96, 160,
... columns: here each block is a row. Its 8-bit layer also rounds the activations, in evaluation but not in training,
and how it rounds a token depends on the other rows of the batch: a packed row would not be what it is alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from configs.config import UserError
from models.fast.layers import product_dtype
from runtime.console import say

INSTALL = "pip install bitsandbytes"
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it warns of kernels of its layers
BLOCK = 64  # weights with a common scale, in 4 bits
BLOCK_OF_SCALES = 256  # scales with a common scale, with double quantisation


@dataclass(frozen=True)
class Quantisation:
    """How weights are rounded, in the names of transformers' `BitsAndBytesConfig`.

    bnb_4bit_compute_dtype: of the matmuls; None: as in other layers. dtype: that of the weights just before they are
    rounded, and of what is made of them. Both are names: "bfloat16".
    """

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = "nf4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_compute_dtype: str | None = None
    dtype: str = "float32"

    @classmethod
    def from_dict(cls, found: dict) -> Quantisation:
        """The inverse of `to_dict`."""
        return cls(**{field.name: found[field.name] for field in fields(cls) if field.name in found})

    def to_dict(self) -> dict:
        """As a dict that JSON can hold: transformers' `quantization_config`, and `dtype`."""
        return {"quant_method": "bitsandbytes", **asdict(self)}

    @property
    def words(self) -> str:
        """All but `dtype` in a few words: "nf4", "int8"."""
        double = ", double quantisation" if self.bnb_4bit_use_double_quant else ""
        computed = f", matmuls in {self.bnb_4bit_compute_dtype}" if self.bnb_4bit_compute_dtype else ""
        return "int8" if self.load_in_8bit else self.bnb_4bit_quant_type + double + computed

    def size(self, rows: int, columns: int) -> int:
        """The bytes of a weight (rows, columns): codes and scales."""
        numel = rows * columns
        if self.load_in_8bit:
            return numel + 4 * rows
        scales = -(-numel // BLOCK)
        double = scales + 4 * -(-scales // BLOCK_OF_SCALES)
        return scales * BLOCK // 2 + (double if self.bnb_4bit_use_double_quant else 4 * scales)


def library() -> Any:
    """bitsandbytes.functional. Raises UserError with the command that installs it."""
    try:
        import bitsandbytes.functional
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "bitsandbytes":
            raise
        raise UserError(
            f"weights of 4 or 8 bits need a package that is not installed. This installs it: {INSTALL}"
        ) from None
    return bitsandbytes.functional


class QuantisedLinear(torch.nn.Linear):
    """A frozen linear layer x W^T + bias, whose W is kept in 4 or 8 bits. `weight` makes W at each access."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, linear: torch.nn.Linear, how: Quantisation):
        torch.nn.Module.__init__(self)  # torch.nn.Linear would make a weight
        self.how, self.dtype = how, getattr(torch, how.dtype)
        self.compute_dtype = getattr(torch, how.bnb_4bit_compute_dtype) if how.bnb_4bit_compute_dtype else None
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        weight = linear.weight.detach().to(self.dtype)
        if how.load_in_8bit:
            codes, scales, _ = library().int8_vectorwise_quant(weight.to(torch.float16))
        else:
            padding = -weight.numel() % BLOCK  # zeros change no scale
            codes, self.state = library().quantize_4bit(
                F.pad(weight.flatten(), (0, padding)).view(-1, BLOCK),
                blocksize=BLOCK,
                compress_statistics=how.bnb_4bit_use_double_quant,
                quant_type=how.bnb_4bit_quant_type,
            )
            scales = self.state.absmax
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """W (out, in), in the dtype that it was rounded from."""
        return self.dequantised(self.dtype)

    @torch.no_grad()
    def dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        """W (out, in) in `dtype`: a new tensor."""
        if self.how.load_in_8bit:
            made = self.codes.float().mul_(self.scales[:, None] * (1 / 127))
            return made.to(self.dtype).to(dtype)
        made = library().dequantize_4bit(self.codes, self.state).flatten()[: self.out_features * self.in_features]
        return made.view(self.out_features, self.in_features).to(dtype)

    def matmul_dtype(self, x: torch.Tensor) -> torch.dtype:
        """The dtype in which this layer computes on `x`."""
        return self.compute_dtype or product_dtype(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.matmul_dtype(x)
        return _Product.apply(x.to(dtype), self).to(product_dtype(x))


class _Product(torch.autograd.Function):
    """x W^T + bias of a `QuantisedLinear`, in the dtype of x. It keeps nothing for the backward pass."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.dequantised(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient @ ctx.layer.dequantised(gradient.dtype), None


def can_be_quantised(model: Any) -> dict[str, torch.nn.Linear]:
    """{name: layer} of the linear layers of a transformers model, except its head: what `quantise` replaces."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return {
        name: layer
        for name, layer in model.named_modules(remove_duplicate=False)
        if type(layer) is torch.nn.Linear
        and layer is not head
        and layer.weight is not embedding.weight
        and name != "score"  # the head of a reward model
    }


def quantise(model: Any, how: Quantisation | None) -> Any:
    """Replace the linear layers of a transformers model by `QuantisedLinear`s, in place; None changes nothing.

    Returns `model`. Raises UserError if bitsandbytes is not installed, or if the model has no such layer.
    """
    if how is None:
        return model
    library()
    layers = can_be_quantised(model)
    if not layers:
        raise UserError(f"{type(model).__name__} has no torch.nn.Linear below its head: no weight can be {how.words}")
    before = model.get_memory_footprint()
    new: dict[torch.nn.Linear, QuantisedLinear] = {}  # a layer may stand in several places
    for name, layer in layers.items():
        if layer not in new:
            new[layer] = QuantisedLinear(layer, how)
            layer.weight = None  # type: ignore[assignment]  # frees it at once
        replace_layer(model, name, new[layer])
    after = model.get_memory_footprint()
    say(f"{count_quantised(model):,} weights in {how.words}: {after / 1e6:,.1f} MB in place of {before / 1e6:,.1f}")
    return model


def replace_layer(model: torch.nn.Module, name: str, layer: torch.nn.Module) -> None:
    """Put `layer` in the place `name` of a model."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def dequantise(model: torch.nn.Module, dtype: torch.dtype) -> Any:
    """Replace each `QuantisedLinear` by a plain linear layer with the same weight in `dtype`. Returns `model`."""
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, QuantisedLinear):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = torch.nn.Parameter(layer.dequantised(dtype), requires_grad=False)
            plain.bias = layer.bias
            replace_layer(model, name, plain.train(layer.training))
    return model


def quantised_layers(model: torch.nn.Module) -> Iterator[QuantisedLinear]:
    """The `QuantisedLinear`s of a model, also below adapters."""
    return (layer for layer in model.modules() if isinstance(layer, QuantisedLinear))


def quantisation_of(model: torch.nn.Module) -> Quantisation | None:
    """How the weights of a model were rounded; None if they were not."""
    return next((layer.how for layer in quantised_layers(model)), None)


def count_quantised(model: torch.nn.Module) -> int:
    """The number of weights of a model that are kept in 4 or 8 bits: no parameters are made of them."""
    return sum(layer.in_features * layer.out_features for layer in quantised_layers(model))
