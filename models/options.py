"""What all scripts that use a model have in common on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from configs.config import UserError, option, refuse_unused
from models.fast.quantised import Quantisation, library


@dataclass
class ModelOptions:
    """The base of the configurations of all scripts that use a model."""

    NOTE: ClassVar[str] = (
        "Before each kind of work, a check of about a second compares the fast ways to compute it with the plain\n"
        "forward pass of transformers, on this very model: a way that gives other numbers is not used, a message says\n"
        "what is used instead, and the manifest of a run keeps the result. The check cannot be turned off."
    )
    chat_template_kwargs: dict | None = option(
        None, 'options of the chat template, such as {"enable_thinking": false}; none: those saved with the tokenizer'
    )


@dataclass
class QuantisationOptions:
    """The options of scripts whose models may have weights of 4 or 8 bits, in the names of transformers and TRL."""

    load_in_4bit: bool = option(False, "round the frozen linear layers to 4 bits (QLoRA); needs bitsandbytes")
    load_in_8bit: bool = option(False, "round them to 8 bits")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "the 4-bit numbers: of a normal distribution, or floats")
    bnb_4bit_use_double_quant: bool = option(False, "round the scales of 4-bit weights, too")
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "dtype of the matmuls with 4-bit weights; none: that of the other layers"
    )


def check_quantisation(config: Any, lora_r: int | None = None) -> None:
    """Raise UserError for `QuantisationOptions` that contradict each other, or that have no effect.

    lora_r: the rank of the adapter in a script that trains.
    """
    if config.load_in_4bit and config.load_in_8bit:
        raise UserError("load_in_4bit and load_in_8bit exclude each other: give one of them")
    if not config.load_in_4bit:
        keys = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype")
        refuse_unused(config, keys, "load_in_4bit = false")
    if lora_r == 0 and (config.load_in_4bit or config.load_in_8bit):
        key = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
        raise UserError(f"{key} = true needs lora_r > 0: rounded weights cannot train, an adapter beside them can")


def quantisation(config: Any, dtype: torch.dtype) -> Quantisation | None:
    """The `Quantisation` that the options of a script ask for; None: the weights stay as they are.

    dtype: of the weights before they are rounded. Raises UserError if bitsandbytes is not installed.
    """
    if not (config.load_in_4bit or config.load_in_8bit):
        return None
    library()
    return Quantisation(
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=config.bnb_4bit_compute_dtype,
        dtype=str(dtype).removeprefix("torch."),
    )
