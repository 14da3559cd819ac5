"""What the losses of RLHF do in expectation, exactly: every answer of a tiny policy is enumerated, nothing is sampled.

    python proof/exact.py      # proof/EXACT.md and proof/figures/exact_*.png, about a minute on one core

The optimum of E[reward] - beta * KL(policy || reference) is known in closed form, pi*(y) ~ pi_ref(y) exp(r(y) / beta),
so the very functions that the trainers import can be measured against it: the KL estimators and their gradients, the
policy gradients of PPO and GRPO, and where each method ends. What is enumerated, and how, is in exact_bed.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from configs.config import option, shown
from proof.exact_bed import kl, make_bed, optimum
from proof.exact_figures import estimators_figure, fixed_points_figure, gradients_figure
from proof.exact_fixed_points import describe, measure_fixed_points, measure_one_token, measure_transformer
from proof.exact_gradients import (
    bias_along_a_path,
    measure_aggregations,
    measure_critics,
    measure_estimators,
    measure_old_samples,
    some_policies,
    success_weight,
)
from proof.exact_report import markdown
from runtime.cli import cli
from runtime.console import say
from runtime.files import in_root, write_atomically


@dataclass
class Config:
    beta: float = option(0.3, "weight of the KL to the reference in the objective", above=0)
    group_size: int = option(3, "answers in a group of GRPO and a batch of PPO; more take much longer", at_least=2)
    steps: int = option(300, "steps of each method to its fixed point", at_least=20)
    transformer_steps: int = option(800, "the same for the transformer; 0 leaves it out", at_least=0)
    seed: int = option(0, "of the rewards, the reference and the policies", at_least=0)
    out: str = option("proof", "the folder that receives EXACT.md and figures/")


def main(config):
    began = time.monotonic()
    bed = make_bed(beta=config.beta, seed=config.seed)
    policies, sampler = some_policies(bed, config.seed)
    say(f"{bed.rewards.shape[0]} prompts, {bed.rewards.shape[1]} answers of up to {bed.max_tokens} tokens")
    found = {"config": config, "kl": kl(policies["tabular"][1].detach(), bed.ref).mean().item()}
    found["estimators"] = {name: measure_estimators(bed, *policy, sampler) for name, policy in policies.items()}
    found["paths"] = bias_along_a_path(bed, True), bias_along_a_path(bed, False)
    say("KL estimators: done")
    found["aggregations"], found["answers"] = measure_aggregations(bed, policies, config.group_size)
    found["critics"] = measure_critics(bed, *policies["tabular"])
    found["old_samples"] = measure_old_samples(bed, *policies["tabular"], sampler, config.group_size)
    say("policy gradients: done")
    found["fixed_points"] = measure_fixed_points(bed, config.group_size, config.steps)
    found["start"] = {**describe(bed, bed.ref), "to_best": kl(bed.ref, optimum(bed)).mean().item()}
    found["best"] = describe(bed, optimum(bed))
    found["one_token"] = measure_one_token(config.beta, config.group_size, config.steps, config.seed)
    steps, size = config.transformer_steps, config.group_size
    found["transformer"] = measure_transformer(bed, size, steps, config.seed) if steps else []
    rates = torch.linspace(0.02, 0.98, 49).tolist()
    found["rates"] = rates
    found["weights"] = {
        (size, scale_std): [success_weight(rate, size, scale_std) for rate in rates]
        for size in (8, 16)
        for scale_std in (False, True)
    }

    folder = in_root(config.out)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    estimators_figure(found, folder / "figures" / "exact_estimators.png")
    gradients_figure(found, folder / "figures" / "exact_gradients.png")
    fixed_points_figure(found, folder / "figures" / "exact_fixed_points.png")
    write_atomically(folder / "EXACT.md", markdown(found))
    say(f"wrote {shown(folder / 'EXACT.md')} in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    cli(main, Config)
