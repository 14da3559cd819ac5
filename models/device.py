"""On what device and in what precision a model runs, and what that changes in it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from configs.config import UserError

CPUINFO = Path("/proc/cpuinfo")


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device():
    """This process's GPU if there is one, else the CPU. Raises UserError for more processes here than GPUs."""
    if torch.cuda.is_available():
        rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if rank >= gpus:
            raise UserError(
                f"process {rank + 1} on this machine has no GPU: {gpus} can be seen. Start {gpus} here, or all on the "
                "CPU with CUDA_VISIBLE_DEVICES= before the command"
            )
        return torch.device("cuda", rank)
    return torch.device("cpu")


def pick_precision(precision, device):
    """`auto` as fp32, bf16 or fp16: bf16 where the hardware computes in it, else fp16 on a GPU and fp32 on a CPU."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    flags = CPUINFO.read_text() if CPUINFO.exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "fp32"


def autocast(device, precision):
    """The context in which a forward pass runs in `precision` (one of fp32, bf16, fp16); float32 weights stay."""
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


def frozen_dtype(precision):
    """The dtype in which weights that are never trained are kept: half the memory, and no cast in each forward pass."""
    return PRECISIONS[precision]


def cast_weights(model, dtype):
    """Put the weights of `model` into `dtype`; returns it.

    model.to(dtype) would also round the frequencies of rotary positions, which are no weights: by 0.3 % in bf16.
    """
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model


def checkpoint_activations(model):
    """Make each layer compute its activations again in the backward pass instead of keeping them (while training)."""
    # the newer name of the two, so that transformers does not say that the older one will go
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # which also works where the inputs need no gradient, as under LoRA


def compile_layers(model):
    """Let torch.compile make fused kernels of each layer, for passes with gradients; all layers share what it makes.

    Evaluation and sampling, whose shapes change from pass to pass, stay as they are.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = _compiled_with_gradients(layer.forward)


def _compiled_with_gradients(plain):
    compiled = torch.compile(plain)
    return lambda *args, **kwargs: (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)
