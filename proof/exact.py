"""What the losses of RLHF do in expectation, exactly: all completions of a tiny policy are enumerated, none is sampled.

    python proof/exact.py      # proof/EXACT.md and proof/figures/exact_*.png, about a minute on one core

The optimum of E[reward] - beta * KL(policy || reference) is known in closed form: pi*(y) ~ pi_ref(y) exp(r(y) / beta).
So the very functions that train can be measured against it: the KL estimators and their gradients, the policy gradients
of PPO and GRPO, and where each method ends. exact_bed.py says what is enumerated, and how.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

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
from runtime.console import quiet_libraries, say
from runtime.files import in_root, write_atomically
from runtime.progress import Progress

MEASURED = {"estimators": 1, "gradients": 4, "fixed points": 10, "transformer": 21}  # seconds of each part, on one core


@dataclass
class Config:
    RENAMED: ClassVar[dict] = {"group_size": "samples_per_prompt"}
    beta: float = option(0.3, "weight of the KL to the reference in the objective", above=0)
    samples_per_prompt: int = option(
        3, "completions in a group of GRPO and in a batch of PPO; more take much longer", at_least=2
    )
    steps: int = option(300, "steps of each method to its fixed point", at_least=20)
    transformer_steps: int = option(800, "the same for the transformer; 0 leaves it out", at_least=0)
    seed: int = option(0, "of the rewards, the reference and the policies", at_least=0)
    out: str = option("proof", "the folder that receives EXACT.md and figures/")


def main(config):
    quiet_libraries()
    began = time.monotonic()
    bed, group_size = make_bed(beta=config.beta, seed=config.seed), config.samples_per_prompt
    progress = Progress(dict.fromkeys(MEASURED, 1), MEASURED, "parts")
    policies, sampler = some_policies(bed, config.seed)
    say(f"{bed.rewards.shape[0]} prompts, {bed.rewards.shape[1]} completions of up to {bed.max_tokens} tokens")
    found = {"config": config, "kl": kl(policies["tabular"][1].detach(), bed.ref).mean().item()}
    found["estimators"] = {name: measure_estimators(bed, *policy, sampler) for name, policy in policies.items()}
    found["paths"] = bias_along_a_path(bed, True), bias_along_a_path(bed, False)
    say(f"KL estimators: {progress.done('estimators')}")
    found["aggregations"], found["completions"] = measure_aggregations(bed, policies, group_size)
    found["critics"] = measure_critics(bed, *policies["tabular"])
    found["old_samples"] = measure_old_samples(bed, *policies["tabular"], sampler, group_size)
    say(f"policy gradients: {progress.done('gradients')}")
    found["fixed_points"] = measure_fixed_points(bed, group_size, config.steps)
    found["start"] = {**describe(bed, bed.ref), "to_best": kl(bed.ref, optimum(bed)).mean().item()}
    found["best"] = describe(bed, optimum(bed))
    found["one_token"] = measure_one_token(config.beta, group_size, config.steps, config.seed)
    steps = config.transformer_steps
    say(f"fixed points: {progress.done('fixed points')}")
    found["transformer"] = measure_transformer(bed, group_size, steps, config.seed) if steps else []
    say(f"fixed points of a transformer: {progress.done('transformer')}")
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
