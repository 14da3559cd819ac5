"""Of train_lm_fsdp.py and train_lm_tp.py, whose weights are spread over processes: options, and work on all weights."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from configs.config import UserError, option, refuse_unused
from models.device import pick_precision
from models.fast.head import name_of, unwrapped
from runtime.console import rank
from train.common import Evaluation, LMConfig, evaluate_lm, show_sample


@dataclass
class ShardedConfig(LMConfig):
    """The configuration of train_lm.py, and what real sizes need."""

    SHARDED: ClassVar[bool] = True
    precision: Literal["auto", "fp32", "bf16"] = option("fp32", "dtype of the matmuls, and of what is gathered")
    gradient_checkpointing: bool = option(False, "compute activations again instead of keeping them")

    def check(self):
        super().check()
        refuse_unused(self, ["keep_tokens"], "weights that are spread over processes")


def without_scaler(precision, device):
    """`pick_precision`, but fp32 where it gives fp16: the scaler of fp16 would have to agree over all processes."""
    found = pick_precision(precision, device)
    return "fp32" if found == "fp16" else found


def layers_of(model):
    """The layers of a transformers model, inner ones first. Raises UserError if it has none that are known as such."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"{name_of(model)} is a {type(unwrapped(model)).__name__}, whose layers are not known here")
    return layers[::-1]


def loss_of(root):
    """The loss of a root that `fully_shard` has sharded, with the arguments of `lm_loss`, for passes without gradients.

    The root keeps its weights whole for a backward pass; here none follows.
    """

    def compute(model, batch):
        found = root(batch)
        root.reshard()
        return found

    return compute


def gathered_weights(model):
    """Yield (name, whole weight) for each weight of a model that `fully_shard` has sharded. All processes take part."""
    for name, weight in model.named_parameters():
        yield name, weight.detach().full_tensor()


def norm(parameters):
    """The norm of the gradients of weights that `fully_shard` has sharded, a scalar. All processes take part."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).full_tensor()


class WholeModel:
    """A copy of a model for work that needs all weights in one process: to sample, and to save.

    Make it before the weights are spread over processes. Between uses its weights take no memory.
    """

    def __init__(self, model):
        empty = {id(p): torch.nn.Parameter(torch.empty_like(p, device="meta")) for p in model.parameters()}
        names = {}
        for name, p in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(p), []).append(name)
        self._names = {tied[0]: tied for tied in names.values()}  # by the first name; several if a weight is tied
        self._empty = {tied[0]: empty[key] for key, tied in names.items()}
        self._model = copy.deepcopy(model, empty)

    @contextlib.contextmanager
    def filled(self, weights, device):
        """A context with the model, its weights on `device`, in process 0. In the other processes it gives None.

        weights: yields (name, whole weight). All processes go through it.
        """
        here = {}
        for name, weight in weights:
            if rank() == 0:
                here[name] = torch.nn.Parameter(weight.detach().to(device, copy=True))
        if rank() != 0:
            yield None
            return
        self._set(here)
        try:
            yield self._model.to(device)
        finally:
            self._set(self._empty)

    def _set(self, weights):
        state = {tied: weight for name, weight in weights.items() for tied in self._names[name]}
        self._model.load_state_dict(state, strict=False, assign=True)


class ShardedEvaluation(Evaluation):
    """`Evaluation` of a model whose weights are spread over processes. Process 0 samples from the whole model.

    loss: as `evaluate_lm` takes it. weights: a function that gives what `WholeModel.filled` takes. processes: those
    that share the blocks; None if each of them reads all blocks.
    """

    def __init__(self, start, config, updates, loss, whole, weights, device, processes=None):
        super().__init__(start, config, updates, processes)
        self.loss_of, self.whole, self.weights, self.device = loss, whole, weights, device

    def loss(self):
        size = self.config.micro_batch_size
        with self.forward():
            return evaluate_lm(self.start.model, self.start.heldout, size, self.processes, self.loss_of, in_step=True)

    def sample(self, when):
        if not self.config.sample_prompt:
            return None
        with self.whole.filled(self.weights(), self.device) as model:
            if model is None:
                return None
            with self.forward():
                return show_sample(model, self.start.tokenizer, self.start.kind, self.config, when)
