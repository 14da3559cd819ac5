"""Distributed data parallel (DDP): several processes, each on its share of a step, take the step that one would take.

    torchrun --nproc_per_node=2 train/train_lm_ddp.py         # two CPU cores (gloo) or two GPUs (nccl)
    python train/train_lm_ddp.py                              # one process: the very steps of train_lm.py
    torchrun --nproc_per_node=8 train/train_lm_ddp.py --config configs/gpu/train_base.yaml --lora_r 16

The `accumulation_steps` micro-batches of a step are dealt to the processes; gradients are added up over all of them
while the backward pass still runs (Li et al. 2020, arXiv:2006.15704). This is also the script for real sizes: it takes
precision (AMP:), gradient checkpointing (CKPT:), compiled layers (COMPILE:) and LoRA. Each line added to train_lm.py is
marked with its reason: `diff -w train/train_lm.py train/train_lm_ddp.py`.
"""

import os
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configs.config import UserError, option
from models.device import PRECISIONS, autocast, checkpoint_activations, pick_device, pick_precision
from models.loader import weights_hash
from models.save import save_model
from runtime.checkpoint import Checkpoints
from runtime.cli import cli
from runtime.console import quiet_libraries, say
from runtime.files import shown
from runtime.run import Run
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
from train.train_lm_lora import add_lora, refuse_base
from train.updates import lr_at, make_optimizer


@dataclass
class Config(LMConfig):
    out: str = "models/lm_ddp"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option("fp32", "AMP: of the matrix products")
    gradient_checkpointing: bool = option(False, "CKPT: compute activations again instead of keeping them")
    compile: bool = option(False, "COMPILE: fused kernels, on a GPU: the first step takes longer, the others less")
    lora_r: int = option(0, "rank of a LoRA adapter; 0 trains all weights", at_least=0)

    def check(self):
        super().check()
        if self.lora_r:
            refuse_base(self.model_name)


class SummedLoss(torch.nn.Module):
    """DDP: the loss as a forward pass, because DDP's all-reduce hangs on the forward of the module it wraps."""

    def __init__(self, model, compiled):
        super().__init__()
        self.model, self.compiled = model, compiled

    def forward(self, batch):
        return lm_loss(self.model, batch, self.compiled)  # COMPILE: the loss, too


def join_processes():
    """DDP: (rank, number of processes), connected over nccl for GPUs and gloo for CPUs. Without torchrun, (0, 1)."""
    if dist.is_initialized():  # a second run in a notebook
        return dist.get_rank(), dist.get_world_size()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return 0, 1
    if backend == "nccl":
        torch.cuda.set_device(pick_device())
    elif os.environ.get("OMP_NUM_THREADS") == "1":  # torchrun's default: a share of the cores for each process instead
        torch.set_num_threads(max(1, os.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group(backend)
    return dist.get_rank(), dist.get_world_size()


@contextmanager
def all_or_none():
    """DDP: if one process leaves this block by a user error or an exit, all leave; none waits for it for ever."""
    failure = None
    try:
        yield
    except (UserError, SystemExit) as error:
        failure = error
    code = 2 if isinstance(failure, UserError) else 1 if failure else 0
    codes = [None] * dist.get_world_size()
    dist.all_gather_object(codes, code)
    if max(codes) == 2 and codes.index(2) == dist.get_rank():  # the first to fail says why
        raise failure
    if max(codes):
        sys.exit(2 if max(codes) == 2 else 0)


def add_up(x):
    """DDP: the sum of a tensor over all processes."""
    dist.all_reduce(x)
    return x


def train(config):
    """Train as `config` says and write the run's folder."""
    rank, processes = join_processes()  # DDP: before anything that one of them could fail at
    device = pick_device()
    with all_or_none():  # DDP: what the user got wrong, wherever it shows, ends all processes
        run = Run(config, config.out)
        quiet_libraries()
        threads = f", {torch.get_num_threads()} threads each" if device.type == "cpu" else ""
        say(f"{processes} processes on {device.type} ({dist.get_backend()}){threads}")  # DDP: what really runs
        precision = pick_precision(config.precision, device)  # AMP: bf16 where the hardware has it
        torch.manual_seed(config.seed)

        # 1. the text, the model, and the text as blocks of tokens
        corpus = load_data(config)
        model, tokenizer = load_start(config, corpus, device)
        inputs = {config.data: corpus.sha256, config.model_name: weights_hash(model)}
        if config.lora_r:  # LoRA: frozen weights in the precision that the matrix products run in
            model = add_lora(model, config.model_name, config.lora_r, dtype=PRECISIONS[precision])
        if config.gradient_checkpointing:  # CKPT: only what enters a layer is kept until the backward pass
            checkpoint_activations(model)
        compile_if_asked(model, config)  # COMPILE: after what it is to compile is in place
        blocks, heldout = load_blocks(config, corpus, tokenizer)
        run.total_steps = count_steps(len(blocks), config)
        if config.accumulation_steps < processes:  # DDP: a process without work is a mistake of the configuration
            raise UserError(
                f"accumulation_steps = {config.accumulation_steps}: the forward passes of a step are dealt to the "
                f"{processes} processes; set it to {processes} or more"
            )
    summed_loss = SummedLoss(model, config.compile)  # DDP: which then hangs its all-reduce on it
    summed_loss = DistributedDataParallel(summed_loss)  # DDP: copies the weights of process 0 to all
    optimizer = make_optimizer(model.parameters(), config.lr, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")  # AMP: fp16 gradients underflow unscaled
    evaluation = {"share": (rank, processes), "reduce": add_up}  # DDP: each block is read by one process
    torch.manual_seed(config.seed + rank)  # DDP: or all processes would draw the same dropout masks
    checkpoints = Checkpoints(run, model=model, optimizer=optimizer, scaler=scaler)  # AMP: which has a state, too
    step, kept = checkpoints.load()  # (0, {}) unless this run was interrupted

    # 2. what the model can do before
    if not kept:
        with autocast(device, precision):  # AMP: evaluated as it is trained
            kept["samples"] = [rank == 0 and show_sample(model, tokenizer, corpus.kind, config, "before")]  # DDP: once
            kept["before"] = evaluate_lm(model, heldout, config.batch_size, **evaluation)
        run.log(0, **kept["before"])

    # 3. the steps
    model.train()
    run.begin_steps(step)
    while step < run.total_steps:
        micro_batches = step_rows(step, len(blocks), config)
        mine = micro_batches[rank::processes]  # DDP: each block is read by one process
        count = torch.tensor(sum(blocks.counted(rows) for rows in mine), device=device)
        add_up(count)  # DDP: what counts in the whole step, on all processes, known before the backward pass
        loss = torch.zeros((), device=device)
        for i, rows in enumerate(mine or micro_batches[:1]):  # DDP: without a share it still takes part, times 0
            last = i == max(len(mine), 1) - 1
            with nullcontext() if last else summed_loss.no_sync():  # DDP: one all-reduce a step, not a micro-batch
                with autocast(device, precision):  # AMP: the forward pass alone; the backward pass follows its types
                    nats, _ = summed_loss(blocks.batch(rows, device))  # DDP: through the wrapper, not the model
                nats = nats / count * bool(mine)  # of the whole step: each token weighs the same, wherever it is
                scaler.scale(nats * processes).backward()  # DDP: which averages over processes; a sum is wanted
            loss += nats.detach()
        add_up(loss)  # DDP: each process has the loss of its own tokens
        scaler.unscale_(optimizer)  # AMP: clipping must see the true gradients
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)  # the norm before clipping
        lr = lr_at(step + 1, run.total_steps, config.lr, config.warmup_steps, config.min_lr_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scale = scaler.get_scale()  # AMP: falls when the step is skipped, on all processes alike
        seen = {"loss": loss} if scaler.is_enabled() else {"loss": loss, "grad_norm": grad_norm}  # AMP: else its matter
        if run.finite(step + 1, blocks.named(micro_batches), **seen):
            scaler.step(optimizer)  # AMP: does nothing when a gradient is inf or NaN
            scaler.update()  # AMP: halves the scale then, and doubles it after 2,000 good steps
        else:
            scaler.update(scale)  # AMP: no scale is at fault
        optimizer.zero_grad()
        if scaler.get_scale() < scale:  # AMP: schedule and data stand still; the same step again, scaled less
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
                run.log(step, **evaluate_lm(model, heldout, config.batch_size, **evaluation))
        if checkpoints.due(step):
            checkpoints.save(step, kept)

    # 4. what it can do after
    with autocast(device, precision):  # AMP: evaluated as it is trained
        after = evaluate_lm(model, heldout, config.batch_size, **evaluation)
        run.log(step, **after)
        kept["samples"].append(rank == 0 and show_sample(model, tokenizer, corpus.kind, config, "after"))  # DDP: once

    # 5. save
    if rank == 0:  # DDP: the weights are the same everywhere
        save_model(model, tokenizer, run.folder)
        save_samples(run.folder, kept["samples"])
    result = summary(kept["before"], after, step)
    run.finish(result, inputs, f"python inference/inference.py --model_name {shown(run.folder)}")


if __name__ == "__main__":
    cli(train, Config)
