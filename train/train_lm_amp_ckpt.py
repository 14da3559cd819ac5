"""Mixed precision (AMP) and gradient checkpointing (CKPT): training in less memory, and the first also in less time.

    python train/train_lm_amp_ckpt.py                         # SmolLM2-135M on Shakespeare's plays
    python train/train_lm_amp_ckpt.py --precision fp16 --gradient_checkpointing false

AMP: the forward pass computes matrix products in bf16 or fp16, over weights that stay float32 (Micikevicius et al.
2017, arXiv:1710.03740). fp16 has a small range: the loss is scaled up, and a step whose gradients overflow is taken
again with a smaller scale. CKPT: a layer's activations are dropped after the forward pass and computed again in the
backward pass (Chen et al. 2016, arXiv:1604.06174). Before training, the memory and the time of each are measured.
On a GPU `--compile true` lets torch.compile fuse what lies between the matrix products. Every line added to train_lm.py
is marked `AMP:`, `CKPT:` or `COMPILE:`.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from configs.config import UserError, option
from models.device import autocast, checkpoint_activations, pick_device, pick_precision
from models.loader import weights_hash
from models.save import save_model
from runtime.checkpoint import Checkpoints
from runtime.cli import cli
from runtime.console import quiet_libraries
from runtime.files import shown
from runtime.run import Run
from train.amp_savings import compare_memory_and_time
from train.common import (
    LMConfig,
    compile_if_asked,
    count_steps,
    evaluate_lm,
    lm_loss,
    load_blocks,
    load_data,
    load_start,
    save_samples,
    show_sample,
    step_rows,
    summary,
)
from train.updates import lr_at, make_optimizer


@dataclass
class Config(LMConfig):
    out: str = "models/lm_amp_ckpt"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "AMP: of the matrix products")
    gradient_checkpointing: bool = option(True, "CKPT: compute activations again instead of keeping them")
    compile: bool = option(False, "COMPILE: fused kernels, on a GPU: the first step takes longer, the others less")
    measure_steps: int = option(2, "steps by which AMP and CKPT are measured before training; 0 = none", at_least=0)


def train(config):
    """Train as `config` says and write the run's folder."""
    run = Run(config, config.out)
    quiet_libraries()
    device = pick_device()
    precision = pick_precision(config.precision, device)  # AMP: bf16 where the hardware has it
    torch.manual_seed(config.seed)

    # 1. the text, the model, and the text as blocks of tokens
    corpus = load_data(config)
    model, tokenizer = load_start(config, corpus, device)
    inputs = {config.data: corpus.sha256, config.model_name: weights_hash(model)}
    if config.gradient_checkpointing:  # CKPT: only what enters a layer is kept until the backward pass
        checkpoint_activations(model)
    compile_if_asked(model, config)  # COMPILE: after what it is to compile is in place
    blocks, heldout = load_blocks(config, corpus, tokenizer)
    run.total_steps = count_steps(len(blocks), config)
    optimizer = make_optimizer(model.parameters(), config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")  # AMP: fp16 gradients underflow unscaled
    checkpoints = Checkpoints(run, model=model, optimizer=optimizer, scaler=scaler)  # AMP: which has a state, too
    step, kept = checkpoints.load()  # (0, {}) unless this run was interrupted

    # 2. what the model can do before
    if not kept:
        kept["costs"] = compare_memory_and_time(config, model, tokenizer, precision)  # AMP: CKPT: what each saves, here
        kept["overflows"] = 0  # AMP: steps that were taken again
        with autocast(device, precision):  # AMP: evaluated as it is trained
            kept["samples"] = [show_sample(model, tokenizer, corpus.kind, config, "before")]
            kept["before"] = evaluate_lm(model, heldout, config.batch_size)
        run.log(0, **kept["before"])

    # 3. the steps
    model.train()
    run.begin_steps(step)
    while step < run.total_steps:
        micro_batches = step_rows(step, len(blocks), config)
        count = sum(blocks.counted(rows) for rows in micro_batches)
        loss = torch.zeros((), device=device)
        for rows in micro_batches:
            with autocast(device, precision):  # AMP: the forward pass alone; the backward pass follows its types
                nats, _ = lm_loss(model, blocks.batch(rows, device), config.compile)  # COMPILE: the loss, too
            nats = nats / count  # of the whole step: each token weighs the same, in whichever micro-batch it is
            scaler.scale(nats).backward()  # AMP: scaled up into fp16's range
            loss += nats.detach()
        scaler.unscale_(optimizer)  # AMP: clipping must see the true gradients
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)  # the norm before clipping
        lr = lr_at(step + 1, run.total_steps, config.lr, config.warmup_steps, config.min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scale = scaler.get_scale()  # AMP: falls when the step is skipped
        seen = {"loss": loss} if scaler.is_enabled() else {"loss": loss, "grad_norm": grad_norm}  # AMP: else its matter
        if run.finite(step + 1, blocks.named(micro_batches), **seen):
            scaler.step(optimizer)  # AMP: does nothing when a gradient is inf or NaN
            scaler.update()  # AMP: halves the scale then, and doubles it after 2,000 good steps
        else:
            scaler.update(scale)  # AMP: no scale is at fault
        optimizer.zero_grad()
        if scaler.get_scale() < scale:  # AMP: schedule and data stand still; the same step again, scaled less
            kept["overflows"] += 1
            if scale < 1e-6:  # AMP: no scale helps
                raise UserError(f"step {step + 1}: gradients are not finite; try a lower lr, or precision bf16 or fp32")
            continue
        step += 1
        run.count_tokens(sum(blocks.tokens[rows].sum() for rows in micro_batches))
        due = config.eval_every and step % config.eval_every == 0 and step < run.total_steps
        if step % config.log_every == 0 or step == run.total_steps or due:
            run.log(step, loss=loss.item(), lr=lr, grad_norm=grad_norm.item())
        if due:
            with autocast(device, precision):  # AMP: evaluated as it is trained
                run.log(step, **evaluate_lm(model, heldout, config.batch_size))
        if checkpoints.due(step):
            checkpoints.save(step, kept)

    # 4. what it can do after
    with autocast(device, precision):  # AMP: evaluated as it is trained
        after = evaluate_lm(model, heldout, config.batch_size)
        run.log(step, **after)
        kept["samples"].append(show_sample(model, tokenizer, corpus.kind, config, "after"))

    # 5. save
    save_model(model, tokenizer, run.folder)
    save_samples(run.folder, kept["samples"])
    result = summary(kept["before"], after, step)
    result |= {"precision": precision, "skipped_steps": kept["overflows"]}  # AMP:
    run.finish(result, inputs, f"python inference/inference.py --model_name {shown(run.folder)}", kept["costs"])


if __name__ == "__main__":
    cli(train, Config)
