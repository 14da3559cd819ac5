"""PPO with LoRA, as % of the machine's peak: ours is rlhf/ppo_train.py. There is no baseline: TRL has no PPO any more.

Policy, value head, reference and reward model share one backbone, which is the default. All completions have the full
length, and there is one optimizer step a rollout. The reward model is not trained: its scores do not change the work.
"""

from __future__ import annotations

import torch

from benchmarks import baselines, measure
from benchmarks.grpo import without_stop
from models.device import pick_device
from models.flops import Cost, rows, sampled
from models.loader import load_tokenizer, resolve_model
from models.tokens import prompt_ids

SIZE = {
    "model_name": "smollm2-135m", "prompts": 4, "samples": 8, "new": 64, "micro_batch": 16, "steps": 2, "lr": 1e-4,
    "lora_r": 16, "sampling_batch": 64,
}  # fmt: skip
ON_GPU = {"prompts": 16, "samples": 16, "new": 128, "micro_batch": 64, "sampling_batch": 256}
SMOKE = SIZE | {"model_name": "tiny-llama", "prompts": 2, "samples": 2, "new": 12, "micro_batch": 4, "lora_r": 4}


def settings(size, folder):
    """The configuration of our script."""
    from rlhf.ppo_train import Config

    return Config(
        model_name=size.model_name,
        reward_model=str(folder / "reward"),
        steps=size.steps + measure.WARM_UP,
        prompts_per_step=size.prompts,
        samples_per_prompt=size.samples,
        max_new_tokens=size.new,
        micro_batch_size=size.micro_batch,
        sampling_batch_size=size.sampling_batch,
        inner_epochs=1,
        minibatches=1,
        lr=size.lr,
        lora_r=size.lora_r,
        precision=measure.precision(),
        out=str(folder / "run"),
        **baselines.LR_CONSTANT,
        **baselines.NO_CHECKPOINTS,
    )


def prepare(size, folder):
    """Write a reward model with the weights that training would start from. A side of its own."""
    from rlhf.train_reward_model import Config, build

    torch.manual_seed(0)
    config = Config(model_name=size.model_name, lora_r=size.lora_r)
    reward_model = build(config, pick_device(), measure.precision())
    reward_model.save(size.prepared, load_tokenizer(size.model_name), resolve_model(size.model_name))
    return {}


def work(size, config):
    """Tokens (new ones) and FLOP of each step: sampling, three forward passes, forward and backward of the policy."""
    from benchmarks.texts import prompts_of_checks
    from data.order import step_indices

    base, adapted = Cost.of(size.model_name), Cost.of(size.model_name, size.lora_r)
    tokenizer, prompts = load_tokenizer(size.model_name), prompts_of_checks()
    found = []
    for step in range(1, config.steps + 1):
        chosen = step_indices(len(prompts), size.prompts, step, config.seed)
        ids, lengths = [prompt_ids(tokenizer, prompts[i]["prompt"]) for i in chosen], [[size.new] * size.samples]
        drawn = sampled(ids, size.new, size.samples)
        learnt = rows(ids, lengths * len(ids))
        scored = rows(ids, lengths * len(ids), head=False)
        passes = adapted.forward(scored) + adapted.forward(learnt) + base.forward(learnt)
        flops = base.forward(drawn) + passes + adapted.training(learnt)
        found.append({"tokens": size.prompts * size.samples * size.new, "flops": flops})
    return found


def ours(size, folder):
    from rlhf import sampler
    from rlhf.ppo_train import main

    (folder / "reward").symlink_to(size.prepared)
    config = settings(size, folder)
    sampler.generate = without_stop(sampler.generate)
    with measure.Clock() as clock:
        main(config)
    return clock.measured(work(size, config), *measure.logged(folder / "run", "loss", "grad_norm"))
