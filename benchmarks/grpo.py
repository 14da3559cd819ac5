"""GRPO with all weights and a KL to the reference: ours is rlhf/grpo_train.py, the baseline TRL's GRPOTrainer, no vLLM.

Both sides sample a group of completions for each of the same prompts. Nothing stops a completion, so each has the full
length. After that work, both sides replace their completions by the same passages. So they train on the same tokens
with the same rewards, and their losses and gradients can be compared. Both sample in the precision of the forward
passes (TRL by autocast), take one optimizer step a rollout in micro-batches of the same size, and use the same
estimator of the KL (k3 times the ratio). All completions have the same length, so the advantages of a group add up to
0, and the loss of a step is its KL term alone. The gradient norm, which is printed beside the loss, says more.
"""

from __future__ import annotations

import dataclasses

import torch

from benchmarks import baselines, measure
from benchmarks.texts import LETTER, letter_e, passages, prompts_of_checks
from models.device import pick_device
from models.flops import Cost, rows, sampled
from models.loader import load_model, load_tokenizer
from models.tokens import prompt_ids

SIZE = {
    "model_name": "smollm2-135m", "prompts": 4, "samples": 8, "new": 64, "micro_batch": 16, "steps": 2, "lr": 1e-5,
    "sampling_batch": 64,
}  # fmt: skip
ON_GPU = {"prompts": 16, "samples": 16, "new": 128, "micro_batch": 64, "sampling_batch": 256}
SMOKE = SIZE | {"model_name": "tiny-llama", "prompts": 2, "samples": 4, "new": 12, "micro_batch": 4, "lr": 1e-3}


def settings(size, folder):
    """The configuration of our script."""
    from rlhf.grpo_train import Config

    return Config(
        model_name=size.model_name,
        reward=LETTER,
        steps=size.steps + measure.WARM_UP,
        prompts_per_step=size.prompts,
        samples_per_prompt=size.samples,
        max_new_tokens=size.new,
        micro_batch_size=size.micro_batch,
        sampling_batch_size=size.sampling_batch,
        lr=size.lr,
        kl_coef=0.04,
        lora_r=0,
        precision=measure.precision(),
        out=str(folder / "run"),
        **baselines.LR_CONSTANT,
        **baselines.NO_CHECKPOINTS,
    )


def prompts_of_steps(config):
    """The prompts of each step, as texts: those that our script takes, in its order."""
    from data.order import step_indices

    rows = prompts_of_checks()
    steps = range(1, config.steps + 1)
    return [
        [rows[i]["prompt"] for i in step_indices(len(rows), config.prompts_per_step, s, config.seed)] for s in steps
    ]


def fixed_completions(size):
    """The completions of each step that both sides train on, as lists of token ids."""
    rows = size.prompts * size.samples
    ids = passages(load_tokenizer(size.model_name), [size.new] * rows * (size.steps + measure.WARM_UP))
    return [ids[i : i + rows] for i in range(0, len(ids), rows)]


def work(size, config):
    """Tokens (new ones) and FLOP of each step: sampling, the reference's pass, forward and backward of the policy."""
    cost, tokenizer = Cost.of(size.model_name), load_tokenizer(size.model_name)
    found = []
    for prompts in prompts_of_steps(config):
        ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
        drawn = sampled(ids, size.new, size.samples)
        learnt = rows(ids, [[size.new] * size.samples] * len(ids))
        flops = cost.forward(drawn) + cost.forward(learnt) + cost.training(learnt)
        found.append({"tokens": size.prompts * size.samples * size.new, "flops": flops})
    return found


def without_stop(generate, completions=None):
    """A `generate` that never stops early. With `completions`, a list for each call, it returns those of its call."""
    of_calls = iter(completions or ())

    def sample(*given, **options):
        found = generate(*given, **{**options, "stop_ids": ()})
        fixed = next(of_calls) if completions else found.completions
        assert [len(ids) for ids in found.completions] == [len(ids) for ids in fixed]
        return dataclasses.replace(found, completions=fixed)

    return sample


def ours(size, folder):
    from rlhf import sampler
    from rlhf.grpo_train import main

    config = settings(size, folder)
    sampler.generate = without_stop(sampler.generate, fixed_completions(size))
    with measure.Clock() as clock:
        main(config)
    done = work(size, config)
    return clock.measured(done, *measure.logged(folder / "run", "loss", "grad_norm"))


def baseline(size, folder):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = settings(size, folder)
    of_steps = iter(fixed_completions(size))

    class Fixed(GRPOTrainer):
        def _generate_single_turn(self, *given, **options):
            found, logprobs = super()._generate_single_turn(*given, **options)
            fixed = next(of_steps)
            assert [len(ids) for ids in found] == [len(ids) for ids in fixed]
            return fixed, logprobs

    def reward(prompts, completions, **_):
        pairs = zip(prompts, completions)
        return [letter_e(prompt[-1]["content"], completion[0]["content"].strip()) for prompt, completion in pairs]

    rows = [{"prompt": [{"role": "user", "content": text}]} for prompts in prompts_of_steps(config) for text in prompts]
    accumulation = size.prompts * size.samples // size.micro_batch
    arguments = baselines.arguments(
        GRPOConfig, folder, size.steps, size.micro_batch, size.lr, accumulation,
        num_generations=size.samples, max_completion_length=size.new, generation_kwargs={"min_new_tokens": size.new},
        beta=config.kl_coef, temperature=config.temperature, shuffle_dataset=False,
    )  # fmt: skip
    tokenizer = load_tokenizer(size.model_name)
    trainer = Fixed(
        baselines.plain(load_model(size.model_name, dtype=torch.float32, device=pick_device())),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return baselines.train(trainer, measure.Clock(), work(size, config))
