"""Mixed precision (AMP) and gradient checkpointing (CKPT): both need less memory, and AMP also needs less time.

    python train/train_lm_amp_ckpt.py                         # SmolLM2-135M on Shakespeare's plays
    python train/train_lm_amp_ckpt.py --precision fp16 --gradient_checkpointing false

AMP: the forward pass computes matmuls in bf16 or fp16; the weights stay float32 (Micikevicius et al. 2018,
arXiv:1710.03740). fp16 has a small range, so the loss is scaled up. A step whose gradients overflow is repeated with a
smaller scale (train/updates.py). CKPT: the activations of a layer are dropped after the forward pass and computed again
in the backward pass (Chen et al. 2016, arXiv:1604.06174). Before training, the script measures the memory and the time
of each. On a GPU, `--compile true` lets torch.compile fuse the operations between the matmuls. Every line added to
train_lm.py is marked `AMP:`, `CKPT:` or `COMPILE:`.
"""

from dataclasses import dataclass
from typing import Literal  # AMP: of the option below

import torch

from configs.config import option  # AMP: CKPT: COMPILE: of the options below
from models.device import checkpoint_activations, pick_device, pick_precision  # CKPT: AMP: what each needs
from models.router import router_of
from models.save import save_model
from runtime.checkpoint import Checkpoints
from runtime.cli import cli
from runtime.console import quiet_libraries
from runtime.run import Run
from train.amp_savings import compare_memory_and_time  # AMP: CKPT: what each saves, on this machine
from train.common import (
    Evaluation,
    LMConfig,
    Start,
    count_steps,
    lm_loss,
    next_command,
    step_rows,
    summary,
)
from train.real_size import compile_if_asked  # COMPILE: on a GPU
from train.token_records import keep_rows
from train.updates import Updates


@dataclass
class Config(LMConfig):
    out: str = "models/lm_amp_ckpt"  # AMP: CKPT: a folder of its own
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "AMP: dtype of the matmuls")
    gradient_checkpointing: bool = option(True, "CKPT: compute activations again instead of keeping them")
    compile: bool = option(False, "COMPILE: fused kernels, on a GPU: the first step takes longer, the others less")
    measure_steps: int = option(2, "AMP: CKPT: steps by which they are measured before training; 0 = none", at_least=0)


def train(config, change_model=None, save=save_model):
    """Train as `config` says and write the run's folder.

    change_model: takes the loaded model and returns the model to train. save(model, tokenizer, folder): writes the
    weights.
    """
    device = pick_device()
    precision = pick_precision(config.precision, device)  # AMP: bf16 where the hardware has it
    run = Run(config, config.out)
    quiet_libraries()
    torch.manual_seed(config.seed)

    # 1. the model, and the text as blocks of tokens
    start = Start(config, device, change_model)
    model, blocks, router = start.model, start.blocks, router_of(start.model)
    if config.gradient_checkpointing:  # CKPT: only what enters a layer is kept until the backward pass
        checkpoint_activations(model)  # CKPT: the rest is computed again
    compile_if_asked(model, config)  # COMPILE: last, because it compiles the layers as they are now
    run.total_steps = count_steps(len(blocks), config)
    updates = Updates(model.parameters(), config, run, precision=precision)  # AMP: in fp16 it scales the loss
    evaluation = Evaluation(start, config, updates)
    checkpoints = Checkpoints(run, model=model, updates=updates)
    _, carried = checkpoints.load()  # {} unless this run was interrupted

    # 2. evaluation before training
    if not carried:
        saved = compare_memory_and_time(config, model, start.tokenizer, precision)  # AMP: CKPT: what each saves, here
        carried["savings"] = saved  # AMP: CKPT: for the manifest
        carried["before"] = evaluation.loss()
        run.log(0, samples=[evaluation.sample("before")], **carried["before"])

    # 3. the steps
    model.train()
    for step in updates.remaining():
        micro_batches = step_rows(step, len(blocks), config)
        count = sum(blocks.counted(rows) for rows in micro_batches)  # tokens that count, in the whole step
        loss, aux_loss = torch.zeros(2, device=device)
        for rows in micro_batches:
            with updates.forward():  # AMP: only the forward pass; the backward pass uses the same dtypes
                nats, _ = lm_loss(model, blocks.batch(rows, device), config.compile)  # COMPILE: the loss, too
            nats = nats / count  # each token has the same weight in every micro-batch
            updates.backward(nats)
            loss += nats.detach()
            aux_loss += router.value / count  # of a mixture of experts that asks for it; else 0
        keep_rows(step, start, micro_batches, updates)  # with --keep_tokens, for report/token_view.py
        if not updates.step(step, blocks.named(micro_batches), loss=loss):
            continue  # AMP: gradients overflowed in fp16: repeat the step with a smaller scale
        run.count_tokens(sum(blocks.tokens[rows].sum() for rows in micro_batches))
        due = evaluation.due(step, run.total_steps)
        if step % config.log_every == 0 or step == run.total_steps or due:
            more = {"aux_loss": aux_loss.item()} if router.coefficient else {}
            run.log(step, loss=loss.item(), lr=updates.lr, grad_norm=updates.grad_norm, **more)
        if due:
            run.log(step, **evaluation.loss())
        checkpoints.save_if_due(step, carried)

    # 4. evaluation after training
    after = evaluation.loss()
    run.log(run.total_steps, samples=[evaluation.sample("after")], **after)

    # 5. save
    save(model, start.tokenizer, run.folder)
    result = summary(carried["before"], after, run.total_steps)
    result |= {"precision": precision, "skipped_steps": updates.overflows}  # AMP: overflows in fp16
    run.finish(result, start.inputs, next_command(run.folder), carried["savings"])  # AMP: CKPT: and what they saved


if __name__ == "__main__":
    cli(train, Config)
