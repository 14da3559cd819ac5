"""Reward model with LoRA: ours is rlhf/train_reward_model.py, the baseline is TRL's RewardTrainer.

Both sides start from the same head and adapter, and have the same centering term. TRL gets token ids. transformers
finds the end of a row by its pad token, so TRL pads with a token that is in no text.
"""

from __future__ import annotations

import torch

from benchmarks import baselines, dpo, measure
from benchmarks.texts import write_pairs
from models.device import pick_device
from models.flops import Cost
from models.loader import load_tokenizer

SIZE = dpo.SIZE | {"lora_r": 16, "lr": 2e-4}
ON_GPU = dpo.ON_GPU
SMOKE = dpo.SMOKE | {"lora_r": 4, "lr": 1e-3}


def settings(size, folder):
    """The configuration of our script; its pairs are written into the folder."""
    from rlhf.train_reward_model import Config

    pairs = folder / "pairs.jsonl"
    # the script holds out some prompts to measure its accuracy; twice as many pairs leave enough for the steps
    count = 2 * (size.steps + measure.WARM_UP) * size.pairs
    write_pairs(pairs, size.model_name, count, size.prompt, size.completion)
    return Config(
        model_name=size.model_name,
        data=str(pairs),
        max_steps=size.steps + measure.WARM_UP,
        lr=size.lr,
        batch_size=size.pairs,
        micro_batch_size=size.pairs,
        lora_r=size.lora_r,
        precision=measure.precision(),
        out=str(folder / "run"),
        **baselines.LR_CONSTANT,
        **baselines.NO_CHECKPOINTS,
    )


def work(size, steps):
    """Tokens and FLOP of each step: a pair's prompt counts once; the head is one number, which costs nothing."""
    cost = Cost.of(size.model_name, size.lora_r)
    found = []
    for pairs in steps:
        flops = cost.training(dpo.pairs_part(pairs, head=False))
        found.append({"tokens": dpo.tokens_of(pairs), "flops": flops})
    return found


def ours(size, folder):
    from rlhf.train_reward_model import main

    config = settings(size, folder)
    with measure.Clock() as clock:
        main(config)
    done = work(size, dpo.pairs_of_steps(config))
    return clock.measured(done, *measure.logged(folder / "run", "loss", "grad_norm"))


def baseline(size, folder):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from rlhf.train_reward_model import build

    config = settings(size, folder)
    steps = dpo.pairs_of_steps(config)
    rows = [{f"{key}_ids": p["prompt"] + p[key] for key in ("chosen", "rejected")} for pairs in steps for p in pairs]
    torch.manual_seed(config.seed)
    model = baselines.plain(build(config, pick_device(), measure.precision()).model)
    tokenizer = load_tokenizer(size.model_name)
    tokenizer.pad_token = tokenizer.unk_token
    arguments = baselines.arguments(
        RewardConfig, folder, size.steps, size.pairs, size.lr,
        center_rewards_coefficient=config.center_coef, max_length=None,
    )  # fmt: skip
    trainer = RewardTrainer(model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    return baselines.train(trainer, measure.Clock(), work(size, steps))
