"""The optimizer steps of a run: AdamW, warm-up and cosine, gradient clipping, and the loss scaler for fp16."""

from __future__ import annotations

import math

import torch

from configs.config import UserError
from models.device import autocast
from runtime.console import say

SMALLEST_SCALE = 1e-6  # of the fp16 loss; if gradients overflow below it, no scale helps


def lr_at(step, total_steps, lr, warmup_steps, min_lr_ratio):
    """Learning rate of optimizer step `step` (from 1): linear warm-up to `lr`, then a cosine to `lr * min_lr_ratio`.

    The peak is at step `warmup_steps` (at step 1 without warm-up), and the minimum is at `total_steps`. Loshchilov &
    Hutter, "SGDR" (2016), eq. 5, with one period.
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    peak = max(warmup_steps, 1)
    progress = min(max(step - peak, 0) / max(total_steps - peak, 1), 1.0)
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def check_warmup(warmup_steps, total_steps):
    """Raise UserError unless the warm-up is shorter than the run. total_steps: its optimizer steps."""
    if warmup_steps >= max(total_steps, 2):
        raise UserError(f"warmup_steps = {warmup_steps} must be below the {total_steps} optimizer steps of this run")


def make_optimizer(parameters, lr, weight_decay=0.0, betas=(0.9, 0.95)):
    """AdamW over the parameters with requires_grad. Weight decay is applied to matrices, not to biases and norms."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)


class Updates:
    """Takes the optimizer steps of a run and counts them: `backward` for each loss, then `step`.

    parameters: the parameters to train. config: lr, warmup_steps, min_lr_ratio, weight_decay, max_grad_norm.
    run: the length of the schedule is run.total_steps * per_step. per_step: updates per step of the run.
    processes: `step` sums the gradients over these processes; None if DistributedDataParallel has done so.
    norm: a function of the parameters that gives the norm of their gradients, a scalar that is equal in all processes;
    None if each process has all of them.
    precision: with "fp16" the loss is scaled up before the backward pass, because small gradients would be 0 in fp16
    (Micikevicius et al. 2018, section 3.2). With other precisions nothing is scaled.

    After a step: `lr` and `grad_norm` (before clipping) are those of this step, `count` is the number of steps taken,
    and `overflows` is the number of steps that were repeated because fp16 gradients overflowed.
    """

    def __init__(self, parameters, config, run, processes=None, precision="fp32", per_step=1, norm=None):
        self.parameters = [p for p in parameters if p.requires_grad]
        self.config, self.run, self.processes, self.per_step, self.norm = config, run, processes, per_step, norm
        self.optimizer = make_optimizer(self.parameters, config.lr, config.weight_decay)
        self.device, self.precision = self.parameters[0].device, precision
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.count = self.overflows = 0
        self.lr = self.grad_norm = None

    def forward(self):
        """A context for forward passes: matmuls run in this precision; the weights keep their dtype."""
        return autocast(self.device, self.precision)

    def backward(self, loss):
        """Compute the gradients of `loss` and add them to the parameters' gradients."""
        self.scaler.scale(loss).backward()

    def step(self, step, where, **seen):
        """Clip the gradients, take one optimizer step and clear the gradients. Returns whether the step counts.

        It does not count if an fp16 gradient overflowed: then the scale is halved and the schedule does not move. If
        the gradient norm (without a scaler) or one of the numbers `seen` is not finite, no weight changes and the run
        counts a failure; see `Run.finite`. step, where: the step and its rows, for messages.
        Raises UserError at too many failures in a row, and if no scale helps.
        """
        if self.processes:
            self.processes.sum_gradients(self.parameters)
        config, optimizer, scaler = self.config, self.optimizer, self.scaler
        total = self.run.total_steps * self.per_step
        self.lr = lr_at(self.count + 1, total, config.lr, config.warmup_steps, config.min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"] = self.lr
        scaler.unscale_(optimizer)  # clipping must see the true gradients
        if self.norm:
            norm = self.norm(self.parameters)
            torch.nn.utils.clip_grads_with_norm_(self.parameters, config.max_grad_norm, norm)
        else:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)
        self.grad_norm, scale = norm.item(), scaler.get_scale()
        if not scaler.is_enabled():  # with a scaler, the scaler handles a norm that is not finite
            seen["grad_norm"] = norm
        if self.run.finite(step, where, **seen):
            scaler.step(optimizer)  # does nothing when an fp16 gradient is inf or NaN
            scaler.update()  # halves the scale then, and doubles it after 2,000 good steps
        else:
            scaler.update(scale)  # keep the scale: it did not cause the failure
        optimizer.zero_grad(set_to_none=True)
        if scaler.get_scale() < scale:
            self.overflows += 1
            if scale < SMALLEST_SCALE:
                raise UserError(f"step {step}: gradients are not finite; try a lower lr, or precision bf16 or fp32")
            return False
        self.count += 1
        return True

    def remaining(self):
        """Yield the numbers of the remaining steps, counted from 1. A step that overflowed in fp16 comes again."""
        self.run.begin_steps(self.count)
        while self.count < self.run.total_steps:
            yield self.count + 1

    def state_dict(self):
        """The state for a checkpoint."""
        counts = {"count": self.count, "overflows": self.overflows}
        counts["precision"] = self.precision
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), **counts}

    def load_state_dict(self, state):
        """Restore a state. If it is of another precision (`auto` on another machine), say so and go on."""
        before = state.get("precision", self.precision)
        if before != self.precision:
            scale = ", with a new loss scale" if self.scaler.is_enabled() else ""
            say(f"precision: {before} until here, {self.precision} on this machine: the run goes on in it{scale}")
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty unless the precision was fp16
            self.scaler.load_state_dict(state["scaler"])
        self.count, self.overflows = state["count"], state["overflows"]
