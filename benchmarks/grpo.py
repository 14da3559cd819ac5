"""GRPO with all weights and a KL to the reference: ours is rlhf/grpo_train.py, the peer TRL's GRPOTrainer, no vLLM.

Both sample a group for each of the same prompts, without a stop, so that every answer has the full length; both do all
of that work, and then the answers are replaced by the same passages: so both train on the same tokens with the same
rewards, and losses and gradients can be compared. Both sample in the precision of the passes (TRL by autocast), take
one optimizer step a rollout in micro-batches of the same size, and estimate the KL alike (k3 times the ratio). The loss
of a step is only its KL term: with answers of one length the advantages of a group add up to 0. The gradient's norm,
which is printed beside it, says more.
"""

from __future__ import annotations

import dataclasses

import torch

from benchmarks import baselines, measure
from benchmarks.flops import Cost, rows, sampled
from benchmarks.texts import LETTER, letter_e, passages, prompts_of_checks
from models.device import pick_device
from models.loader import load_model, load_tokenizer
from models.tokens import prompt_ids

SIZE = {
    "model_name": "smollm2-135m", "prompts": 4, "group": 8, "new": 64, "micro_batch": 16, "steps": 2, "lr": 1e-5,
    "rollout_batch": 64,
}  # fmt: skip
ON_GPU = {"prompts": 16, "group": 16, "new": 128, "micro_batch": 64, "rollout_batch": 256}
SMOKE = SIZE | {"model_name": "tiny-llama", "prompts": 2, "group": 4, "new": 12, "micro_batch": 4, "lr": 1e-3}


def settings(size, folder):
    """The configuration of our script."""
    from rlhf.grpo_train import Config

    return Config(
        model_name=size.model_name,
        judge=LETTER,
        steps=size.steps + measure.WARM_UP,
        prompts_per_step=size.prompts,
        group_size=size.group,
        max_new_tokens=size.new,
        micro_batch_size=size.micro_batch,
        rollout_batch_size=size.rollout_batch,
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


def fixed_answers(size):
    """The answers of each step that both sides train on, as lists of token ids."""
    rows = size.prompts * size.group
    ids = passages(load_tokenizer(size.model_name), [size.new] * rows * (size.steps + measure.WARM_UP))
    return [ids[i : i + rows] for i in range(0, len(ids), rows)]


def work(size, config):
    """Tokens (new ones) and FLOP of each step: sampling, the reference's pass, forward and backward of the policy."""
    cost, tokenizer = Cost.of(size.model_name), load_tokenizer(size.model_name)
    found = []
    for prompts in prompts_of_steps(config):
        ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
        drawn = sampled(ids, size.new, size.group)
        learnt = rows(ids, [[size.new] * size.group] * len(ids))
        flops = cost.forward(drawn) + cost.forward(learnt) + cost.training(learnt)
        found.append({"tokens": size.prompts * size.group * size.new, "flops": flops})
    return found


def without_stop(generate, answers=None):
    """Our sampler, which never stops early; what it drew is replaced by the next of `answers`, if they are given."""
    of_steps = iter(answers or ())

    def sample(*given, **options):
        found = generate(*given, **{**options, "stop_ids": ()})
        fixed = next(of_steps) if answers else found.completions
        assert [len(ids) for ids in found.completions] == [len(ids) for ids in fixed]
        return dataclasses.replace(found, completions=fixed)

    return sample


def ours(size, folder):
    from rlhf import rollouts
    from rlhf.grpo_train import main

    config = settings(size, folder)
    rollouts.generate = without_stop(rollouts.generate, fixed_answers(size))
    with measure.Clock() as clock:
        main(config)
    done = work(size, config)
    return clock.measured(done, *measure.logged(folder / "run", "loss", "grad_norm"))


def peer(size, folder):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = settings(size, folder)
    answers = iter(fixed_answers(size))

    class Fixed(GRPOTrainer):
        def _generate_single_turn(self, *given, **options):
            found, logprobs = super()._generate_single_turn(*given, **options)
            fixed = next(answers)
            assert [len(ids) for ids in found] == [len(ids) for ids in fixed]
            return fixed, logprobs

    def reward(prompts, completions, **_):
        pairs = zip(prompts, completions)
        return [letter_e(prompt[-1]["content"], answer[0]["content"].strip()) for prompt, answer in pairs]

    rows = [{"prompt": [{"role": "user", "content": text}]} for prompts in prompts_of_steps(config) for text in prompts]
    accumulation = size.prompts * size.group // size.micro_batch
    arguments = baselines.arguments(
        GRPOConfig, folder, size.steps, size.micro_batch, size.lr, accumulation,
        num_generations=size.group, max_completion_length=size.new, beta=config.kl_coef, temperature=config.temperature,
        shuffle_dataset=False, generation_kwargs={"min_new_tokens": size.new},
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
