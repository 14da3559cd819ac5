"""Measurements of a step: means and sums over its batches and over all processes."""

from __future__ import annotations

import math
from statistics import stdev

import torch

from rlhf.utils import kl_estimate, masked_mean
from runtime.console import rank


class Meter:
    """The measurements of a step: means and sums over its micro-batches and all processes."""

    def __init__(self):
        self.totals = {}  # name: (total, count; None for a sum); for a standard error: (the samples, their number)

    def mean(self, weight=1.0, **values):
        """Add each value to its weighted mean. weight: the number of tokens or rows that the value is a mean of."""
        for key, value in values.items():
            total, count = self.totals.get(key, (0.0, 0.0))
            self.totals[key] = (total + float(value) * float(weight), count + float(weight))

    def sum(self, **values):
        """Add each value to its sum over micro-batches and processes."""
        for key, value in values.items():
            self.totals[key] = (self.totals.get(key, (0.0, None))[0] + float(value), None)

    def sample(self, **values):
        """Add an independent sample of each value, such as a prompt's mean reward: KEY_se is the standard error."""
        for key, value in values.items():
            samples, count = self.totals.get(f"{key}_se", ([], 0))
            self.totals[f"{key}_se"] = ([*samples, float(value)], count + 1)

    def over_processes(self, processes):
        """{name: (total, count)} of all measurements so far, over all processes, as in `totals`."""
        merged = {}
        for totals in processes.gather(self.totals):
            for key, (total, count) in totals.items():
                before = merged.get(key)
                if before:
                    total, count = before[0] + total, None if count is None else before[1] + count
                merged[key] = (total, count)
        return merged

    def collect(self, processes):
        """All measurements, over all processes, as a dict of floats."""
        merged = self.over_processes(processes)
        found = {}
        for key, (total, count) in merged.items():
            if not isinstance(total, list):
                found[key] = total if count is None else total / max(count, 1e-12)
            elif count > 1:
                found[key] = stdev(total) / math.sqrt(count)
        return found


class RunningMeter(Meter):
    """A meter over the steps between two log lines. A checkpoint keeps the measurements since the last line."""

    def __init__(self, processes):
        super().__init__()
        self.processes = processes

    def collect_and_reset(self):
        means = self.collect(self.processes)
        self.totals = {}
        return means

    def state_dict(self):
        return {"totals": self.over_processes(self.processes)}

    def load_state_dict(self, state):
        """Process 0 continues with the totals of all processes."""
        self.totals = {key: tuple(pair) for key, pair in state["totals"].items()} if rank() == 0 else {}


class RunningCounts(RunningMeter):
    """Counts over the steps between two log lines, which `sum` adds up."""

    def collect_and_reset(self):
        return {key: int(count) for key, count in super().collect_and_reset().items()}


def cut_by_clipping(ratio, advantages, clip_low, clip_high):
    """Whether clipping cuts the gradient of a token: its ratio left the bounds on the side that its advantage favours.

    That is a ratio above 1 + clip_high with a positive advantage, or below 1 - clip_low with a negative one (Schulman
    et al. 2017, figure 1).

    ratio, advantages: (N, L), or shapes that broadcast to it. The bounds are 1 - clip_low and 1 + clip_high.
    """
    return ((ratio > 1 + clip_high) & (advantages > 0)) | ((ratio < 1 - clip_low) & (advantages < 0))


def measure_kl(meter, logprobs, ref_logprobs, mask):
    """Measure the KL to the reference on completions that the policy sampled, by k3. All arguments are (N, L).

    "kl" is in nats per sequence, "kl_per_token" in nats per token.
    """
    kl = torch.where(mask.bool(), kl_estimate(logprobs, ref_logprobs, "k3"), 0.0)
    meter.mean(len(mask), kl=kl.sum(1).mean())
    meter.mean(mask.sum(), kl_per_token=masked_mean(kl, mask))


def measure_sampler(meter, sampler_logprobs, logprobs, mask):
    """Measure how far the sampler's log-probs are from those of training, with the same weights. All are (N, L).

    "sampler_kl" is k3 of KL(sampler || policy), in nats per token. It comes from rounding and is 0 in exact arithmetic.
    If it is more than a few thousandths, the samples come from another distribution than the policy, and the gradient
    is biased.
    """
    kl = torch.where(mask.bool(), kl_estimate(sampler_logprobs, logprobs, "k3"), 0.0)
    meter.mean(mask.sum(), sampler_kl=masked_mean(kl, mask))


def measure_updates(meter, logprobs, old_logprobs, advantages, mask, clip_low, clip_high, first=False):
    """Measure how far the policy has moved from the one that sampled. The tensors are (N, L).

    "approx_kl": KL(old policy, current policy) in nats per token: ratio - 1 - log ratio, which is k3. "clipfrac": the
    share of tokens whose loss is clipped, so that they have no gradient. first: whether no update has been made since
    the rollout; then the same KL is also "approx_kl_first", and must be 0.
    """
    log_ratio = torch.where(mask.bool(), logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    clipped = cut_by_clipping(ratio, advantages, clip_low, clip_high)
    kl = masked_mean(ratio - 1 - log_ratio, mask)
    meter.mean(mask.sum(), approx_kl=kl, clipfrac=masked_mean(clipped.float(), mask))
    if first:
        meter.mean(mask.sum(), approx_kl_first=kl)


def measure_router(meter, router, sequences):
    """Measure the router's auxiliary loss of a pass that trains, if the model asks for it.

    "aux_loss" is its mean over the sequences, without the coefficient. sequences: their number in the pass.
    """
    if router.coefficient:
        meter.mean(sequences, aux_loss=router.value / sequences)


def in_words(rows):
    """A text that names the rows of a batch (their places in a file, or their prompts), each once, for messages."""
    return "; ".join(dict.fromkeys(" ".join(row.split()) for row in rows))
