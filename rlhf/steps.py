"""Steps over several processes, and what a step measured."""

from __future__ import annotations

import torch
from accelerate.utils import gather_object

from configs.config import UserError
from rlhf.utils import kl_estimate, masked_mean
from runtime.console import rank


def measure_kl(meter, logprobs, ref_logprobs, mask):
    """Count the KL to the reference of answers that the policy sampled, by k3; all (N, L).

    As "kl" in nats an answer, and as "kl_per_token" in nats a token.
    """
    kl = torch.where(mask.bool(), kl_estimate(logprobs, ref_logprobs, "k3"), 0.0)
    meter.mean(len(mask), kl=kl.sum(1).mean())
    meter.mean(mask.sum(), kl_per_token=masked_mean(kl, mask))


def sum_over_ranks(accelerator, x):
    """The sum of a tensor over all processes; the tensor itself with one process."""
    return accelerator.reduce(x, reduction="sum") if accelerator.num_processes > 1 else x


def sum_gradients(accelerator, parameters):
    """Add up the gradients of all ranks in one all-reduce, so that a loss divided by global counts is one process's.

    Called once per optimizer step, after the last micro-batch. A rank without any row takes part with zeros.
    """
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if accelerator.num_processes == 1:
        return
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])
    flat = sum_over_ranks(accelerator, flat)
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(piece.view_as(p))


def optimizer_step(run, step, batch, accelerator, optimizer, scaler, parameters, lr):
    """Sum the gradients over ranks, unscale, clip, step. Returns (norm before clipping, whether a step was taken).

    With fp16 a step whose gradients overflowed is skipped, and the scaler lowers its scale; the schedule stands still.
    Without a scaler a gradient that is not finite is a failure, which the run counts: see `Run.finite`, where `batch`
    says what the step is taken on. Raises UserError at too many of them, or when no scale helps.
    """
    sum_gradients(accelerator, parameters)
    for group in optimizer.param_groups:
        group["lr"] = lr
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.config.max_grad_norm)
    scale = scaler.get_scale()
    if scale < 1e-6:
        raise UserError(f"step {step}: gradients are not finite; try a lower lr, or precision bf16 or fp32")
    finite = scaler.is_enabled() or run.finite(step, batch, grad_norm=norm)
    if finite:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm.item(), finite and scaler.get_scale() >= scale


def in_words(rows):
    """Rows of a batch (their places in a file, or their prompts) as one text, each once: for a message about them."""
    return "; ".join(dict.fromkeys(" ".join(row.split()) for row in rows))


class Meter:
    """What a step measured: means and sums over its micro-batches and all ranks.

    totals: what `over_ranks` gave before an interruption; rank 0 goes on from it.
    """

    def __init__(self, totals=None):
        self.totals = dict(totals or {}) if rank() == 0 else {}

    def mean(self, weight=1.0, **values):
        """Count each value with this weight (the number of tokens or rows that it is the mean of)."""
        for key, value in values.items():
            total, count = self.totals.get(key, (0.0, 0.0))
            self.totals[key] = (total + float(value) * float(weight), count + float(weight))

    def sum(self, **values):
        """Add up each value; the sum over micro-batches and ranks is reported."""
        for key, value in values.items():
            self.totals[key] = (self.totals.get(key, (0.0, None))[0] + float(value), None)

    def over_ranks(self, accelerator):
        """{name: (total, count, or None for a sum)} of everything measured so far, over all ranks."""
        merged = {}
        for totals in gather_object([self.totals]) if accelerator.num_processes > 1 else [self.totals]:
            for key, (total, count) in totals.items():
                before = merged.get(key, (0.0, None if count is None else 0.0))
                merged[key] = (before[0] + total, None if count is None else before[1] + count)
        return merged

    def collect(self, accelerator):
        """Everything measured, over all ranks, as a dict of floats."""
        merged = self.over_ranks(accelerator)
        return {key: t if c is None else t / max(c, 1e-12) for key, (t, c) in merged.items()}
