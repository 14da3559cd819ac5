"""Train a causal language model on text: the plain loop, in float32, in one process.

    python train/train_lm.py                                  # SmolLM2-135M on Shakespeare's plays
    python train/train_lm.py --config configs/train_scratch.yaml
    python train/train_lm.py --data my.jsonl --lr 1e-4

The model reads packed blocks of `max_length` tokens and predicts each next token. Each other script of this folder adds
one technique: LoRA and W&B call `train` below; DDP and AMP/checkpointing change the loop (see their diff).
"""

from dataclasses import dataclass

import torch

from models.device import pick_device
from models.router import router_of
from models.save import save_model
from runtime.checkpoint import Checkpoints
from runtime.cli import cli
from runtime.console import quiet_libraries
from runtime.run import Run
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
from train.token_records import keep_rows
from train.updates import Updates


@dataclass
class Config(LMConfig):
    out: str = "models/lm"


def train(config, change_model=None, save=save_model):
    """Train as `config` says and write the run's folder.

    change_model: takes the loaded model and returns the model to train. save(model, tokenizer, folder): writes the
    weights.
    """
    device = pick_device()
    run = Run(config, config.out)
    quiet_libraries()
    torch.manual_seed(config.seed)

    # 1. the model, and the text as blocks of tokens
    start = Start(config, device, change_model)
    model, blocks, router = start.model, start.blocks, router_of(start.model)
    run.total_steps = count_steps(len(blocks), config)
    updates = Updates(model.parameters(), config, run)  # AdamW, warm-up and cosine, clipping
    evaluation = Evaluation(start, config, updates)
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
        for rows in micro_batches:
            nats, _ = lm_loss(model, blocks.batch(rows, device))
            nats = nats / count  # each token has the same weight in every micro-batch
            updates.backward(nats)
            loss += nats.detach()
            aux_loss += router.value / count  # of a mixture of experts that asks for it; else 0
        keep_rows(step, start, micro_batches, updates)  # with --keep_tokens, for report/token_view.py
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
    save(model, start.tokenizer, run.folder)
    result = summary(carried["before"], after, run.total_steps)
    run.finish(result, start.inputs, next_command(run.folder))


if __name__ == "__main__":
    cli(train, Config)
