"""Distributed data parallel (DDP): several processes share the work of a step. The steps are those of one process.

    torchrun --nproc_per_node=2 train/train_lm_ddp.py         # two CPU cores (gloo) or two GPUs (nccl)
    python train/train_lm_ddp.py                              # one process: the steps of train_lm.py
    torchrun --nproc_per_node=8 train/train_lm_ddp.py --config configs/gpu/train_base.yaml --lora_r 16

The micro-batches of a step are divided among the processes. Gradients are summed over all processes while the backward
pass still runs (Li et al. 2020, arXiv:2006.15704). This is also the script for models of real size: it has options for
precision, gradient checkpointing, compiled layers and LoRA, see train/real_size.py. Each line added to train_lm.py is
marked with its reason: `diff train/train_lm.py train/train_lm_ddp.py`.
"""

from contextlib import nullcontext  # DDP: for the last micro-batch
from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel  # DDP: the wrapper

from models.device import pick_device, pick_precision  # DDP: for real sizes
from models.router import router_of
from models.save import save_model
from runtime.checkpoint import Checkpoints
from runtime.cli import cli
from runtime.console import quiet_libraries
from runtime.processes import all_or_none, join_processes, on_main  # DDP: to act as one
from runtime.run import Run
from train.common import Evaluation, Start, count_steps, next_command, step_rows, summary  # DDP: fewer
from train.real_size import RealSizeConfig, SummedLoss, check_shares  # DDP: several processes are for real sizes
from train.token_records import keep_rows
from train.updates import Updates


@dataclass
class Config(RealSizeConfig):  # DDP: precision, LoRA, checkpointing and compiled layers are options
    out: str = "models/lm_ddp"  # DDP: a folder of its own


def train(config, change_model=None, save=save_model):
    """Train as `config` says and write the run's folder.

    change_model: takes the loaded model and returns the model to train. save(model, tokenizer, folder): writes the
    weights.
    """
    device = pick_device()
    processes = join_processes(device, group_of_one=True)  # DDP: before any code that can fail in one process
    precision = pick_precision(config.precision, device)  # DDP: for real sizes
    processes.describe(device)  # DDP: print how many processes run
    run = Run(config, config.out)
    quiet_libraries()
    torch.manual_seed(config.seed)

    # 1. the model, and the text as blocks of tokens
    with all_or_none():  # DDP: a UserError in one process ends all processes
        start = Start(config, device, change_model or config.change_model)  # DDP: for real sizes
        run.total_steps = count_steps(len(start.blocks), config)  # DDP: in the block
        check_shares(config, processes)  # DDP: raise UserError if a process would have no work
    model, blocks, router = start.model, start.blocks, router_of(start.model)
    updates = Updates(model.parameters(), config, run, precision=precision)  # DDP: for real sizes
    summed_loss = SummedLoss(model, updates.forward, config.compile)  # DDP: the loss as a module, for the wrapper
    summed_loss = DistributedDataParallel(summed_loss)  # DDP: copies the weights of process 0 to all processes
    torch.manual_seed(config.seed + processes.rank)  # DDP: each process draws its own dropout masks
    evaluation = Evaluation(start, config, updates, processes)  # DDP: each block is read by one process
    checkpoints = Checkpoints(run, model=model, updates=updates)
    _, carried = checkpoints.load()  # {} unless this run was interrupted

    # 2. evaluation before training
    if not carried:
        carried["before"] = evaluation.loss()
        run.log(0, samples=[evaluation.sample("before")], **carried["before"])

    # 3. the steps
    model.train()
    for step in updates.remaining():
        micro_batches = step_rows(step, len(blocks), config)
        count = sum(blocks.counted(rows) for rows in micro_batches)  # tokens that count, in the whole step
        loss, aux_loss = torch.zeros(2, device=device)
        mine = processes.share(micro_batches)  # DDP: each block is read by one process
        for i, rows in enumerate(mine or micro_batches[:1]):  # DDP: without a share it takes part with weight 0
            last = i == max(len(mine), 1) - 1  # DDP: after the last micro-batch the gradients are complete
            with nullcontext() if last else summed_loss.no_sync():  # DDP: one all-reduce per step
                nats, _ = summed_loss(blocks.batch(rows, device))  # DDP: through the wrapper, not the model
                nats = nats / count * bool(mine)  # DDP: of the whole step, over all processes
                updates.backward(nats * processes.world_size)  # DDP: the wrapper averages gradients; we need the sum
            loss += nats.detach()
            aux_loss += router.value / count * bool(mine)  # DDP: of the whole step, over all processes
        processes.sum(loss)  # DDP: each process has the loss of its own tokens
        processes.sum(aux_loss)  # DDP: and that of its own blocks
        keep_rows(step, start, micro_batches, updates)  # with --keep_tokens, for report/token_view.py
        if not updates.step(step, blocks.named(micro_batches), loss=loss):
            continue  # DDP: gradients overflowed in fp16: repeat the step with a smaller scale
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
    on_main(lambda: save(model, start.tokenizer, run.folder))  # DDP: the weights are the same everywhere
    result = summary(carried["before"], after, run.total_steps)
    run.finish(result, start.inputs, next_command(run.folder))


if __name__ == "__main__":
    cli(train, Config, several=True)  # DDP: torchrun may start it
