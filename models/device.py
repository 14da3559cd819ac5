"""The device and the precision of a model, and the changes to the model that they need."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch

from configs.config import UserError
from runtime.console import say

CPUINFO = Path("/proc/cpuinfo")


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device() -> torch.device:
    """This process's GPU if there is one, else the CPU. Raises UserError if this machine has fewer GPUs than processes.

    One GPU belongs to each process.
    """
    if torch.cuda.is_available():
        rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if rank >= gpus:
            raise UserError(
                f"process {rank + 1} on this machine has no GPU: {gpus} can be seen. Start {gpus} here, or all on the "
                "CPU with CUDA_VISIBLE_DEVICES= before the command"
            )
        return torch.device("cuda", rank)
    if torch.backends.mps.is_available():
        _say_once("the GPU of this Mac (MPS) is not used, because it has no float64: the run is on the CPU")
    return torch.device("cpu")


_say_once = functools.cache(say)


def pick_precision(precision: str, device: torch.device) -> str:
    """Replace `auto` by bf16 where the hardware computes in bf16, else by fp16 on a GPU and fp32 on a CPU.

    Other values are returned as they are.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    flags = CPUINFO.read_text() if CPUINFO.exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context that runs forward passes in `precision` (fp32, bf16 or fp16). The weights stay float32."""
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


def frozen_dtype(precision: str) -> torch.dtype:
    """The dtype of weights that are never trained. bf16 and fp16 need half the memory, and no cast per forward pass."""
    return PRECISIONS[precision]


def cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> Any:
    """Cast the weights of `model` to `dtype`, in place. Returns `model`.

    model.to(dtype) would also round the frequencies of the rotary positions, by 0.3 % in bf16. They are not weights.
    """
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def checkpoint_activations(model: Any) -> None:
    """Recompute the activations of each layer in the backward pass instead of keeping them (in training mode only)."""
    # prefer the newer of the two names: with the older one, transformers prints a deprecation warning
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # also works where the inputs need no gradient, as with LoRA


def compile_layers(model: torch.nn.Module) -> None:
    """Compile each layer with torch.compile, for passes with gradients. All layers share the compiled code.

    Evaluation and sampling are not compiled, because their shapes change from pass to pass.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = _compiled_with_gradients(layer.forward)


def _compiled_with_gradients(plain):
    compiled = torch.compile(plain)
    return lambda *args, **kwargs: (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)
