"""Options of train_lm_ddp.py for models of real size: precision, LoRA, gradient checkpointing, compiled layers.

Other scripts explain these options one by one: see train_lm_amp_ckpt.py and train_lm_lora.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from configs.config import UserError, option
from models.device import PRECISIONS, checkpoint_activations, compile_layers, pick_precision
from train.common import LMConfig, lm_loss
from train.train_lm_lora import add_lora, refuse_base


@dataclass
class RealSizeConfig(LMConfig):
    DDP: ClassVar[bool] = True
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("fp32", "dtype of the matmuls")
    gradient_checkpointing: bool = option(False, "compute activations again instead of keeping them")
    compile: bool = option(False, "fused kernels, on a GPU: the first step takes longer, the others less")
    lora_r: int = option(0, "rank of a LoRA adapter; 0 trains all weights", at_least=0)

    def check(self):
        super().check()
        if self.lora_r:
            refuse_base(self.model_name)

    def change_model(self, model):
        """Apply these options to the loaded model. Returns the model to train."""
        if self.lora_r:  # the frozen weights have the dtype of the matmuls
            dtype = PRECISIONS[pick_precision(self.precision, model.device)]
            model = add_lora(model, self.model_name, self.lora_r, dtype=dtype)
        if self.gradient_checkpointing:
            checkpoint_activations(model)
        compile_if_asked(model, self)  # last, because it compiles the layers as they are now
        return model


def compile_if_asked(model, config):
    """Compile the layers if `config.compile` is set. Raises UserError on a CPU."""
    if config.compile and model.device.type == "cpu":
        raise UserError("compile = True is for GPUs: on a CPU compiling takes longer than it saves")
    if config.compile:
        compile_layers(model)


class SummedLoss(torch.nn.Module):
    """`lm_loss` as the forward pass of a module, in a context that `precision()` makes.

    DistributedDataParallel and FSDP prepare their communication in the forward pass of the module that they wrap. A
    loss function that calls the inner model directly would skip this.
    """

    def __init__(self, model, precision, compiled=False):
        super().__init__()
        self.model, self.precision, self.compiled = model, precision, compiled

    def forward(self, batch):
        with self.precision():
            return lm_loss(self.model, batch, self.compiled)


def check_shares(config, processes):
    """Raise UserError if a step has fewer micro-batches than there are processes: some processes would have no work."""
    passes = math.ceil(config.batch_size / config.micro_batch_size)
    if passes < processes.world_size:
        raise UserError(
            f"batch_size = {config.batch_size}, micro_batch_size = {config.micro_batch_size}: the {passes} "
            f"micro-batches of a step are dealt to {processes.world_size} processes; give each at least one"
        )
