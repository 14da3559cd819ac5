"""What a step measured: means over its batches and over all processes."""

from __future__ import annotations

import torch

from rlhf.utils import kl_estimate, masked_mean
from runtime.console import rank


class Meter:
    """What a step measured: means and sums over its micro-batches and all processes."""

    def __init__(self):
        self.totals = {}  # name: (total, count; None for a sum)

    def mean(self, weight=1.0, **values):
        """Count each value with this weight (the number of tokens or rows that it is the mean of)."""
        for key, value in values.items():
            total, count = self.totals.get(key, (0.0, 0.0))
            self.totals[key] = (total + float(value) * float(weight), count + float(weight))

    def sum(self, **values):
        """Add up each value; the sum over micro-batches and processes is reported."""
        for key, value in values.items():
            self.totals[key] = (self.totals.get(key, (0.0, None))[0] + float(value), None)

    def over_processes(self, processes):
        """{name: (total, count, or None for a sum)} of everything measured so far, over all processes."""
        merged = {}
        for totals in processes.gather(self.totals):
            for key, (total, count) in totals.items():
                before = merged.get(key, (0.0, None if count is None else 0.0))
                merged[key] = (before[0] + total, None if count is None else before[1] + count)
        return merged

    def collect(self, processes):
        """Everything measured, over all processes, as a dict of floats."""
        merged = self.over_processes(processes)
        return {key: t if c is None else t / max(c, 1e-12) for key, (t, c) in merged.items()}


class RunningMeter(Meter):
    """A meter over several steps, until it is logged; a checkpoint keeps what was measured since the last line."""

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
        """Process 0 goes on from the totals of all."""
        self.totals = {key: tuple(pair) for key, pair in state["totals"].items()} if rank() == 0 else {}


def measure_kl(meter, logprobs, ref_logprobs, mask):
    """Count the KL to the reference of completions that the policy sampled, by k3; all (N, L).

    As "kl" in nats per sequence, and as "kl_per_token" in nats per token.
    """
    kl = torch.where(mask.bool(), kl_estimate(logprobs, ref_logprobs, "k3"), 0.0)
    meter.mean(len(mask), kl=kl.sum(1).mean())
    meter.mean(mask.sum(), kl_per_token=masked_mean(kl, mask))


def measure_sampler(meter, sampler_logprobs, logprobs, mask):
    """Count how far the sampler's log-probs are from those that training computes; all (N, L), of the same weights.

    As "sampler_kl", nats per token: k3 of KL(sampler || policy). It is rounding, 0 in exact arithmetic; above some
    thousandths the sampler is not the policy, and the gradient is that of another distribution.
    """
    kl = torch.where(mask.bool(), kl_estimate(sampler_logprobs, logprobs, "k3"), 0.0)
    meter.mean(mask.sum(), sampler_kl=masked_mean(kl, mask))


def in_words(rows):
    """Rows of a batch (their places in a file, or their prompts) as one text, each once: for a message about them."""
    return "; ".join(dict.fromkeys(" ".join(row.split()) for row in rows))
