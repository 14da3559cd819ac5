"""Tensor parallelism (TP): each process computes a part of every layer. All of them read the same tokens.

    torchrun --nproc_per_node=2 train/train_lm_tp.py          # two CPU cores (gloo) or two GPUs (nccl)
    python train/train_lm_tp.py                               # one process: the steps of train_lm.py

A process has some of the attention heads, of the columns of each MLP, and of the rows of the vocabulary (Shoeybi et al.
2019, "Megatron-LM", arXiv:1909.08053). train/tensor_parallel.py is the technique, from top to bottom: two functions at
the borders of a block, an embedding and a loss with a part of the vocabulary each, and the split of the model. A block
waits for all processes twice in each pass, so they should be GPUs of one machine. docs/sharding.md counts the bytes.
Each line added to train_lm.py is marked with its reason: `diff train/train_lm.py train/train_lm_tp.py`.
"""

from dataclasses import dataclass
from functools import partial  # TP: for the loss

import torch

from models.device import checkpoint_activations, pick_device  # TP: for real sizes
from models.router import router_of
from models.save import save_model
from runtime.checkpoint import Checkpoints
from runtime.cli import cli
from runtime.console import quiet_libraries
from runtime.processes import all_or_none, join_processes, on_main  # TP: to act as one
from runtime.run import Run
from train.common import Start, count_steps, lm_loss, next_command, step_rows, summary  # TP: fewer
from train.packed import packed_way  # TP: a check that needs the whole model
from train.sharded import ShardedConfig, ShardedEvaluation, WholeModel, without_scaler  # TP: for all weights
from train.tensor_parallel import TensorParallel, WholeState  # TP: the technique
from train.updates import Updates


@dataclass
class Config(ShardedConfig):  # TP: precision and checkpointing are options
    out: str = "models/lm_tp"  # TP: a folder of its own


def train(config, change_model=None, save=save_model):
    """Train as `config` says and write the run's folder.

    change_model: takes the loaded model and returns the model to train. save(model, tokenizer, folder): writes the
    weights.
    """
    device = pick_device()
    processes = join_processes(device, group_of_one=True)  # TP: before any code that can fail in one process
    precision = without_scaler(config.precision, device)  # TP: the parts stay float32
    processes.describe(device)  # TP: print how many processes run
    run = Run(config, config.out)
    quiet_libraries()
    torch.manual_seed(config.seed)

    # 1. the model, and the text as blocks of tokens
    with all_or_none():  # TP: a UserError in one process ends all processes
        start = Start(config, device, change_model)  # TP: in the block
        model, blocks, router = start.model, start.blocks, router_of(start.model)  # TP: in the block
        run.total_steps = count_steps(len(blocks), config)  # TP: in the block
        packed_way(model, config.max_length)  # TP: while each process has the whole model
        whole = WholeModel(model)  # TP: takes no memory until it is filled
        split = TensorParallel(model, processes)  # TP: from here on, the model has a part of each weight
    if config.gradient_checkpointing:  # TP: activations are not split
        checkpoint_activations(model)  # TP: the sums over the processes are computed again, too
    updates = Updates(model.parameters(), config, run, precision=precision, norm=split.norm)  # TP: of the whole
    loss_of = partial(lm_loss, nll=split.nll)  # TP: each process has the logits of a part of the vocabulary
    evaluation = ShardedEvaluation(start, config, updates, loss_of, whole, split.weights, device)  # TP: all read all
    checkpoints = Checkpoints(run, split=WholeState(split, updates))  # TP: another number of processes can go on
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
        for rows in micro_batches:
            with updates.forward():  # TP: only the forward pass; the backward pass uses the same dtypes
                nats, _ = loss_of(model, blocks.batch(rows, device))  # TP: the same rows in all processes
            nats = nats / count  # each token has the same weight in every micro-batch
            updates.backward(nats)
            loss += nats.detach()
            aux_loss += router.value / count  # of a mixture of experts that asks for it; else 0
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
    with whole.filled(split.weights(), "cpu") as model:  # TP: a plain model, in the memory of process 0
        on_main(lambda: save(model, start.tokenizer, run.folder))  # TP: any script loads it
    result = summary(carried["before"], after, run.total_steps)
    run.finish(result, start.inputs, next_command(run.folder))


if __name__ == "__main__":
    cli(train, Config, several=True)  # TP: torchrun may start it
