"""Fully sharded data parallel (FSDP2): each process keeps a part of every weight, gradient and optimizer state.

    torchrun --nproc_per_node=2 train/train_lm_fsdp.py        # two CPU cores (gloo) or two GPUs (nccl)
    python train/train_lm_fsdp.py                             # one process: the steps of train_lm.py
    torchrun --nproc_per_node=8 train/train_lm_fsdp.py --batch_size 64 --micro_batch_size 8 --precision bf16

As in train_lm_ddp.py, the micro-batches of a step are divided among the processes, and the steps are those of one
process. But of N processes each keeps only 1/N of the weights, gradients and moments of AdamW (Rajbhandari et al. 2020,
"ZeRO", arXiv:1910.02054, stage 3; Zhao et al. 2023, arXiv:2304.11277). A layer is gathered just before its pass and
freed after it. In the backward pass it is gathered again, and each process receives the sum of its part of the
gradients. docs/sharding.md counts the bytes. Each line added to train_lm.py is marked with its reason:
`diff train/train_lm.py train/train_lm_fsdp.py`.
"""

from dataclasses import dataclass
from functools import partial  # FSDP: for contexts and calls that are made later

import torch
from torch.distributed.device_mesh import init_device_mesh  # FSDP: names the processes that share the weights
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # FSDP: the technique, as torch has it

from models.device import PRECISIONS, autocast, checkpoint_activations, pick_device  # FSDP: for real sizes
from models.router import router_of
from models.save import save_model
from runtime.checkpoint import Checkpoints
from runtime.cli import cli
from runtime.console import quiet_libraries
from runtime.processes import all_or_none, join_processes, on_main  # FSDP: to act as one
from runtime.run import Run
from train import sharded  # FSDP: what torch leaves to us
from train.common import Start, count_steps, next_command, step_rows, summary  # FSDP: fewer
from train.packed import packed_way  # FSDP: a check that needs the whole model
from train.real_size import SummedLoss, check_shares  # FSDP: the loss as a module; each process needs work
from train.sharded import ShardedConfig, ShardedEvaluation, WholeModel  # FSDP: for work that needs all weights
from train.updates import Updates


@dataclass
class Config(ShardedConfig):  # FSDP: precision and checkpointing are options
    GATHERS = True  # FSDP: for the memory that --dry_run predicts
    out: str = "models/lm_fsdp"  # FSDP: a folder of its own


def train(config, change_model=None, save=save_model):
    """Train as `config` says and write the run's folder.

    change_model: takes the loaded model and returns the model to train. save(model, tokenizer, folder): writes the
    weights.
    """
    device = pick_device()
    processes = join_processes(device, group_of_one=True)  # FSDP: before any code that can fail in one process
    precision = sharded.without_scaler(config.precision, device)  # FSDP: the shards stay float32
    processes.describe(device)  # FSDP: print how many processes run
    run = Run(config, config.out)
    quiet_libraries()
    torch.manual_seed(config.seed)

    # 1. the model, and the text as blocks of tokens
    with all_or_none():  # FSDP: a UserError in one process ends all processes
        start = Start(config, torch.device("cpu"), change_model)  # FSDP: a GPU never holds the whole model
        run.total_steps = count_steps(len(start.blocks), config)  # FSDP: in the block
        check_shares(config, processes)  # FSDP: raise UserError if a process would have no work
        packed_way(start.model, config.max_length)  # FSDP: while each process has the whole model
        layers = sharded.layers_of(start.model)  # FSDP: what is gathered, computed and freed at a time
    model, blocks, router = start.model, start.blocks, router_of(start.model)
    whole = WholeModel(model)  # FSDP: takes no memory until the end
    if config.gradient_checkpointing:  # FSDP: else activations soon take more than the weights
        checkpoint_activations(model)  # FSDP: the layer is still gathered when it is computed again
    mesh = init_device_mesh(device.type, (processes.world_size,))  # FSDP: all processes in one row
    dtype = None if precision == "fp32" else PRECISIONS[precision]  # FSDP: None: that of the weights
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32)  # FSDP: sums in 32 bits
    summed_loss = SummedLoss(model, partial(autocast, device, precision))  # FSDP: the loss as a module, for the root
    for layer in layers:  # FSDP: each layer is a group: one gather, and one sum of gradients
        fully_shard(layer, mesh=mesh, mp_policy=policy)  # FSDP: its weights become DTensors: 1/N in each process
    fully_shard(summed_loss, mesh=mesh, mp_policy=policy)  # FSDP: the rest is one group: a head may be tied
    updates = Updates(model.parameters(), config, run, precision=precision, norm=sharded.norm)  # FSDP: of all shards
    torch.manual_seed(config.seed + processes.rank)  # FSDP: each process draws its own dropout masks
    weights = partial(sharded.gathered_weights, model)  # FSDP: gathers one weight after the other
    loss_of = sharded.loss_of(summed_loss)  # FSDP: through the root, as in training
    evaluation = ShardedEvaluation(start, config, updates, loss_of, whole, weights, device, processes)  # FSDP: shared
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
        for rows, weight in processes.equal_share(micro_batches):  # FSDP: all gather together: as many passes in each
            nats, _ = summed_loss(blocks.batch(rows, device))  # FSDP: through the root, which gathers
            nats = nats / count * weight  # FSDP: of the whole step, over all processes; 0 if another process reads it
            updates.backward(nats * processes.world_size)  # FSDP: gradients are averaged; we need the sum
            loss += nats.detach()
            aux_loss += router.value / count * weight  # FSDP: 0 if another process reads it
        processes.sum(loss)  # FSDP: each process has the loss of its own tokens
        processes.sum(aux_loss)  # FSDP: and that of its own blocks
        if not updates.step(step, blocks.named(micro_batches), loss=loss):
            continue  # repeat the step; this never happens in float32
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
    with whole.filled(weights(), "cpu") as model:  # FSDP: a plain model, in the memory of process 0
        on_main(lambda: save(model, start.tokenizer, run.folder))  # FSDP: any script loads it
    result = summary(carried["before"], after, run.total_steps)
    run.finish(result, start.inputs, next_command(run.folder))


if __name__ == "__main__":
    cli(train, Config, several=True)  # FSDP: torchrun may start it
