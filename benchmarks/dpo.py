"""DPO, with all weights or with LoRA on all linear layers: ours is rlhf/dpo_train.py, the baseline TRL's DPOTrainer.

Both sides compute the reference in each step, which is TRL's default. Ours can also compute it once before training;
that is the same work, but the steps would not show it. With all weights, ours keeps the reference in the precision of
the forward passes, and TRL keeps it in float32, its default. With LoRA, both sides freeze the base in the precision of
the forward passes. TRL gets token ids.
"""

from __future__ import annotations

import torch

from benchmarks import baselines, measure
from benchmarks.texts import write_pairs
from models.device import frozen_dtype, pick_device
from models.flops import Cost, rows
from models.loader import load_model, load_tokenizer

SIZE = {"model_name": "smollm2-135m", "pairs": 8, "prompt": 28, "completion": 60, "steps": 3, "lr": 1e-5, "lora_r": 0}
ON_GPU = {"pairs": 64, "prompt": 64, "completion": 192, "steps": 8}
SMOKE = {"model_name": "tiny-llama", "pairs": 4, "prompt": 20, "completion": 40, "steps": 2, "lr": 1e-3, "lora_r": 0}


def settings(size, folder):
    """The configuration of our script; its pairs are written into the folder."""
    from rlhf.dpo_train import Config

    pairs = folder / "pairs.jsonl"
    steps = size.steps + measure.WARM_UP
    write_pairs(pairs, size.model_name, steps * size.pairs, size.prompt, size.completion)
    return Config(
        model_name=size.model_name,
        data=str(pairs),
        heldout_fraction=0.0,
        precompute_reference=False,
        lr=size.lr,
        batch_size=size.pairs,
        micro_batch_size=size.pairs,
        lora_r=size.lora_r,
        precision=measure.precision(),
        out=str(folder / "run"),
        **baselines.LR_CONSTANT,
        **baselines.NO_CHECKPOINTS,
    )


def pairs_of_steps(config):
    """The pairs of each step as token ids, as our script takes them: this one, or that of the reward model."""
    from data.order import step_indices
    from data.pairs import count_steps, load_pairs, pair_length, split_by_prompt

    pairs, _, _ = load_pairs(config.data, load_tokenizer(config.model_name), config.max_length)
    train, _ = split_by_prompt(pairs, config.heldout_fraction, config.seed)
    steps = range(1, count_steps(config, len(train)) + 1)
    chosen = [step_indices(len(train), config.batch_size, step, config.seed) for step in steps]
    return [sorted((train[i] for i in indices), key=pair_length) for indices in chosen]


def work(size, steps):
    """Tokens and FLOP of each step: policy forward and backward, reference forward; a pair's prompt counts once."""
    policy, reference = Cost.of(size.model_name, size.lora_r), Cost.of(size.model_name)
    found = []
    for pairs in steps:
        part = pairs_part(pairs)
        found.append({"tokens": tokens_of(pairs), "flops": policy.training(part) + reference.forward(part)})
    return found


def pairs_part(pairs, head=True):
    """The arithmetic of one pass over some pairs."""
    return rows([p["prompt"] for p in pairs], [[len(p["chosen"]), len(p["rejected"])] for p in pairs], head)


def tokens_of(pairs):
    """Tokens of all prompts, each once, and of both completions."""
    return sum(len(p[key]) for p in pairs for key in ("prompt", "chosen", "rejected"))


def ours(size, folder):
    from rlhf.dpo_train import main

    config = settings(size, folder)
    with measure.Clock() as clock:
        main(config)
    done = work(size, pairs_of_steps(config))
    return clock.measured(done, *measure.logged(folder / "run", "loss", "grad_norm"))


def baseline(size, folder):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    config = settings(size, folder)
    steps = pairs_of_steps(config)
    rows = [{f"{key}_ids": p[key] for key in ("prompt", "chosen", "rejected")} for pairs in steps for p in pairs]
    lora = LoraConfig(
        r=size.lora_r, lora_alpha=2 * size.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"
    ) if size.lora_r else None  # fmt: skip
    dtype = frozen_dtype(measure.precision()) if size.lora_r else torch.float32
    trainer = Tokenised(
        baselines.plain(load_model(size.model_name, dtype=dtype, device=pick_device())),
        args=baselines.arguments(DPOConfig, folder, size.steps, size.pairs, size.lr, beta=config.beta),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(size.model_name),
        peft_config=lora,
    )
    return baselines.train(trainer, measure.Clock(), work(size, steps))
