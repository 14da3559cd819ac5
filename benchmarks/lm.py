"""LM training, full weights: ours is train/train_lm_amp_ckpt.py, the peer TRL's SFTTrainer.

Both train all weights in float32 under autocast on the same blocks of tokens: without gradient checkpointing, in one
forward pass a step. TRL gets the token ids, so that nothing is tokenised in its steps.
"""

from __future__ import annotations

from benchmarks import measure, peers
from benchmarks.flops import Cost, row
from benchmarks.texts import plays

SIZE = {"model_name": "smollm2-135m", "batch_size": 4, "accumulation": 1, "length": 512, "steps": 3, "lr": 5e-5}
SMOKE = {"model_name": "tiny-llama", "batch_size": 2, "accumulation": 1, "length": 64, "steps": 2, "lr": 1e-3}


def settings(size, folder):
    """The configuration of our script; its text is written into the folder."""
    from train.train_lm_amp_ckpt import Config

    text = folder / "text.txt"
    text.write_text(plays(8 * size.length * size.batch_size * size.accumulation * (size.steps + 2)))
    return Config(
        model_name=size.model_name,
        data=str(text),
        batch_size=size.batch_size,
        accumulation_steps=size.accumulation,
        max_length=size.length,
        max_steps=size.steps + measure.WARM_UP,
        lr=size.lr,
        eval_blocks=1,
        log_every=1,
        gradient_checkpointing=False,
        measure_steps=0,
        precision=measure.precision(),
        out=str(folder / "run"),
        **peers.LR_CONSTANT,
        **peers.NO_CHECKPOINTS,
    )


def work(size):
    """Tokens and FLOP of a step: every token but the first of a block is predicted."""
    cost, one = Cost.of(size.model_name), row(1, [size.length - 1])
    rows = size.batch_size * size.accumulation
    return {"tokens": rows * size.length, "flops": rows * cost.training(one)}


def ours(size, folder):
    from train.train_lm_amp_ckpt import train

    config = settings(size, folder)
    with measure.Clock() as clock:
        train(config)
    return clock.measured(work(size), *measure.logged(folder / "run", "loss", "grad_norm"))


def ddp(size, folder):
    """Ours as one of several processes, train/train_lm_ddp.py; for scaling.py."""
    from train.train_lm_ddp import Config, train

    same = vars(settings(size, folder))
    config = Config(**{k: same[k] for k in same.keys() & vars(Config()).keys()})
    with measure.Clock() as clock:
        train(config)
    return clock.measured(work(size))


def peer(size, folder):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from train.common import load_blocks, load_data, load_start, step_rows

    # our blocks, in our order
    config = settings(size, folder)
    corpus = load_data(config)
    model, tokenizer = load_start(config, corpus, measure.pick_device())
    blocks, _ = load_blocks(config, corpus, tokenizer)
    chosen = [i for step in range(config.max_steps) for batch in step_rows(step, len(blocks), config) for i in batch]
    rows = [{"input_ids": blocks.input_ids[i, : blocks.tokens[i]].tolist()} for i in chosen]

    arguments = peers.arguments(
        SFTConfig, folder, size.steps, size.batch_size, size.lr, size.accumulation,
        weight_decay=config.weight_decay, max_length=size.length,
    )  # fmt: skip
    trainer = SFTTrainer(
        peers.plain(model), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return peers.train(trainer, measure.Clock(), work(size))
