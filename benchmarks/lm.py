"""LM training, full weights: ours is train/train_lm_amp_ckpt.py, the baseline is TRL's SFTTrainer.

Both sides train all weights in float32 under autocast, on the same blocks of tokens, without gradient checkpointing.
TRL gets token ids, so its steps tokenise nothing. On a GPU the model has the shape of GPT-2 (124 M, with SmolLM2's
tokenizer), and ours compiles its layers, as the command for an H100 in configs/gpu/train_base.yaml does. The layers are
compiled in the first step, which is not timed. The step that contains the end of the text has another mask; its layers
are compiled again, and that is timed. TRL runs as its users get it.
"""

from __future__ import annotations

import importlib

import torch

from benchmarks import baselines, measure
from benchmarks.texts import plays
from models.flops import Cost, row
from models.loader import load_tokenizer

SIZE = {
    "model_name": "smollm2-135m", "batch_size": 4, "micro_batch_size": 4, "length": 512, "steps": 3, "lr": 5e-5,
    "compile": False,
}  # fmt: skip
GPT2 = "gpt2-124m"
ON_GPU = {"model_name": GPT2, "batch_size": 128, "micro_batch_size": 32, "length": 1024, "steps": 6, "compile": True}
SMOKE = SIZE | {
    "model_name": "tiny-llama", "batch_size": 2, "micro_batch_size": 2, "length": 64, "steps": 2, "lr": 1e-3,
}  # fmt: skip


def prepare(size, folder):
    """Write the model GPT2: its shape, random weights and SmolLM2's tokenizer. A side of its own."""
    from transformers import AutoModelForCausalLM, GPT2Config

    tokenizer = load_tokenizer("smollm2-135m")
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "vocab_size": len(tokenizer)}
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(**options, **ids), dtype=torch.float32)
    model.save_pretrained(size.prepared)
    tokenizer.save_pretrained(size.prepared)
    return {}


def model_of(size):
    return size.prepared if size.model_name == GPT2 else size.model_name


def settings(size, folder):
    """The configuration of our script; its text is written into the folder."""
    from train.train_lm_amp_ckpt import Config

    text = folder / "text.txt"
    text.write_text(plays(8 * size.length * size.batch_size * (size.steps + 2)))
    return Config(
        model_name=model_of(size),
        data=str(text),
        batch_size=size.batch_size,
        micro_batch_size=size.micro_batch_size,
        max_length=size.length,
        max_steps=size.steps + measure.WARM_UP,
        lr=size.lr,
        eval_blocks=1,
        log_every=1,
        gradient_checkpointing=False,
        compile=size.compile,
        measure_steps=0,
        precision=measure.precision(),
        out=str(folder / "run"),
        **baselines.LR_CONSTANT,
        **baselines.NO_CHECKPOINTS,
    )


def work(size):
    """Tokens and FLOP of a step: every token but the first of a block is predicted."""
    cost, one = Cost.of(model_of(size)), row(1, [size.length - 1])
    return {"tokens": size.batch_size * size.length, "flops": size.batch_size * cost.training(one)}


def ours(size, folder):
    from train.train_lm_amp_ckpt import train

    config = settings(size, folder)
    with measure.Clock() as clock:
        train(config)
    return clock.measured(work(size), *measure.logged(folder / "run", "loss", "grad_norm"))


def ddp(size, folder):
    """Ours as one of several processes, train/train_lm_ddp.py; for scaling.py."""
    return _one_of_several("train_lm_ddp", size, folder)


def fsdp(size, folder):
    """The same with sharded weights, train/train_lm_fsdp.py."""
    return _one_of_several("train_lm_fsdp", size, folder)


def tp(size, folder):
    """The same with split layers, train/train_lm_tp.py: each process reads all rows."""
    return _one_of_several("train_lm_tp", size, folder)


def _one_of_several(name, size, folder):
    script = importlib.import_module(f"train.{name}")
    same = vars(settings(size, folder))
    config = script.Config(**{k: same[k] for k in same.keys() & vars(script.Config()).keys()})
    with measure.Clock() as clock:
        script.train(config)
    return clock.measured(work(size))


def baseline(size, folder):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from train.common import load_blocks, load_data, load_start, step_rows

    # our blocks, in our order
    config = settings(size, folder)
    corpus = load_data(config)
    model, tokenizer = load_start(config, corpus, measure.pick_device())
    blocks, _ = load_blocks(config, corpus, tokenizer)
    steps = range(1, config.max_steps + 1)
    chosen = [i for step in steps for rows in step_rows(step, len(blocks), config) for i in rows]
    rows = [{"input_ids": blocks.input_ids[i, : blocks.tokens[i]].tolist()} for i in chosen]

    arguments = baselines.arguments(
        SFTConfig, folder, size.steps, size.micro_batch_size, size.lr, size.batch_size // size.micro_batch_size,
        weight_decay=config.weight_decay, max_length=size.length,
    )  # fmt: skip
    trainer = SFTTrainer(
        baselines.plain(model), args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    return baselines.train(trainer, measure.Clock(), work(size))
